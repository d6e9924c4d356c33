"""vLLM's serving classes behind our ``Engine``; vLLM's errors become ours here."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import cached_property
from typing import Any, NoReturn

from pydantic_core import from_json
from vllm import __version__ as vllm_version
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.inputs import TokensPrompt
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine.exceptions import EngineDeadError

from qwen2vl_serve.engine import Adapter, EngineState, Medium, ServedModel, Usage
from qwen2vl_serve.errors import (
    APIError,
    ContextLengthExceeded,
    EngineUnavailable,
    InternalError,
    InvalidValue,
    ModelNotFound,
    Overloaded,
)
from qwen2vl_serve.protocol.chat import ChatRequest
from qwen2vl_serve.vllm_engine import tools
from qwen2vl_serve.vllm_engine.adapters import Adapters
from qwen2vl_serve.vllm_engine.chunks import is_plain, plain_chunks
from qwen2vl_serve.vllm_engine.encoding import PromptEncoder
from qwen2vl_serve.vllm_engine.positions import most_seconds
from qwen2vl_serve.vllm_engine.progress import Progress
from qwen2vl_serve.vllm_engine.request import Asked, as_template_message, as_vllm

logger = logging.getLogger(__name__)

_DONE = "data: [DONE]"
_ERROR = 'data: {"error"'
# vLLM's names of what it measured when a prompt does not fit.
_CONTEXT_PARAMETERS = {
    "input_tokens": "it takes at least {} tokens",
    "input_text": "it has {} characters",
    "max_tokens": "max_tokens is {}",
    "max_completion_tokens": "max_completion_tokens is {}",
}


class VLLMEngine:
    """``qwen2vl_serve.engine.Engine`` on vLLM's ``OpenAIServingChat``."""

    def __init__(
        self,
        client: EngineClient,
        chat: OpenAIServingChat,
        encoder: PromptEncoder,
        room: int = 0,
        tool_chat: OpenAIServingChat | None = None,
    ) -> None:
        self._client = client
        self._progress = Progress.of(client)
        self._chat = chat
        self._tool_chat = tool_chat
        self._encoder = encoder
        self._window = int(chat.model_config.max_model_len)
        self._adapters = Adapters(client, chat.models, self._window, room)
        started = int(time.time())
        self._models = tuple(
            ServedModel(path.name, started, self._window) for path in chat.models.base_model_paths
        )

    @property
    def models(self) -> Sequence[ServedModel]:
        """The served names: the profile's, its first name first, then adapters."""
        return (*self._models, *self._adapters.served)

    @property
    def version(self) -> str:
        """Name and version of the engine."""
        return f"vllm {vllm_version}"

    @property
    def max_item_tokens(self) -> int:
        """Most visual tokens of a single item, which vLLM's encoder takes whole.

        The room is ``max_num_batched_tokens``, or the largest item that vLLM reserved memory
        for, of at most 14 frames.
        """
        return int(self._client.input_processor.mm_encoder_cache_size)

    @cached_property
    def max_video_seconds(self) -> float:
        """Most seconds that all videos of a request span."""
        return most_seconds(self._chat.model_config.hf_config, self._window)

    @property
    def progress(self) -> int:
        """A number that grows with every step that brings some request forward."""
        return self._progress.steps

    @property
    def pending(self) -> int:
        """How many requests vLLM's front end waits for."""
        return int(self._client.get_num_unfinished_requests())

    @property
    def states(self) -> Sequence[EngineState]:
        """It serves: an engine that does not is no more."""
        return ("serving",)

    async def complete(
        self, request: ChatRequest, media: Sequence[Medium], request_id: str, usage: Usage
    ) -> bytes:
        """Answer at once: a ``chat.completion`` object as JSON."""
        with self._adapters.used(request.model) as adapter:
            try:
                answer = await self._start(
                    request, as_vllm(request, media, request_id, usage, adapter)
                )
            except InternalError:
                if not media:
                    raise
                # See ``stream``.
                answer = await self._start(
                    request, as_vllm(request, media, request_id, usage, adapter)
                )
        usage.completion_tokens = answer.usage.completion_tokens
        body: str = answer.model_dump_json()
        return body.encode()

    def stream(
        self, request: ChatRequest, media: Sequence[Medium], request_id: str, usage: Usage
    ) -> AsyncGenerator[str, None]:
        """Answer token by token, one ``chat.completion.chunk`` a value.

        A request that fails between its rendering and the engine leaves vLLM's front end
        believing that the engine holds its media. vLLM fails the next request with one of
        them and mends the error by that, so a request with media is tried twice.
        """
        once = self._twice if media else self._chunks
        return once(request, media, request_id, usage)

    async def _twice(
        self, request: ChatRequest, media: Sequence[Medium], request_id: str, usage: Usage
    ) -> AsyncGenerator[str, None]:
        begun = False
        try:
            async with aclosing(self._chunks(request, media, request_id, usage)) as chunks:
                async for chunk in chunks:
                    begun = True
                    yield chunk
                return
        except InternalError:
            if begun:
                raise
        async with aclosing(self._chunks(request, media, request_id, usage)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _chunks(
        self, request: ChatRequest, media: Sequence[Medium], request_id: str, usage: Usage
    ) -> AsyncGenerator[str, None]:
        with self._adapters.used(request.model) as adapter:
            asked = as_vllm(request, media, request_id, usage, adapter)
            events = await self._start(request, asked)
            if not is_plain(asked):
                events = self._unwrapped(asked, events)
            async with aclosing(events):
                try:
                    async for chunk in events:
                        yield chunk
                except APIError:
                    raise
                except Exception as error:
                    raise self._translated(error, asked) from error

    async def _unwrapped(
        self, asked: Asked, events: AsyncGenerator[str, None]
    ) -> AsyncGenerator[str, None]:
        """Yield the JSON of vLLM's events.

        vLLM reports a failure in mid-stream as one more event and closes with ``[DONE]``,
        which clients read as a whole answer; here it is raised.
        """
        usage = asked.usage
        # The first event of each answer names its role. vLLM sends it even where generation fails
        # at once, so that it is held until the next. After that each holds at least a token.
        count = -(asked.n or 1)
        held: list[str] = []
        async with aclosing(events):
            async for event in events:
                if event.startswith(_DONE):
                    usage.completion_tokens = asked.completion_tokens()
                    break
                if event.startswith(_ERROR):
                    self._raise_error(ErrorResponse(**from_json(event[len("data: ") :])), asked)
                count += 1
                if count <= 0:
                    held.append(_json(event))
                    usage.completion_tokens = 0
                    continue
                for one in held:
                    yield one
                held.clear()
                usage.completion_tokens = count
                yield _json(event)
            for one in held:
                yield one

    async def load_adapter(self, name: str, adapter: Adapter) -> ServedModel:
        """Load an adapter under a name, or another one in its place."""
        return await self._adapters.load(name, adapter)

    async def unload_adapter(self, name: str) -> None:
        """Take an adapter away; answers that use it end as they would have."""
        await self._adapters.unload(name)

    def count_tokens(self, request: ChatRequest) -> int:
        """Return the prompt's tokens, each picture and video as one; the engine is not asked.

        Template and encoder are those that vLLM renders the prompt with.
        """
        tokenizer = self._client.renderer.tokenizer
        conversation = [as_template_message(message) for message in request.messages]
        text = tokenizer.apply_chat_template(
            conversation,
            tools=tools.offered(request),
            chat_template=tools.TEMPLATE if request.uses_tools else None,
            tokenize=False,
            add_generation_prompt=True,
        )
        return len(self._encoder.encode(text))

    async def check(self) -> None:
        """Return when the engine answers; raise ``EngineUnavailable`` when it does not."""
        try:
            await self._client.check_health()
        except EngineDeadError:
            raise EngineUnavailable("The engine has stopped; the server is going down.") from None

    async def probe(self) -> None:
        """Generate one token of nothing in particular; raise ``EngineUnavailable`` if it cannot."""
        await self._one_token("probe")

    async def warm_up(self) -> None:
        """Use once what vLLM makes ready at its first use only, while every other request waits.

        That is the ranks of log probabilities, which are compiled, and the compiler of grammars.
        """
        await self._one_token("warm-up", logprobs=1)
        await self._one_token(
            "warm-up", structured_outputs=StructuredOutputsParams(json_object=True)
        )

    async def _one_token(self, name: str, **wanted: Any) -> None:
        prompt = TokensPrompt(prompt_token_ids=[0])
        sampling = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, **wanted)
        try:
            async for _ in self._client.generate(prompt, sampling, f"{name}-{uuid.uuid4().hex}"):
                pass
        except EngineDeadError:
            raise EngineUnavailable("The engine has stopped; the server is going down.") from None

    async def _start(self, request: ChatRequest, asked: Asked) -> Any:
        """Return vLLM's response object, or its event generator for ``stream: true``."""
        # Whoever asks for no tools pays nothing for their parser.
        chat = self._chat
        if self._tool_chat is not None and request.uses_tools:
            chat = self._tool_chat
        try:
            answer = await chat.create_chat_completion(asked)
        except APIError:
            raise
        except Exception as error:
            raise self._translated(error, asked) from error
        if isinstance(answer, ErrorResponse):
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                # vLLM takes any cancellation for a client that left, and answers it with a 400.
                raise asyncio.CancelledError
            self._raise_error(answer, asked)
        return answer

    def _translated(self, error: Exception, asked: Asked | None = None) -> APIError:
        """Return our error for one that vLLM raised; its text goes to the log alone."""
        match error:
            case EngineDeadError():
                return EngineUnavailable("The engine has stopped; the server is going down.")
            case GracefulHTTPError():
                return Overloaded("The server's queue is full; try again shortly.")
            case VLLMClientError() if getattr(error, "parameter", None) in _CONTEXT_PARAMETERS:
                logger.info("vLLM refused: %s", error)
                measured = _CONTEXT_PARAMETERS[error.parameter].format(error.value)
                return ContextLengthExceeded(
                    f"The prompt is too long: {measured}, but this model's maximum context length "
                    f"is {self._window} tokens (max_model_len), answer included. Send fewer or "
                    "smaller pictures, shorter messages or a smaller max_tokens.",
                    param="messages",
                )
            case VLLMClientError():
                logger.warning("vLLM refused %s: %s", _name(asked), error)
                param = getattr(error, "parameter", None) or _at_fault(str(error), asked)
                return _refused(param, getattr(error, "value", None))
            case ValueError():
                logger.warning("vLLM refused %s", _name(asked), exc_info=error)
                return _refused(_at_fault(str(error), asked))
            case _:
                logger.error("vLLM failed at %s", _name(asked), exc_info=error)
                return InternalError("The engine failed on this request; the log has the cause.")

    def _raise_error(self, response: ErrorResponse, asked: Asked | None = None) -> NoReturn:
        error = response.error
        if self._client.errored:
            raise EngineUnavailable("The engine stopped while it answered.")
        logger.warning("vLLM answered %s with %d: %s", _name(asked), error.code, error.message)
        if error.code == 404:
            raise ModelNotFound(
                "The model is not served here; take a name from /v1/models.", param="model"
            )
        if error.code < 500:
            raise _refused(error.param or _at_fault(error.message, asked))
        raise InternalError("The engine failed on this request; the log has the cause.")


