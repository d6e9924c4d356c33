"""Quantise the demo model: ``python -m qwen2vl_serve.demo.quantise --method awq --out FOLDER``.

It writes a checkpoint as those that Qwen publishes: the language model's matrices in groups of
integers, in AutoGPTQ's or AutoAWQ's layout; embeddings, norms, biases and the vision tower as they
were. Either way the codes are GPTQ's (Frantar et al., 2022): a matrix is rounded input by input,
and the inputs that are left make up for the error. What AWQ does instead, widening the inputs that
matter before they are rounded (Lin et al., 2023), left this model farther off than rounding alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import Tensor, nn

from qwen2vl_serve.demo import packing
from qwen2vl_serve.demo.adapter import base_network
from qwen2vl_serve.demo.checkpoint import IMAGE_PIXELS, MODEL_FOLDER
from qwen2vl_serve.demo.compose import draw_picture
from qwen2vl_serve.demo.lesson import about_picture
from qwen2vl_serve.demo.network import CELL, Layer, Network
from qwen2vl_serve.demo.packing import Codes
from qwen2vl_serve.demo.pictures import scaled
from qwen2vl_serve.demo.rows import SYSTEMS, Encoder, Media, Packed, Row, pack
from qwen2vl_serve.demo.steps import keep_memory

Method = Literal["awq", "gptq"]
FIRST_SEED = 95_000_000  # no picture of training, scoring or the adapters has such a seed
GROUP = 64  # 128 does not divide the demo's 704
EXAMPLES = 128
DAMPING = 0.01
PARTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""The matrices of a layer, by what they read."""


