"""Scripted engines for the replicas of a fleet: they remember what they were shown."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from qwen2vl_serve.engine import Adapter, Medium
from qwen2vl_serve.profile import Profile
from qwen2vl_serve.protocol.chat import ChatRequest
from qwen2vl_serve.protocol.content import ImagePart
from tests.fake_engine import FakeEngine


class RememberingEngine(FakeEngine):
    """Says ``hit`` or ``miss`` of a request's beginning, its process, and more words of a ``long``.

    They are 40, twenty a second, and 60 of a ``longest``, two a second.

    What it caches is what an engine caches: the first picture, or the first message.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    async def _words(
        self, request: ChatRequest, media: Sequence[Medium]
    ) -> AsyncGenerator[str, None]:
        known = _beginning(request) in self.seen
        self.seen.add(_beginning(request))
        last = str(request.messages[-1].content)
        self.words = ["hit " if known else "miss ", f"{os.getpid()} "]
        self.pause = 0.0
        if "long" in last:
            longest = "longest" in last
            self.words += ["word "] * (60 if longest else 40)
            self.pause = 0.5 if longest else 0.05
        words, pause = self.words, self.pause
        async for word in super()._words(request, media):
            self.words, self.pause = words, pause
            yield word


def _beginning(request: ChatRequest) -> str:
    content = request.messages[0].content
    for part in content if not isinstance(content, str) else ():
        if isinstance(part, ImagePart):
            return part.image_url.address
    return str(content)


@asynccontextmanager
async def start_engine(profile: Profile, _: Mapping[str, Adapter]) -> AsyncIterator[FakeEngine]:
    """Start one; SIGUSR2 is its end, as that of vLLM's process is."""
    engine = RememberingEngine()
    yield engine
