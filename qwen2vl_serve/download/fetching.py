"""From a model's name to a folder that holds it whole."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol

from qwen2vl_serve.checkpoints import hubs
from qwen2vl_serve.download.huggingface import HuggingFace
from qwen2vl_serve.download.listing import (
    Hub,
    Listing,
    RepoFile,
    Source,
    check_name,
    check_online,
    needed,
)
from qwen2vl_serve.download.modelscope import ModelScope
from qwen2vl_serve.errors import DownloadError, HubUnreachable, PreflightError

AT_ONCE = 4
SPARE_BYTES = 64 * 1024**2
"""What is left free on the disk beside the checkpoint: locks, logs, the file system's own."""


class Progress(Protocol):
    """Is told how a download goes; its methods are called from several threads."""

    def begin(self, total: int) -> None:
        """Take note of the bytes that the checkpoint has in all."""
        ...

    def advance(self, count: int, *, fetched: bool = True) -> None:
        """Take note of bytes that are here; a negative count takes some back.

        Those that were here before are not ``fetched``: they say nothing of the speed.
        """
        ...

    def say(self, line: str) -> None:
        """Tell a line, as what is asked of which hub."""
        ...


@dataclass(frozen=True, slots=True)
class Downloaded:
    """A checkpoint that is here whole. ``commit`` is None where the hub names none."""

    folder: Path
    source: str
    revision: str
    commit: str | None
    files: int
    size: int


def download(
    name: str,
    *,
    source: Source = "auto",
    to: Path | None = None,
    revision: str | None = None,
    cache: Path | None = None,
    progress: Progress,
) -> Downloaded:
    """Fetch what serving needs of a checkpoint, and hold every file to the hub's size and hash.

    Into ``to``, or into the hub's own ``cache``. ``auto`` asks ModelScope where
    ``VLLM_USE_MODELSCOPE`` says so; else Hugging Face, and ModelScope where that is not reached.

    Raises:
        PreflightError: no such model, not for this user, no room, asking is forbidden.
        DownloadError: it did not come whole; the same call goes on where it stopped.
    """
    check_name(name)
    check_online(name)
    hub, listing = _ask(name, source, revision, cache, progress)
    files = needed(listing.files, name)
    folder = hub.place(listing, to)
    _check_room(folder, files, name)
    progress.begin(sum(file.size for file in files))
    ended = threading.Event()

    def fetch(file: RepoFile) -> None:
        _fetch(hub, listing, file, to, _Counted(progress, ended))

    _for_each(files, fetch, ended)
    hub.finish(listing, to)
    size = sum(file.size for file in files)
    return Downloaded(folder, hub.title, listing.revision, listing.commit, len(files), size)


def _ask(
    name: str, source: Source, revision: str | None, cache: Path | None, progress: Progress
) -> tuple[Hub, Listing]:
    if source == "modelscope" or (source == "auto" and hubs.modelscope_first()):
        hub: Hub = ModelScope(cache)
        return hub, hub.listing(name, revision)
    hub = HuggingFace(cache)
    try:
        return hub, hub.listing(name, revision)
    except HubUnreachable as first:
        if source != "auto":
            raise
        try:
            # A commit of one hub is none of the other's.
            other = ModelScope(cache)
            progress.say(f"{first}")
            progress.say("asking ModelScope instead")
            return other, other.listing(name, revision)
        except (PreflightError, DownloadError):
            raise first from None


def _for_each(
    files: Sequence[RepoFile], work: Callable[[RepoFile], None], ended: threading.Event
) -> None:
    """Do ``work`` for every file, a few at once; raise what fails first, or Ctrl-C, at once.

    The threads are daemons, since an executor waits for what is under way: minutes to hours.
    """
    waiting: SimpleQueue[RepoFile] = SimpleQueue()
    done: SimpleQueue[BaseException | None] = SimpleQueue()
    for file in files:
        waiting.put(file)

    def take() -> None:
        while not ended.is_set():
            try:
                file = waiting.get_nowait()
            except Empty:
                return
            try:
                work(file)
            except BaseException as error:
                done.put(error)
            else:
                done.put(None)

    try:
        for number in range(AT_ONCE):
            threading.Thread(target=take, name=f"download-{number}", daemon=True).start()
        for _ in files:
            if (error := done.get()) is not None:
                raise error
    finally:
        ended.set()


def _fetch(hub: Hub, listing: Listing, file: RepoFile, to: Path | None, counted: _Counted) -> None:
    """Fetch one file and check it; one that is damaged is fetched once more."""
    for attempt in (1, 2):
        path = hub.fetch(listing, file, to, counted.advance)
        fault = file.fault(path)
        if fault is None:
            # What was here before was not counted while it came.
            counted.settle(file.size)
            return
        counted.settle(0)
        _remove(path, cached=to is None)
        if attempt == 1:
            counted.say(f"{file.path} {fault}; fetched again")
    raise DownloadError(
        f"{listing.name}: {file.path} {fault}, twice; a proxy or mirror changes what it passes on"
    )


class _Ended(Exception):
    """Stops a thread of a download that is over."""


class _Counted:
    """One file's share of the progress, until the download is over."""

    def __init__(self, progress: Progress, ended: threading.Event) -> None:
        self._progress = progress
        self._ended = ended
        self._count = 0
        self._lock = threading.Lock()

    def say(self, line: str) -> None:
        self._progress.say(line)

    def advance(self, count: int, *, fetched: bool = True) -> None:
        if self._ended.is_set():
            raise _Ended
        with self._lock:
            self._count += count
        self._progress.advance(count, fetched=fetched)

    def settle(self, count: int) -> None:
        self.advance(count - self._count, fetched=False)


def _remove(path: Path, *, cached: bool) -> None:
    """Remove a file and, of the hub's cache, what it names; elsewhere that is somebody's own."""
    real = path.resolve()
    path.unlink(missing_ok=True)
    if cached:
        real.unlink(missing_ok=True)


def _size(path: Path) -> int:
    """Return the bytes of a file; 0 of one that is not here, or that another command moved."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _check_room(folder: Path, files: Sequence[RepoFile], name: str) -> None:
    """Compare what is missing with the disk's room.

    Raises:
        PreflightError: there is not enough, or the folder cannot be written.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise PreflightError(
            f"{folder}: cannot be written by this user; name another place with --to, or "
            "`export HF_HOME=FOLDER`"
        )
    left = sum(
        file.size
        for file in files
        if not any(
            _size(place) == file.size
            for place in (folder / file.path, hubs.content(folder, file.sha256 or file.git))
        )
    )
    left = max(0, left - sum(map(_size, hubs.begun(folder))))
    free = shutil.disk_usage(existing).free
    if left and left + SPARE_BYTES > free:
        raise PreflightError(
            f"{name}: {left / 1e9:.1f} GB are still to come to {folder}, which has "
            f"{free / 1e9:.1f} GB free; free some, or name another place with --to"
        )
