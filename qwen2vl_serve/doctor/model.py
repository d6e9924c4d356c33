"""The checkpoint: is it here, whole, ours, and can it be split as the profile wants."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen2vl_serve.checkpoints import checkpoint, hubs
from qwen2vl_serve.doctor import software
from qwen2vl_serve.doctor.finding import Finding, fatal, ok, refused, warning
from qwen2vl_serve.doctor.mend import can_mend
from qwen2vl_serve.doctor.world import World
from qwen2vl_serve.errors import SetupError
from qwen2vl_serve.machine import hardware
from qwen2vl_serve.plan.architectures import Quantisation
from qwen2vl_serve.plan.configuration import positions_of, quantisation_of
from qwen2vl_serve.plan.legality import other_size
from qwen2vl_serve.plan.refusals import mismatch, refusal
from qwen2vl_serve.plan.source import architecture_of

NOT_HERE = "not here yet: the hub is asked at start"
UNUSABLE = "not looked at: config.json cannot be used"
PICKLES = ("pt", "npcache")
# Where older tools told of the packing, and vLLM still looks (``get_config_filenames``).
PACKED_BY = (
    "quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json",
)  # fmt: skip
POSITIONS = 32768
"""Of a text model whose config.json does not say (transformers' default for the family)."""
UNPADDED_72B, PADDED_72B = 29568, 29696
_PART = re.compile(
    r"visual\.(?:blocks\.\d+\.(?:attn|mlp)|patch_embed|merger)"
    r"|(?<!\w)layers\.\d+\.(?:self_attn|mlp)|embed_tokens"
)


def model(world: World) -> Finding:
    """See that the model's folder exists, or that the hub may be asked for it."""
    if (lost := _lost_folder(world)) is not None:
        return lost
    name = world.profile.model.path
    if world.local:
        if Path(name).is_dir():
            return ok(name)
        return fatal(
            f"model.model: there is no folder {name}",
            "nothing can be loaded",
            "correct the path, or give the model's name on the hub, as Qwen/Qwen2-VL-7B-Instruct",
        )
    if world.folder is not None:
        return ok(f"{name} in the hub cache, {world.folder}")
    if (offline := hubs.forbidden()) is not None:
        return fatal(
            f"model.model: {name} is not in the local hub cache, and {offline} forbids to "
            "download it",
            "nothing can be loaded",
            "give the path of its folder or unset the variable",
        )
    return ok(f"{name}, to be downloaded from the hub")


def _lost_folder(world: World) -> Finding | None:
    """Look for the folders of what may stand elsewhere than the weights."""
    section = world.profile.model
    for field, name, instead in (
        ("tokenizer", section.tokenizer, "leave it out for the model's own"),
        ("generation_config", section.generation_config, "write auto or vllm"),
    ):
        if name in (None, "auto", "vllm") or not checkpoint.is_folder(name):
            continue
        if not Path(name).is_dir():
            return fatal(
                f"model.{field}: there is no folder {name}",
                "vLLM stops at it",
                f"correct the path, or {instead}",
            )
    return None


def config(world: World) -> Finding:
    """Read config.json: a family that is served, rotary settings that vLLM understands."""
    if world.folder is None or not world.folder.is_dir():
        return ok(NOT_HERE)
    try:
        settings = world.read_config(world.folder)
    except SetupError as error:
        finding = refused(error, "vLLM stops at it, or positions of pictures are wrong")
        if "rope" in finding.found.removeprefix(str(world.folder)) and can_mend(world.folder):
            mend = f"{finding.mend} (`qwen2vl-serve doctor --fix` does it on a copy)"
            return fatal(finding.found, finding.why, mend)
        return finding
    text = checkpoint.text_config(settings)
    return _too_long(world, text) or _rotary(world, settings["model_type"], text)


def _rotary(world: World, kind: str, text: dict[str, Any]) -> Finding:
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if rope.get("type") == "mrope" and "rope_type" not in rope:
        older = 'rope_scaling {"type": "mrope"}, as transformers wrote it up to 4.44'
        if _as_tested(world):
            return ok(f"{kind}; {older}, which this vLLM reads")
        return warning(
            f"{world.folder}/config.json: {older}",
            'other versions stop at it: KeyError, or assert "factor" in rope_scaling',
            'write "rope_type": "default" beside it (`qwen2vl-serve doctor --fix` does it on a '
            "copy), or install the tested versions",
        )
    return ok(kind)


def _too_long(world: World, text: dict[str, Any]) -> Finding | None:
    """Find a window that no reading of the rotary settings allows.

    Source: ``_get_and_verify_max_len`` in vLLM's ``config/model.py``, which counts a ``factor`` by
    the type of the settings; what is between the readings is the plan's, which only warns.
    """
    asked = world.profile.engine.max_model_len
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    positions = text.get("max_position_embeddings") or POSITIONS
    factor = rope.get("factor")
    stretched = positions * factor if isinstance(factor, int | float) else positions
    longest = int(max(positions, stretched, positions_of(text, POSITIONS)))
    if asked is None or asked <= longest or _long_allowed():
        return None
    return fatal(
        f"engine.max_model_len: {asked} is beyond the model's {longest} positions",
        "vLLM refuses it",
        "lower it, or extend them with model.hf_overrides (YaRN)",
    )


def _long_allowed() -> bool:
    """Whether vLLM is told to only warn, as its ``envs.py`` reads the variable."""
    return os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "").strip().lower() in ("1", "true")