def _name(asked: Asked | None) -> str:
    return "a request" if asked is None else f"request {asked.request_id}"


_SCHEMA = "response_format.json_schema.schema"


def _at_fault(words: str, asked: Asked | None) -> str | None:
    """Return the field that vLLM's words are about where that is the schema of the answer."""
    grammar = asked is not None and asked.structured_outputs is not None
    return _SCHEMA if grammar and re.search("grammar|schema", words, re.IGNORECASE) else None


_REMEDIES = {
    _SCHEMA: "say it in plainer words, or leave parts out to find which it is",
    "logit_bias": "its keys must be token ids of this model's vocabulary",
    "stop_token_ids": "they must be token ids of this model's vocabulary",
    "logprobs": "ask for fewer top_logprobs",
}


def _refused(param: str | None, value: object = None) -> InvalidValue:
    """Return the error for what vLLM does not take, by the field and the value that it names.

    Fields that it names are ours as well, as far as ``parse_chat`` lets them through.
    """
    if param is None:
        return InvalidValue(
            "The engine does not take this request; the server's log has the cause. Try it without "
            "response_format, tools and sampling fields to find out which it is."
        )
    given = "" if value is None else f" ({_shown(value)})"
    remedy = _REMEDIES.get(param, "leave it out or give another value")
    return InvalidValue(f"{param}: the engine does not take it{given}; {remedy}.", param=param)


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:40]}…"


