"""The client for asyncio; needs httpx, the extra ``async``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Unpack

from qwen2vl_client.answer import Answer, Explanation, Model
from qwen2vl_client.async_files import AsyncFiles
from qwen2vl_client.async_stream import AsyncTextStream
from qwen2vl_client.async_transport import AsyncTransport
from qwen2vl_client.flows import (
    DEFAULT_TIMEOUT,
    Flows,
    Question,
    chosen_api_key,
    chosen_base_url,
)
from qwen2vl_client.media import ImageSource, VideoSource
from qwen2vl_client.request import SYSTEM_PROMPT, ChatFields, Message
from qwen2vl_client.uploads import UPLOAD_ABOVE


class AsyncClient:
    """As ``Client``, awaited; for the tasks of one event loop.

    ::

        async with AsyncClient() as client:
            print(await client.chat("What is this?", images="a.jpg"))

    Cancelling the task that awaits an answer closes its connection, and the server stops.
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
        self._transport = AsyncTransport(
            chosen_base_url(base_url), chosen_api_key(api_key), timeout=timeout, verify=verify
        )
        self._flows = Flows(self._transport.base_url, model, max_retries, upload_above)
        self.files = AsyncFiles(self._flows, self._transport)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncClient({self.base_url!r}, model={self._flows.given_model!r})"

    @property
    def base_url(self) -> str:
        """The address of the API, ending in its version."""
        return self._transport.base_url

    @property
    def model(self) -> Awaitable[str]:
        """The model that calls name, awaited; asked of the server once where none was given."""
        return self._transport.run(self._flows.model())

    async def close(self) -> None:
        """Close the pooled connections."""
        await self._transport.close()

    async def models(self, *, timeout: float | None = None) -> list[Model]:
        """Return the models that the server offers."""
        return await self._transport.run(self._flows.models(timeout))

    async def health(self, *, timeout: float | None = 10.0) -> bool:
        """Tell whether the server's process answers; False where nothing listens, too."""
        return await self._transport.run(self._flows.probe("/health/live", timeout))

    async def ready(self, *, timeout: float | None = 10.0) -> bool:
        """Tell whether the server's engine answers and new requests are taken."""
        return await self._transport.run(self._flows.probe("/health/ready", timeout))

    async def chat(
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
        return await self._transport.run(self._flows.chat(question, model, timeout, sampling))

    async def stream(
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
    ) -> AsyncTextStream:
        """Ask as ``chat`` does, and return the text piece by piece as it is generated.

        ``on_complete`` is called with the whole answer when the stream has reached its end,
        and not when it failed or was closed before.
        """
        question = Question(text, images, videos, system, messages)
        opened = await self._transport.run(self._flows.stream(question, model, timeout, sampling))
        return AsyncTextStream(opened.source, opened.started, on_complete)

    async def explain(
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
        return await self._transport.run(self._flows.explain(question, model, timeout, sampling))
