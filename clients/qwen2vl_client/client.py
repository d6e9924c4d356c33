"""The client: one object for one server."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Unpack

import requests

from qwen2vl_client.answer import Answer, Model
from qwen2vl_client.errors import APIResponseError, InvalidArgumentError
from qwen2vl_client.media import ImageSource, VideoSource
from qwen2vl_client.request import (
    SYSTEM_PROMPT,
    Message,
    Sampling,
    chat_messages,
    encode,
    sampling_fields,
    user_message,
)
from qwen2vl_client.retry import RetryPolicy
from qwen2vl_client.stream import TextStream
from qwen2vl_client.transport import Transport
from qwen2vl_client.version import __version__

DEFAULT_BASE_URL = "http://127.0.0.1:8000/v1"
DEFAULT_TIMEOUT = 600.0


class Client:
    """Asks one server; may be used by several threads at once.

    ``base_url`` defaults to the environment's ``QWEN2VL_BASE_URL``, then to
    ``http://127.0.0.1:8000/v1``; ``api_key`` to ``QWEN2VL_API_KEY``. ``model=None`` asks the
    server once and takes the first model it offers. ``timeout`` in seconds bounds one attempt
    of a call as a whole, and in a stream the wait for each piece. A call is tried again up to
    ``max_retries`` times where the connection failed or the server answered 408, 409, 429 or
    5xx. ``verify`` may name the file of a certificate authority of your own.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        model: str | None = None,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        max_retries: int = 2,
        verify: bool | str = True,
    ) -> None:
        if max_retries < 0:
            raise InvalidArgumentError(f"max_retries={max_retries} must be 0 or more")
        self._transport = Transport(
            base_url or os.environ.get("QWEN2VL_BASE_URL") or DEFAULT_BASE_URL,
            os.environ.get("QWEN2VL_API_KEY") if api_key is None else api_key,
            timeout=timeout,
            retry=RetryPolicy(max_retries),
            verify=verify,
            user_agent=f"qwen2vl-client/{__version__} requests/{requests.__version__}",
        )
        self._model = model
        self._model_lock = threading.Lock()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.base_url!r}, model={self._model!r})"

    @property
    def base_url(self) -> str:
        """The address of the API, ending in its version."""
        return self._transport.base_url

    @property
    def model(self) -> str:
        """The model that calls name; asked of the server once where none was given."""
        with self._model_lock:
            if self._model is None:
                offered = self.models()
                if not offered:
                    raise APIResponseError(f"{self.base_url} offers no model")
                self._model = offered[0].id
            return self._model

    def close(self) -> None:
        """Close the pooled connections."""
        self._transport.close()

    def models(self, *, timeout: float | None = None) -> list[Model]:
        """Return the models that the server offers."""
        listed = self._transport.get("/models", timeout).json.get("data")
        if not isinstance(listed, list) or not all(
            isinstance(entry, dict) and "id" in entry for entry in listed
        ):
            raise APIResponseError(f"{self.base_url}/models answered without a list of models")
        return [Model(str(one["id"]), one.get("max_model_len"), one) for one in listed]

    def chat(
        self,
        text: str | None = None,
        *,
        images: ImageSource | Sequence[ImageSource] | None = None,
        videos: str | os.PathLike[str] | bytes | Sequence[VideoSource] | None = None,
        system: str | None = SYSTEM_PROMPT,
        messages: Sequence[Message] = (),
        model: str | None = None,
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Answer:
        """Ask, and return the whole answer.

        ``images`` are paths, URLs, bytes or Pillow images; ``videos`` are paths, URLs, bytes or
        lists of frames. ``messages`` are earlier turns in OpenAI's shape, put before this one
        (alone, without ``text``, they are sent as they are). ``system=None`` sends no system
        message. ``sampling`` overrides the defaults (temperature 0.7, top_p 0.8,
        repetition_penalty 1.05, max_tokens 1024); None leaves a field out.

        Raises ``InvalidArgumentError`` before anything is sent, ``APIConnectionError``,
        ``APIStatusError`` or ``APIResponseError`` afterwards.
        """
        started = time.monotonic()
        fields = sampling_fields(sampling, stream=False)
        turns = chat_messages(messages, user_message(text, images, videos), system)
        body = encode({"model": model or self.model, "messages": turns, **fields})
        reply = self._transport.post("/chat/completions", body, timeout)
        return Answer.from_raw(reply.json, reply.request_id, time.monotonic() - started)

    def stream(
        self,
        text: str | None = None,
        *,
        images: ImageSource | Sequence[ImageSource] | None = None,
        videos: str | os.PathLike[str] | bytes | Sequence[VideoSource] | None = None,
        system: str | None = SYSTEM_PROMPT,
        messages: Sequence[Message] = (),
        model: str | None = None,
        timeout: float | None = None,
        on_complete: Callable[[Answer], None] | None = None,
        **sampling: Unpack[Sampling],
    ) -> TextStream:
        """Ask as ``chat`` does, and return the text piece by piece as it is generated.

        ``on_complete`` is called with the whole answer when the stream has reached its end,
        and not when it failed or was closed before.
        """
        started = time.monotonic()
        fields = sampling_fields(sampling, stream=True)
        turns = chat_messages(messages, user_message(text, images, videos), system)
        body = encode({"model": model or self.model, "messages": turns, **fields})
        source = self._transport.open_stream("/chat/completions", body, timeout)
        return TextStream(source, started, on_complete)
