"""A bound on what is worked on at once, measured in whatever unit its users agree on."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    """Admits work as long as the sum of its sizes stays within ``capacity``, in order of arrival.

    What is larger than the whole capacity passes alone. For one event loop.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def holding(self, size: int) -> AsyncIterator[None]:
        """Wait until ``size`` fits, and give it back at the end of the block."""
        size = min(size, self.capacity)
        await self._enter(size)
        try:
            yield
        finally:
            self._leave(size)

    async def _enter(self, size: int) -> None:
        if not self._waiting and self.held + size <= self.capacity:
            self.held += size
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._admit()
            else:
                # Let in and cancelled at once: what was taken for it goes back.
                self._leave(size)
            raise

    def _leave(self, size: int) -> None:
        self.held -= size
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            size, turn = self._waiting[0]
            # Who was cancelled while waiting leaves the line here, before its task has run.
            if not turn.cancelled() and self.held + size > self.capacity:
                return
            self._waiting.popleft()
            if not turn.cancelled():
                self.held += size
                turn.set_result(None)
