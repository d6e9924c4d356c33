"""LoRA adapters as PEFT and ms-swift write them, read and checked without torch.

vLLM 0.32 leaves out without a word what it cannot apply, takes matrices of another size as far as
they go, and loses its engine to some that are damaged. So whatever is loaded passes here first.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen2vl_serve.adapters.parts import Sizes, sizes_of
from qwen2vl_serve.checkpoints import checkpoint
from qwen2vl_serve.engine import Adapter
from qwen2vl_serve.errors import PreflightError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MERGE = "merge it into the model (PEFT's merge_and_unload()) and serve the result"
# Settings of PEFT that change what an adapter means and that vLLM does not implement, with the
# words for them; source: PEFTHelper in vllm/lora/peft_helper.py.
_UNSERVED = {
    "use_dora": "a DoRA",
    "lora_bias": "a LoRA with biases (lora_bias)",
    "alora_invocation_tokens": "an activated LoRA (alora_invocation_tokens)",
    "layer_replication": "a LoRA with layer_replication",
    "use_bdlora": "a block-diagonal LoRA (use_bdlora)",
    "use_qalora": "a QALoRA",
    "modules_to_save": "a LoRA beside whole modules (modules_to_save)",
    "target_parameters": "a LoRA of bare parameters (target_parameters)",
}
_INITIAL = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")


def read_adapter(folder: Path, config: Mapping[str, Any] | None) -> Adapter:
    """Read an adapter's two files; ``config`` is the model's config.json, None where unknown.

    Raises:
        PreflightError: it is not whole, not a plain LoRA, or not one of this model.
    """
    settings = checkpoint.read_json(folder / CONFIG, _whereabouts(folder))
    _check_kind(settings, folder)
    shapes = checkpoint.tensor_shapes(_weights(folder))
    pairs = _pairs(shapes, folder)
    base = settings.get("base_model_name_or_path")
    ranks = _numbers("rank_pattern", (int,), settings, folder)
    _check_ranks(pairs, settings["r"], ranks, folder)
    sizes = None if config is None else sizes_of(config)
    if sizes is not None:
        for name, pair in pairs.items():
            _check_part(name, pair, sizes, f"{folder}: {_of(base)}")
    return Adapter(
        folder=folder,
        # What no part has is counted as well by vLLM (PEFTHelper.validate_legal).
        rank=max(int(settings["r"]), *ranks.values(), *(a[0] for a, _ in pairs.values())),
        base=base if isinstance(base, str) and base else None,
        parts=len(pairs),
        vision_parts=sum("visual." in name for name in pairs),
        digest=_digest(folder),
    )


def another_model(
    adapter: Adapter, model: str, config: Mapping[str, Any] | None = None
) -> str | None:
    """Return the model that an adapter says it was trained on, where ``model`` is another one.

    Only published names tell: Qwen2-VL-7B and Qwen2.5-VL-7B have text layers of the same sizes.
    Of a folder of any name, config.json tells the family.
    """
    theirs, ours = _family(adapter.base or ""), _family(model)
    if theirs is None:
        return None
    kind = None if config is None else config.get("model_type")
    other = (ours is not None and ours != theirs) or (
        kind is not None and kind != _KINDS.get(theirs[0], kind)
    )
    return adapter.base if other else None


_KINDS = {"qwen2": "qwen2_vl", "qwen2.5": "qwen2_5_vl"}


def _family(name: str) -> tuple[str, str] | None:
    if checkpoint.known_shape(name.rstrip("/")) is None:
        return None
    family, _, rest = name.rstrip("/").rpartition("/")[2].lower().partition("-vl-")
    return family, rest.split("-")[0]


def _whereabouts(folder: Path) -> str:
    """Say what the absence of the settings means."""
    inner = sorted(found.parent.name for found in folder.glob(f"*/{CONFIG}"))
    if inner:
        return f"name one of the folders within: {', '.join(inner[-3:])}"
    return "name the folder that PEFT or ms-swift wrote"


def _of(base: object) -> str:
    return f"an adapter of {base}" if isinstance(base, str) and base else "an adapter"


def _check_kind(settings: Mapping[str, Any], folder: Path) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise PreflightError(f"{folder}: is a {kind}, not a plain LoRA, which alone vLLM loads; "
                             f"{MERGE}")  # fmt: skip
    for name, words in _UNSERVED.items():
        if settings.get(name):
            raise PreflightError(f"{folder}: is {words}, which vLLM does not apply; {MERGE}")
    if settings.get("bias", "none") != "none":
        raise PreflightError(f"{folder}: trains biases, which vLLM does not apply; {MERGE}")
    initial = settings.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower() not in _INITIAL:
        raise PreflightError(
            f"{folder}: init_lora_weights {initial!r} changes the model below the adapter; convert "
            "it with PEFT's path_initial_model_for_weight_conversion"
        )
    for name in ("r", "lora_alpha"):
        value = settings.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise PreflightError(
                f"{folder / CONFIG}: {name} is {str(value)[:40]}, not a number above 0; copy the "
                "adapter again"
            )
    if "target_modules" not in settings:
        raise PreflightError(f"{folder / CONFIG}: has no target_modules; copy the adapter again")
    _numbers("alpha_pattern", (int, float), settings, folder)


def _numbers(
    name: str, kinds: tuple[type, ...], settings: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Return what a setting gives to the parts that match a regular expression."""
    value = settings.get(name) or {}
    try:
        sound = all(
            re.compile(pattern) and type(number) in kinds and number > 0
            for pattern, number in value.items()
        )
    except (AttributeError, re.error):
        sound = False
    if not sound:
        raise PreflightError(
            f"{folder / CONFIG}: {name} is {str(value)[:60]}, not numbers above 0 by regular "
            "expressions; correct it, or copy the adapter again"
        )
    return dict(value)


