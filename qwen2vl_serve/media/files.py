"""Uploaded files: kept by their content for a while, so that a picture is sent once.

A file's id is the hash of its bytes and its owner. In the folder each is one file of that name: a
line of JSON (name, purpose, times), then the bytes; written aside and renamed, so that none is ever
half there.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3
from pydantic import BaseModel, ConfigDict

from qwen2vl_serve.media.lru import CacheFigures

SWEEP_SECONDS = 60.0
"""How late an expired file may leave the disk; it is not served in the meantime."""

UNFINISHED_SECONDS = 3600.0
"""What was written aside so long ago in a shared folder is nobody's any more."""

_FILE_ID = re.compile(r"file-[0-9a-f]{64}")
_UNFINISHED = ".upload-"
_LONGEST_HEAD = 64 * 1024


class NoSuchFile(Exception):
    """No file has this id: never uploaded, deleted, expired or evicted."""


class StoredFile(BaseModel):
    """What is known of a file; ``bytes`` its size, times in whole seconds since the epoch."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int
    owner: str = ""


class FileStore:
    """Files within a quota; thread-safe. What was unused the longest makes room for what is new.

    Without a ``folder`` they lie in a temporary one that ``close`` removes. A folder belongs to one
    server: what it holds is read once, here. Raises ``OSError`` when it cannot be used. Where it is
    ``shared`` with others, on a disk that all of them mount, each finds what any of them took; who
    makes room knows only its own uses.

    Each file has an owner; to any other it is not there. All share the quota.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        max_files: int,
        max_bytes: int,
        ttl_seconds: float,
        shared: bool = False,
    ) -> None:
        self._shared = shared and folder is not None
        self.max_files = max_files
        self.max_bytes = max_bytes
        self.ttl_seconds = ttl_seconds
        self._folder = folder
        self._temporary = folder is None
        self._lock = threading.Lock()
        self._files: OrderedDict[str, StoredFile] = OrderedDict()  # the longest unused first
        self._total = self._hits = self._misses = self._evictions = 0
        self._closed = threading.Event()
        self._sweeper: threading.Thread | None = None
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._read_folder(folder)

    def add(
        self,
        data: bytes,
        filename: str,
        purpose: str,
        seconds: float | None = None,
        owner: str = "",
    ) -> StoredFile:
        """Keep ``data`` for ``seconds`` (at most, and by default, ``ttl_seconds``).

        Bytes that are there already begin their time anew under the name given now. Raises
        ``ValueError`` when they alone exceed ``max_bytes``.
        """
        if len(data) > self.max_bytes:
            raise ValueError(f"{len(data)} bytes exceed the {self.max_bytes} of all files")
        now = int(time.time())
        kept = min(self.ttl_seconds if seconds is None else seconds, self.ttl_seconds)
        # Keyed by its owner: the same bytes of two owners are two files, and neither learns of the
        # other's.
        hasher = blake3(key=blake3(owner.encode()).digest()) if owner else blake3()
        digest = hasher.update(data).hexdigest()
        file = StoredFile(
            id=f"file-{digest}",
            filename=filename,
            purpose=purpose,
            bytes=len(data),
            created_at=now,
            expires_at=now + math.ceil(kept),
            owner=owner,
        )
        unfinished = self._write_aside(file, data)
        with self._lock:
            self._forget(file.id)
            unfinished.replace(self._path(file.id))
            self._remember(file)
            self._look_around()
            self._expire()
            self._make_room()
        return file

    def read(self, file_id: str, owner: str = "") -> bytes:
        """Return a file's bytes; raises ``NoSuchFile``."""
        with self.open(file_id, owner) as source:
            return source.read()

    def open(self, file_id: str, owner: str = "") -> BinaryIO:
        """Return a file to be read from its first byte, whoever deletes it meanwhile.

        Raises ``NoSuchFile``.
        """
        with self._lock:
            self._find(file_id, owner)
            self._files.move_to_end(file_id)
            try:
                source = self._path(file_id).open("rb")
            except FileNotFoundError:
                self._forget(file_id)
                raise NoSuchFile(file_id) from None
        source.readline(_LONGEST_HEAD)
        return source

    def look_up(self, file_id: str, owner: str = "") -> StoredFile:
        """Return what is known of a file that is to be shown; raises ``NoSuchFile``. Counted."""
        with self._lock:
            try:
                file = self._find(file_id, owner)
            except NoSuchFile:
                self._misses += 1
                raise
            self._hits += 1
            return file

    def find(self, file_id: str, owner: str = "") -> StoredFile:
        """Return what is known of a file; raises ``NoSuchFile``."""
        with self._lock:
            return self._find(file_id, owner)

    def listing(self, owner: str = "") -> Sequence[StoredFile]:
        """Return an owner's files, the newest first."""
        with self._lock:
            self._look_around()
            self._expire()
            files = [file for file in self._files.values() if file.owner == owner]
        return sorted(files, key=lambda file: (-file.created_at, file.id))

    def count(self) -> int:
        """Return how many files are kept."""
        return len(self._files)

    def size(self) -> int:
        """Return how many bytes they hold together."""
        return self._total

    def figures(self) -> CacheFigures:
        """Return what ``/metrics`` shows; what expired or was deleted is no eviction."""
        return CacheFigures(
            self._hits, self._misses, self._evictions, len(self._files), self._total
        )

    def delete(self, file_id: str, owner: str = "") -> None:
        """Remove a file; raises ``NoSuchFile``."""
        with self._lock:
            self._remove(self._find(file_id, owner))

    def close(self) -> None:
        """Stop; remove the folder where it was a temporary one."""
        self._closed.set()
        with self._lock:
            if self._temporary and self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _look_around(self) -> None:
        """Take note of what others that share the folder took and removed."""
        if not self._shared or self._folder is None:
            return
        names = {path.name for path in self._folder.glob("file-*")}
        for name in self._files.keys() - names:
            self._forget(name)
        for name in names - self._files.keys():
            self._look_at(name)

    def _look_at(self, file_id: str) -> None:
        """Take note of what others that share the folder did with one file."""
        self._forget(file_id)
        if _FILE_ID.fullmatch(file_id) and (file := _head(self._path(file_id))) is not None:
            self._remember(file)

    def _find(self, file_id: str, owner: str) -> StoredFile:
        file = self._unexpired(file_id)
        if file is None or file.owner != owner:
            raise NoSuchFile(file_id)
        return file

    def _unexpired(self, file_id: str) -> StoredFile | None:
        """Return a file whose time is not over, as far as all know that share the folder.

        One whose time is over goes.
        """
        if self._shared:
            self._look_at(file_id)
        file = self._files.get(file_id)
        if file is not None and file.expires_at <= time.time():
            self._remove(file)
            return None
        return file

    def _write_aside(self, file: StoredFile, data: bytes) -> Path:
        head = file.model_dump_json().encode() + b"\n"
        folder = self._prepared_folder()
        with tempfile.NamedTemporaryFile(dir=folder, prefix=_UNFINISHED, delete=False) as target:
            path = Path(target.name)
            try:
                target.write(head)
                target.write(data)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        return path

    def _prepared_folder(self) -> Path:
        with self._lock:
            # Systems clear away temporary folders that lay idle for long.
            if self._folder is None or (self._temporary and not self._folder.is_dir()):
                self._folder = Path(tempfile.mkdtemp(prefix="qwen2vl-files-"))
            return self._folder

    def _path(self, file_id: str) -> Path:
        if self._folder is None:
            raise NoSuchFile(file_id)
        return self._folder / file_id

    def _read_folder(self, folder: Path) -> None:
        """Take over what an earlier server left; what it left unfinished goes."""
        for path in folder.glob(f"{_UNFINISHED}*"):
            with contextlib.suppress(FileNotFoundError):  # finished by the other server meanwhile
                age = time.time() - path.stat().st_mtime
                if not self._shared or age > UNFINISHED_SECONDS:
                    path.unlink()
        found = [file for path in folder.glob("file-*") if (file := _head(path)) is not None]
        for file in sorted(found, key=lambda file: file.created_at):
            self._remember(file)
        self._expire()
        self._make_room()

    def _remember(self, file: StoredFile) -> None:
        self._files[file.id] = file
        self._total += file.bytes
        if self._sweeper is None:
            self._sweeper = threading.Thread(target=self._sweep, name="files", daemon=True)
            self._sweeper.start()

    def _forget(self, file_id: str) -> None:
        if (file := self._files.pop(file_id, None)) is not None:
            self._total -= file.bytes

    def _remove(self, file: StoredFile) -> None:
        self._forget(file.id)
        self._path(file.id).unlink(missing_ok=True)

    def _make_room(self) -> None:
        while len(self._files) > self.max_files or self._total > self.max_bytes:
            self._remove(next(iter(self._files.values())))
            self._evictions += 1

    def _expire(self) -> None:
        now = time.time()
        for file in [one for one in self._files.values() if one.expires_at <= now]:
            self._unexpired(file.id)

    def _sweep(self) -> None:
        while not self._closed.wait(SWEEP_SECONDS):
            with self._lock:
                self._expire()


def _head(path: Path) -> StoredFile | None:
    """Return what a file of the folder says of itself; None, and gone, where it is damaged."""
    if _FILE_ID.fullmatch(path.name) is None:
        return None
    with contextlib.suppress(OSError), path.open("rb") as source:
        head = source.readline(_LONGEST_HEAD)
        seen = os.fstat(source.fileno())
        with contextlib.suppress(ValueError):
            file = StoredFile.model_validate_json(head)
            if file.id == path.name and seen.st_size == len(head) + file.bytes:
                return file
        # Another server may have put a whole one there meanwhile.
        if os.path.samestat(seen, path.stat()):
            path.unlink()
    return None
