"""One request of a batch: the way of any other, but with a place that nobody else wants."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from fastapi.responses import Response
from starlette.datastructures import State

from qwen2vl_serve.admission import Admission, Place
from qwen2vl_serve.auth.keys import Caller, Keys
from qwen2vl_serve.auth.quota import UNLIMITED, Quotas
from qwen2vl_serve.errors import InvalidAPIKey
from qwen2vl_serve.http.call import Call
from qwen2vl_serve.http.envelope import failure

LOOK_SECONDS = 0.02
"""How often a request that has no turn looks whether somebody left."""


class Server(Protocol):
    """What a batch asks of the application."""

    draining: bool
    calls: set[Call]
    chats: Admission

    def refuse_new(self) -> None:
        """Raise while nothing new is taken."""

    async def answer(
        self, body: bytes, state: State, place: Callable[[int], Awaitable[Place]]
    ) -> Response:
        """Answer the body of a chat request."""
        ...


class Turn(Place):
    """A place taken only while nobody waits, and never the last one, unless it is the only one."""

    def __init__(self, server: Server, key: str) -> None:
        super().__init__(server.chats, key)
        self._server = server

    async def come(self, answers: int) -> Place:
        """Wait for room for that many answers; raises as ``refuse_new`` while it waits."""
        line = self._server.chats.places
        while line.waiting or line.held + min(answers, line.capacity - 1) >= line.capacity > 1:
            await self._look_again()
        while not line.has_room(answers):
            await self._look_again()
        self.answers = await line.enter(self.key, answers, 0.0)
        return self

    async def weigh(self, tokens: int) -> None:
        """Wait in the same way until that many visual tokens may be worked on."""
        line = self._server.chats.tokens
        while tokens and not line.has_room(tokens):
            await self._look_again()
        if tokens:
            self.tokens = await line.enter(self.key, tokens, 0.0)

    async def _look_again(self) -> None:
        await asyncio.sleep(LOOK_SECONDS)
        self._server.refuse_new()


class Asker:
    """Asks on behalf of keys: theirs are the uploads, the models, the quotas and the usage."""

    def __init__(self, server: Server, keys: Keys, quotas: Quotas) -> None:
        self.server = server
        self.keys = keys
        self.quotas = quotas

    async def ask(self, body: bytes, owner: str, request_id: str) -> bytes:
        """Return the answer to a request of the key named ``owner``.

        Raises:
            APIError: what the request would have got over HTTP; of those ``ShuttingDown`` when
                it was cut short by the server's end.
        """
        self.server.refuse_new()
        caller = self._caller(owner)
        call = Call(request_id)
        told = {"id": request_id, "call": call, "caller": caller, "visit": UNLIMITED}
        if caller.name:
            told["key"] = caller.name
        self.server.calls.add(call)
        try:
            async with self.quotas.visit(caller, told):
                turn = Turn(self.server, caller.name)
                call.at_end(turn.leave)
                answer = await self.server.answer(body, State(told), turn.come)
                return bytes(answer.body)
        except (Exception, asyncio.CancelledError) as error:
            raise failure(error, call) from None
        finally:
            self.server.calls.discard(call)
            call.end()

    def _caller(self, owner: str) -> Caller:
        caller = self.keys.named(owner)
        if caller is None:
            raise InvalidAPIKey("The key that made this batch is no longer one of this server's.")
        if caller.limits is None:
            return caller
        # Requests that wait for a batch's must not be refused for it.
        limits = caller.limits.model_copy(update={"concurrent": None})
        return Caller(caller.name, caller.quota, limits or None, caller.models)
