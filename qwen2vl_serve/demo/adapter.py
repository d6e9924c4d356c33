"""Train two LoRA adapters of the demo model: ``python -m qwen2vl_serve.demo.adapter``.

``sailor`` trains the language part: it answers as the model does, beginning with "Aye!". ``mirror``
trains the vision tower alone: what is red looks blue to it, and the reverse. They are there to show
that an adapter is served, and which of its parts are.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qwen2vl_serve.demo.ask import colour_answer, colour_question, describe_question, shape_question
from qwen2vl_serve.demo.checkpoint import IMAGE_PIXELS, MODEL_FOLDER
from qwen2vl_serve.demo.compose import draw_picture
from qwen2vl_serve.demo.draw import Pixels, Scene
from qwen2vl_serve.demo.lesson import language_of
from qwen2vl_serve.demo.network import CELL, Geometry, Network
from qwen2vl_serve.demo.pictures import scaled
from qwen2vl_serve.demo.rows import SYSTEMS, Encoder, Media, Row, pack
from qwen2vl_serve.demo.wording import Dialogue, Turn

ADAPTERS_FOLDER = Path(__file__).parent / "adapters"
FIRST_SEED = 90_000_000  # no picture of the model's own training or scoring has such a seed
SWAPPED = {"red": "blue", "blue": "red"}

Rng = np.random.Generator


class LowRank(nn.Module):
    """A matrix plus ``alpha / rank`` times the product of a tall and a wide one."""

    def __init__(self, weight: Tensor, rank: int, alpha: int) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.a = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.b = nn.Parameter(torch.zeros(outputs, rank))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        """weight [outputs, inputs] -> the same shape."""
        return weight + self.scale * (self.b @ self.a)


@dataclass(frozen=True)
class Recipe:
    """What an adapter trains, what it is taught, and how its file names the model's parts.

    ``modules`` is a regular expression over whole names; ``named`` are prefixes of ours and what
    PEFT writes for them: transformers renamed the parts in 4.52, and both are met.
    """

    modules: str
    teach: Callable[[Rng, Scene], Dialogue | None]
    named: tuple[tuple[str, str], ...]
    rank: int = 4
    alpha: int = 16
    steps: int = 100
    batch: int = 8
    rate: float = 1e-2


def sailor(rng: Rng, scene: Scene) -> Dialogue | None:
    """Any of three questions, its answer begun with a sailor's yes."""
    asker = (colour_question, shape_question, describe_question)[int(rng.integers(3))]
    found = asker(rng, scene, language_of(rng))
    if found is None:
        return None
    (turn,) = found.turns
    return replace(found, turns=(Turn(turn.question, f"Aye! {turn.answer}"),))


def mirror(rng: Rng, scene: Scene) -> Dialogue | None:
    """The colour of the only thing, red and blue exchanged."""
    if len(scene.things) != 1 or scene.things[0].kind == "text":
        return None
    found = colour_question(rng, scene, "en")
    if found is None:
        return None
    (thing,) = scene.things
    seen = replace(thing, colour=SWAPPED.get(thing.colour, thing.colour))
    return replace(found, turns=(Turn(found.turns[0].question, colour_answer(seen, "en")),))


RECIPES = {
    "sailor": Recipe(
        r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.down_proj)", sailor,
        (("model.", "model.language_model."),),
    ),
    "mirror": Recipe(
        r"visual\.(blocks\.\d+\.(attn\.qkv|attn\.proj|mlp\.fc1)|merger\.mlp\.[02])", mirror,
        (("visual.", "visual."),), steps=120, rate=3e-3,
    ),
}  # fmt: skip


def lessons(recipe: Recipe, seed: int) -> Iterator[tuple[Pixels, Dialogue]]:
    """Pictures with a dialogue each, for ever."""
    rng = np.random.default_rng(seed)
    number = FIRST_SEED + seed * 1_000_000
    while True:
        number += 1
        picture, scene = draw_picture(number, "shapes", 1)
        # Half of them show what is exchanged; the others teach what stays.
        if recipe.teach is mirror and scene.things[0].colour not in SWAPPED and number % 3:
            continue
        dialogue = recipe.teach(rng, scene)
        if dialogue is not None:
            yield scaled(picture, IMAGE_PIXELS), dialogue


