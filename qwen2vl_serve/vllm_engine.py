"""The seam: the one module that knows vLLM (0.32).

``start_engine`` boots the engine of a profile and yields a ``VLLMEngine``, which lets vLLM's
own serving classes do the work and translates at the border: our request to vLLM's, vLLM's
errors to ours.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar, NoReturn

from pydantic_core import from_json
from vllm import __version__ as vllm_version
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.generate.base.protocol import (
    JsonSchemaResponseFormat,
    ResponseFormat,
    StreamOptions,
)
from vllm.entrypoints.launchers.api_server.entry import (
    build_async_engine_client_from_engine_args,
)
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
)
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.multimodal.media.base import MediaWithBytes
from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.utils.gc_utils import freeze_gc_heap
from vllm.v1.engine.exceptions import EngineDeadError

from qwen2vl_serve import protocol
from qwen2vl_serve.engine import Picture, ServedModel
from qwen2vl_serve.errors import (
    APIError,
    ContextLengthExceeded,
    EngineUnavailable,
    InternalError,
    InvalidValue,
    InvalidVideo,
    ModelNotFound,
    Overloaded,
)
from qwen2vl_serve.media.fetch import Fetcher
from qwen2vl_serve.profile import Profile
from qwen2vl_serve.protocol import ChatRequest, ImagePart, Message, TextPart, VideoPart

logger = logging.getLogger(__name__)

MEDIA_CONNECTOR = "qwen2vl_serve"
"""Name under which vLLM finds our connector (environment ``VLLM_MEDIA_CONNECTOR``)."""

_DONE = "data: [DONE]"
_ERROR = 'data: {"error"'
# vLLM's names of what it measured when a prompt does not fit.
_CONTEXT_PARAMETERS = {"input_tokens", "input_text", "max_tokens", "max_completion_tokens"}


class VLLMEngine:
    """``qwen2vl_serve.engine.Engine`` on vLLM's ``OpenAIServingChat``."""

    def __init__(self, client: EngineClient, chat: OpenAIServingChat) -> None:
        self._client = client
        self._chat = chat
        self._window = int(chat.model_config.max_model_len)
        started = int(time.time())
        self._models = tuple(
            ServedModel(path.name, started, self._window) for path in chat.models.base_model_paths
        )

    @property
    def models(self) -> Sequence[ServedModel]:
        """The served names, the profile's first name first."""
        return self._models

    @property
    def version(self) -> str:
        """Name and version of the engine."""
        return f"vllm {vllm_version}"

    async def complete(
        self, request: ChatRequest, pictures: Sequence[Picture], request_id: str
    ) -> bytes:
        """Answer at once: a ``chat.completion`` object as JSON."""
        answer = await self._start(request, pictures, request_id)
        body: str = answer.model_dump_json()
        return body.encode()

    async def stream(
        self, request: ChatRequest, pictures: Sequence[Picture], request_id: str
    ) -> AsyncGenerator[str, None]:
        """Answer token by token, one ``chat.completion.chunk`` a value.

        vLLM reports a failure in mid-stream as one more event and closes with ``[DONE]``,
        which clients read as a whole answer; here it is raised.
        """
        events = await self._start(request, pictures, request_id)
        try:
            async for event in events:
                if event.startswith(_DONE):
                    return
                if event.startswith(_ERROR):
                    self._raise_error(ErrorResponse(**from_json(event[len("data: ") :])))
                yield event[len("data: ") :].rstrip("\n")
        finally:
            await events.aclose()

    def count_tokens(self, request: ChatRequest) -> int:
        """Return the prompt's tokens with each picture as one; the engine is not asked.

        Template and tokenizer are those that vLLM renders the prompt with.
        """
        tokenizer = self._client.renderer.tokenizer
        conversation = [_as_template_message(message) for message in request.messages]
        text = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )
        return len(tokenizer.encode(text, add_special_tokens=False))

    async def check(self) -> None:
        """Return when the engine answers; raise ``EngineUnavailable`` when it does not."""
        try:
            await self._client.check_health()
        except EngineDeadError:
            raise EngineUnavailable("The engine has stopped; the server is going down.") from None

    async def _start(
        self, request: ChatRequest, pictures: Sequence[Picture], request_id: str
    ) -> Any:
        """Return vLLM's response object, or its event generator for ``stream: true``."""
        try:
            answer = await self._chat.create_chat_completion(
                _as_vllm(request, pictures, request_id)
            )
        except APIError:
            raise
        except Exception as error:
            raise self._translated(error) from error
        if isinstance(answer, ErrorResponse):
            self._raise_error(answer)
        return answer

    def _translated(self, error: Exception) -> APIError:
        """Return our error for one that vLLM raised; library text passes only where typed."""
        match error:
            case EngineDeadError():
                return EngineUnavailable("The engine has stopped; the server is going down.")
            case GracefulHTTPError():
                return Overloaded("The server's queue is full; try again shortly.")
            case VLLMClientError() if getattr(error, "parameter", None) in _CONTEXT_PARAMETERS:
                return ContextLengthExceeded(
                    f"The messages and the requested output do not fit into max_model_len "
                    f"({self._window} tokens): {error.args[0]} Send fewer or smaller pictures, "
                    "shorter messages or a smaller max_tokens.",
                    param="messages",
                )
            case VLLMClientError():
                return InvalidValue(str(error.args[0]), param=getattr(error, "parameter", None))
            case ValueError():
                return InvalidValue(str(error))
            case _:
                logger.error("vLLM failed", exc_info=error)
                return InternalError("The engine failed on this request; the log has the cause.")

    def _raise_error(self, response: ErrorResponse) -> NoReturn:
        error = response.error
        if self._client.errored:
            raise EngineUnavailable("The engine stopped while it answered.")
        if error.code == 404:
            raise ModelNotFound(error.message, param="model")
        if error.code < 500:
            raise InvalidValue(error.message, param=error.param)
        raise InternalError("The engine failed on this request; the log has the cause.")


