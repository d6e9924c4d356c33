"""The client: one object for one server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Unpack

from qwen2vl_client.answer import Answer, Explanation, Model
from qwen2vl_client.files import Files
from qwen2vl_client.flows import (
    DEFAULT_BASE_URL,
    DEFAULT_TIMEOUT,
    Flows,
    Question,
    chosen_api_key,
    chosen_base_url,
)
from qwen2vl_client.media import ImageSource, VideoSource
from qwen2vl_client.request import SYSTEM_PROMPT, ChatFields, Message
from qwen2vl_client.stream import TextStream
from qwen2vl_client.transport import Transport
from qwen2vl_client.uploads import UPLOAD_ABOVE

__all__ = ["DEFAULT_BASE_URL", "DEFAULT_TIMEOUT", "Client"]


class Client:
    """Asks one server; may be used by several threads at once.

    ``base_url`` defaults to the environment's ``QWEN2VL_BASE_URL``, then to
    ``http://127.0.0.1:8000/v1``; ``api_key`` to ``QWEN2VL_API_KEY``. ``model=None`` asks the
    server once and takes the first model it offers. ``timeout`` in seconds bounds one attempt
    of a call as a whole, and in a stream the wait for each piece. A call is tried again up to
    ``max_retries`` times where the connection failed or the server answered 408, 409, 429 or
    5xx. ``verify`` may name the file of a certificate authority of your own. Local pictures and
    videos of more than ``upload_above`` bytes are uploaded once and named by their id afterwards
    (None: never); a server that keeps no files gets them inline.
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
        upload_above: int | None = UPLOAD_ABOVE,
    ) -> None:
        self._transport = Transport(
            chosen_base_url(base_url), chosen_api_key(api_key), timeout=timeout, verify=verify
        )
        self._flows = Flows(self._transport.base_url, model, max_retries, upload_above)
        self.files = Files(self._flows, self._transport)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.base_url!r}, model={self._flows.given_model!r})"

    @property
    def base_url(self) -> str:
        """The address of the API, ending in its version."""
        return self._transport.base_url

    @property
    def model(self) -> str:
        """The model that calls name; asked of the server once where none was given."""
        return self._transport.run(self._flows.model())

    def close(self) -> None:
        """Close the pooled connections."""
        self._transport.close()

    def models(self, *, timeout: float | None = None) -> list[Model]:
        """Return the models that the server offers."""
        return self._transport.run(self._flows.models(timeout))

    def health(self, *, timeout: float | None = 10.0) -> bool:
        """Tell whether the server's process answers; False where nothing listens, too."""
        return self._transport.run(self._flows.probe("/health/live", timeout))

    def ready(self, *, timeout: float | None = 10.0) -> bool:
        """Tell whether the server's engine answers and new requests are taken."""
        return self._transport.run(self._flows.probe("/health/ready", timeout))

    def chat(
        self,
        /,
        text: str | None = None,
        *,
        images: ImageSource | Sequence[ImageSource] | None = None,
        videos: VideoSource | Sequence[VideoSource] | None = None,
        system: str | None = SYSTEM_PROMPT,
        messages: Sequence[Message] = (),
        model: str | None = None,
        timeout: float | None = None,
        **sampling: Unpack[ChatFields],
    ) -> Answer:
        """Ask, and return the whole answer.

        ``images`` are paths, URLs, bytes, open files, Pillow images, numpy arrays or uploaded
        files; ``videos`` are paths, URLs, bytes, uploaded files or lists of frames.
        ``messages`` are earlier turns in OpenAI's shape, put before this one
        (alone, without ``text``, they are sent as they are). ``system=None`` sends no system
        message. ``sampling`` overrides the defaults (temperature 0.7, top_p 0.8,
        repetition_penalty 1.05, max_tokens 1024); None leaves a field out.

        Raises ``InvalidArgumentError`` before anything is sent, ``APIConnectionError``,
        ``APIStatusError`` or ``APIResponseError`` afterwards.
        """
        question = Question(text, images, videos, system, messages)
        return self._transport.run(self._flows.chat(question, model, timeout, sampling))

    def stream(
        self,
        /,
        text: str | None = None,
        *,
        images: ImageSource | Sequence[ImageSource] | None = None,
        videos: VideoSource | Sequence[VideoSource] | None = None,
        system: str | None = SYSTEM_PROMPT,
        messages: Sequence[Message] = (),
        model: str | None = None,
        timeout: float | None = None,
        on_complete: Callable[[Answer], None] | None = None,
        **sampling: Unpack[ChatFields],
    ) -> TextStream:
        """Ask as ``chat`` does, and return the text piece by piece as it is generated.

        ``on_complete`` is called with the whole answer when the stream has reached its end,
        and not when it failed or was closed before.
        """
        question = Question(text, images, videos, system, messages)
        opened = self._transport.run(self._flows.stream(question, model, timeout, sampling))
        return TextStream(opened.source, opened.started, on_complete)

    def explain(
        self,
        /,
        text: str | None = None,
        *,
        images: ImageSource | Sequence[ImageSource] | None = None,
        videos: VideoSource | Sequence[VideoSource] | None = None,
        system: str | None = SYSTEM_PROMPT,
        messages: Sequence[Message] = (),
        model: str | None = None,
        timeout: float | None = None,
        **sampling: Unpack[ChatFields],
    ) -> Explanation:
        """Return what the same ``chat`` would cost and whether it fits; nothing is generated."""
        question = Question(text, images, videos, system, messages)
        return self._transport.run(self._flows.explain(question, model, timeout, sampling))
