"""The model of a profile, fetched before the engine starts where it is not here yet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qwen2vl_serve.checkpoints import checkpoint, hubs
from qwen2vl_serve.download.fetching import download
from qwen2vl_serve.download.meter import Meter
from qwen2vl_serve.profile import Profile


def have_model(profile: Profile, say: Callable[[str], None]) -> Profile:
    """Return the profile with the folder that holds its model, fetched now if need be.

    A checkpoint that the cache of one of the hubs holds whole is taken without asking them. Names
    that clients use stay as they are. ``say`` takes lines for the operator.

    Raises:
        PreflightError, DownloadError: as ``download``.
    """
    model = profile.model
    if Path(model.path).is_dir() or checkpoint.is_folder(model.path):
        return profile
    if model.load_format not in (None, "auto", "safetensors", "dummy"):
        return profile  # vLLM's own way of loading, as from an object store
    cache = None if model.download_dir is None else Path(model.download_dir).expanduser()
    places = hubs.places(model.path, model.revision, cache)
    folder = next(filter(checkpoint.is_whole, places), None)
    if folder is None:
        meter = Meter(lambda line: say(f"fetch   {line}"))
        found = download(model.path, revision=model.revision, cache=cache, progress=meter)
        at = found.commit or found.revision
        say(f"fetch   {model.path} at {at} is in {found.folder}")
        folder = found.folder
    named = model.model_copy(
        update={
            "model": str(folder),
            "served_model_name": model.served_names,
            "tokenizer": None if model.tokenizer == model.path else model.tokenizer,
            "revision": None,
        }
    )
    return profile.model_copy(update={"model": named}).named(profile.name)
