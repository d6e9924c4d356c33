"""Rotary settings as every version reads them, written into a copy of the checkpoint.

The copy holds config.json of its own and links to all other files: no weights are copied, and
the original is not touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from qwen2vl_serve.checkpoints import checkpoint
from qwen2vl_serve.doctor.world import World
from qwen2vl_serve.errors import PreflightError, SetupError

# Time, height and width of the released models, whose heads are 128 wide.
SECTIONS = {128: [16, 24, 24]}
ROPE_KEYS = ("rope_parameters", "rope_scaling")


def mended_copy(world: World) -> Path | None:
    """Write a copy of the model's folder with mended rotary settings; return where it is.

    None when nothing is to be mended. Raises ``PreflightError`` where there is no folder, no
    readable config.json or no way to know the right settings.
    """
    folder = world.folder
    if folder is None:
        raise PreflightError(
            f"model.model: {world.profile.model.path} is not on this machine; download it first"
        )
    config = checkpoint.read_json(folder / "config.json", "there is nothing to mend")
    mended = mended_config(config)
    if mended == config:
        return None
    text = json.dumps(mended, indent=2, ensure_ascii=False) + "\n"
    # Named by what it holds: a second run finds the first one's copy.
    digest = hashlib.sha256(f"{folder.absolute()}\n{text}".encode()).hexdigest()[:8]
    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    name = Path(world.profile.model.path).name or "model"
    place = state.absolute() / "qwen2vl-serve" / "mended" / f"{name}-{digest}"
    if not place.is_dir():
        _write(place, folder, text)
    return place


def can_mend(folder: Path) -> bool:
    """Whether ``mended_copy`` would make a config.json in this folder one that is not refused."""
    try:
        config = checkpoint.read_json(folder / "config.json", "there is nothing to mend")
        mended = mended_config(config)
    except PreflightError:
        return False
    return mended != config and _is_usable(mended)


def mended_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return config.json with rotary settings that every version reads; unchanged if they are.

    Up to transformers 4.44 the settings are known by ``type`` ``mrope``, since then by
    ``rope_type`` ``default``; with both, no version looks for a ``factor``. A window that YaRN
    stretches stays so: of its settings only a ``type`` that contradicts them is left out.
    """
    text = checkpoint.text_config(config)
    key = _rope_key(text)
    rope = {} if key is None else text[key]
    if _is_usable(config) and "rope_type" in rope:
        return config
    if rope.get("rope_type") == "yarn" and "type" in rope:
        one_type = {name: value for name, value in rope.items() if name != "type"}
        stretched = _with_rope(config, one_type)
        if _is_usable(stretched):
            return stretched
    shape = checkpoint.shape_of(config)
    width = None if shape is None else shape.head_dim
    sections = _sections(rope.get("mrope_section"), width)
    if sections is None:
        raise PreflightError(
            f"rope_scaling: mrope_section for heads {width} wide is not known; download the "
            "checkpoint's config.json again"
        )
    kept = {name: value for name, value in rope.items() if name == "rope_theta"}
    mended = kept | {"type": "mrope", "rope_type": "default", "mrope_section": sections}
    return _with_rope(config, mended)


def _rope_key(text: dict[str, Any]) -> str | None:
    return next((key for key in ROPE_KEYS if isinstance(text.get(key), dict)), None)


def _with_rope(config: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """Put ``rope`` where the rotary settings stand, or where older versions look for them."""
    text = checkpoint.text_config(config)
    mended = {**text, _rope_key(text) or ROPE_KEYS[1]: rope}
    return mended if text is config else {**config, "text_config": mended}


def _sections(given: object, width: int | None) -> list[int] | None:
    """Return the given sections where they fit heads of this width, else the released ones."""
    three = isinstance(given, list) and [type(part) for part in given] == [int] * 3
    if isinstance(given, list) and three and sum(given) * 2 == width:
        return given
    return SECTIONS.get(width or 0)


def _is_usable(config: dict[str, Any]) -> bool:
    try:
        checkpoint.check_config(config, Path("config.json"))
    except SetupError:
        return False
    return True


def _write(place: Path, folder: Path, config: str) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # Under another name until it is whole.
        half = Path(tempfile.mkdtemp(prefix=".", dir=place.parent))
        try:
            for file in folder.iterdir():
                if file.name != "config.json":
                    (half / file.name).symlink_to(file.resolve())
            (half / "config.json").write_text(config, "utf-8")
            half.chmod(0o755)
            half.rename(place)
        except BaseException:
            shutil.rmtree(half, ignore_errors=True)
            raise
    except OSError as error:
        raise PreflightError(
            f"{place}: the copy cannot be written ({error.strerror}); set XDG_STATE_HOME to a "
            "folder that can"
        ) from None
