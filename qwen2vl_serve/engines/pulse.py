"""Whether the engine moves: a process that lives and answers nothing is no use to anybody."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from qwen2vl_serve.engine import Engine
from qwen2vl_serve.errors import APIError, EngineUnavailable

logger = logging.getLogger(__name__)

_LONGEST_LOOK = 2.0
"""What lies between two looks counts at most so many seconds: a process that was itself stopped,
or starved, must not take that for the engine's fault."""


class Pulse:
    """Watches the engine's progress; ``look`` is to be called about once a second.

    With work pending the engine has to move within ``hang_seconds``; 0 asks nothing of it. When it
    has been idle for ``probe_seconds`` it is asked for one token, which is work like any other; 0
    never asks.
    """

    def __init__(
        self,
        engine: Engine,
        hang_seconds: float,
        probe_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._hang_seconds = hang_seconds
        self._probe_seconds = probe_seconds
        self._clock = clock
        self._seen = engine.progress
        self._looked = self._moved = clock()
        self._probe: asyncio.Task[None] | None = None
        self.stalled = 0.0

    @property
    def hangs(self) -> bool:
        """Whether the engine has had work for longer than it may take without moving."""
        return 0 < self._hang_seconds <= self.stalled

    def require(self) -> None:
        """Return while the engine is believed to move.

        Raises:
            EngineUnavailable: it hangs.
        """
        if self.hangs:
            raise EngineUnavailable(
                f"The engine has not moved for {self.stalled:.0f} s though it has work."
            )

    def look(self) -> None:
        """Take note of what the engine has done since the last look."""
        now, progress = self._clock(), self._engine.progress
        elapsed = min(now - self._looked, _LONGEST_LOOK)
        self._looked = now
        if progress != self._seen:
            self._seen, self._moved, self.stalled = progress, now, 0.0
        elif self._engine.pending:
            # Added up: clients that give up waiting must not make a hung engine look idle.
            self.stalled += elapsed
        elif self._probe_seconds and now - self._moved >= self._probe_seconds:
            self._ask()

    def stop(self) -> None:
        """Ask nothing more of the engine."""
        if self._probe is not None:
            self._probe.cancel()

    def _ask(self) -> None:
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._one_token())

    async def _one_token(self) -> None:
        try:
            await self._engine.probe()
        except APIError as error:
            logger.warning("the idle engine was asked for a token: %s", error)
        else:
            self._moved = self._clock()
            self.stalled = 0.0
