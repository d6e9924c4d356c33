"""Named keys at rest: a JSON file of hashes, limits and expiries that ``keys`` commands write.

The secrets are ours to choose: 256 random bits each, shown once. Nothing can be guessed from a
fast hash of those, so a slow one, which is for passwords that people choose, would only slow the
server down.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import shlex
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from qwen2vl_serve.errors import ProfileError, SetupError
from qwen2vl_serve.profile import default_keys_path

PREFIX = "sk-q2vl-"
"""What our secrets begin with, so that people and scanners of repositories recognise them."""

MOST_KEYS = 10_000
"""More make every request's comparison slow."""

Count = Annotated[int, Field(ge=1, le=2**53)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class KeyLimits(_Strict):
    """What a key may use; None is no limit. ``concurrent`` counts requests being answered."""

    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    visual_tokens_per_minute: Count | None = None
    concurrent: Count | None = None

    def __bool__(self) -> bool:
        return any(value is not None for _, value in self)


NO_LIMITS = KeyLimits()


class NamedKey(_Strict):
    """A key without its secret; times in seconds since the epoch, ``models`` None for all."""

    name: Name
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created_at: int
    expires_at: int | None = None
    models: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    limits: KeyLimits = NO_LIMITS

    def expired(self, now: float) -> bool:
        """Tell whether the key's time is over at ``now``, in seconds since the epoch."""
        return self.expires_at is not None and now >= self.expires_at


class _Document(_Strict):
    keys: Annotated[tuple[NamedKey, ...], Field(max_length=MOST_KEYS)]

    @model_validator(mode="after")
    def _unique(self) -> Self:
        if len({key.name for key in self.keys}) < len(self.keys):
            raise PydanticCustomError("twice", "two keys have one name")
        return self


def expiry_of(text: str, now: datetime) -> int:
    """Return when ``2027-01-01`` (its first second, UTC), ``30d`` or ``12h`` is.

    In seconds since the epoch. Raises ``SetupError`` for other words and for the past.
    """
    span = re.fullmatch(r"([1-9][0-9]{0,4})([dh])", text)
    try:
        if span is not None:
            count = int(span[1])
            end = now + (timedelta(days=count) if span[2] == "d" else timedelta(hours=count))
        else:
            end = datetime.combine(date.fromisoformat(text), datetime.min.time(), UTC)
    except ValueError:
        raise SetupError(
            f"--expires {text[:40]!r}: give a day as 2027-01-01 or a time as 30d or 12h"
        ) from None
    if end <= now:
        raise SetupError(f"--expires {text}: is over already")
    return int(end.timestamp())


def digest_of(secret: str) -> bytes:
    """Return what is kept and compared of a secret: its SHA-256."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


class KeysFile:
    """The file at ``path``; made by the first ``add``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def in_use(self) -> bool:
        """Whether a server has to read it: it is there, or is one that a profile has named.

        At its default place it may be absent. Elsewhere that is a wrong path, which must not leave
        a server open.
        """
        return self.state() is not None or self.path != default_keys_path()

    def read(self) -> Sequence[NamedKey]:
        """Return the keys; raises ``ProfileError`` for what is no such file."""
        try:
            return _Document.model_validate_json(self.path.read_bytes()).keys
        except FileNotFoundError as error:
            raise ProfileError(
                f"keys file {self.path}: {error.strerror}; correct server.keys_file, or make the "
                f"file with `qwen2vl-serve keys add NAME --file {shlex.quote(str(self.path))}`"
            ) from None
        except OSError as error:
            raise ProfileError(f"keys file {self.path}: {error.strerror}") from None
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(step) for step in first["loc"]) or "the file"
            raise ProfileError(f"keys file {self.path}: {where}: {first['msg']}") from None

    def state(self) -> tuple[int, int, int] | None:
        """Return what changes whenever the file does; None while there is none."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def add(
        self,
        name: str,
        limits: KeyLimits = NO_LIMITS,
        models: Sequence[str] | None = None,
        expires_at: int | None = None,
    ) -> str:
        """Make a key of that name and return its secret, which is kept nowhere.

        Raises:
            SetupError: the name is taken or unfit, or the file cannot be read or written.
        """
        secret = PREFIX + secrets.token_urlsafe(32)
        try:
            key = NamedKey(
                name=name,
                sha256=digest_of(secret).hex(),
                created_at=int(time.time()),
                expires_at=expires_at,
                models=None if models is None else tuple(models),
                limits=limits,
            )
        except ValidationError:
            raise SetupError(
                f"the name {name[:80]!r} is unfit; use at most 64 of A-Z a-z 0-9 . _ @ -, "
                "beginning with a letter or digit"
            ) from None

        def added(keys: Sequence[NamedKey]) -> Sequence[NamedKey]:
            if any(one.name == name for one in keys):
                raise SetupError(f"there is a key {name!r} already; revoke it first")
            if len(keys) >= MOST_KEYS:
                raise SetupError(f"the file holds {MOST_KEYS} keys, the most it may")
            return [*keys, key]

        self._change(added)
        return secret

    def revoke(self, name: str) -> None:
        """Remove a key; the file stays, so that a server whose last key went stays closed.

        Raises:
            SetupError: there is none of that name, or the file cannot be read or written.
        """

        def without(keys: Sequence[NamedKey]) -> Sequence[NamedKey]:
            left = [one for one in keys if one.name != name]
            if len(left) == len(keys):
                names = ", ".join(one.name for one in keys) or "none"
                raise SetupError(f"there is no key {name[:80]!r}; there are: {names}")
            return left

        self._change(without)

    def _change(self, change: Callable[[Sequence[NamedKey]], Sequence[NamedKey]]) -> None:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(self.path.parent):
                keys = change(self.read() if self.path.exists() else ())
                _replace(self.path, _Document(keys=tuple(keys)).model_dump_json(indent=2) + "\n")
        except OSError as error:
            raise SetupError(f"keys file {self.path}: cannot write: {error.strerror}") from None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep others from changing a file of ``folder`` between our reading and writing it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    """Write aside and rename: a reader sees the old file or the new, and only its owner does.

    The owner stays who it was: a file that root changes must stay readable for the server.
    """
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".keys-", delete=False) as new:
        try:
            with contextlib.suppress(FileNotFoundError, PermissionError):
                owner = path.stat()
                os.fchown(new.fileno(), owner.st_uid, owner.st_gid)
            os.fchmod(new.fileno(), stat.S_IRUSR | stat.S_IWUSR)
            new.write(text)
            new.flush()
            os.fsync(new.fileno())
            Path(new.name).replace(path)
        except BaseException:
            Path(new.name).unlink(missing_ok=True)
            raise