def processor(world: World) -> Finding:
    """See that processor, tokenizer and chat template are there."""
    folder = world.folder
    if folder is None or not folder.is_dir():
        return ok(NOT_HERE)
    try:
        checkpoint.check_processor(folder)
    except SetupError as error:
        if _may_come(world):
            return ok(NOT_HERE)
        return refused(error, "no message could be turned into tokens")
    return ok("pictures, text and chat template")


def weights(world: World) -> Finding:
    """See that every file of the weights is here, as long as its header says, and holds the model.

    What of the model no file holds is fatal; files of another size than config.json's only warn.
    """
    model = world.profile.model
    if model.load_format == "dummy":
        return ok("load_format dummy: random weights are made up")
    if (pickles := _pickles(world)) is not None:
        return fatal(
            pickles,
            "they may run code when they are loaded",
            "take a checkpoint with safetensors, and leave model.load_format out",
        )
    unfinished = [path.name for place in world.places for path in hubs.interrupted(place)]
    named = f"{len(unfinished)} interrupted downloads, as {unfinished[0]}" if unfinished else ""
    folder = _weights_folder(world)
    if folder is None or (_may_come(world) and not _names_all(folder)):
        if named:
            return warning(
                f"{named} of {model.path}",
                "the start begins with the rest of the download",
                f"`qwen2vl-serve download {model.path}` to have it done before",
            )
        return ok(NOT_HERE)
    try:
        files = checkpoint.check_weights(folder)
    except SetupError as error:
        finding = refused(error, "vLLM finds out after minutes of loading")
        return replace(finding, found=f"{finding.found} ({named})") if named else finding
    return _incomplete(world, folder) or ok(f"{files} file{'s' * (files > 1)}, whole")


def _incomplete(world: World, folder: Path) -> Finding | None:
    """Compare what the files hold with what config.json describes, where it can be read.

    Names are looked at by their parts: versions and packers write them with other beginnings and
    ends. Source of the refusal: ``track_weights_loading`` in ``model_loader/default_loader.py``.
    """
    try:
        described = architecture_of(world.profile, ask_hub=False)
    except SetupError:
        return None  # the check ``config`` says why
    names = "\n".join(map("\n".join, map(checkpoint.tensor_names, folder.glob("*.safetensors"))))
    held = set(_PART.findall(names))
    lost = [part for part in described.parts() if part not in held]
    mend = "download the checkpoint again, its config.json as well"
    if lost:
        more = f" and {len(lost) - 1} other parts" if len(lost) > 1 else ""
        return fatal(
            f"{folder}: its weights lack {lost[0]}{more} of the model that config.json describes",
            "vLLM refuses what is not initialised from the checkpoint, or answers are noise",
            mend,
        )
    if (other := other_size(described)) is not None:
        return warning(f"{folder}: {other}", "vLLM may refuse a tensor's size, or lack one", mend)
    return None


