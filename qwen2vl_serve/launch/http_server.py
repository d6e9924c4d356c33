"""uvicorn under our signals: from the first SIGTERM to the last answer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from qwen2vl_serve.api import API
from qwen2vl_serve.errors import EngineUnavailable, ShuttingDown

_DRAIN_LOOK_SECONDS = 0.05
_STANDARD_INPUT = 0


class Stopped(BaseException):
    """A signal during the boot; not an ``Exception``, so that no handler of vLLM's keeps it."""


class Signals:
    """SIGTERM and SIGINT from the first line to the last: stop the boot, drain, then nothing.

    SIGHUP reads the profile again once the server runs, and does nothing before and after. Where it
    means what it says, that the terminal has gone, it is as SIGTERM.

    asyncio's own handlers would not run while vLLM blocks the loop in its boot, and would give
    the signals back to the system before the process has ended.
    """

    def __init__(self) -> None:
        self.drain: Callable[[], object] | None = None
        self.reload: Callable[[], object] = lambda: None
        self._on_terminal = os.isatty(_STANDARD_INPUT)
        signal.signal(signal.SIGHUP, self._hang_up)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        if self.drain is None:
            raise Stopped
        self.drain()

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        if self._on_terminal and not os.isatty(_STANDARD_INPUT):
            self._receive(number, frame)
        else:
            self.reload()

    @contextlib.contextmanager
    def reaching(self, http: HTTPServer, reload: Callable[[], None]) -> Iterator[None]:
        """Send signals to ``http`` and ``reload``; from its end on they change nothing."""
        loop = asyncio.get_running_loop()
        self.drain = lambda: loop.call_soon_threadsafe(http.drain)
        self.reload = lambda: loop.call_soon_threadsafe(reload)
        try:
            yield
        finally:
            self.drain = self.reload = lambda: None
            for number in (signal.SIGTERM, signal.SIGINT):
                # Python gives handlers back to the system before its process has ended.
                signal.signal(number, signal.SIG_IGN)


class HTTPServer(uvicorn.Server):
    """uvicorn with our signals: the first drains, the second ends at once.

    While it drains it still listens, so that who comes is told with 503 to go elsewhere.
    """

    def __init__(self, config: uvicorn.Config, api: API, grace_seconds: float) -> None:
        super().__init__(config)
        self.api = api
        self.grace_seconds = grace_seconds
        self.engine_lost = False
        self.on_started: Callable[[], None] = lambda: None
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone: uvicorn would raise them again after a clean drain."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets)
        self.on_started()

    def drain(self) -> None:
        """Take nothing new and finish what runs; called again, drop what runs."""
        if self._draining is not None:
            self.should_exit = self.force_exit = True
            return
        self.api.draining = True
        self._draining = asyncio.create_task(self._drained())

    def lose_engine(self, error: EngineUnavailable) -> None:
        """End everything with ``error``, as nothing that runs can be finished."""
        self.engine_lost = True
        self.api.lost = error
        self.grace_seconds = 0.0
        if self._draining is None:
            self.drain()
        else:
            self.api.cut(error)

    async def _drained(self) -> None:
        deadline = time.monotonic() + self.grace_seconds
        while self.api.calls and time.monotonic() < deadline:
            await asyncio.sleep(_DRAIN_LOOK_SECONDS)
        self.api.cut(
            self.api.lost
            or ShuttingDown("The server is shutting down; it could not wait for the whole answer.")
        )
        self.should_exit = True
