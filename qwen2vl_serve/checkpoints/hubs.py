"""The hubs as this machine knows them: what its variables say, and where their checkpoints are.

Folders are laid out as by huggingface_hub, modelscope_hub 0.5 and modelscope up to 1.37.
"""

from __future__ import annotations

import os
from pathlib import Path

PART = ".part"
"""The ending of files that ``download`` has of Hugging Face, but not whole."""

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def forbidden() -> str | None:
    """Name the variable that forbids to ask a hub."""
    return next((name for name in _OFFLINE if _is_set(name)), None)


def modelscope_first() -> bool:
    """Whether ModelScope is asked, and not Hugging Face."""
    return _is_set("VLLM_USE_MODELSCOPE")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in {"1", "true", "yes", "on"}


def hugging_face_cache() -> Path:
    """Return the folder that Hugging Face's library downloads into."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub")


def modelscope_cache() -> Path:
    """Return the folder that ModelScope's library downloads into."""
    return Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()


def snapshot(name: str, revision: str | None, cache: Path) -> Path:
    """Return where a checkpoint is in a cache of Hugging Face's layout; may not exist."""
    repository = cache / f"models--{name.replace('/', '--')}"
    wanted = revision or "main"
    try:
        commit = (repository / "refs" / wanted).read_text("ascii").strip()
    except (OSError, ValueError):
        commit = wanted
    return repository / "snapshots" / commit


def modelscope_snapshot(name: str, revision: str | None, cache: Path) -> Path:
    """Return where a checkpoint is in a cache of ModelScope's layout; may not exist."""
    return cache / "models" / name.replace("/", "--") / "snapshots" / (revision or "master")


def places(
    name: str, revision: str | None = None, download_dir: str | Path | None = None
) -> list[Path]:
    """Return where a checkpoint may be, in the caches of both hubs or in ``download_dir``.

    Where the hub that is asked would put it comes first.
    """
    below = None if download_dir is None else Path(download_dir).expanduser()
    of_modelscope = below or modelscope_cache()
    found = [
        snapshot(name, revision, below or hugging_face_cache()),
        modelscope_snapshot(name, revision, of_modelscope),
    ]
    if modelscope_first():
        found.reverse()
    if revision in (None, "master"):
        older = name.replace(".", "___")
        found += [of_modelscope / f"{part}/{older}" for part in ("models", "hub/models")]
    return found


def cached_folder(
    name: str, revision: str | None = None, download_dir: str | Path | None = None
) -> Path | None:
    """Find a checkpoint's folder among its ``places``, whole or not."""
    folders = places(name, revision, download_dir)
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def content(folder: Path, digest: str | None) -> Path:
    """Return where Hugging Face's cache keeps what a file of a snapshot's ``folder`` links to.

    Snapshots of several commits share it.
    """
    return folder.parent.parent / "blobs" / str(digest)


def begun(folder: Path) -> list[Path]:
    """Return the files of an interrupted download to ``folder`` that the next one goes on with."""
    return [
        *folder.glob(f".cache/huggingface/download/**/*{PART}"),
        *(folder.parent.parent / "blobs").glob(f"*{PART}"),
        *folder.glob("*.incomplete"),  # ModelScope's
    ]


def interrupted(folder: Path) -> list[Path]:
    """Return what interrupted downloads to ``folder``, of any tool, left behind."""
    others = [
        *folder.glob(".cache/huggingface/download/**/*.incomplete"),
        *(folder.parent.parent / "blobs").glob("*.incomplete"),
        *(path for path in folder.glob("._____temp/*") if path.is_file()),
        *folder.glob("*.aria2"),
    ]
    return sorted([*begun(folder), *others])
