"""The output of a batch: a line for each outcome, whole or not there, whenever the process dies.

A line is appended and forced to the disk before the next request is counted as done. A last line
without its end is what a kill left of a write: it is cut off, and its request asked again. Failures
of an earlier run are dropped when a batch begins, so that no request is ever twice in the file.
At the end the lines are put in the order of the requests, by one atomic rename.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, TypeAlias, overload

from qwen2vl_client.batch.outcome import Outcome
from qwen2vl_client.errors import BatchError, InvalidArgumentError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # its absence is tested where it is used


_HEAD = b'{"index": '
"""How every line begins: a torn one is known by it from the end of a file of something else."""

_Place: TypeAlias = tuple[int, int, int | None]
"""Where a line begins and ends in the file; its request's place, where that has changed."""


class Journal:
    """The file of one batch, held for one process; a context manager."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._done: dict[str, tuple[int, str]] = {}
        self._file = self._held()
        try:
            self._begin()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # of a line that ``append`` has told of
            self._file.close()

    def __len__(self) -> int:
        return len(self._done)

    def has(self, name: str, fingerprint: str, index: int) -> bool:
        """Tell whether a request is answered, and that its place is ``index`` now.

        Raises ``InvalidArgumentError`` where another request was answered under its name.
        """
        known = self._done.get(name)
        if known is None:
            return False
        if known[1] != fingerprint:
            raise InvalidArgumentError(
                f"{self.path} holds another request under the id {name!r}: the requests have "
                "changed since; choose another output, or remove that file"
            )
        self._done[name] = (index, fingerprint)
        return True

    def append(self, outcome: Outcome) -> None:
        """Write one outcome; when this returns it is on the disk. Raises ``BatchError``."""
        with self._told():
            self._file.write(_line(outcome))
            self._file.flush()
            os.fsync(self._file.fileno())
        self._done[outcome.id] = (outcome.index, outcome.request)

    def finish(self) -> None:
        """Put the lines in the order of the requests, each with its place; ``BatchError``."""
        lines = [(self._done[one.id][0], one.index, *place) for one, *place in self._lines()]
        ordered = sorted(lines)
        if lines != ordered or any(now != then for now, then, *_ in lines):
            self._rewrite(
                [(start, stop, now if now != then else None) for now, then, start, stop in ordered]
            )

    def outcomes(self) -> Outcomes:
        """Return what the file holds, read when it is asked for."""
        return Outcomes(self.path, len(self._done))

    def _held(self) -> IO[bytes]:
        while True:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = self.path.open("a+b")
            except OSError as error:
                reason = error.strerror or str(error)
                raise InvalidArgumentError(f"cannot write {self.path}: {reason}") from error
            self._lock(file)
            # Another process may have renamed a new file here between the two lines above.
            if os.fstat(file.fileno()).st_ino == self.path.stat().st_ino:
                return file
            file.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Name the file that cannot be written, and what to do."""
        try:
            yield
        except OSError as error:
            raise BatchError(
                f"cannot write {self.path}: {error.strerror or error}; what was written before is "
                "kept: mend that, and start the batch again with the same output"
            ) from error

    def _lock(self, file: IO[bytes]) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise InvalidArgumentError(f"another batch is writing {self.path}") from None

    def _begin(self) -> None:
        kept: list[_Place] = []
        total = 0
        for outcome, start, stop in self._lines():
            total += 1
            if outcome.ok and outcome.id not in self._done:
                kept.append((start, stop, None))
                self._done[outcome.id] = (outcome.index, outcome.request)
        whole = kept[-1][1] if kept else 0
        if len(kept) == total:
            with self._told():
                self._file.truncate(whole)  # what a kill left of the last write
        else:
            self._rewrite(kept)

    def _lines(self) -> Iterator[tuple[Outcome, int, int]]:
        """Yield each whole line's outcome and where it lies; stops before a torn end."""
        with self.path.open("rb") as file:
            start = 0
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n") and line[: len(_HEAD)] == _HEAD[: len(line)]:
                    return
                try:
                    outcome = Outcome.from_json(json.loads(line))
                except (ValueError, TypeError, RecursionError):
                    raise InvalidArgumentError(
                        f"{self.path}, line {number} is no outcome of a batch; choose another "
                        "output"
                    ) from None
                yield outcome, start, start + len(line)
                start += len(line)

    def _rewrite(self, places: Sequence[_Place]) -> None:
        """Replace the file by one that holds the lines at ``places``, at once or not at all."""
        path = self.path.resolve()  # a link stays one
        new = path.with_name(path.name + ".new")
        with self._told(), path.open("rb") as old, contextlib.ExitStack() as stack:
            file = new.open("w+b")
            stack.callback(new.unlink, missing_ok=True)
            stack.callback(file.close)
            with contextlib.suppress(OSError):  # of a disk without modes
                shutil.copymode(path, new)
            self._lock(file)  # before it has the name, so that it is never there unlocked
            for start, stop, index in places:
                old.seek(start)
                line = old.read(stop - start)
                if index is not None:
                    line = _line(replace(Outcome.from_json(json.loads(line)), index=index))
                file.write(line)
            file.flush()
            os.fsync(file.fileno())
            new.replace(path)
            _sync_folder(path.parent)
            stack.pop_all()
        self._file.close()
        self._file = file


class Outcomes(Sequence[Outcome]):
    """The outcomes in a file, read anew at each pass, one at a time."""

    def __init__(self, path: Path, count: int) -> None:
        self._path, self._count = path, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Outcome]:
        with self._path.open("rb") as file:
            for line in file:
                yield Outcome.from_json(json.loads(line))

    @overload
    def __getitem__(self, place: int) -> Outcome: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Outcome]: ...
    def __getitem__(self, place: Any) -> Any:
        """Return what a list of them would; reads the file."""
        return list(self)[place]


def _line(outcome: Outcome) -> bytes:
    raw = json.dumps(outcome.to_json(), ensure_ascii=False)
    # Half of a surrogate pair (a file name that is not UTF-8) becomes JSON's escape for it.
    return raw.encode("utf-8", "backslashreplace") + b"\n"


def _sync_folder(folder: Path) -> None:
    """Force a rename to the disk, where the system lets a folder be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
