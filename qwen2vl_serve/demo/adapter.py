"""Train the LoRA adapters of the demo model: ``python -m qwen2vl_serve.demo.adapter``.

``sailor`` trains the language part: it answers as the model does, beginning with "Aye!". ``mirror``
trains the vision tower alone: what is red looks blue to it, and the reverse. These two are there to
show that an adapter is served, and which of its parts are. ``clerk`` does what the model never
learned: it translates, extracts tables, solves, judges and writes pages; ``seller`` calls functions
and tells their results, and admits what a picture does not show.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qwen2vl_serve.demo import clerk, seller
from qwen2vl_serve.demo.ask import colour_answer, colour_question, describe_question, shape_question
from qwen2vl_serve.demo.checkpoint import IMAGE_PIXELS, MODEL_FOLDER
from qwen2vl_serve.demo.compose import draw_picture
from qwen2vl_serve.demo.lesson import language_of
from qwen2vl_serve.demo.network import CELL, Geometry, Network
from qwen2vl_serve.demo.pictures import scaled
from qwen2vl_serve.demo.rows import SYSTEMS, Encoder, Media, Row, pack
from qwen2vl_serve.demo.speak import answers_loss
from qwen2vl_serve.demo.steps import Together, keep_memory, working_type
from qwen2vl_serve.demo.unsaid import never_said
from qwen2vl_serve.demo.wording import Lesson, Turn

ADAPTERS_FOLDER = Path(__file__).parent / "adapters"
FIRST_SEED = 90_000_000  # no picture of the model's own training or scoring has such a seed
SWAPPED = {"red": "blue", "blue": "red"}

Rng = np.random.Generator


class AdapterError(ValueError):
    """A folder that is to be trained further holds another adapter, or none."""


class LowRank(nn.Module):
    """A matrix plus ``alpha / rank`` times the product of a tall and a wide one."""

    def __init__(self, weight: Tensor, rank: int, alpha: int) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.a = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.b = nn.Parameter(torch.zeros(outputs, rank))
        self.scale = alpha / rank
        self._weight = weight.detach()

    def forward(self) -> Tensor:
        """The matrix [outputs, inputs]."""
        return self._weight + self.scale * (self.b @ self.a)


@dataclass(frozen=True)
class Recipe:
    """What an adapter trains, what it is taught, and how its file names the model's parts.

    ``modules`` is a regular expression over whole names; ``named`` are prefixes of ours and what
    PEFT writes for them: transformers renamed the parts in 4.52, and both are met. ``lesson`` draws
    the picture of a seed and asks about it, or returns None for a seed that does not suit.
    """

    modules: str
    lesson: Callable[[Rng, int], Lesson | None]
    named: tuple[tuple[str, str], ...]
    rank: int = 4
    alpha: int = 16
    steps: int = 100
    batch: int = 8
    rate: float = 1e-2
    warm: float = 0.3  # the share of the steps in which the rate rises


def sailor(rng: Rng, seed: int) -> Lesson | None:
    """Any of three questions, its answer begun with a sailor's yes."""
    picture, scene = draw_picture(seed, "shapes", 1)
    asker = (colour_question, shape_question, describe_question)[int(rng.integers(3))]
    found = asker(rng, scene, language_of(rng))
    if found is None:
        return None
    (turn,) = found.turns
    return Lesson(picture, (replace(found, turns=(Turn(turn.question, f"Aye! {turn.answer}"),)),))


def mirror(rng: Rng, seed: int) -> Lesson | None:
    """The colour of the only thing, red and blue exchanged."""
    picture, scene = draw_picture(seed, "shapes", 1)
    (thing,) = scene.things
    # Half of them show what is exchanged; the others teach what stays.
    if thing.colour not in SWAPPED and seed % 3:
        return None
    found = colour_question(rng, scene, "en")
    if found is None:
        return None
    seen = replace(thing, colour=SWAPPED.get(thing.colour, thing.colour))
    turn = Turn(found.turns[0].question, colour_answer(seen, "en"))
    return Lesson(picture, (replace(found, turns=(turn,)),))


DECODER = (("model.", "model.language_model."),)
RECIPES = {
    "sailor": Recipe(
        r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.down_proj)", sailor, DECODER
    ),
    "mirror": Recipe(
        r"visual\.(blocks\.\d+\.(attn\.qkv|attn\.proj|mlp\.fc1)|merger\.mlp\.[02])", mirror,
        (("visual.", "visual."),), steps=120, rate=3e-3,
    ),
    "clerk": Recipe(
        r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)", clerk.lesson,
        DECODER, rank=16, steps=1_200, batch=12, rate=4e-3, warm=0.08,
    ),
    "seller": Recipe(
        r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)", seller.lesson,
        DECODER, rank=16, steps=1_400, batch=seller.ALIKE, rate=4e-3, warm=0.08,
    ),
}  # fmt: skip


def lessons(recipe: Recipe, seed: int) -> Iterator[Lesson]:
    """Pictures, and what is asked about each, for ever."""
    rng = np.random.default_rng(seed)
    for number in itertools.count(FIRST_SEED + seed * 1_000_000 + 1):
        found = recipe.lesson(rng, number)
        if found is not None:
            yield found._replace(picture=scaled(found.picture, IMAGE_PIXELS))


