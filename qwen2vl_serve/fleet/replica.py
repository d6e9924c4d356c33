"""One replica: our application over one engine, asked with whole requests instead of a socket."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi import FastAPI
from starlette.types import Message

from qwen2vl_serve.adapters.named import named_adapters, with_adapters
from qwen2vl_serve.app import build_app
from qwen2vl_serve.download import have_model
from qwen2vl_serve.errors import EngineUnavailable
from qwen2vl_serve.fleet.asking import REPLICA_HEADER, Ask, Messages
from qwen2vl_serve.fleet.preflight import door_keys
from qwen2vl_serve.http import request_log, tracing
from qwen2vl_serve.launch.engine_environment import engine_environment, engine_sockets
from qwen2vl_serve.launch.resources import media_loader
from qwen2vl_serve.launch.serve import WATCH_SECONDS
from qwen2vl_serve.profile import Profile

logger = logging.getLogger("qwen2vl_serve")

LAST_SECONDS = 5.0
"""What an answer whose client has left is given to take note of it."""


class Replica:
    """The application of ``profile``; ``seam`` is the module that starts its engine.

    ``start`` boots, which takes minutes; ``close`` ends the engine.
    """

    def __init__(self, profile: Profile, name: str, seam: str) -> None:
        self.profile = profile
        self.name = name.encode()
        self.seam = seam
        self.app: FastAPI | None = None
        self._open = contextlib.AsyncExitStack()

    async def start(self) -> None:
        """Boot the engine.

        Raises:
            PreflightError: the profile cannot be served by a replica, or not without keys.
            BootError: the checkpoint did not come.
            Exception: whatever vLLM raises when it does not start.
        """
        handler = logging.StreamHandler()
        handler.setFormatter(request_log.formatter(self.profile.server.log_format))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        keys = door_keys(self.profile)
        profile = have_model(self.profile, logger.info)
        adapters = named_adapters(profile)
        profile = with_adapters(profile, adapters)
        os.environ.update(engine_environment(profile, replica=True))
        self._open.enter_context(engine_sockets())
        seam = importlib.import_module(self.seam)
        loader = media_loader(profile, shared=True)
        self._open.push_async_callback(loader.close)
        engine = await self._open.enter_async_context(seam.start_engine(profile, adapters))
        traces = tracing.tracer()
        if traces is not None:
            self._open.callback(traces.close)
        self.app = build_app(engine, loader, profile, keys, traces)
        watch = asyncio.create_task(self._watch())
        self._open.callback(watch.cancel)
        logger.info("replica %s serves %s", self.name.decode(), engine.models[0].id)

    async def close(self) -> None:
        """End the engine; nothing may be asked any more."""
        if self.app is not None:
            self.app.state.api.pulse.stop()
        await self._open.aclose()

    async def check(self) -> None:
        """Return while the engine lives and moves, or is to be waited for.

        Raises:
            EngineUnavailable: it is lost, or hangs and ``server.exit_on_hang`` is set.
        """
        api = self._api()
        await api.engine.check()
        if self.profile.server.exit_on_hang:
            api.pulse.require()

    async def answer(self, ask: Ask) -> AsyncGenerator[Messages, None]:
        """Yield the answer's ASGI messages as they come, several at a time where they come fast.

        Closed before its end, it ends the request as a client does that leaves.
        """
        if self.app is None:
            raise RuntimeError("the replica has not been started")
        said: asyncio.Queue[Message | None] = asyncio.Queue()
        exchange = _Exchange(ask, self.name, said)
        task = asyncio.create_task(self._answered(ask.scope, exchange, said))
        try:
            while True:
                batch = [await said.get()]
                while not said.empty():
                    batch.append(said.get_nowait())
                messages = [message for message in batch if message is not None]
                if messages:
                    yield messages
                if batch[-1] is None:
                    break
            await task
        finally:
            exchange.gone.set()
            if not task.done():
                await asyncio.wait({task}, timeout=LAST_SECONDS)
                task.cancel()

    async def _answered(
        self, scope: Mapping[str, Any], exchange: _Exchange, said: asyncio.Queue[Message | None]
    ) -> None:
        app: Any = self.app
        try:
            await app({**scope, "state": {}}, exchange.receive, exchange.send)
        finally:
            said.put_nowait(None)

    async def _watch(self) -> None:
        """Let answers of a lost engine end, and have new requests refused at once."""
        api = self._api()
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                await api.engine.check()
                api.pulse.look()
            except EngineUnavailable as error:
                logger.error("the engine is lost: %s", error)
                api.lost = error
                api.cut(error)
                return

    def _api(self) -> Any:
        if self.app is None:
            raise RuntimeError("the replica has not been started")
        return self.app.state.api


class _Exchange:
    """The two callables of an ASGI exchange."""

    def __init__(self, ask: Ask, name: bytes, said: asyncio.Queue[Message | None]) -> None:
        self.gone = asyncio.Event()
        self._body: bytes | None = ask.body
        self._name = name
        self._said = said

    async def receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), (REPLICA_HEADER, self._name)]
            message = {**message, "headers": headers}
        self._said.put_nowait(message)
