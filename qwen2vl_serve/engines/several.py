"""``Engines``: the ``Engine`` that is several engines.

A dense model's data-parallel ranks share nothing, so each here is an engine of its own. vLLM's own
client of several ranks would choose among them as well, but takes the loss of one for the loss of
all: its monitor waits for the first process that ends and then stops the others
(``CoreEngineProcManager.monitor_engine_liveness`` in ``v1/engine/utils.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress

from qwen2vl_serve.engine import Adapter, Engine, EngineState, Medium, ServedModel, Usage
from qwen2vl_serve.engines.content import Content, content_of
from qwen2vl_serve.engines.member import Member, Start
from qwen2vl_serve.engines.pulse import Pulse
from qwen2vl_serve.engines.router import Router
from qwen2vl_serve.errors import APIError, EngineUnavailable, ModelNotFound
from qwen2vl_serve.protocol.chat import ChatRequest


class Engines:
    """``qwen2vl_serve.engine.Engine`` over several; the app is not to know that there are more.

    A request that an engine fails by its own end before anything was answered goes to another; an
    answer that has begun ends with its engine. A lost engine is started anew, and so is one that
    hangs if ``replace_hung``; with none left there is nothing to go on with.
    """

    def __init__(
        self,
        starts: Sequence[Start],
        *,
        hang_seconds: float,
        probe_seconds: float,
        replace_hung: bool,
    ) -> None:
        def watch(engine: Engine) -> Pulse:
            return Pulse(engine, hang_seconds, probe_seconds)

        self._members = [Member(index, start, watch) for index, start in enumerate(starts)]
        self._router = Router(len(starts))
        self._replace_hung = replace_hung
        self._adapters: dict[str, tuple[Adapter, ServedModel]] = {}
        self._changing = asyncio.Lock()
        self._tending: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start all engines; what the first that fails raises passes unchanged.

        The first starts alone: it fills what the others read (the system's cache of the weights'
        files, vLLM's of compiled code), and what is wrong with all of them is told once.
        """
        first, *others = self._members
        await first.begin()
        boots = [asyncio.create_task(member.begin()) for member in others]
        try:
            await asyncio.gather(*boots)
        except BaseException:
            for boot in boots:
                boot.cancel()
            await asyncio.gather(*boots, return_exceptions=True)
            raise
        for member in self._members:
            member.serve()
            self._tending.append(asyncio.create_task(member.tend(self._admit)))

    async def stop(self) -> None:
        """Stop all engines, also those that are starting."""
        for task in self._tending:
            task.cancel()
        await asyncio.gather(*self._tending, return_exceptions=True)
        await asyncio.gather(*(member.end() for member in self._members))

    @property
    def states(self) -> Sequence[EngineState]:
        """What each engine does, by its index."""
        return [member.state for member in self._members]

    @property
    def models(self) -> Sequence[ServedModel]:
        """The served names: the profile's, its first name first, then adapters."""
        base = [model for model in self._any.models if model.parent is None]
        return (*base, *(model for _, model in self._adapters.values()))

    @property
    def version(self) -> str:
        """Name and version of the engines."""
        return self._any.version

    @property
    def max_item_tokens(self) -> int:
        """Most visual tokens that are computed of a single picture or video."""
        return self._any.max_item_tokens

    @property
    def max_video_seconds(self) -> float:
        """Most seconds that all videos of a request span."""
        return self._any.max_video_seconds

    @property
    def progress(self) -> int:
        """The steps of all engines that are up."""
        return sum(member.engine.progress for member in self._living)

    @property
    def pending(self) -> int:
        """The least that any engine has under way: all of them hang only if each has work.

        One that hangs beside others that move is seen by ``check``.
        """
        return min((member.engine.pending for member in self._living), default=0)

    async def complete(
        self, request: ChatRequest, media: Sequence[Medium], request_id: str, usage: Usage
    ) -> bytes:
        """Answer at once, by the engine that knows most of the request."""
        content, answers = content_of(request, media), request.n or 1
        while True:
            member = self._choose(content, answers)
            engine = member.engine
            with self._router.under_way(member.index, answers):
                try:
                    return await engine.complete(request, media, request_id, usage)
                except EngineUnavailable:
                    if not await member.lost(engine):
                        raise

    async def stream(
        self, request: ChatRequest, media: Sequence[Medium], request_id: str, usage: Usage
    ) -> AsyncGenerator[str, None]:
        """Answer token by token, by the engine that knows most of the request."""
        content, answers = content_of(request, media), request.n or 1
        while True:
            member, begun = self._choose(content, answers), False
            engine = member.engine
            with self._router.under_way(member.index, answers):
                try:
                    async with aclosing(engine.stream(request, media, request_id, usage)) as chunks:
                        async for chunk in chunks:
                            begun = True
                            yield chunk
                    return
                except EngineUnavailable:
                    if not await member.lost(engine):
                        raise
                    if begun:
                        raise EngineUnavailable(
                            "The engine stopped while it answered; ask again, another serves."
                            if self._living
                            else "The engine stopped while it answered."
                        ) from None

    async def load_adapter(self, name: str, adapter: Adapter) -> ServedModel:
        """Load an adapter into every engine, or into none."""
        async with self._changing:
            before = self._adapters.get(name)
            loaded: list[Member] = []
            model: ServedModel | None = None
            for member in self._living:
                engine = member.engine
                try:
                    model = await member.asked(engine.load_adapter(name, adapter))
                except APIError as error:
                    if isinstance(error, EngineUnavailable) and await member.lost(engine):
                        continue
                    for one in loaded:
                        with suppress(APIError):
                            await (
                                one.engine.unload_adapter(name)
                                if before is None
                                else one.engine.load_adapter(name, before[0])
                            )
                    raise
                loaded.append(member)
            if model is None:
                raise self._none_left()
            self._adapters[name] = adapter, model
            return model

    async def unload_adapter(self, name: str) -> None:
        """Take an adapter away from every engine; answers that use it end as they would have."""
        async with self._changing:
            if self._adapters.pop(name, None) is None:
                raise ModelNotFound(f"No adapter is named {name[:100]!r}.", param="lora_name")
            for member in self._living:
                with suppress(ModelNotFound):
                    await member.engine.unload_adapter(name)

    def count_tokens(self, request: ChatRequest) -> int:
        """Return the prompt's tokens, each picture and video as one; no engine is asked."""
        return self._any.count_tokens(request)

    async def check(self) -> None:
        """Look after each engine; raise ``EngineUnavailable`` when none is left."""
        for member in self._members:
            await member.look(replace_hung=self._replace_hung)
        if not self._living:
            raise self._none_left()

    async def probe(self) -> None:
        """Ask every engine that is up for a token; ``EngineUnavailable`` if none gives it."""
        asked = [member.engine.probe() for member in self._living]
        failed = [
            error
            for error in await asyncio.gather(*asked, return_exceptions=True)
            if error is not None
        ]
        if len(failed) == len(asked):
            raise failed[0] if failed else self._none_left()

    def _choose(self, content: Content, answers: int) -> Member:
        serving = [member.index for member in self._members if member.state == "serving"]
        if not serving:
            raise self._none_left()
        return self._members[self._router.choose(content, answers, serving)]

    @property
    def _living(self) -> list[Member]:
        return [member for member in self._members if member.state != "starting"]

    @property
    def _any(self) -> Engine:
        """One that is up; else one that was, which still knows what it was made with."""
        return next(iter(self._living), self._members[0]).engine

    def _none_left(self) -> EngineUnavailable:
        return EngineUnavailable(f"None of the {len(self._members)} engines serves.")

    async def _admit(self, member: Member) -> None:
        """Give an engine that was started anew what the others have, and requests."""
        async with self._changing:
            for name, (adapter, _) in self._adapters.items():
                await member.asked(member.engine.load_adapter(name, adapter))
            self._router.forget(member.index)
            member.serve()


@asynccontextmanager
async def several_engines(
    starts: Sequence[Start], *, hang_seconds: float, probe_seconds: float, replace_hung: bool
) -> AsyncIterator[Engines]:
    """Start several engines; stop them on the way out.

    ``hang_seconds`` and ``probe_seconds`` are those of ``Pulse``, for each engine by itself.
    """
    engines = Engines(
        starts,
        hang_seconds=hang_seconds,
        probe_seconds=probe_seconds,
        replace_hung=replace_hung,
    )
    try:
        await engines.start()
        yield engines
    finally:
        await engines.stop()
