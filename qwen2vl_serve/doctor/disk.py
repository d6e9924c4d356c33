"""Room on the disk that weights are downloaded to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from qwen2vl_serve.checkpoints import checkpoint, hubs
from qwen2vl_serve.doctor.finding import Finding, fatal, ok
from qwen2vl_serve.doctor.world import World
from qwen2vl_serve.errors import SetupError
from qwen2vl_serve.machine.hardware import GIB
from qwen2vl_serve.plan.architectures import published
from qwen2vl_serve.plan.weights import stored_bytes


def disk(world: World) -> Finding:
    """Compare the weights that are still to come with the room where they go."""
    model = world.profile.model
    places = world.places
    if world.local or any(map(checkpoint.is_whole, places)):
        return ok("nothing to download")
    place = _place(world)
    existing = next(folder for folder in (place, *place.parents) if folder.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        return fatal(
            f"{place} cannot be written by this user",
            "the weights are downloaded to it",
            "`export HF_HOME=FOLDER`, or set model.download_dir",
        )
    size = _size(places, model.path)
    free = shutil.disk_usage(existing).free / GIB
    if size is None:
        return ok(f"{free:.1f} GiB free at {place}; this model's size is not known before")
    left = max(size - max(map(_present, places)), 0.0)
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
    cache = hubs.modelscope_cache() if hubs.modelscope_first() else hubs.hugging_face_cache()
    return cache.absolute()


def _size(places: Sequence[Path], name: str) -> float | None:
    """Return the weights' GiB: from their index, else as the plan counts them, else None."""
    for place in places:
        try:
            index = checkpoint.read_json(place / "model.safetensors.index.json", "")
            return int(index["metadata"]["total_size"]) / GIB
        except (SetupError, KeyError, TypeError, ValueError):
            continue
    model = published(name)
    if model is None or not name.lower().startswith("qwen/"):
        return None
    return stored_bytes(model) / GIB


def _present(place: Path) -> float:
    """Return the GiB that an earlier download left, of files that are whole and that are not."""
    files = [*place.glob("*.safetensors"), *hubs.begun(place)]
    return sum(file.stat().st_size for file in files if file.is_file()) / GIB
