"""A checkpoint's folder, read without torch: is it whole, is it ours, how may it be split?

Faults raise ``PreflightError`` naming the file and what to do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2vl_serve.errors import PreflightError

SERVED_TYPES = ("qwen2_vl", "qwen2_5_vl")
_LFS = b"version https://git-lfs"
# The largest header that the safetensors format allows.
_MAX_HEADER_BYTES = 100_000_000
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
# How the hub's libraries name a part of the weights, also where no index tells of the others.
_PART = re.compile(r"-\d{5}-of-(\d{5})\.safetensors$")
_ROPE_WITHOUT_FACTOR = ("default", "mrope")
_ROPE_WITH_FACTOR = ("yarn",)


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that decide how a model may be split over cards.

    ``group`` is the quantisation's group size along a layer's input, None where there is none.
    """

    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    layers: int
    vision_heads: int
    vision_intermediate: int
    group: int | None = None

    def obstacle(self, tensor_parallel: int, *, split_vision: bool = True) -> str | None:
        """Say what ``tensor_parallel`` does not divide, or None when the split is legal.

        More ranks than KV heads replicate them, so either number has to divide the other. A
        quantisation group cannot straddle two ranks of a row-parallel layer.
        """
        sizes = {"attention heads": self.heads, "intermediate size": self.intermediate}
        if split_vision:
            sizes["vision heads"] = self.vision_heads
            sizes["vision intermediate size"] = self.vision_intermediate
        for what, size in sizes.items():
            if size % tensor_parallel:
                return f"{size} {what}"
        if self.kv_heads % tensor_parallel and tensor_parallel % self.kv_heads:
            return f"{self.kv_heads} KV heads"
        if self.group is not None:
            for what, size in (
                ("attention width", self.heads * self.head_dim),
                ("intermediate size", self.intermediate),
            ):
                if size // tensor_parallel % self.group:
                    return f"{what} {size} in quantisation groups of {self.group}"
        return None

    def legal(self, *, split_vision: bool = True) -> list[int]:
        """List the tensor parallel sizes up to 64 that this model can be split into."""
        sizes = range(1, 65)
        return [n for n in sizes if self.obstacle(n, split_vision=split_vision) is None]


def is_folder(name: str) -> bool:
    """Tell a path from a hub name, which has the form ``owner/name`` and no dots in front."""
    owner, slash, rest = name.partition("/")
    if Path(name).exists() or not slash or "/" in rest or "\\" in name:
        return True
    # models/Qwen2-VL beside an existing folder models is a mistyped path.
    return owner in ("", ".", "..", "~") or not rest or Path(owner).is_dir()


