"""The routes of chat: read → parse → admission → media → engine → response."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic_core import to_json
from starlette.datastructures import State
from starlette.exceptions import HTTPException

from qwen2vl_serve import __version__, uploads
from qwen2vl_serve.admission import Admission, Place
from qwen2vl_serve.auth.keys import Caller
from qwen2vl_serve.auth.reservation import reserve
from qwen2vl_serve.context.overflow import Fitted, fit, merged, trimmed
from qwen2vl_serve.context.summary import Summaries
from qwen2vl_serve.context.window import (
    Context,
    largest_max_pixels,
    measure,
    refusal,
    refuse_large_items,
    refuse_long_videos,
)
from qwen2vl_serve.engine import Engine, ServedModel, Usage
from qwen2vl_serve.engines.pulse import Pulse
from qwen2vl_serve.errors import (
    APIError,
    ContextLengthExceeded,
    EngineUnavailable,
    ModelNotFound,
    ShuttingDown,
)
from qwen2vl_serve.http.body import BodyReader
from qwen2vl_serve.http.call import Call
from qwen2vl_serve.http.connection import EventStream, WhileConnected
from qwen2vl_serve.http.envelope import Metrics
from qwen2vl_serve.media.documents import Documents
from qwen2vl_serve.media.ledger import Account
from qwen2vl_serve.media.loader import MediaBudget, MediaLoader, Medium
from qwen2vl_serve.media.picture import Picture
from qwen2vl_serve.profile import Profile
from qwen2vl_serve.protocol.chat import ChatRequest
from qwen2vl_serve.protocol.validation import RequestLimits, parse_chat, refuse_excess_media

_T = TypeVar("_T")

TAKEN_LIMITS = (
    "max_body_bytes", "max_media_bytes", "max_media_pixels", "max_media_frames", "body_seconds",
    "max_messages", "overflow", "reserved_tokens", "max_n", "max_tokens", "max_in_flight",
    "max_starting", "max_visual_tokens", "max_queued", "queue_seconds", "max_held_body_bytes",
)  # fmt: skip
"""Fields of ``limits`` that ``API.take_limits`` takes; the others are the HTTP parser's."""

EXPLAIN_AT_ONCE = 8
"""Most explanations that are worked on at a time; as many more wait."""


