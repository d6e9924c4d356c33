"""What of a request an engine may have computed before: its conversation, turn by turn, its media.

Two engines share no cache. Which of them knows a request is told by digests of what it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain

from qwen2vl_serve.engine import Medium
from qwen2vl_serve.protocol.chat import AssistantMessage, ChatRequest, SystemMessage
from qwen2vl_serve.protocol.content import TextPart

_CHARACTERS_A_TOKEN = 4
"""Near enough to compare with; a tokenizer would cost more than what it decides."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a request consists of, as (key, tokens).

    Each of ``turns`` is all that comes up to the end of a user's turn, the longest last: a turn of
    a conversation has the turns before it. ``media`` are its pictures and videos.
    """

    turns: tuple[tuple[bytes, int], ...]
    media: tuple[tuple[bytes, int], ...]

    @property
    def keys(self) -> Sequence[bytes]:
        """Everything that an engine which has answered it knows."""
        return [key for key, _ in chain(self.turns, self.media)]


def content_of(request: ChatRequest, media: Sequence[Medium]) -> Content:
    """Return what ``request`` consists of; ``media`` are those of its parts, in their order.

    A system prompt alone is no turn: where everybody's is the same it would lead everybody to the
    one engine that saw it first. An adapter's turns are not the model's own.
    """
    digest = blake2b(digest_size=16)
    told = 0

    def take(text: str) -> None:
        nonlocal told
        data = text.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(data))
        digest.update(data)
        told += len(text)

    take(request.model or "")
    if request.uses_tools:
        take(repr(request.tools))
    told = visual = 0
    rest = iter(media)
    turns: list[tuple[bytes, int]] = []
    for message in request.messages:
        take(message.role)
        parts = message.content
        for part in [parts] if isinstance(parts, str) else parts:
            if isinstance(part, str):
                take(part)
            elif isinstance(part, TextPart):
                take(part.text)
            else:
                medium = next(rest)
                take(medium.key)
                visual += medium.visual_tokens
        if isinstance(message, AssistantMessage):
            if message.tool_calls:
                take(repr(message.tool_calls))
        elif not isinstance(message, SystemMessage):
            turns.append((digest.digest(), visual + told // _CHARACTERS_A_TOKEN))
    kept = tuple((one.key.encode(), one.visual_tokens) for one in media)
    return Content(tuple(turns), kept)