def read_config(folder: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Read config.json under ``overrides``, which replace its values level by level as in vLLM.

    Refuses a model of another family, and rotary settings that vLLM 0.32 cannot use.
    """
    source = folder / "config.json"
    config = merged(read_json(source, "it is not a checkpoint's folder"), overrides)
    check_config(config, source)
    return config


def check_config(config: dict[str, Any], source: Path) -> None:
    """Check family and rotary settings of a config.json, which ``source`` names in messages."""
    kind = config.get("model_type")
    if kind == "qwen":
        raise PreflightError(
            f"{source}: is of Qwen's first generation (as Qwen-VL-Chat), which vLLM dropped after "
            "0.23 and which would need trust_remote_code; take Qwen/Qwen2-VL-7B-Instruct"
        )
    if kind not in SERVED_TYPES:
        raise PreflightError(
            f"{source}: model_type is {kind!r}; this server serves {' and '.join(SERVED_TYPES)}"
        )
    text = text_config(config)
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    if not isinstance(rope, dict):
        raise PreflightError(
            f"{source}: rope_scaling is missing; Qwen2-VL needs "
            '{"rope_type": "default", "type": "mrope", "mrope_section": [16, 24, 24]}'
        )
    name = rope.get("rope_type", rope.get("type", "default"))
    older = rope.get("type", name)
    if older != name and (name, older) != ("default", "mrope"):
        stretched = name in _ROPE_WITH_FACTOR
        mend = 'leave "type" out' if stretched else 'write "type": "mrope", "rope_type": "default"'
        raise PreflightError(
            f"{source}: rope_scaling has type {older!r} beside rope_type {name!r}, which vLLM "
            f"refuses; {mend}"
        )
    if name not in _ROPE_WITHOUT_FACTOR + _ROPE_WITH_FACTOR:
        raise PreflightError(
            f"{source}: rope_scaling has type {name!r}, of another transformers version; write "
            '"type": "mrope" (to 4.44) or "rope_type": "default" (since), or download the '
            "checkpoint's config.json again"
        )
    if name in _ROPE_WITH_FACTOR and not isinstance(rope.get("factor"), int | float):
        raise PreflightError(f"{source}: rope_scaling of type {name!r} needs a factor")
    _check_sections(rope, text, source)


def shape_of(config: dict[str, Any]) -> Shape | None:
    """Read the sizes from a config.json; None when it does not name them."""
    text = text_config(config)
    vision, quantised = _object(config, "vision_config"), _object(config, "quantization_config")
    try:
        heads = int(text["num_attention_heads"])
        group = int(quantised.get("group_size") or 0)
        embed = int(vision.get("embed_dim") or vision.get("hidden_size") or 1280)
        return Shape(
            heads=heads,
            kv_heads=int(text.get("num_key_value_heads") or heads),
            head_dim=int(text.get("head_dim") or int(text["hidden_size"]) // heads),
            intermediate=int(text["intermediate_size"]),
            layers=int(text["num_hidden_layers"]),
            vision_heads=int(vision.get("num_heads") or 16),
            vision_intermediate=int(
                vision.get("intermediate_size") or embed * int(vision.get("mlp_ratio") or 4)
            ),
            group=group if group > 0 else None,
        )
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError):
        return None


def known_shape(name: str) -> Shape | None:
    """Shape of one of Qwen's published checkpoints by its hub name, without the hub."""
    family, _, rest = name.rpartition("/")[2].lower().partition("-vl-")
    sizes = _PUBLISHED.get((family, rest.split("-")[0]))
    if sizes is None:
        return None
    hidden, intermediate, layers, heads, kv_heads, vision = sizes
    quantised = rest.endswith(("-awq", "-gptq-int4", "-gptq-int8"))
    if quantised and intermediate == _UNPADDED_72B:
        intermediate = _PADDED_72B
    group = 128 if quantised else None
    return Shape(heads, kv_heads, hidden // heads, intermediate, layers, 16, vision, group)


# Qwen pads the 72B's width before quantising it, so that groups of 128 divide over eight cards.
_UNPADDED_72B, _PADDED_72B = 29568, 29696
# hidden, intermediate, layers, heads, KV heads, vision intermediate: from their config.json.
_PUBLISHED = {
    ("qwen2", "2b"): (1536, 8960, 28, 12, 2, 5120),
    ("qwen2", "7b"): (3584, 18944, 28, 28, 4, 5120),
    ("qwen2", "72b"): (8192, _UNPADDED_72B, 80, 64, 8, 5120),
    ("qwen2.5", "3b"): (2048, 11008, 36, 16, 2, 3420),
    ("qwen2.5", "7b"): (3584, 18944, 28, 28, 4, 3420),
    ("qwen2.5", "32b"): (5120, 27648, 64, 40, 8, 3456),
    ("qwen2.5", "72b"): (8192, _UNPADDED_72B, 80, 64, 8, 3456),
}


def read_json(path: Path, without: str) -> dict[str, Any]:
    """Read a JSON object; ``without`` says what its absence means."""
    try:
        _require_file(path)
        data = path.read_bytes()
        if data.startswith(_LFS):
            raise PreflightError(f"{path}: is a Git LFS pointer, not the file; run git lfs pull")
        value = json.loads(data)
    except FileNotFoundError:
        raise PreflightError(f"{path}: is missing; {without}") from None
    except OSError as error:
        raise PreflightError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise PreflightError(f"{path}: is not JSON; download the checkpoint again") from None
    if not isinstance(value, dict):
        raise PreflightError(f"{path}: is not a JSON object; download the checkpoint again")
    return value


def _require_file(path: Path) -> None:
    """Raise where reading would wait for ever: a pipe that nobody writes to."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise PreflightError(f"{path}: is not a file; download the checkpoint again")


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The text model's settings, which older configs keep at the top."""
    return _object(config, "text_config") or config


def _object(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def merged(config: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Replace values of a config.json, level by level, as vLLM's ``hf_overrides`` do."""
    result = dict(config)
    for key, value in overrides.items():
        inner = result.get(key)
        if isinstance(inner, dict) and isinstance(value, Mapping):
            result[key] = merged(inner, value)
        else:
            result[key] = value
    return result


def _check_sections(rope: dict[str, Any], text: dict[str, Any], source: Path) -> None:
    """M-RoPE divides half a head's width between time, height and width."""
    sections = rope.get("mrope_section")
    if (
        not isinstance(sections, list)
        or len(sections) != 3
        or not all(type(part) is int for part in sections)
    ):
        raise PreflightError(
            f"{source}: rope_scaling has no mrope_section of three integers; without it "
            "pictures have no position (download the checkpoint's config.json again)"
        )
    shape = shape_of({"text_config": text})
    if shape is not None and sum(sections) * 2 != shape.head_dim:
        raise PreflightError(
            f"{source}: mrope_section {sections} must add up to half of the head's width "
            f"{shape.head_dim}"
        )


def check_processor(folder: Path) -> None:
    """Check what text and pictures are prepared with: processor, tokenizer, chat template."""
    _check_images(folder)
    settings = read_json(folder / "tokenizer_config.json", "text cannot be read without it")
    if (folder / "tokenizer.json").exists():
        read_json(folder / "tokenizer.json", "")
    elif not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
        raise PreflightError(
            f"{folder}: has neither tokenizer.json nor vocab.json with merges.txt; "
            "download the checkpoint again"
        )
    _check_template(folder, settings.get("chat_template"))


def _check_images(folder: Path) -> None:
    """Check the image processor, in a file of its own or in transformers 5's one of all.

    Source: ``get_image_processor_dict`` in transformers' ``image_processing_base.py``.
    """
    own, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
    if own.exists() or not whole.exists():
        read_json(own, "pictures cannot be prepared without it")
    elif not isinstance(read_json(whole, "").get("image_processor"), dict):
        raise PreflightError(
            f"{whole}: has no image_processor, and there is no {own.name}; download the "
            "checkpoint again"
        )


def _check_template(folder: Path, of_tokenizer: object) -> None:
    """Check the chat template that transformers takes: its own file before the tokenizer's."""
    file, older = folder / "chat_template.jinja", folder / "chat_template.json"
    if file.is_file():
        template: object = _read_text(file)
    elif older.is_file():
        file, template = older, read_json(older, "").get("chat_template")
    else:
        file, template = folder / "tokenizer_config.json", of_tokenizer
        if not template:
            raise PreflightError(
                f"{folder}: has no chat template (chat_template.jinja); a base model cannot chat, "
                "take the Instruct checkpoint"
            )
    if not template or (isinstance(template, str) and not template.strip()):
        raise PreflightError(f"{file}: holds an empty chat template; download it again")
    if isinstance(template, str) and (fault := _fault_of(template)) is not None:
        raise PreflightError(f"{file}: is not a chat template ({fault}); download it again")


def _fault_of(template: str) -> str | None:
    """Say what keeps a template from being read; None also where Jinja is not installed.

    Source: ``_compile_jinja_template`` in transformers' ``chat_template_utils.py``, whose tag
    ``generation`` marks what is trained on and changes nothing else.
    """
    try:
        from jinja2 import TemplateSyntaxError  # noqa: PLC0415  # comes with torch
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415
    except ImportError:
        return None
    known = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        known.parse(_GENERATION.sub("", template))
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    return None


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    if data.startswith(_LFS):
        raise PreflightError(f"{path}: is a Git LFS pointer, not the file; run git lfs pull")
    return data.decode("utf-8", "replace")


def is_whole(folder: Path) -> bool:
    """Whether a folder holds all that serving needs of a checkpoint, as far as the checks go."""
    try:
        check_processor(folder)
        return check_weights(folder) > 0
    except PreflightError:
        return False


def check_weights(folder: Path) -> int:
    """Check weights by their headers and sizes, not by their bytes; return the files' number."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = read_json(index, "").get("weight_map")
        if not isinstance(places, dict) or not places:
            raise PreflightError(f"{index}: has no weight_map; download the checkpoint again")
        shards = sorted(set(map(str, places.values())))
        for shard in shards:
            names = tensor_names(folder / shard)
            lost = [name for name, place in places.items() if place == shard and name not in names]
            if lost:
                raise PreflightError(
                    f"{folder / shard}: lacks {lost[0]}, which {index.name} says it holds; "
                    "download it again"
                )
        return len(shards)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise PreflightError(
            f"{folder}: holds no weights (*.safetensors); download the checkpoint again"
        )
    for file in files:
        tensor_names(file)
        for part in _parts(file):
            if not part.is_file():
                raise PreflightError(f"{part}: is missing; download the checkpoint again")
    return len(files)


def _parts(file: Path) -> Iterator[Path]:
    """Yield every file that a part's name tells of: ``model-00001-of-00002`` has a second."""
    if found := _PART.search(file.name):
        for number in range(1, int(found[1]) + 1):
            yield file.with_name(
                f"{file.name[: found.start()]}-{number:05}-of-{found[1]}.safetensors"
            )


def tensor_names(path: Path) -> frozenset[str]:
    """Check a safetensors file's header against its size; return the names of its tensors."""
    return frozenset(_tensors(path))


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Check a safetensors file as ``tensor_names`` does; return the shapes of its tensors."""
    try:
        return {
            name: tuple(int(size) for size in entry["shape"])
            for name, entry in _tensors(path).items()
        }
    except (ValueError, KeyError, TypeError):
        raise PreflightError(
            f"{path}: is not a whole safetensors file (its header is damaged); download it again"
        ) from None


def _tensors(path: Path) -> dict[str, dict[str, Any]]:
    """Read a safetensors file's header.

    Format: eight bytes of header length (little endian), a JSON object that gives each tensor's
    ``data_offsets`` within what follows, then the data.
    """
    broken = f"{path}: is not a whole safetensors file"
    try:
        _require_file(path)
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(_LFS))
            if start == _LFS:
                raise PreflightError(
                    f"{path}: is a Git LFS pointer, not the weights; run git lfs pull"
                )
            length = int.from_bytes(start[:8], "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise PreflightError(f"{broken} (its header is cut off); download it again")
            file.seek(8)
            header = json.loads(file.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
    except FileNotFoundError:
        raise PreflightError(f"{path}: is missing; download the checkpoint again") from None
    except OSError as error:
        raise PreflightError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise PreflightError(f"{broken} (its header is damaged); download it again") from None
    if 8 + length + end != size:
        raise PreflightError(f"{broken} ({size} bytes of {8 + length + end}); download it again")
    return tensors