def quantisation(world: World) -> Finding:
    """Find packing that vLLM refuses, or that is not the profile's, and an unpadded 72B."""
    if (stopped := _contradicted(world) or _unreadable(world)) is not None:
        return stopped
    shape = world.shape
    if shape is None:
        return ok(UNUSABLE if world.folder is not None else NOT_HERE)
    if shape.group is None:
        return ok("none in groups")
    if shape.intermediate != UNPADDED_72B or UNPADDED_72B % (2 * shape.group) == 0:
        return ok(f"groups of {shape.group}")
    found = (
        f"{world.folder}: intermediate_size {UNPADDED_72B} is quantised in groups of {shape.group}"
    )
    why = f"{UNPADDED_72B} / {shape.group} groups do not divide over cards"
    mend = (
        f"take Qwen's own AWQ or GPTQ checkpoint, or pad the weights to {PADDED_72B} before "
        "quantising them"
    )
    if world.profile.engine.tensor_parallel_size > 1:
        return fatal(f"{found}: it cannot be split", why, mend)
    return warning(f"{found}: it runs on one card only", why, mend)


def _packing(world: World) -> Quantisation | None:
    try:
        return quantisation_of(world.config or {})
    except (TypeError, ValueError):
        return None  # of no known form: vLLM says what it thinks of it


def _contradicted(world: World) -> Finding | None:
    config, folder = world.config, world.folder
    if config is None or folder is None:
        return None
    packing = _packing(world)
    if packing is None:
        parts = (config, checkpoint.text_config(config))
        in_config = any(part.get("quantization_config") for part in parts)
        if in_config or any((folder / name).is_file() for name in PACKED_BY):
            return None  # told in a place or a form that only vLLM reads
    found = mismatch(world.profile.model.quantization, packing, on_cards=world.on_cards)
    if found is None:
        return None
    return fatal(f"{found.field}: {found.found}", "vLLM refuses it", found.mend)


def _unreadable(world: World) -> Finding | None:
    packing = _packing(world)
    if packing is None:
        return None
    dtype = world.profile.model.dtype
    found = refusal(packing, dtype, on_cards=world.on_cards)
    if found is not None:
        what = f"{world.folder}: " if found.field == "model.model" else ""
        return fatal(f"{found.field}: {what}{found.found}", "vLLM refuses it", found.mend)
    if packing.bits == 4 and not world.on_cards and not hardware.has_avx512():
        return fatal(
            f"{world.folder}: {packing.method.upper()} on an x86 processor without AVX-512",
            "vLLM's library for AVX2 lacks the kernel: the engine dies at its first step",
            "take the unquantised checkpoint, or a processor with AVX-512",
        )
    return None


def split(world: World) -> Finding:
    """See that layers and heads divide over the profile's cards."""
    if world.folder is None or not (world.folder / "config.json").is_file():
        shape = checkpoint.known_shape(world.profile.model.path)
    else:
        shape = world.shape
    if shape is None:
        return ok("not known for this model before it is here")
    engine = world.profile.engine
    tensor, pipeline = engine.tensor_parallel_size, engine.pipeline_parallel_size
    split_vision = engine.mm_encoder_tp_mode != "data"
    obstacle = shape.obstacle(tensor, split_vision=split_vision)
    if obstacle is not None:
        legal = ", ".join(map(str, shape.legal(split_vision=split_vision)))
        return fatal(
            f"engine.tensor_parallel_size: {tensor} does not divide {world.profile.model.model} "
            f"({obstacle})",
            "vLLM refuses it, or fails while it loads",
            f"it can be {legal}, times pipeline_parallel_size for more cards",
        )
    if pipeline > shape.layers:
        return fatal(
            f"engine.pipeline_parallel_size: {pipeline} stages for {shape.layers} layers",
            "a stage would be empty",
            f"it can be at most {shape.layers}",
        )
    return ok(f"tensor {tensor} × pipeline {pipeline}")


def _pickles(world: World) -> str | None:
    form, folder = world.profile.model.load_format, _weights_folder(world)
    if form in PICKLES:
        return f"model.load_format: {form} reads pickles"
    if folder is None or any(folder.glob("*.safetensors")) or not any(folder.glob("*.bin")):
        return None
    return f"{folder}: holds its weights as pickles (*.bin)"


def _may_come(world: World) -> bool:
    """Whether the hub may still bring what the folder lacks."""
    return not world.local and hubs.forbidden() is None


def _weights_folder(world: World) -> Path | None:
    folder = world.folder
    return folder if folder is not None and folder.is_dir() else None


def _names_all(folder: Path) -> bool:
    """Whether no file of the weights is absent, whole or not."""
    try:
        index = checkpoint.read_json(folder / "model.safetensors.index.json", "")
        return all((folder / str(name)).exists() for name in index["weight_map"].values())
    except (SetupError, KeyError, AttributeError):
        return any(folder.glob("*.safetensors"))


def _as_tested(world: World) -> bool:
    return software.versions(world).level == "ok"