class API:
    """The routes, over one engine and one profile."""

    def __init__(
        self, engine: Engine, loader: MediaLoader, profile: Profile, metrics: Metrics
    ) -> None:
        self.engine = engine
        self.loader = loader
        self.metrics = metrics
        self.pulse = Pulse(engine, profile.server.hang_seconds, profile.server.probe_seconds)
        self.calls: set[Call] = set()
        # What the engine was started with, whatever a profile that is read again says.
        self.tools = profile.server.tools != "off"
        self.most_shown = profile.media.limit_mm_per_prompt
        self.chats = self.admission("chat", profile.limits.max_in_flight, "limits.max_in_flight")
        self.bodies = BodyReader(self.chats.overloaded)
        self.explanations = self.admission("explain", EXPLAIN_AT_ONCE)
        self.uploads = self.admission("upload", uploads.AT_ONCE)
        self.summaries = Summaries(
            profile.overflow.summary_max_tokens, profile.overflow.summary_prompt, loader
        )
        self.allowed_overflow = profile.overflow.allowed
        self.take_limits(profile)
        self.documents = Documents(
            loader,
            profile.media.max_pdf_pages,
            self.limits.images,
            self.limits.videos,
            profile.media.pdf_cache_bytes,
        )
        self.draining = False
        self.lost: EngineUnavailable | None = None

    async def chat_completions(self, request: Request) -> Response:
        """Answer a conversation about text, pictures and videos."""
        self.refuse_new()
        self.chats.require_room(_key(request.state))
        chat = self._parsed(await self.bodies.read(request), request.state)
        async with WhileConnected(request.receive):
            place = await self._place(self.chats, request.state, chat.n or 1)
            return await self._answered(chat, request.state, place)

    async def answer(
        self, body: bytes, state: State, place: Callable[[int], Awaitable[Place]]
    ) -> Response:
        """Answer a chat request that came some other way, once ``place`` has one for it.

        ``state`` is what a request's is: ``id``, ``call``, ``caller`` and ``visit``.
        """
        chat = self._parsed(body, state)
        return await self._answered(chat, state, await place(chat.n or 1))

    def _parsed(self, body: bytes, state: State) -> ChatRequest:
        chat = parse_chat(body, self.limits)
        call: Call = state.call
        model = self._find(chat.model, state.caller)
        if chat.model is None:
            # The first name of this key's, which may be an adapter's: the engine must not guess.
            chat = chat.model_copy(update={"model": model.id})
        call.model = model.id
        if model.parent is not None:
            self.metrics.adapter_requests.labels(model.id).inc()
        call.done("read")
        return chat

    async def _answered(self, chat: ChatRequest, state: State, place: Place) -> Response:
        call: Call = state.call
        async with self.loader.ledger.account(state.caller.name) as account:
            fitted = await self._load(chat, account, place, state)
            call.visual_tokens = _visual_tokens(fitted.media)
            if chat.stream:
                await place.start()
                call.queued = place.waited
            await reserve(state.visit, fitted, call.usage)
            media, told = fitted.media, call.usage
            if not chat.stream:
                answer = self.engine.complete(fitted.request, media, state.id, told)
                body = await self._explained(answer, fitted)
                return Response(_with_reports(body, fitted), media_type="application/json")
            chunks = self.engine.stream(fitted.request, media, state.id, told)
            try:
                # The first chunk before the status line: until then errors have their own.
                first = await self._explained(anext(chunks), fitted)
            except BaseException:
                await chunks.aclose()
                raise
            call.begun()
            place.begun()
            # The engine has seen them; the account ends here, however long the answer takes.
            for medium in media:
                medium.forget()
        return EventStream(_with_reports(first.encode(), fitted).decode(), chunks, call)

    async def explain(self, request: Request) -> JSONResponse:
        """Tell what a chat request would cost, without generating: tokens, sizes, what fits."""
        self.refuse_new()
        self.explanations.require_room(_key(request.state))
        chat = parse_chat(await self.bodies.read(request), self.limits)
        refuse_excess_media(chat, self.limits)
        caller: Caller = request.state.caller
        model = self._find(chat.model, caller)
        call: Call = request.state.call
        call.model = model.id
        call.done("read")
        async with WhileConnected(request.receive):
            place = await self._place(self.explanations, request.state, 1)
            async with self.loader.ledger.account(caller.name) as account:
                chat = await self.documents.with_pages(chat, account)
                media = await self._fetched(chat, account, place)
                call.done("fetch")
                await self.loader.ready(media)
                call.done("decode")
                refuse_long_videos(media, self.engine.max_video_seconds)
                context = await self._measure(chat, media)
        budget = None if context.fits else largest_max_pixels(context, self.loader)
        return JSONResponse(
            {
                "object": "chat.completion.explanation",
                "model": model.id,
                "prompt_tokens": context.prompt,
                "text_tokens": context.text,
                "visual_tokens": context.visual,
                "max_model_len": context.window,
                "context_left": max(context.window - context.prompt, 0),
                "max_item_tokens": context.item,
                "too_large": [medium.param for medium in context.too_large],
                "fits": context.fits,
                "largest_max_pixels": budget,
                "media": [medium.info() for medium in media],
            }
        )

    async def models(self, request: Request) -> JSONResponse:
        """List the models that are served to the caller."""
        models = [self.card(model) for model in self._served(request.state.caller)]
        return JSONResponse({"object": "list", "data": models})

    async def model(self, name: str, request: Request) -> JSONResponse:
        """Describe one served model."""
        if not name:
            raise HTTPException(404)  # /v1/models/ names none
        return JSONResponse(self.card(self._find(name, request.state.caller)))

    def card(self, model: ServedModel) -> dict[str, Any]:
        """Describe a model as OpenAI does, with its window and limits."""
        card: dict[str, Any] = {
            "id": model.id,
            "object": "model",
            "created": model.created,
            "owned_by": "qwen2vl_serve",
            "max_model_len": model.max_model_len,
            "limit_mm_per_prompt": {"image": self.limits.images, "video": self.limits.videos},
        }
        if model.parent is not None:
            # vLLM's ``root`` is the adapter's folder, which is the operator's business.
            card |= {"parent": model.parent, "root": model.parent}
        return card

    async def live(self) -> JSONResponse:
        """Tell that the process turns its event loop."""
        return JSONResponse({"status": "live"})

    async def ready(self) -> JSONResponse:
        """Tell that the engine answers and that new requests are taken."""
        self.refuse_new()
        await self.engine.check()
        states = self.engine.states
        if len(states) == 1:
            return JSONResponse({"status": "ready"})
        status = "ready" if all(state == "serving" for state in states) else "degraded"
        return JSONResponse({"status": status, "engines": list(states)})

    async def version(self) -> JSONResponse:
        """Tell the versions of this server and of its engine."""
        return JSONResponse({"qwen2vl_serve": __version__, "engine": self.engine.version})

    async def metrics_text(self) -> Response:
        """Return vLLM's figures and ours for Prometheus."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def _load(
        self, chat: ChatRequest, account: Account, place: Place, state: State
    ) -> Fitted:
        """Load pictures and videos and, under an overflow policy, make the request fit."""
        call: Call = state.call
        policy = chat.overflow or self.overflow
        chat, left_out = trimmed(chat, policy, self.limits.images, self.limits.videos)
        refuse_excess_media(chat, self.limits)
        chat = await self.documents.with_pages(chat, account)
        media = await self._fetched(chat, account, place)
        call.done("fetch")
        call.visual_tokens = _visual_tokens(media)
        call.queued = place.waited
        await self.loader.ready(media)
        call.done("decode")
        for one in media:
            kind = "image" if isinstance(one, Picture) else "video"
            self.metrics.media.labels(kind, "decoded" if one.decoded else "known").inc()
            self.metrics.media_bytes.labels(kind).inc(one.size_bytes)
        refuse_long_videos(media, self.engine.max_video_seconds)
        if policy == "error":
            # The engine counts anyway; its refusal is explained when it comes.
            refuse_large_items(media, self.engine.max_item_tokens)
            return Fitted(chat, media)
        context = await self._measure(chat, media)
        if policy == "summarise" and not context.fits:
            generate = partial(self._summarise, state)
            key = _key(state)
            fitted = await self.summaries.fit(context, chat, key, self._measured, generate)
        else:
            fitted = await asyncio.to_thread(
                fit, context, chat, policy, self.loader, self._measured
            )
        await self.loader.ready(fitted.media)
        return merged(fitted, policy, left_out)

    async def _summarise(
        self, state: State, chat: ChatRequest, media: Sequence[Medium], used: Usage
    ) -> bytes:
        """Answer a request of our own within the client's: its place, its key's account."""
        told: Usage = state.call.usage
        await reserve(state.visit, Fitted(chat, media), told)
        answer = await self.engine.complete(chat, media, f"{state.id}-summary", used)
        told.summary_tokens += (used.prompt_tokens or 0) + (used.completion_tokens or 0)
        return answer

    async def _measure(self, chat: ChatRequest, media: Sequence[Medium]) -> Context:
        return await asyncio.to_thread(self._measured, chat, media)

    def _measured(self, chat: ChatRequest, media: Sequence[Medium]) -> Context:
        window, item = self.engine.models[0].max_model_len, self.engine.max_item_tokens
        return measure(chat, media, self.engine.count_tokens, window, item)

    async def _explained(self, answer: Awaitable[_T], fitted: Fitted) -> _T:
        """Await the engine's answer; say of what does not fit what would."""
        try:
            return await answer
        except ContextLengthExceeded:
            context = await self._measure(fitted.request, fitted.media)
            raise refusal(context, self.loader) from None

    def refuse_new(self) -> None:
        """Return while new requests are taken.

        Raises:
            ShuttingDown: the server drains.
            EngineUnavailable: the engine is lost or hangs.
        """
        if self.lost is not None:
            raise EngineUnavailable(self.lost.message)
        if self.draining:
            raise ShuttingDown("The server is shutting down and takes no new requests.")
        self.pulse.require()

    def cut(self, error: APIError) -> None:
        """End every request with ``error``: in its answer, or as the last event of its stream."""
        for call in list(self.calls):
            call.cut(error)

    def take_limits(self, profile: Profile) -> None:
        """Hold new requests to the ``limits`` of ``profile``; those that run keep theirs."""
        limits = profile.limits
        self.limits = RequestLimits(
            max_messages=limits.max_messages,
            max_n=limits.max_n,
            max_tokens=limits.max_tokens,
            images=self.most_shown.image,
            videos=self.most_shown.video,
            reserved_tokens=limits.reserved_tokens,
            overflow=limits.overflow,
            allowed_overflow=self.allowed_overflow,
            tools=self.tools,
        )
        self.loader.take_budget(
            MediaBudget(limits.max_media_bytes, limits.max_media_pixels, limits.max_media_frames)
        )
        self.overflow = limits.overflow
        self.bodies.resize(limits.max_body_bytes, limits.body_seconds, limits.max_held_body_bytes)
        self.chats.resize(
            limits.max_in_flight,
            limits.max_visual_tokens,
            limits.max_queued,
            limits.queue_seconds,
            limits.max_starting,
        )
        self.explanations.resize(
            EXPLAIN_AT_ONCE, limits.max_visual_tokens, EXPLAIN_AT_ONCE, limits.queue_seconds
        )

    def admission(self, kind: str, most: int, limit: str = "") -> Admission:
        """Return places of their own for one kind of request, counted under its name.

        ``limit`` is the profile's field that says how many.
        """
        counts = self.metrics
        one = Admission(
            most,
            limit=limit,
            refused=lambda reason, field: counts.refused.labels(kind, reason, field).inc(),
            waited=counts.waited.observe,
        )
        counts.admitted.labels(kind).set_function(lambda: one.places.held)
        counts.queued.labels(kind).set_function(lambda: one.waiting)
        return one

    async def _place(self, admission: Admission, state: State, answers: int) -> Place:
        place = await admission.place(_key(state), answers)
        call: Call = state.call
        call.at_end(place.leave)
        call.queued = place.waited
        call.done("queue")
        return place

    async def _fetched(self, chat: ChatRequest, account: Account, place: Place) -> Sequence[Medium]:
        """Fetch media, and wait until as many tokens as they cost may be worked on."""
        media = await self.loader.fetch(chat, account)
        await place.weigh(_visual_tokens(media))
        return media

    def _served(self, caller: Caller) -> Sequence[ServedModel]:
        return [model for model in self.engine.models if caller.may_use(model.id)]

    def _find(self, name: str | None, caller: Caller) -> ServedModel:
        served = self._served(caller)
        for model in served:
            if name is None or model.id == name:
                return model
        names = ", ".join(repr(model.id) for model in served) or "none to this key"
        raise ModelNotFound(
            f"model {str(name)[:100]!r} is not served here; served: {names}.", param="model"
        )


def _key(state: State) -> str:
    """Return the name of the key that a request came with; all without one share a name."""
    return str(getattr(state, "key", None) or "")


def _visual_tokens(media: Sequence[Medium]) -> int:
    return sum(medium.visual_tokens for medium in media)


def _with_reports(body: bytes, fitted: Fitted) -> bytes:
    """Add ``media`` and ``overflow``, where due, to a JSON object that is already written."""
    reports: dict[str, object] = {}
    if fitted.request.include_media_info:
        reports["media"] = [medium.info() for medium in fitted.media]
    if fitted.report is not None:
        reports["overflow"] = fitted.report
    return body[:-1] + b"," + to_json(reports)[1:] if reports else body