def _weights(folder: Path) -> Path:
    """Return the file of the weights; only safetensors are looked into."""
    weights = folder / WEIGHTS
    if not weights.exists() and (folder / "adapter_model.bin").is_file():
        raise PreflightError(
            f"{folder}: adapter_model.bin is a pickle, which may run code when it is loaded; "
            "save the adapter again with safe_serialization=True"
        )
    return weights


Shape = tuple[int, ...]
Pair = tuple[Shape, Shape]


def _pairs(shapes: Mapping[str, Shape], folder: Path) -> dict[str, Pair]:
    """Return the shapes of A [rank, inputs] and B [outputs, rank] of each part."""
    halves: dict[str, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        found = _TENSOR.fullmatch(name)
        if found is None or len(shape) != 2:
            raise PreflightError(
                f"{folder / WEIGHTS}: {name} is no matrix of a LoRA on a linear layer, which vLLM "
                f"does not apply; {MERGE}"
            )
        halves.setdefault(found[1], {})[found[2]] = shape
    for name, half in halves.items():
        if set(half) != {"A", "B"} or half["A"][0] != half["B"][1]:
            raise PreflightError(
                f"{folder / WEIGHTS}: {name} has not both halves of one rank; copy the "
                "adapter again"
            )
    if not halves:
        raise PreflightError(f"{folder / WEIGHTS}: holds no weights; copy the adapter again")
    return {name: (half["A"], half["B"]) for name, half in halves.items()}


def _check_ranks(
    pairs: Mapping[str, Pair], r: int, patterns: Mapping[str, int], folder: Path
) -> None:
    for name, (a, _) in pairs.items():
        matching = (
            value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)
        )
        rank = next(matching, r)
        if a[0] != rank:
            raise PreflightError(
                f"{folder}: {name} has rank {a[0]} in {WEIGHTS} and {rank} in {CONFIG}; the files "
                "belong to two adapters"
            )


def _check_part(name: str, pair: Pair, sizes: Sizes, who: str) -> None:
    a, b = pair
    wanted = sizes.of(name)
    if wanted is None:
        raise PreflightError(
            f"{who} trains {name}, which this model has not or vLLM does not adapt; {MERGE}"
        )
    if (a[1], b[0]) != wanted:
        raise PreflightError(
            f"{who} is for another model: {name} has {a[1]} inputs and {b[0]} outputs, here "
            f"{wanted[0]} and {wanted[1]}"
        )


def _digest(folder: Path) -> str:
    """Return what stands for the content of both files: 16 hexadecimal digits."""
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    with (folder / WEIGHTS).open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()[:16]
