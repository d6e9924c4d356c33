"""One of several engines: started, watched, lost, started anew."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

from qwen2vl_serve.engine import Engine, EngineState
from qwen2vl_serve.engines.pulse import Pulse
from qwen2vl_serve.errors import EngineUnavailable

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

Start = Callable[[], AbstractAsyncContextManager[Engine]]
"""Starts an engine; its context's end takes away whatever is left of it, dead or alive."""

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds between an engine's end and its next start, doubled with each start that fails."""

_LOOK_SECONDS = 1.0


class Member:
    """A place among several engines, and the engine that stands in it."""

    def __init__(self, index: int, start: Start, watch: Callable[[Engine], Pulse]) -> None:
        self.index = index
        self.state: EngineState = "starting"
        self._start = start
        self._watch = watch
        self._lost = asyncio.Event()
        self._life: AbstractAsyncContextManager[Engine] | None = None
        self._ending: asyncio.Future[bool | None] | None = None
        self._engine: Engine | None = None
        self._pulse: Pulse | None = None

    @property
    def engine(self) -> Engine:
        """The engine, or the one that stood here last."""
        if self._engine is None:
            raise EngineUnavailable("The engine has not started yet.")
        return self._engine

    async def begin(self) -> None:
        """Start the engine; whatever fails passes unchanged. ``serve`` opens it to requests."""
        life = self._start()
        engine = await life.__aenter__()
        self._life, self._engine, self._pulse = life, engine, self._watch(engine)

    def serve(self) -> None:
        """Take requests from now on."""
        self._lost.clear()
        self.state = "serving"

    async def end(self) -> None:
        """Stop the engine, or take away what is left of it."""
        self.state = "starting"
        if self._pulse is not None:
            self._pulse.stop()
        life, self._life = self._life, None
        if life is not None:
            self._ending = asyncio.ensure_future(life.__aexit__(None, None, None))
        if self._ending is not None and not self._ending.done():
            # Cut off on its way it would leave processes behind.
            await asyncio.shield(self._ending)

    def lose(self) -> None:
        """Give no more requests to the engine, and have ``tend`` put another in its place."""
        self.state = "starting"
        self._lost.set()

    async def look(self, *, replace_hung: bool) -> None:
        """See whether the engine lives and moves; to be called about once a second."""
        if self.state == "starting" or self._pulse is None:
            return
        try:
            await self.engine.check()
        except EngineUnavailable:
            logger.error("engine %d has stopped", self.index)
            self.lose()
            return
        self._pulse.look()
        if not self._pulse.hangs:
            self.state = "serving"
        elif replace_hung:
            logger.error("engine %d has not moved for %.0f s", self.index, self._pulse.stalled)
            self.lose()
        else:
            self.state = "hung"

    async def lost(self, engine: Engine) -> bool:
        """Whether what ``engine`` was asked here has failed because it is gone."""
        await self.look(replace_hung=False)
        return self.state == "starting" or self._engine is not engine

    async def asked(self, work: Awaitable[_T]) -> _T:
        """Await what the engine is asked for, no longer than it lives.

        vLLM never ends the wait for what a dead engine was asked beside answers.

        Raises:
            EngineUnavailable: it ended before.
        """
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({task}, timeout=_LOOK_SECONDS))[0]:
                await self.engine.check()
            return await task
        finally:
            task.cancel()

    async def tend(self, admit: Callable[[Member], Awaitable[None]]) -> None:
        """Whenever the engine is lost, start another until one is up and admitted."""
        while True:
            await self._lost.wait()
            pause = FIRST_PAUSE
            while self.state == "starting":
                try:
                    await self.end()
                    await asyncio.sleep(pause)
                    await self.begin()
                    await admit(self)
                except Exception:
                    # Whatever keeps it from starting may pass: memory that is not free yet, a card.
                    logger.exception("engine %d did not start anew", self.index)
                    pause = min(2 * pause, LONGEST_PAUSE)