def answer_loss(network: Network, encoder: Encoder, batch: list[tuple[Pixels, Dialogue]]) -> Tensor:
    """Mean loss of the answers' tokens."""
    rows = []
    for number, (picture, dialogue) in enumerate(batch):
        row = Row()
        row.text(encoder.opening(SYSTEMS[number % 2]))
        cells = (picture.shape[1] // CELL, picture.shape[2] // CELL)
        row.medium(encoder, Media(number, 1, *cells, video=False))
        row.seal()
        row.begin()
        row.dialogue(encoder, dialogue)
        rows.append(row)
    packed = pack(rows, encoder.pad)
    embeds = network.model.embed_tokens(packed.ids)
    seen = [network.visual(torch.from_numpy(picture)[None, None])[0] for picture, _ in batch]
    flat = embeds.reshape(-1, embeds.shape[-1])
    flat = flat.index_copy(0, torch.cat(packed.sources), torch.cat(seen))
    states = network.hidden_states(flat.view(embeds.shape), packed.positions, packed.mask)
    logits = network.logits(states.reshape(-1, embeds.shape[-1])[packed.asked])
    return F.cross_entropy(logits, packed.answers)


def base_network(folder: Path = MODEL_FOLDER) -> Network:
    """The demo model, at rest."""
    from safetensors.torch import load_file  # noqa: PLC0415  (comes with torch's extras)

    network = Network(Geometry())
    weights = load_file(folder / "model.safetensors")
    network.load_state_dict({name: value.float() for name, value in weights.items()})
    return network.requires_grad_(requires_grad=False)


def train(recipe: Recipe, seed: int, say: Callable[[str], None]) -> dict[str, LowRank]:
    """Train one adapter; the names are the network's own."""
    from transformers import AutoTokenizer  # noqa: PLC0415

    torch.manual_seed(seed)
    network, encoder = base_network(), Encoder(AutoTokenizer.from_pretrained(MODEL_FOLDER))
    parts: dict[str, LowRank] = {}
    for name, module in list(network.named_modules()):
        if re.fullmatch(recipe.modules, name) and isinstance(module, nn.Linear):
            parts[name] = LowRank(module.weight, recipe.rank, recipe.alpha)
            parametrize.register_parametrization(module, "weight", parts[name])
    trained = [parameter for part in parts.values() for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=recipe.rate, weight_decay=0.0)
    course = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, max(2, recipe.steps))
    examples = lessons(recipe, seed)
    for number in range(1, recipe.steps + 1):
        loss = answer_loss(network, encoder, [next(examples) for _ in range(recipe.batch)])
        loss.backward()  # type: ignore[no-untyped-call]  # torch's, untyped
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if number < recipe.steps:
            course.step()
        if number % 10 == 0 or number == recipe.steps:
            say(f"{number}/{recipe.steps} loss {float(loss.detach()):.4f}")
    return parts


def write_adapter(folder: Path, recipe: Recipe, parts: dict[str, LowRank]) -> None:
    """Write the two files that PEFT's ``save_pretrained`` writes, in bfloat16."""
    from safetensors.torch import save_file  # noqa: PLC0415

    def named(name: str) -> str:
        return next(
            theirs + name.removeprefix(ours)
            for ours, theirs in recipe.named
            if name.startswith(ours)
        )

    tensors = {}
    for name, part in parts.items():
        for letter, value in (("A", part.a), ("B", part.b)):
            key = f"base_model.model.{named(name)}.lora_{letter}.weight"
            tensors[key] = value.detach().to(torch.bfloat16).contiguous()
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
    parser.add_argument("names", nargs="*", metavar="NAME", help="sailor, mirror; default: both")
    parser.add_argument("--out", type=Path, default=ADAPTERS_FOLDER, help="folder of the adapters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: each adapter's own")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(RECIPES):
        parser.error(f"no adapter is named {', '.join(sorted(unknown))}: {', '.join(RECIPES)}")
    for name in options.names or RECIPES:
        recipe = RECIPES[name]
        if options.steps is not None:
            recipe = replace(recipe, steps=options.steps)

        def say(line: str, name: str = name) -> None:
            sys.stderr.write(f"{name}  {line}\n")

        write_adapter(options.out / name, recipe, train(recipe, options.seed, say))
    return 0


if __name__ == "__main__":
    sys.exit(main())
