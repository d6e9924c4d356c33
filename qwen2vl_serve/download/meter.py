"""How a download goes, as lines: for logs and for what is no terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

EVERY_SECONDS = 5.0


class Meter:
    """A ``Progress`` that tells a line every few seconds, and one at the end.

    The rate, and the time that is left, are of the bytes that were fetched.
    """

    def __init__(
        self, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tell = tell
        self._clock = clock
        self._lock = threading.Lock()
        self._total = self._done = self._fetched = 0
        self._begun = self._told = 0.0

    def begin(self, total: int) -> None:
        """Take note of the bytes that the checkpoint has in all."""
        self._total = total
        self._begun = self._told = self._clock()

    def advance(self, count: int, *, fetched: bool = True) -> None:
        """Take note of bytes that are here; a negative count takes some back."""
        with self._lock:
            self._done += count
            self._fetched += count if fetched else 0
            now = self._clock()
            ended = count > 0 and self._done >= self._total
            if ended or now - self._told >= EVERY_SECONDS:
                self._told = now
                self._tell(self.line())

    def say(self, line: str) -> None:
        """Tell a line at once."""
        self._tell(line)

    def line(self) -> str:
        """Return amounts, rate and the time that is left."""
        seconds = max(self._clock() - self._begun, 1e-3)
        rate = max(self._fetched, 0) / seconds
        text = f"{_amount(self._done)} of {_amount(self._total)}, {_amount(rate)}/s"
        if self._done < self._total and rate > 0:
            text += f", {_duration((self._total - self._done) / rate)} left"
        return text


def _amount(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
