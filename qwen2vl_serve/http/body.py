"""Bodies of requests, read within bounds of size, time and memory."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from functools import partial

from fastapi import Request

from qwen2vl_serve.errors import (
    APIError,
    RateLimited,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedContentType,
)
from qwen2vl_serve.line import Refused

MOST_PIECES = 4096
"""Of a body that comes in crumbs, how many are held apart: each takes more room than a byte."""


class Bodies:
    """A bound on the bytes of all bodies together, which come whether they are wanted or not.

    Those of a key that has a name hold at most ``share``, so that others find room as well.
    """

    def __init__(self, capacity: int, share: int) -> None:
        self.capacity = capacity
        self.share = share
        self._held: Counter[str] = Counter()

    @property
    def held(self) -> int:
        """How many bytes are held."""
        return self._held.total()

    def take(self, key: str, size: int) -> None:
        """Hold ``size`` bytes more for ``key``.

        Raises:
            Refused: there is no room for them.
            RateLimited: the key would hold more than one may.
        """
        held = self.held
        if held + size > self.capacity:
            text = f"The server holds {held} bytes of requests already"
            raise Refused("bytes", text, "limits.max_held_body_bytes")
        if key and self._held[key] + size > self.share:
            raise RateLimited(
                f"The requests of this key hold {self._held[key]} bytes already, and those of one "
                f"key at most {self.share} (half of limits.max_held_body_bytes): wait for an "
                "answer.",
                retry_after=1,
            )
        self._held[key] += size

    def give_back(self, key: str, size: int) -> None:
        """Hold ``size`` less for ``key``."""
        self._held[key] -= size
        if not self._held[key]:
            del self._held[key]


class BodyReader:
    """Reads bodies that hold JSON; ``overloaded`` makes the error of there being no room.

    ``resize`` sets its bounds: bytes of one body, seconds until it is there, bytes of all.
    ``kind`` is what they hold instead of JSON, ``setting`` the profile's field that bounds one.
    """

    def __init__(
        self,
        overloaded: Callable[[Refused], APIError],
        *,
        kind: str = "application/json",
        setting: str = "limits.max_body_bytes",
    ) -> None:
        self._overloaded = overloaded
        self._kind = kind
        self._setting = setting
        self._room = Bodies(0, 0)
        self.max_bytes = 0
        self.seconds = 0.0

    @property
    def held(self) -> int:
        """Bytes of the bodies of requests that are being answered."""
        return self._room.held

    def resize(self, max_bytes: int, seconds: float, most_held: int) -> None:
        """Take new bounds; what is held already is not asked again."""
        self.max_bytes = max_bytes
        self.seconds = seconds
        self._room.capacity = max(most_held, max_bytes)
        self._room.share = max(most_held // 2, max_bytes)

    async def read(self, request: Request) -> bytes:
        """Return a body, within the limits of size and time."""
        kind = request.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != self._kind:
            raise UnsupportedContentType(f"The content type is {kind[:60]!r}; send {self._kind}.")
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.strip().lower() != "identity":
            raise UnsupportedContentType(
                f"The body is encoded as {encoding[:60]!r}; send it uncompressed."
            )
        limit = self.max_bytes
        key: str = getattr(request.state, "key", "")
        # Joined at the end: a growing buffer is copied over and over, milliseconds of a photo.
        pieces: list[bytes] = []
        size = 0
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and len(declared) < 20 and int(declared) > limit:
            raise self._too_large(int(declared))
        try:
            async with asyncio.timeout(self.seconds):
                async for piece in request.stream():
                    if size + len(piece) > limit:
                        raise self._too_large(size + len(piece))
                    self._room.take(key, len(piece))
                    size += len(piece)
                    pieces.append(piece)
                    if len(pieces) == MOST_PIECES:
                        pieces = [b"".join(pieces)]
        except TimeoutError:
            raise RequestTimeout(
                f"The body took more than {self.seconds:g} seconds; send smaller pictures, or "
                "raise limits.body_seconds in the profile."
            ) from None
        except Refused as refusal:
            raise self._overloaded(refusal) from None
        finally:
            request.state.call.at_end(partial(self._room.give_back, key, size))
        return b"".join(pieces)

    def _too_large(self, size: int) -> RequestTooLarge:
        return RequestTooLarge(
            f"The body holds {size} bytes or more; at most {self.max_bytes} are read: "
            f"send smaller or fewer pictures, or raise {self._setting} in the profile."
        )
