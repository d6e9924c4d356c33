"""Giving back, in quiet times, the memory that big pictures leave with malloc.

glibc keeps freed blocks of up to 32 MB for the next picture. That is bounded and saves a quarter of
the CPU time of decoding it, but on a server that nobody asks it is memory for nothing.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

from prometheus_client.metrics import MetricWrapperBase

from qwen2vl_serve.http.envelope import Metrics

QUIET_SECONDS = 30
"""How long nothing is answered and no picture comes, before memory is given back."""


class IdleMemory:
    """Watches the server's own figures; ``look`` is to be called once a second."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._seen = 0.0
        self._quiet = 0
        self._to_give = False

    def look(self) -> bool:
        """Tell whether a quiet time has just lasted long enough, after one with media."""
        seen = _total(self._metrics.media_bytes, "_total")
        running = _total(self._metrics.in_flight)
        if running or seen != self._seen:
            self._to_give |= seen != self._seen
            self._seen, self._quiet = seen, 0
            return False
        self._quiet += 1
        if self._quiet < QUIET_SECONDS or not self._to_give:
            return False
        self._to_give = False
        return True


def _total(metric: MetricWrapperBase, ending: str = "") -> float:
    # The registry has a lookup as well, which collects everything for each value.
    (family,) = metric.collect()
    return sum(one.value for one in family.samples if one.name == family.name + ending)


def give_back() -> None:
    """Return to the system what malloc holds free; some 15 ms, during which malloc waits."""
    with suppress(OSError, AttributeError):  # musl and macOS have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
