"""A cache bounded by bytes, with the figures that every cache of this server shows."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class CacheFigures:
    """Look-ups that found something or nothing, what made room for others, what is kept now."""

    hits: int
    misses: int
    evictions: int
    entries: int
    bytes: int


class LRU(Generic[_Value]):
    """Values by key, together of at most ``max_bytes``; the longest unused makes room.

    For one event loop. Without any bytes nothing is kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._values: OrderedDict[str, tuple[_Value, int]] = OrderedDict()
        self._bytes = self._hits = self._misses = self._evictions = 0

    def get(self, key: str) -> _Value | None:
        """Return the value, None where there is none (any more)."""
        if key not in self._values:
            self._misses += 1
            return None
        self._hits += 1
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: str, value: _Value, size: int) -> None:
        """Keep ``value``, of ``size`` bytes; one that is larger than the cache is not kept."""
        if key in self._values:
            self._bytes -= self._values.pop(key)[1]
        if size > self.max_bytes:
            return
        self._values[key] = value, size
        self._bytes += size
        while self._bytes > self.max_bytes:
            _, (_, gone) = self._values.popitem(last=False)
            self._bytes -= gone
            self._evictions += 1

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def figures(self) -> CacheFigures:
        """Return what ``/metrics`` shows."""
        return CacheFigures(
            self._hits, self._misses, self._evictions, len(self._values), self._bytes
        )