def _json(event: str) -> str:
    return event[len("data: ") :].rstrip("\n")


class Chat(OpenAIServingChat):  # type: ignore[misc]  # vLLM ships no type information
    """vLLM's chat serving, which holds ``max_tokens`` to its word and tells what it counted.

    vLLM cuts ``max_tokens`` without a sign where pictures leave less of the window than asked
    for: its own check comes before their tokens are counted.
    """

    def _maybe_get_adapters(self, request: Asked, supports_default_mm_loras: bool = False) -> Any:
        """Return the adapter that the request was begun with, whatever has its name by now."""
        chosen = request.adapter
        return chosen or super()._maybe_get_adapters(request, supports_default_mm_loras)

    async def render_chat_request(self, request: Asked) -> Any:
        """Return vLLM's conversation and engine inputs.

        Raises:
            ContextLengthExceeded: prompt and ``max_tokens`` exceed ``max_model_len``.
        """
        rendered = await super().render_chat_request(request)
        if isinstance(rendered, ErrorResponse):
            return rendered
        _, inputs = rendered
        window = self.model_config.max_model_len
        prompt = sum(len(one["prompt_token_ids"]) for one in inputs)
        request.count_prompt(prompt)
        wanted = request.max_completion_tokens or request.max_tokens
        left = window - prompt
        if left > 0 and not wanted:
            request.limit_to(left)
        if left > 0 and (request.min_tokens or 0) > left:
            raise InvalidValue(
                f"min_tokens is {request.min_tokens}, but the prompt takes {prompt} tokens and "
                f"leaves {left} of the {window} of max_model_len: ask for at most {left}, or "
                "send less.",
                param="min_tokens",
            )
        if (wanted or 1) > left:
            raise ContextLengthExceeded(
                f"The prompt is too long: it takes {prompt} tokens and the answer asks for "
                f"{wanted or 1} more, but this model's maximum context length is {window} tokens "
                "(max_model_len). Send fewer or smaller pictures, shorter messages, or max_tokens "
                f"of at most {max(left, 0)}.",
                param="messages",
            )
        return rendered

    def chat_completion_stream_generator(
        self, request: Asked, *given: Any, **named: Any
    ) -> AsyncGenerator[str, None]:
        """Return our own chunks where they are text alone, else vLLM's events.

        What is counted is noted in ``request``.
        """
        if is_plain(request):
            return plain_chunks(request, *given[:3])
        request.counted_by(next(one for one in given if isinstance(one, RequestResponseMetadata)))
        events: AsyncGenerator[str, None] = super().chat_completion_stream_generator(
            request, *given, **named
        )
        return events
