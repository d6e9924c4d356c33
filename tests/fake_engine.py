"""An engine behind the ``Engine`` protocol that says what a test tells it to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from qwen2vl_serve.engine import Medium, ServedModel
from qwen2vl_serve.errors import EngineUnavailable
from qwen2vl_serve.protocol import ChatRequest


@dataclass
class FakeEngine:
    """Answers ``words``; ``failure`` is raised before word ``fail_at``."""

    words: list[str] = field(default_factory=lambda: ["A ", "red ", "circle."])
    pause: float = 0.0
    failure: Exception | None = None
    fail_at: int = 0
    dead: bool = False
    running: int = 0
    aborted: int = 0
    requests: list[ChatRequest] = field(default_factory=list)
    media: list[Sequence[Medium]] = field(default_factory=list)
    max_item_tokens: int = 100_000

    @property
    def models(self) -> Sequence[ServedModel]:
        return (ServedModel("demo", 1_700_000_000, 4096), ServedModel("alias", 1_700_000_000, 4096))

    @property
    def version(self) -> str:
        return "fake 1"

    async def complete(
        self, request: ChatRequest, media: Sequence[Medium], request_id: str
    ) -> bytes:
        words = [word async for word in self._words(request, media)]
        message = {"role": "assistant", "content": "".join(words)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        answer = {"id": f"chatcmpl-{request_id}", "object": "chat.completion", "choices": [choice]}
        return json.dumps(answer | {"created": 1, "model": "demo"}).encode()

    async def stream(
        self, request: ChatRequest, media: Sequence[Medium], request_id: str
    ) -> AsyncGenerator[str, None]:
        async for word in self._words(request, media):
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

    async def _words(
        self, request: ChatRequest, media: Sequence[Medium]
    ) -> AsyncGenerator[str, None]:
        self.requests.append(request)
        self.media.append(media)
        self.running += 1
        try:
            for index, word in enumerate(self.words):
                if self.failure is not None and index == self.fail_at:
                    raise self.failure
                await asyncio.sleep(self.pause)
                yield word
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted += 1
            raise
        finally:
            self.running -= 1
