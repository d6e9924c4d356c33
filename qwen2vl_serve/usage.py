"""The tokens of a request: guessed before it runs, read from its answer afterwards."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from pydantic_core import from_json

from qwen2vl_serve.context import Fitted
from qwen2vl_serve.protocol import ChatRequest, StreamOptions
from qwen2vl_serve.quota import Visit

ANSWER_TOKENS = 256
"""What is reserved for an answer whose ``max_tokens`` is not given."""

BYTES_PER_TOKEN = 4
"""English text has about this many; what is guessed wrong is settled afterwards."""

_USAGE = '"usage":{'


async def reserve(visit: Visit, fitted: Fitted) -> None:
    """Take from the key what the request is likely to use, its whole ``max_tokens`` included.

    Raises:
        RateLimited: so much is not left in this minute.
    """
    if visit.metered:
        visual = sum(medium.visual_tokens for medium in fitted.media)
        answer = fitted.request.output_limit or ANSWER_TOKENS
        text = _text_bytes(fitted.request) // BYTES_PER_TOKEN + 1
        await visit.reserve(visual + text + answer * (fitted.request.n or 1), visual)


def tell(visit: Visit, body: bytes) -> None:
    """Tell the visit what a whole answer has used."""
    if visit.metered and (tokens := _total(body)) is not None:
        visit.used(tokens)


def asking_for_usage(request: ChatRequest) -> ChatRequest:
    """Return the request with the chunk of token counts that ends a stream."""
    options = request.stream_options or StreamOptions()
    return request.model_copy(
        update={"stream_options": options.model_copy(update={"include_usage": True})}
    )


async def told(
    visit: Visit, chunks: AsyncGenerator[str, None], request: ChatRequest
) -> AsyncGenerator[str, None]:
    """Pass a stream on and tell the visit what it has used.

    The chunk of counts goes out only if ``request``, the client's own, asks for it. A stream
    that ends without one leaves what was reserved: it was cut short, by whomever.
    """
    options = request.stream_options
    wanted = options is not None and options.include_usage
    async with aclosing(chunks):
        async for chunk in chunks:
            # vLLM writes no spaces, other engines may.
            if _USAGE in chunk or '"usage": {' in chunk:
                tokens = _total(chunk)
                if tokens is not None:
                    visit.used(tokens)
                if not wanted and from_json(chunk).get("choices") == []:
                    continue
            yield chunk


def _total(answer: str | bytes) -> int | None:
    usage = from_json(answer).get("usage")
    return usage.get("total_tokens") if isinstance(usage, dict) else None


def _text_bytes(request: ChatRequest) -> int:
    texts = (
        text
        for message in request.messages
        for text in (
            [message.content]
            if isinstance(message.content, str)
            else [getattr(part, "text", "") for part in message.content or ()]
        )
    )
    return sum(len(text.encode("utf-8", "replace")) for text in texts)
