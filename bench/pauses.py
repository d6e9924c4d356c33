"""When the machine stood still: times in which not even a process that only sleeps was run.

Guests of a shared host are stopped for a tenth of a second, now and then for seconds. What is
measured across such a pause tells nothing about a server.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

PAUSE_SECONDS = 0.05
"""A sleep that is late by so much is a pause. On full cores it comes late by some milliseconds."""

AFTER_SECONDS = 0.1
"""For so long after a pause what had piled up is still being worked on."""

# Line-buffered, so that nothing is lost whenever it is ended; the clock is one for all processes.
_WATCH = f"""
import time
while True:
    begun = time.monotonic()
    time.sleep(0.005)
    ended = time.monotonic()
    if ended - begun > 0.005 + {PAUSE_SECONDS}:
        print(begun, ended, flush=True)
"""


@dataclass
class Pauses:
    """Pauses on the clock of ``time.monotonic``, known once the watching has ended."""

    known: list[tuple[float, float]] = field(default_factory=list)

    def touch(self, begun: float, ended: float) -> bool:
        """Tell whether something that took from ``begun`` to ``ended`` met a pause."""
        return any(one < ended and begun < two + AFTER_SECONDS for one, two in self.known)

    def within(self, begun: float, ended: float) -> float:
        """Return how many seconds of that time were pauses."""
        return sum(max(0.0, min(two, ended) - max(one, begun)) for one, two in self.known)


@contextmanager
def watched() -> Iterator[Pauses]:
    """Watch for pauses; what it yields knows them at the end."""
    pauses = Pauses()
    # A session of its own: Linux shares the cores between sessions first, so that a busy server
    # does not keep it waiting.
    process = subprocess.Popen(  # noqa: S603 -- our own words
        [sys.executable, "-c", _WATCH], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield pauses
    finally:
        process.terminate()
        told, _ = process.communicate()
        pauses.known += _read(told.splitlines())


def _read(lines: Sequence[str]) -> Iterator[tuple[float, float]]:
    for line in lines:
        begun, _, ended = line.partition(" ")
        if ended:
            yield float(begun), float(ended)
