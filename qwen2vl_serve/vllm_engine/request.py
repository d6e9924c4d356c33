"""Our request in vLLM's words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import PrivateAttr
from vllm.entrypoints.generate.base.protocol import (
    RequestResponseMetadata,
    StreamOptions,
)
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.lora.request import LoRARequest
from vllm.multimodal.media.base import MediaWithBytes
from vllm.sampling_params import StructuredOutputsParams
from xgrammar.structural_tag import JSONSchemaFormat, StructuralTag

from qwen2vl_serve.engine import Medium, Picture, Usage
from qwen2vl_serve.protocol.chat import ChatRequest, Message, ResponseFormat, ToolMessage
from qwen2vl_serve.protocol.content import ImagePart, TextPart, UserPart
from qwen2vl_serve.vllm_engine import tools
from qwen2vl_serve.vllm_engine.connector import Frames


class Pixels(Image.Image):
    """A Pillow image that decodes when its pixels are first asked for, and knows its size before.

    vLLM looks at every picture of a request to see that it is there, also at those whose
    processed form it has cached under their key, and turns the others upright in a copy: of these
    nothing is looked at. ``patches`` takes the array, other processors what Pillow makes of it.
    """

    def __init__(self, picture: Picture) -> None:
        super().__init__()
        self._mode = "RGB"
        self._size = picture.size
        self._picture = picture

    @property
    def array(self) -> NDArray[np.uint8]:
        """RGB, uint8 [height, width, 3]."""
        return self._picture.pixels()

    @property
    def im(self) -> Any:
        """Pillow's own pixels, made once."""
        if self._im is None:
            self._im = Image.fromarray(self.array).im
        return self._im

    @im.setter
    def im(self, pixels: Any) -> None:
        self._im = pixels

    def copy(self) -> Pixels:
        """Return the image itself, for nobody changes it."""
        return self


def _wrapped(picture: Picture) -> Any:
    # In vLLM's wrapper the image is not touched while its parts are parsed. The bytes it would
    # hash are not needed: the key (``uuid``) comes with it.
    return MediaWithBytes(Pixels(picture), b"")


class Asked(ChatCompletionRequest):  # type: ignore[misc]  # vLLM ships no type information
    """vLLM's request object, which carries what was counted for it back to us."""

    _usage: Usage = PrivateAttr(default_factory=Usage)
    _counted: RequestResponseMetadata | None = PrivateAttr(default=None)
    _adapter: LoRARequest | None = PrivateAttr(default=None)
    _most_tokens: int | None = PrivateAttr(default=None)

    @property
    def adapter(self) -> LoRARequest | None:
        """The adapter that it is answered with, None for the model itself."""
        return self._adapter

    def answered_with(self, adapter: LoRARequest) -> None:
        """Choose an adapter."""
        self._adapter = adapter

    def count_in(self, usage: Usage) -> None:
        """Have the prompt counted in ``usage``."""
        self._usage = usage

    @property
    def usage(self) -> Usage:
        """Where its tokens are counted."""
        return self._usage

    def held_to(self, most_tokens: int | None) -> None:
        """Say how long its answers may be where the window leaves so much."""
        self._most_tokens = most_tokens

    def limit_to(self, left: int) -> None:
        """Set ``max_tokens`` of a request that names none, of which the window leaves ``left``."""
        if self._most_tokens is not None:
            self.max_tokens = min(self._most_tokens, left)

    def count_prompt(self, tokens: int) -> None:
        """Note the tokens of the prompt."""
        self._usage.prompt_tokens = tokens

    def counted_by(self, metadata: RequestResponseMetadata) -> None:
        """Name the object in which vLLM tells at the end what it has counted."""
        self._counted = metadata

    def completion_tokens(self) -> int | None:
        """Tokens of all answers to a stream that has ended."""
        if self._counted is None or self._counted.final_usage_info is None:
            return None
        tokens: int = self._counted.final_usage_info.completion_tokens
        return tokens


# vLLM's own field warns whenever it is read, into nowhere and for a fiftieth of a request: by a
# descriptor of its class, which a field of ours by that name would leave in place.
Asked.max_tokens = None  # type: ignore[assignment]  # of the class, no request


