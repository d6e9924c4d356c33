"""A client for Qwen2-VL behind an OpenAI-compatible server; needs requests and nothing else.

::

    from qwen2vl_client import Client

    client = Client("http://127.0.0.1:8000/v1")
    print(client.chat("What is this?", images=["a.jpg"]))

``AsyncClient`` and ``AsyncConversation`` are the same for asyncio; they need httpx.
"""

from typing import TYPE_CHECKING, Any

from qwen2vl_client.answer import (
    Answer,
    Explanation,
    Model,
    StoredFile,
    Timings,
    ToolCall,
    Usage,
)
from qwen2vl_client.client import Client
from qwen2vl_client.conversation import Conversation
from qwen2vl_client.errors import (
    AnswerError,
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    BatchError,
    ClientError,
    InvalidArgumentError,
    MediaError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestTooLargeError,
    ServerError,
    ServerNotReachedError,
)
from qwen2vl_client.fitting import Event
from qwen2vl_client.media import image_part, video_part
from qwen2vl_client.media_info import MediaInfo
from qwen2vl_client.request import DEFAULT_SAMPLING, SYSTEM_PROMPT, ChatFields, Sampling
from qwen2vl_client.stream import TextStream
from qwen2vl_client.version import __version__

if TYPE_CHECKING:
    from qwen2vl_client.async_client import AsyncClient
    from qwen2vl_client.async_conversation import AsyncConversation
    from qwen2vl_client.async_stream import AsyncTextStream

__all__ = [
    "DEFAULT_SAMPLING",
    "SYSTEM_PROMPT",
    "APIConnectionError",
    "APIResponseError",
    "APIStatusError",
    "APITimeoutError",
    "Answer",
    "AnswerError",
    "AsyncClient",
    "AsyncConversation",
    "AsyncTextStream",
    "AuthenticationError",
    "BadRequestError",
    "BatchError",
    "ChatFields",
    "Client",
    "ClientError",
    "Conversation",
    "Event",
    "Explanation",
    "InvalidArgumentError",
    "MediaError",
    "MediaInfo",
    "Model",
    "NotFoundError",
    "PermissionDeniedError",
    "RateLimitError",
    "RequestTooLargeError",
    "Sampling",
    "ServerError",
    "ServerNotReachedError",
    "StoredFile",
    "TextStream",
    "Timings",
    "ToolCall",
    "Usage",
    "__version__",
    "image_part",
    "video_part",
]

_NEEDS_HTTPX = {
    "AsyncClient": "qwen2vl_client.async_client",
    "AsyncConversation": "qwen2vl_client.async_conversation",
    "AsyncTextStream": "qwen2vl_client.async_stream",
}


def __getattr__(name: str) -> Any:
    # httpx is an extra: only who asks for these needs it.
    if name in _NEEDS_HTTPX:
        from importlib import import_module  # noqa: PLC0415  (for these names alone)

        return getattr(import_module(_NEEDS_HTTPX[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
