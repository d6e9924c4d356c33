"""The tokens of a request, guessed before it runs."""

from __future__ import annotations

from qwen2vl_serve.auth.quota import Visit
from qwen2vl_serve.context.overflow import Fitted
from qwen2vl_serve.engine import Usage
from qwen2vl_serve.protocol.chat import ChatRequest
from qwen2vl_serve.protocol.tools import as_json

ANSWER_TOKENS = 256
"""What is reserved for an answer whose ``max_tokens`` is not given."""

BYTES_PER_TOKEN = 4
"""English text has about this many; what is guessed wrong is settled afterwards."""


async def reserve(visit: Visit, fitted: Fitted, usage: Usage) -> None:
    """Take from the key what the request is likely to use, its whole ``max_tokens`` included.

    When the visit ends it is settled by ``usage``, which the engine fills meanwhile.

    Raises:
        RateLimited: so much is not left in this minute.
    """
    if visit.metered:
        visual = sum(medium.visual_tokens for medium in fitted.media)
        answer = fitted.request.output_limit or ANSWER_TOKENS
        text = _text_bytes(fitted.request) // BYTES_PER_TOKEN + 1
        visit.settle_by(usage)
        await visit.reserve(visual + text + answer * (fitted.request.n or 1), visual)


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
    offered = sum(len(as_json(tool.model_dump())) for tool in request.tools or ())
    return offered + sum(len(text.encode("utf-8", "replace")) for text in texts)