def as_vllm(
    request: ChatRequest,
    media: Sequence[Medium],
    request_id: str,
    usage: Usage | None = None,
    adapter: LoRARequest | None = None,
) -> Asked:
    """Return vLLM's request object, whose tokens will be counted in ``usage``.

    Built without its validators: ``parse_chat`` has checked every field, and vLLM's own pass
    over the messages costs more than ours.
    """
    given = request.model_dump(exclude_none=True, exclude=_TRANSLATED)
    if request.stream_options is not None:
        given["stream_options"] = StreamOptions(**request.stream_options.model_dump())
    if request.response_format is not None:
        given["structured_outputs"] = _as_structured_outputs(request.response_format)
    if request.tools is not None:
        given |= tools.fields(request)
    rest = iter(media)
    blank, mutable = _blank()
    asked: Asked = blank.model_copy(
        update={
            **deepcopy(mutable),
            **given,
            "messages": [_as_message(message, rest) for message in request.messages],
            "request_id": request_id,
        }
    )
    if request.output_limit is None:
        asked.held_to(request.most_tokens)
    if usage is not None:
        asked.count_in(usage)
    if adapter is not None:
        asked.answered_with(adapter)
    return asked


@lru_cache(maxsize=1)
def _blank() -> tuple[Asked, dict[str, Any]]:
    """A request of defaults to copy, and those of them that must not be shared.

    Making one anew, pydantic goes over all 68 fields and reads the signature of a factory each
    time, which takes a fifth of a short request's CPU time.
    """
    blank: Asked = Asked.model_construct(messages=[])
    return blank, {name: value for name, value in blank if isinstance(value, list | dict)}


# Fields that vLLM spells differently, or that ask for nothing.
_TRANSLATED = {
    "messages",
    "stream_options",
    "response_format",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "modalities",
    "add_generation_prompt",
    "mm_processor_kwargs",
    "vl_high_resolution_images",
    "include_media_info",
    "overflow",
}


def _as_message(message: Message, media: Iterator[Medium]) -> dict[str, Any]:
    content = _content(message)
    parts = content if isinstance(content, str) else [_as_part(part, media) for part in content]
    beside = tools.beside_content(message, parsed=False)
    return {"role": _role(message), "content": parts, **beside}


def as_template_message(message: Message) -> dict[str, Any]:
    """Return a message as the chat template reads it: media as bare placeholders."""
    content = _content(message)
    parts = content if isinstance(content, str) else [_as_template_part(part) for part in content]
    beside = tools.beside_content(message, parsed=True)
    return {"role": _role(message), "content": parts, **beside}


def _content(message: Message) -> str | Sequence[UserPart]:
    content = message.content
    # vLLM puts lines between the texts of a tool's result, and of no other message.
    if isinstance(message, ToolMessage) and not isinstance(content, str):
        texts = [part.text for part in content if isinstance(part, TextPart)]
        if len(texts) == len(content):
            return "".join(texts)
    return content


def _as_template_part(part: UserPart) -> dict[str, str]:
    match part:
        case TextPart():
            return {"type": "text", "text": part.text}
        case ImagePart():
            return {"type": "image"}
        case _:
            return {"type": "video"}


def _role(message: Message) -> str:
    # The family's template prints a role as it is given; it was trained on "system".
    return "system" if message.role == "developer" else message.role


def _as_part(part: UserPart, media: Iterator[Medium]) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    medium: Any = next(media)  # a picture or a video: the part says which
    if isinstance(part, ImagePart):
        return {"type": "image_pil", "image_pil": _wrapped(medium), "uuid": medium.key}
    # What stands for the address reaches our connector as it is.
    return {"type": "video_url", "video_url": Frames(medium), "uuid": medium.key}


def _as_structured_outputs(wanted: ResponseFormat) -> StructuredOutputsParams | None:
    """Return the grammar of an answer, which has one blank at most between the parts of its JSON.

    vLLM's own way to a JSON schema allows any number, and a small model may write nothing else; or
    none at all, as no model was taught to write. As a structural tag a schema can say how many.
    """
    if wanted.type == "text":
        return None
    if wanted.json_schema is None:
        schema: dict[str, Any] | bool = {"type": "object"}
    else:
        schema = wanted.json_schema.schema_ or True
        tools.refuse_unenforceable(schema, "response_format.json_schema.schema")
    content = JSONSchemaFormat(json_schema=schema, max_whitespace_cnt=1)
    return StructuredOutputsParams(structural_tag=StructuralTag(format=content).model_dump_json())
