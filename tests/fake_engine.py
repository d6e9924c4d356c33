"""An engine behind the ``Engine`` protocol that says what a test tells it to."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import islice

from qwen2vl_serve.engine import Adapter, EngineState, Medium, ServedModel, Usage
from qwen2vl_serve.errors import EngineUnavailable, ModelNotFound
from qwen2vl_serve.protocol.chat import ChatRequest


@dataclass
class FakeEngine:
    """Answers ``words``, at most ``most_tokens``; ``failure`` is raised before word ``fail_at``.

    While ``hung`` it keeps what it has and gives nothing out, as a process that was stopped.
    """

    words: list[str] = field(default_factory=lambda: ["A ", "red ", "circle."])
    pause: float = 0.0
    failure: Exception | None = None
    fail_at: int = 0
    dead: bool = False
    hung: bool = False
    progress: int = 0
    probes: int = 0
    running: int = 0
    aborted: int = 0
    requests: list[ChatRequest] = field(default_factory=list)
    media: list[Sequence[Medium]] = field(default_factory=list)
    max_item_tokens: int = 100_000
    max_video_seconds: float = math.inf
    adapters: dict[str, Adapter] = field(default_factory=dict)

    @property
    def models(self) -> Sequence[ServedModel]:
        base = [ServedModel(name, 1_700_000_000, 4096) for name in ("demo", "alias")]
        return [*base, *(ServedModel(one, 1_700_000_001, 4096, "demo") for one in self.adapters)]

    async def load_adapter(self, name: str, adapter: Adapter) -> ServedModel:
        self.adapters[name] = adapter
        return self.models[-1]

    async def unload_adapter(self, name: str) -> None:
        if self.adapters.pop(name, None) is None:
            raise ModelNotFound("no such adapter", param="lora_name")

    @property
    def pending(self) -> int:
        return self.running

    @property
    def states(self) -> Sequence[EngineState]:
        return ("serving",)

    @property
    def version(self) -> str:
        return "fake 1"

    async def complete(
        self, request: ChatRequest, media: Sequence[Medium], request_id: str, usage: Usage
    ) -> bytes:
        usage.prompt_tokens = self.count_tokens(request)
        words = [word async for word in self._alive(request, media)]
        usage.completion_tokens = len(words)
        message = {"role": "assistant", "content": "".join(words)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        answer = {"id": f"chatcmpl-{request_id}", "object": "chat.completion", "choices": [choice]}
        return json.dumps(answer | {"created": 1, "model": "demo"}).encode()

    async def stream(
        self, request: ChatRequest, media: Sequence[Medium], request_id: str, usage: Usage
    ) -> AsyncGenerator[str, None]:
        usage.prompt_tokens, usage.completion_tokens = self.count_tokens(request), 0
        async for word in self._alive(request, media):
            usage.completion_tokens += 1
            choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
            chunk = {"id": f"chatcmpl-{request_id}", "object": "chat.completion.chunk"}
            yield json.dumps(chunk | {"created": 1, "model": "demo", "choices": [choice]})

    def count_tokens(self, request: ChatRequest) -> int:
        """A token a word, a token a picture, a token a video."""
        parts = [
            part
            for message in request.messages
            for part in ([message.content] if isinstance(message.content, str) else message.content)
        ]
        texts = [part if isinstance(part, str) else getattr(part, "text", "p") for part in parts]
        return sum(len(text.split()) for text in texts)

    async def check(self) -> None:
        if self.dead:
            raise EngineUnavailable("The engine has stopped.")

    async def probe(self) -> None:
        self.probes += 1
        await self.check()
        self.running += 1
        try:
            await self._awake()
            self.progress += 1
        finally:
            self.running -= 1

    async def _awake(self) -> None:
        while self.hung:
            await asyncio.sleep(0.02)
            await self.check()

    async def _alive(
        self, request: ChatRequest, media: Sequence[Medium]
    ) -> AsyncGenerator[str, None]:
        async with aclosing(self._words(request, media)) as words:
            async for word in words:
                await self._awake()
                if self.dead:
                    raise EngineUnavailable("The engine stopped while it answered.")
                self.progress += 1
                yield word

    async def _words(
        self, request: ChatRequest, media: Sequence[Medium]
    ) -> AsyncGenerator[str, None]:
        self.requests.append(request)
        self.media.append(media)
        self.running += 1
        try:
            for index, word in enumerate(islice(self.words, request.most_tokens)):
                if self.failure is not None and index == self.fail_at:
                    raise self.failure
                await asyncio.sleep(self.pause)
                yield word
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted += 1
            raise
        finally:
            self.running -= 1
