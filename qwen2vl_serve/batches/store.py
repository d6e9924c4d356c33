"""Batches at rest: a folder for each, read again after any end of the server.

A folder holds ``batch.json`` (replaced as a whole), ``input.jsonl`` (a copy, so that the uploaded
file may go), and ``output.jsonl`` and ``errors.jsonl``, to which each outcome is appended by one
write. What an end of the server has cut off there is taken away when it is read again, and its
request is asked once more: no outcome is lost, and none stands there twice.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from qwen2vl_serve.batches.lines import Fault
from qwen2vl_serve.media.files import FileStore

WINDOW_SECONDS = 24 * 3600
"""``completion_window``: the one that there is."""

MOST_FILES = 10_000

Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling",
    "cancelled",
]  # fmt: skip

UNFINISHED: frozenset[Status] = frozenset({"validating", "in_progress", "finalizing", "cancelling"})

_BATCH_ID = re.compile(r"batch_[0-9a-f]{32}")


class NoSuchBatch(Exception):
    """No batch has this id, or it is another's."""


class Batch(BaseModel):
    """What is known of a batch; times in whole seconds since the epoch, ``owner`` a key's name."""

    model_config = ConfigDict(strict=True, extra="forbid")

    id: str
    owner: str
    input_file_id: str
    created_at: int
    expires_at: int
    status: Status = "validating"
    metadata: dict[str, str] | None = None
    faults: list[Fault] = []
    output_file_id: str | None = None
    error_file_id: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    reached: dict[str, int] = {}
    """When each status was reached."""

    @property
    def unfinished(self) -> bool:
        """Whether something is still to be done."""
        return self.status in UNFINISHED

    def reach(self, status: Status) -> None:
        """Enter ``status``, now."""
        self.status = status
        self.reached[status] = int(time.time())


class BatchStore:
    """All batches of a folder of one server. Raises ``OSError`` if it cannot be used.

    ``files`` keeps what they read and write, at most ``max_bytes`` of it. For one event loop; what
    waits for the disk is to be called in a thread.
    """

    def __init__(self, folder: Path, *, ttl_seconds: float, max_bytes: int) -> None:
        self.folder = folder
        self.ttl_seconds = ttl_seconds
        self._saving, self._appending = threading.Lock(), threading.Lock()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise
        self.files = FileStore(
            folder / "files", max_files=MOST_FILES, max_bytes=max_bytes, ttl_seconds=ttl_seconds
        )
        found = [batch for path in folder.iterdir() if (batch := _read(path)) is not None]
        self.batches = {batch.id: batch for batch in sorted(found, key=lambda one: one.created_at)}

    def close(self) -> None:
        """Give the folder free for another server."""
        self.files.close()
        os.close(self._lock)

    def add(self, owner: str, file_id: str, data: bytes, metadata: dict[str, str] | None) -> Batch:
        """Write a new batch over the requests in ``data``; not yet one of ``batches``.

        Those are the event loop's alone, which may be going over them.
        """
        now = int(time.time())
        batch = Batch(
            id=f"batch_{secrets.token_hex(16)}",
            owner=owner,
            input_file_id=file_id,
            created_at=now,
            expires_at=now + WINDOW_SECONDS,
            metadata=metadata,
        )
        path = self.folder / batch.id
        path.mkdir(mode=0o700)
        try:
            (path / "input.jsonl").write_bytes(data)
            self.save(batch)
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return batch

    def find(self, batch_id: str, owner: str) -> Batch:
        """Return one of an owner's batches; raises ``NoSuchBatch``."""
        batch = self.batches.get(batch_id)
        if batch is None or batch.owner != owner:
            raise NoSuchBatch(batch_id)
        return batch

    def listing(self, owner: str) -> Sequence[Batch]:
        """Return an owner's batches, the newest first."""
        return [batch for batch in reversed(self.batches.values()) if batch.owner == owner]

    def unfinished(self) -> Sequence[Batch]:
        """Return those on which there is something to do, the oldest first."""
        return [batch for batch in self.batches.values() if batch.unfinished]

    def save(self, batch: Batch) -> None:
        """Write what is known of a batch, as a whole or not at all."""
        path = self.folder / batch.id / "batch.json"
        aside = path.with_suffix(".new")
        # Work on a batch and its client's cancellation save it at the same time.
        with self._saving:
            with aside.open("w", encoding="utf-8") as target:
                target.write(batch.model_dump_json())
                target.flush()
                os.fsync(target.fileno())
            aside.replace(path)

    def input(self, batch: Batch) -> Path:
        """Return the file with its requests."""
        return self.folder / batch.id / "input.jsonl"

    def outcomes(self, batch: Batch, *, failed: bool) -> Path:
        """Return the file to which its outcomes are appended, good or ``failed`` ones."""
        return self.folder / batch.id / ("errors.jsonl" if failed else "output.jsonl")

    def append(self, batch: Batch, line: bytes, *, failed: bool) -> None:
        """Write one outcome; raises ``OSError``, and then nothing of it is there."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        target = os.open(self.outcomes(batch, failed=failed), flags, 0o600)
        try:
            # Cutting off a torn line must not take away one that came behind it.
            with self._appending:
                size = os.fstat(target).st_size
                if os.write(target, line) != len(line):
                    os.ftruncate(target, size)
                    raise OSError(errno.ENOSPC, "no room for an outcome")
        finally:
            os.close(target)

    def settled(self, batch: Batch) -> set[str]:
        """Return the ``custom_id`` of every outcome that is written, and count them in ``batch``.

        What was cut off goes.
        """
        good = _whole_lines(self.outcomes(batch, failed=False))
        bad = _whole_lines(self.outcomes(batch, failed=True))
        batch.completed, batch.failed = len(good), len(bad)
        return good | bad

    def clear(self) -> Sequence[Path]:
        """Forget what finished longer ago than ``ttl_seconds``; return the folders to remove."""
        now = time.time()
        gone = [
            batch
            for batch in self.batches.values()
            if not batch.unfinished and max(batch.reached.values()) + self.ttl_seconds < now
        ]
        for batch in gone:
            del self.batches[batch.id]
        return [self.folder / batch.id for batch in gone]


def _read(path: Path) -> Batch | None:
    """Return what a folder says of its batch; None, and gone, where its making was cut off."""
    if _BATCH_ID.fullmatch(path.name) is None:
        return None
    try:
        return Batch.model_validate_json((path / "batch.json").read_bytes())
    except FileNotFoundError:
        shutil.rmtree(path, ignore_errors=True)
    except (OSError, ValidationError):
        # Whatever it is, it is not ours to remove.
        return None
    return None


def _whole_lines(path: Path) -> set[str]:
    """Return the ids in a file of outcomes, which afterwards ends with a whole line."""
    found: set[str] = set()
    try:
        with path.open("r+b") as source:
            end = 0
            for data in source:
                try:
                    custom_id = from_json(data)["custom_id"] if data.endswith(b"\n") else None
                except (ValueError, KeyError, TypeError):
                    custom_id = None
                if not isinstance(custom_id, str):
                    break
                found.add(custom_id)
                end += len(data)
            source.truncate(end)
    except FileNotFoundError:
        pass
    return found