class Chat(OpenAIServingChat):  # type: ignore[misc]  # vLLM ships no type information
    """vLLM's chat serving, which holds ``max_tokens`` to its word.

    vLLM cuts ``max_tokens`` without a sign where pictures leave less of the window than asked
    for: its own check comes before their tokens are counted.
    """

    async def render_chat_request(self, request: ChatCompletionRequest) -> Any:
        """Return vLLM's conversation and engine inputs.

        Raises:
            ContextLengthExceeded: prompt and ``max_tokens`` exceed ``max_model_len``.
        """
        rendered = await super().render_chat_request(request)
        wanted = request.max_completion_tokens or request.max_tokens
        if isinstance(rendered, ErrorResponse) or wanted is None:
            return rendered
        _, inputs = rendered
        window = self.model_config.max_model_len
        prompt = sum(len(one["prompt_token_ids"]) for one in inputs)
        if prompt + wanted > window:
            raise ContextLengthExceeded(
                f"The messages take {prompt} tokens and max_tokens asks for {wanted} more; "
                f"max_model_len is {window}. Send fewer or smaller pictures, shorter messages, "
                f"or max_tokens of at most {max(window - prompt, 0)}.",
                param="messages",
            )
        return rendered


@asynccontextmanager
async def start_engine(profile: Profile, fetcher: Fetcher) -> AsyncIterator[VLLMEngine]:
    """Boot vLLM with ``profile.engine_args()``; shut it down on the way out.

    vLLM fetches through ``fetcher``, by the connector that ``VLLM_MEDIA_CONNECTOR`` names.

    Whatever vLLM raises at start passes unchanged: the launcher explains it.
    """
    bound = type("BoundConnector", (Connector,), {"fetcher": fetcher})
    MEDIA_CONNECTOR_REGISTRY.register(MEDIA_CONNECTOR)(bound)
    args = AsyncEngineArgs(**profile.engine_args())
    async with build_async_engine_client_from_engine_args(args) as client:
        names = profile.model.served_names
        models = OpenAIServingModels(client, [BaseModelPath(name, args.model) for name in names])
        renderer = OnlineRenderer(
            model_config=client.model_config,
            renderer=client.renderer,
            request_logger=None,
            chat_template=None,
            chat_template_content_format="auto",
        )
        renderer.warmup()
        chat = Chat(
            client,
            models,
            "assistant",
            online_renderer=renderer,
            request_logger=None,
            chat_template=None,
            chat_template_content_format="auto",
        )
        # As vLLM's own server does: what the boot left is not walked at each collection.
        freeze_gc_heap()
        yield VLLMEngine(client, chat)


