"""A client for Qwen2-VL behind an OpenAI-compatible server; needs requests and nothing else.

::

    from qwen2vl_client import Client

    client = Client("http://127.0.0.1:8000/v1")
    print(client.chat("What is this?", images=["a.jpg"]))
"""

from qwen2vl_client.answer import Answer, Model, Usage
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
from qwen2vl_client.media import image_part, video_part
from qwen2vl_client.request import DEFAULT_SAMPLING, SYSTEM_PROMPT, Sampling
from qwen2vl_client.stream import TextStream
from qwen2vl_client.version import __version__

__all__ = [
    "DEFAULT_SAMPLING",
    "SYSTEM_PROMPT",
    "APIConnectionError",
    "APIResponseError",
    "APIStatusError",
    "APITimeoutError",
    "Answer",
    "AnswerError",
    "AuthenticationError",
    "BadRequestError",
    "BatchError",
    "Client",
    "ClientError",
    "Conversation",
    "InvalidArgumentError",
    "MediaError",
    "Model",
    "NotFoundError",
    "PermissionDeniedError",
    "RateLimitError",
    "RequestTooLargeError",
    "Sampling",
    "ServerError",
    "ServerNotReachedError",
    "TextStream",
    "Usage",
    "__version__",
    "image_part",
    "video_part",
]