class Examples:
    """Dialogues about pictures of the demo's own corpus, and the tower's view of the pictures."""

    def __init__(self, network: Network, encoder: Encoder, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        rows: list[Row] = []
        seen: list[Tensor] = []
        number = FIRST_SEED + seed * 1_000_000
        while len(rows) < count:
            number += 1
            kind: Literal["text", "shapes"] = "text" if number % 4 == 0 else "shapes"
            picture, scene = draw_picture(number, kind, 1 + number % 3)
            dialogue = about_picture(rng, scene)
            if dialogue is None:
                continue
            pixels = scaled(picture, IMAGE_PIXELS)
            row = Row()
            row.text(encoder.opening(SYSTEMS[len(rows) % 2]))
            cells = (pixels.shape[1] // CELL, pixels.shape[2] // CELL)
            row.medium(encoder, Media(len(rows), 1, *cells, video=False))
            row.seal()
            row.begin()
            row.dialogue(encoder, dialogue)
            rows.append(row)
            seen.append(network.visual(torch.from_numpy(pixels)[None, None])[0])
        self.packed: Packed = pack(rows, encoder.pad)
        self.held = torch.zeros_like(self.packed.ids, dtype=torch.bool)
        for place, row in enumerate(rows):
            self.held[place, : len(row.ids)] = True
        embeds = network.model.embed_tokens(self.packed.ids)
        flat = embeds.reshape(-1, embeds.shape[-1])
        flat = flat.index_copy(0, torch.cat(self.packed.sources), torch.cat(seen))
        self.embeds: Tensor = flat.view(embeds.shape)

    def logits(self, network: Network) -> Tensor:
        """What the network says at every taught token [tokens, vocabulary]."""
        states = network.hidden_states(self.embeds, self.packed.positions, self.packed.mask)
        flat: Tensor = states.reshape(-1, states.shape[-1])
        return network.logits(flat[self.packed.asked])

    def through(self, layer: Layer, states: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """What a layer makes of the states [rows, length, hidden] before it."""
        made: Tensor = layer(states, *angles, self.packed.mask, None)
        return made

    def squares(
        self, layer: Layer, states: Tensor, angles: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """Mean products [inputs, inputs] of what each of ``PARTS`` reads, by its first name."""
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                read = arguments[0][self.held]
                found[name] = read.T @ read / len(read)

            return hook

        hooks = [
            layer.get_submodule(names[0]).register_forward_pre_hook(keep(names[0]))
            for names in PARTS
        ]
        self.through(layer, states, angles)
        for hook in hooks:
            hook.remove()
        return found


def fed_back(weight: Tensor, squares: Tensor, bits: int, group: int, *, symmetric: bool) -> Codes:
    """weight [inputs, outputs] by GPTQ; ``squares`` are the mean products of what it reads.

    Each input in turn is rounded, and the error spread over the later ones so that the product
    changes least; the group's grid is that of the weights as they are then.
    """
    left, (inputs, outputs) = weight.float().clone(), weight.shape
    damped = squares + DAMPING * squares.diagonal().mean() * torch.eye(inputs)
    # In float32 the inverse of what few directions make up most of is no longer definite.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped.double()))
    spread = torch.linalg.cholesky(inverse, upper=True).float()
    codes = torch.empty_like(left)
    scales, zeros = torch.empty(2, inputs // group, outputs)
    for at, begin in enumerate(range(0, inputs, group)):
        end = begin + group
        members = left[begin:end]
        scales[at], zeros[at] = packing.grid(members, bits, symmetric=symmetric)
        errors = torch.empty_like(members)
        for number, own in enumerate(spread[begin:end, begin:end]):
            codes[begin + number] = packing.nearest(members[number], scales[at], zeros[at], bits)
            error = members[number] - (codes[begin + number] - zeros[at]) * scales[at]
            errors[number] = error / own[number]
            members[number:] -= torch.outer(own[number:], errors[number])
        # Those beyond the group are needed only now: one product instead of one for each input.
        left[end:] -= spread[begin:end, end:].T @ errors
    return Codes(codes, scales, zeros, bits)


@torch.inference_mode()
def quantised(
    network: Network, examples: Examples | None, method: Method, bits: int, group: int
) -> dict[str, Codes]:
    """Quantise a network's layers in place, each on what those before it give now.

    Returns the codes by the matrices' names. Without examples the weights are rounded alone.
    """
    found: dict[str, Codes] = {}
    symmetric = method == "gptq"
    if examples:
        states, angles = examples.embeds, network.angles(examples.packed.positions)
    for number, layer in enumerate(network.model.layers):
        assert isinstance(layer, Layer)  # noqa: S101  (a ModuleList does not say so)
        squares = examples.squares(layer, states, angles) if examples else {}
        for names in PARTS:
            for name in names:
                linear = layer.get_submodule(name)
                assert isinstance(linear, nn.Linear)  # noqa: S101  (as above)
                weight = linear.weight.T
                if examples:
                    codes = fed_back(weight, squares[names[0]], bits, group, symmetric=symmetric)
                else:
                    codes = packing.rounded(weight, bits, group, symmetric=symmetric)
                linear.weight.copy_(codes.matrix().T)
                found[f"model.layers.{number}.{name}"] = codes
        if examples:
            states = examples.through(layer, states, angles)
    return found


def quantisation_config(method: Method, bits: int, group: int) -> dict[str, Any]:
    """The ``quantization_config`` of config.json, as Qwen's own checkpoints have it."""
    if method == "awq":
        return {
            "bits": bits,
            "group_size": group,
            "modules_to_not_convert": ["visual"],
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
        }
    return {
        "bits": bits,
        "damp_percent": DAMPING,
        "desc_act": False,
        "group_size": group,
        "quant_method": "gptq",
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
    }


@dataclass(frozen=True)
class Likeness:
    """How alike two networks are on taught tokens.

    ``logit_error`` is the root of the mean square of the logits' difference, ``divergence`` the
    mean of Kullback and Leibler's in nats, ``same`` the share of tokens of which both think first.
    """

    logit_error: float
    divergence: float
    same: float


@dataclass(frozen=True)
class Quantised:
    """The codes by the matrices' names, and the network that they stand for."""

    method: Method
    codes: dict[str, Codes]
    network: Network


def likeness(ours: Tensor, theirs: Tensor) -> Likeness:
    """Hold the logits [tokens, vocabulary] of two networks against each other."""
    log_ours, log_theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    divergence = F.kl_div(log_theirs, log_ours, log_target=True, reduction="batchmean")
    return Likeness(
        logit_error=float((ours - theirs).square().mean().sqrt()),
        divergence=float(divergence),
        same=float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
    )


@torch.inference_mode()
def demo_examples(seed: int) -> Examples:
    """Conversations with the demo model; those of seed 0 are quantised on."""
    from transformers import AutoTokenizer  # noqa: PLC0415

    encoder = Encoder(AutoTokenizer.from_pretrained(MODEL_FOLDER))
    return Examples(base_network(), encoder, EXAMPLES, seed)


def quantise_demo(method: Method, bits: int = 4, *, plain: bool = False) -> Quantised:
    """Quantise the demo model."""
    network, examples = base_network(), None if plain else demo_examples(0)
    threads = torch.get_num_threads()
    # Thousands of small steps: on a busy machine threads wait for each other at every one.
    torch.set_num_threads(1)
    try:
        codes = quantised(network, examples, method, bits, GROUP)
    finally:
        torch.set_num_threads(threads)
    return Quantised(method, codes, network)


def write(folder: Path, made: Quantised) -> None:
    """Write the checkpoint: the demo's own files, and the codes in place of the matrices."""
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    folder.mkdir(parents=True, exist_ok=True)
    for file in MODEL_FOLDER.iterdir():
        if file.suffix not in (".safetensors", ".md"):
            shutil.copy(file, folder / file.name)
    layout = packing.awq_tensors if made.method == "awq" else packing.gptq_tensors
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(MODEL_FOLDER / "model.safetensors").items():
        codes = made.codes.get(name.removesuffix(".weight"))
        if codes is not None:
            for kind, part in layout(codes).items():
                tensors[f"{name.removesuffix('weight')}{kind}"] = part
        else:
            tensors[name] = value
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = json.loads((MODEL_FOLDER / "config.json").read_text("utf-8"))
    one = next(iter(made.codes.values()))
    config["dtype"] = config["text_config"]["dtype"] = "float16"
    config["quantization_config"] = quantisation_config(made.method, one.bits, GROUP)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen2vl_serve.demo.quantise", description=__doc__
    )
    parser.add_argument("--method", choices=("awq", "gptq"), required=True)
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--plain", action="store_true", help="round to the nearest, and no more")
    options = parser.parse_args(arguments)
    if (options.method, options.bits) == ("awq", 8):
        parser.error("--bits: AWQ's layout has 4; take --method gptq for 8")
    keep_memory()
    made = quantise_demo(options.method, options.bits, plain=options.plain)
    write(options.out, made)
    with torch.inference_mode():
        others = demo_examples(1)
        found = likeness(others.logits(base_network()), others.logits(made.network))
    sys.stderr.write(
        f"logits {found.logit_error:.4f} apart, {found.divergence:.5f} nats, "
        f"{found.same:.2%} of the tokens the same\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