class Connector(MediaConnector):  # type: ignore[misc]  # vLLM ships no type information
    """Where vLLM asks for the videos that a request names; pictures it is given.

    Addresses go through our ``Fetcher``, and none of vLLM's or a library's words to a client.
    """

    fetcher: ClassVar[Fetcher]

    async def load_from_url_async(
        self, url: str, media_io: Any, *, fetch_timeout: int | None = None
    ) -> Any:
        """Return the media of a ``data:`` or ``http(s)`` address."""
        if url[:5].lower() == "data:":
            return await super().load_from_url_async(url, media_io, fetch_timeout=fetch_timeout)
        data = await self.fetcher.fetch(url)
        return await asyncio.get_running_loop().run_in_executor(None, media_io.load_bytes, data)

    async def fetch_video_async(self, video_url: str, **options: Any) -> Any:
        """Return the frames of a video.

        Raises:
            InvalidVideo: the address cannot be fetched, or its bytes not be decoded.
        """
        try:
            return await super().fetch_video_async(video_url, **options)
        except Exception as error:
            logger.info("video refused: %s", type(error).__name__)
            raise InvalidVideo(
                "video_url could not be fetched or decoded; send an mp4 or webm file, or frames "
                "as data:video/jpeg;base64,<frame>,<frame>….",
                param="messages",
            ) from None


class _Lazy(MediaWithBytes):  # type: ignore[misc]  # vLLM ships no type information
    """A picture whose pixels vLLM asks for only where its processor's cache has not its key.

    vLLM takes it for its own pair of media and bytes; the bytes it would hash are not needed,
    since the key (``uuid``) comes with it.
    """

    def __init__(self, picture: Picture) -> None:
        self._picture = picture

    @property
    def media(self) -> Any:
        """The pixels, decoded now."""
        return self._picture.pixels()


def _as_vllm(
    request: ChatRequest, pictures: Sequence[Picture], request_id: str
) -> ChatCompletionRequest:
    """Return vLLM's request object.

    Built without its validators: ``parse_chat`` has checked every field, and vLLM's own pass
    over the messages costs more than ours.
    """
    given = request.model_dump(exclude_none=True, exclude=_TRANSLATED)
    if request.stream_options is not None:
        given["stream_options"] = StreamOptions(**request.stream_options.model_dump())
    if request.response_format is not None:
        given["response_format"] = _as_response_format(request.response_format)
    rest = iter(pictures)
    return ChatCompletionRequest.model_construct(
        messages=[_as_message(message, rest) for message in request.messages],
        request_id=request_id,
        **given,
    )


# Fields that vLLM spells differently, or that ask for nothing.
_TRANSLATED = {
    "messages",
    "stream_options",
    "response_format",
    "tool_choice",
    "modalities",
    "add_generation_prompt",
    "mm_processor_kwargs",
    "vl_high_resolution_images",
    "include_media_info",
    "overflow",
}


def _as_message(message: Message, pictures: Iterator[Picture]) -> dict[str, Any]:
    role = _role(message)
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    return {"role": role, "content": [_as_part(part, pictures) for part in message.content]}


def _as_template_message(message: Message) -> dict[str, Any]:
    role = _role(message)
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    return {"role": role, "content": [_as_template_part(part) for part in message.content]}


def _as_template_part(part: TextPart | ImagePart | VideoPart) -> dict[str, str]:
    match part:
        case TextPart():
            return {"type": "text", "text": part.text}
        case ImagePart():
            return {"type": "image"}
        case VideoPart():
            return {"type": "video"}


def _role(message: Message) -> str:
    # The family's template prints a role as it is given; it was trained on "system".
    return "system" if message.role == "developer" else message.role


def _as_part(part: TextPart | ImagePart | VideoPart, pictures: Iterator[Picture]) -> dict[str, Any]:
    match part:
        case TextPart():
            return {"type": "text", "text": part.text}
        case ImagePart():
            picture = next(pictures)
            return {"type": "image_pil", "image_pil": _Lazy(picture), "uuid": picture.key}
        case VideoPart():
            return {"type": "video_url", "video_url": {"url": part.video_url.url}}


def _as_response_format(wanted: protocol.ResponseFormat) -> ResponseFormat:
    schema = wanted.json_schema
    if schema is None:
        return ResponseFormat(type=wanted.type)
    return ResponseFormat(
        type=wanted.type,
        json_schema=JsonSchemaResponseFormat(
            name=schema.name, schema=schema.schema_ or {}, strict=schema.strict
        ),
    )