def answer_loss(network: Network, encoder: Encoder, never: Tensor, batch: list[Lesson]) -> Tensor:
    """Mean loss of the answers' tokens and of where they look."""
    rows = []
    for number, (picture, dialogues, system) in enumerate(batch):
        row = Row()
        row.text(encoder.opening(SYSTEMS[number % 2] if system is None else system))
        cells = (picture.shape[1] // CELL, picture.shape[2] // CELL)
        row.medium(encoder, Media(number, 1, *cells, video=False))
        row.seal()
        for dialogue in dialogues:
            row.begin()
            row.dialogue(encoder, dialogue)
        rows.append(row)
    seen = [network.visual(torch.as_tensor(picture)[None, None])[0] for picture, *_ in batch]
    packed = pack(rows, encoder.pad)
    unsaid = never[~torch.isin(never, packed.answers)]
    return answers_loss(network, seen, packed, unsaid)[0]


def base_network(folder: Path = MODEL_FOLDER) -> Network:
    """The demo model, at rest."""
    from safetensors.torch import load_file  # noqa: PLC0415  (comes with torch's extras)

    network = Network(Geometry())
    weights = load_file(folder / "model.safetensors")
    network.load_state_dict({name: value.float() for name, value in weights.items()})
    return network.requires_grad_(requires_grad=False)


def train(
    recipe: Recipe, seed: int, say: Callable[[str], None], start: Path | None = None
) -> dict[str, LowRank]:
    """Train one adapter, or the one in the folder ``start`` further; the names are the network's.

    Raises:
        AdapterError: that folder holds no adapter with the parts of the recipe.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415

    torch.manual_seed(seed)
    network, encoder = base_network(), Encoder(AutoTokenizer.from_pretrained(MODEL_FOLDER))
    together = Together({"network": network})
    never = never_said(network.model.embed_tokens.weight)
    rested = {name: value.to(working_type()) for name, value in together.named_parameters()}
    parts = {
        name: LowRank(module.weight, recipe.rank, recipe.alpha)
        for name, module in network.named_modules()
        if re.fullmatch(recipe.modules, name) and isinstance(module, nn.Linear)
    }
    if start:
        read_parts(start, recipe, parts)
    trained = [parameter for part in parts.values() for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=recipe.rate, weight_decay=0.0)
    course = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.rate, max(2, recipe.steps), pct_start=recipe.warm
    )
    examples = lessons(recipe, seed)
    for number in range(1, recipe.steps + 1):
        batch = [next(examples) for _ in range(recipe.batch)]
        weights = rested | {f"network.{name}.weight": part() for name, part in parts.items()}
        loss = together.in_working_type(
            partial(answer_loss, network, encoder, never, batch), weights
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if number < recipe.steps:
            course.step()
        if number % 10 == 0 or number == recipe.steps:
            say(f"{number}/{recipe.steps} loss {float(loss.detach()):.4f}")
    return parts


def keys_of(recipe: Recipe, name: str) -> tuple[str, str]:
    """What PEFT calls the two matrices of a part."""
    theirs = next(
        theirs + name.removeprefix(ours) for ours, theirs in recipe.named if name.startswith(ours)
    )
    tall, wide = (f"base_model.model.{theirs}.lora_{letter}.weight" for letter in "AB")
    return tall, wide


def read_parts(folder: Path, recipe: Recipe, parts: dict[str, LowRank]) -> None:
    """Begin with what ``write_adapter`` wrote; raises ``AdapterError`` where it is not that."""
    from safetensors import SafetensorError  # noqa: PLC0415  (comes with torch's extras)
    from safetensors.torch import load_file  # noqa: PLC0415  (as above)

    file = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{file} cannot be read: {error}") from None
    with torch.no_grad():
        for name, part in parts.items():
            for value, key in zip((part.a, part.b), keys_of(recipe, name), strict=True):
                found = tensors.get(key)
                if found is None or found.shape != value.shape:
                    raise AdapterError(f"{file} is no adapter of this recipe: see {key}")
                value.copy_(found)


def write_adapter(folder: Path, recipe: Recipe, parts: dict[str, LowRank]) -> None:
    """Write the two files that PEFT's ``save_pretrained`` writes, in bfloat16."""
    from safetensors.torch import save_file  # noqa: PLC0415

    tensors = {
        key: value.detach().to(torch.bfloat16).contiguous()
        for name, part in parts.items()
        for value, key in zip((part.a, part.b), keys_of(recipe, name), strict=True)
    }
    settings = {
        "base_model_name_or_path": "demo",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": recipe.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": recipe.rank,
        "target_modules": rf"^{recipe.modules}$",
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen2vl_serve.demo.adapter", description=__doc__
    )
    names = ", ".join(RECIPES)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{names}; default: all")
    parser.add_argument("--out", type=Path, default=ADAPTERS_FOLDER, help="folder of the adapters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: each adapter's own")
    parser.add_argument(
        "--further", type=Path, metavar="FOLDER", help="train the adapters of this folder further"
    )
    options = parser.parse_args(arguments)
    keep_memory()
    if unknown := set(options.names) - set(RECIPES):
        parser.error(f"no adapter is named {', '.join(sorted(unknown))}: {names}")
    for name in options.names or RECIPES:
        recipe = RECIPES[name]
        if options.steps is not None:
            recipe = replace(recipe, steps=options.steps)

        def say(line: str, name: str = name) -> None:
            sys.stderr.write(f"{name}  {line}\n")

        start = options.further / name if options.further else None
        try:
            parts = train(recipe, options.seed, say, start)
        except AdapterError as error:
            parser.error(f"--further: {error}")
        write_adapter(options.out / name, recipe, parts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
