"""Where a model's sizes come from: its folder, the built-in facts, the hub's cache, the hub.

Only the last needs a network, and only for models that nothing nearer knows.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import requests

from qwen2vl_serve.checkpoints import checkpoint, hubs
from qwen2vl_serve.errors import PreflightError
from qwen2vl_serve.plan.architectures import Architecture, published, published_names
from qwen2vl_serve.plan.configuration import positions_of, read_architecture
from qwen2vl_serve.profile import Profile

HUB_SECONDS = 10.0


def architecture_of(profile: Profile, *, ask_hub: bool = True) -> Architecture:
    """Return the sizes of the profile's model; without ``ask_hub``, as far as they are here.

    Raises:
        PreflightError: a folder or config.json that cannot be read, or a name that nothing knows.
    """
    model = profile.model
    name, overrides = model.path, model.hf_overrides
    folder = Path(name)
    if folder.is_dir():
        return _of_folder(model.model, folder, overrides)
    cached = hubs.cached_folder(name, model.revision, model.download_dir)
    if cached is not None:
        return _of_folder(name, cached, overrides)
    if (known := published(name)) is not None:
        return _with_positions(replace(known, assumed=_is_path(name)), overrides)
    if _is_path(name):
        raise PreflightError(
            f"model.model: there is no folder {name}; correct the path, or give the model's name "
            f"on the hub, as {published_names()[1]}"
        )
    if not ask_hub:
        raise PreflightError(f"model.model: nothing on this machine knows the sizes of {name}")
    config, stored = _of_hub(name, model.revision)
    return replace(of_config(name, config, overrides, name), stored_bytes=stored)


def _is_path(name: str) -> bool:
    owner, slash, rest = name.partition("/")
    return not slash or "/" in rest or owner in ("", ".", "..", "~") or Path(owner).is_dir()


def _of_folder(name: str, folder: Path, overrides: Mapping[str, Any]) -> Architecture:
    source = folder / "config.json"
    config = checkpoint.read_json(source, "it is not a checkpoint's folder")
    found = of_config(name, config, overrides, str(source))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return found
    try:
        checkpoint.check_weights(folder)
    except PreflightError as error:
        return replace(found, fault=str(error))
    return replace(found, stored_bytes=sum(map(_tensor_bytes, _indexed(folder, files))))


def _indexed(folder: Path, files: list[Path]) -> list[Path]:
    """Leave out what an index does not name, as vLLM does: shards of an earlier save, say.

    Source: ``filter_duplicate_safetensors_files`` in ``model_loader/weight_utils.py``.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return files
    named = set(checkpoint.read_json(index, "")["weight_map"].values())
    return [file for file in files if file.name in named]


def of_config(
    name: str, config: dict[str, Any], overrides: Mapping[str, Any], source: str
) -> Architecture:
    """Read a config.json, which ``source`` names in messages, under ``overrides``.

    Raises:
        PreflightError: another family, or a size that is missing or none.
    """
    try:
        found = read_architecture(name, checkpoint.merged(config, overrides))
    except ValueError as error:
        raise PreflightError(
            f"{source}: {error}; download it again, or correct model.hf_overrides"
        ) from None
    if found is None:
        raise PreflightError(
            f"{source}: model_type {config.get('model_type')!r} cannot be planned; take a "
            "checkpoint of Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen2 or Qwen3"
        )
    return found


def _with_positions(known: Architecture, overrides: Mapping[str, Any]) -> Architecture:
    """Apply what ``hf_overrides`` say of the context's length to a model that is built in."""
    inner = overrides.get("text_config")
    text = {**overrides, **(inner if isinstance(inner, Mapping) else {})}
    try:
        positions = positions_of(text, known.text.positions)
    except ValueError as error:
        raise PreflightError(f"model.hf_overrides: {error}; correct it") from None
    return replace(known, text=replace(known.text, positions=positions))


def _tensor_bytes(path: Path) -> int:
    """Bytes of tensors in a safetensors file: its size without the header."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        return max(0, path.stat().st_size - 8 - length)
    except OSError as error:
        raise PreflightError(f"{path}: cannot be read: {error.strerror}") from None


def _of_hub(name: str, revision: str | None) -> tuple[dict[str, Any], int | None]:
    """Fetch config.json, and what the hub knows of the weights, without repeating a request.

    The hub's own download would try for half a minute where there is no network.
    """
    known = ", ".join(published_names()[:3])
    instead = f"give the path of its folder, or one of the built-in models ({known}, …)"
    if importlib.util.find_spec("huggingface_hub") is None:
        raise PreflightError(
            f"model.model: {name} is not built in, and huggingface_hub is not installed to ask the "
            f"hub; {instead}"
        )
    from huggingface_hub import (  # noqa: PLC0415 -- optional
        constants,
        get_token,
        hf_hub_url,
        is_offline_mode,
    )

    if is_offline_mode():
        raise PreflightError(
            f"model.model: {name} is not built in, and HF_HUB_OFFLINE forbids to ask the hub; "
            f"{instead}"
        )
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        url = hf_hub_url(name, "config.json", revision=revision)
        config = _json(url, headers)
    except (requests.RequestException, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"answers {status}" if status else f"is not reached ({type(error).__name__})"
        if isinstance(error, requests.JSONDecodeError):
            reason = "answers with what is no config.json (a page of a proxy?)"
        raise PreflightError(
            f"model.model: {name} is not built in, and the hub {reason}; {instead}"
        ) from None
    try:
        path = f"{name}/revision/{revision}" if revision else name
        tensors = _json(f"{constants.ENDPOINT}/api/models/{path}", headers)["safetensors"]
        counts = tensors["parameters"]
        stored = sum(int(count) * _STORED_BYTES[dtype] for dtype, count in counts.items())
    except (requests.RequestException, ValueError, KeyError, TypeError, AttributeError):
        return config, None  # not every repository has them, and they only serve a comparison
    return config, stored


_STORED_BYTES = {
    "F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


def _json(url: str, headers: Mapping[str, str]) -> dict[str, Any]:
    """Get a JSON object.

    Raises:
        requests.RequestException: no answer, or another status than success.
        ValueError: something else.
    """
    reply = requests.get(url, headers=headers, timeout=HUB_SECONDS)
    reply.raise_for_status()
    found = reply.json()
    if not isinstance(found, dict):
        raise ValueError(f"{url} is no object")
    return found
