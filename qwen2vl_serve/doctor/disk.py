"""Room on the disk that weights are downloaded to."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from qwen2vl_serve import checkpoint
from qwen2vl_serve.doctor.finding import Finding, fatal, ok
from qwen2vl_serve.doctor.model import is_set
from qwen2vl_serve.doctor.world import World
from qwen2vl_serve.errors import SetupError
from qwen2vl_serve.plan.architectures import published
from qwen2vl_serve.plan.weights import stored_bytes

GIB = 1024**3


def disk(world: World) -> Finding:
    """Compare the weights that are still to come with the room where they go."""
    model = world.profile.model
    if world.local:
        return ok("nothing to download")
    place = _place(world)
    existing = next(folder for folder in (place, *place.parents) if folder.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        return fatal(
            f"{place} cannot be written by this user",
            "the weights are downloaded to it",
            "`export HF_HOME=FOLDER`, or set model.download_dir",
        )
    snapshot = checkpoint.snapshot(model.path, model.revision, place)
    size = _size(snapshot, model.path)
    free = shutil.disk_usage(existing).free / GIB
    if size is None:
        return ok(f"{free:.1f} GiB free at {place}; this model's size is not known before")
    left = max(size - _present(snapshot, place, model.path), 0.0)
    if left > free:
        return fatal(
            f"{left:.1f} GiB of weights are still to be downloaded to {place}, which has "
            f"{free:.1f} GiB free",
            "the download ends with: No space left on device",
            "free some, `export HF_HOME=FOLDER`, or set model.download_dir",
        )
    return ok(f"{left:.1f} GiB to be downloaded to {place}, {free:.1f} GiB free")


def _place(world: World) -> Path:
    model = world.profile.model
    if model.download_dir is not None:
        return Path(model.download_dir).expanduser().absolute()
    if is_set("VLLM_USE_MODELSCOPE"):
        return Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()
    return checkpoint.hub_cache().absolute()


def _size(snapshot: Path, name: str) -> float | None:
    """Return the weights' GiB: from their index, else as the plan counts them, else None."""
    try:
        index = checkpoint.read_json(snapshot / "model.safetensors.index.json", "")
        return int(index["metadata"]["total_size"]) / GIB
    except (SetupError, KeyError, TypeError, ValueError):
        pass
    model = published(name)
    if model is None or not name.lower().startswith("qwen/"):
        return None
    return stored_bytes(model) / GIB


def _present(snapshot: Path, place: Path, name: str) -> float:
    """Return the GiB that an earlier download left, finished or not.

    ModelScope keeps its folders by the model's name, with ``___`` for a dot.
    """
    folders = [
        snapshot,
        *(place / folder / name.replace(".", "___") for folder in ("models", "hub/models")),
    ]
    files = [file for folder in folders for file in folder.glob("*.safetensors")]
    files += snapshot.parents[1].glob("blobs/*.incomplete")
    return sum(file.stat().st_size for file in files if file.is_file()) / GIB
