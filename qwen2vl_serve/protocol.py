"""The chat request as this server accepts it: strict types, named limits, nothing coerced.

``parse_chat`` turns a body into a ``ChatRequest`` or raises a ``RequestError`` that names the
field, the limit and the value given. Fields that OpenAI's clients send for bookkeeping
(``user``, ``metadata`` …) are accepted without effect, as its API defines; a field that would
change the answer and is not served here is refused, never ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import ErrorDetails, from_json

from qwen2vl_serve.errors import (
    InvalidJSON,
    InvalidType,
    InvalidValue,
    MissingParameter,
    RequestError,
    ReservedToken,
    TooManyItems,
    UnsupportedParameter,
)

# Fields of OpenAI's and vLLM's request that would change the answer, the schedule or the
# memory of the server, and that it does not serve. With each: what to do instead.
UNSUPPORTED: Mapping[str, str] = {
    "add_special_tokens": "leave it out: the chat template adds what the model needs",
    "allowed_token_ids": "use response_format to constrain the answer",
    "audio": "this model neither hears nor speaks",
    "bad_words": "use logit_bias",
    "cache_salt": "leave it out",
    "chat_template": "the server's template is the model's own",
    "chat_template_kwargs": "leave it out",
    "continue_final_message": "leave it out",
    "documents": "put the documents into a message",
    "ec_transfer_params": "leave it out",
    "echo": "leave it out",
    "function_call": "tools are not served",
    "functions": "tools are not served",
    "guided_choice": "use response_format",
    "guided_grammar": "use response_format",
    "guided_json": "use response_format",
    "guided_regex": "use response_format",
    "include_reasoning": "this model does not reason apart from its answer",
    "kv_transfer_params": "leave it out",
    "length_penalty": "beam search is not served",
    "logprob_token_ids": "use top_logprobs",
    "media_io_kwargs": "the profile's media section sets it",
    "mm_payload": "leave it out",
    "mm_processor_kwargs": "the profile's media section sets it",
    "priority": "requests are served in the order of their arrival",
    "prompt_embeds": "send text and pictures",
    "prompt_logprobs": "leave it out",
    "reasoning_effort": "this model does not reason apart from its answer",
    "repetition_detection": "use repetition_penalty",
    "request_id": "send the header x-request-id",
    "return_mm_kwargs": "leave it out",
    "return_prompt_text": "leave it out",
    "return_token_ids": "leave it out",
    "return_token_offsets": "leave it out",
    "return_tokens_as_token_ids": "leave it out",
    "routed_experts_prompt_start": "leave it out",
    "session_id": "leave it out",
    "stream_interval": "leave it out",
    "structured_outputs": "use response_format",
    "thinking_token_budget": "this model does not reason apart from its answer",
    "tools": "tools are not served",
    "truncate_prompt_tokens": "shorten the messages",
    "truncation_side": "shorten the messages",
    "use_beam_search": "leave it out",
    "vllm_xargs": "leave it out",
    "watermarking": "leave it out",
    "web_search_options": "this server does not search",
}

# The model's control tokens: typed by a user they forge a role or take a picture's place.
# Grounding markers (box, object_ref) are text that users and assistants may write.
_RESERVED = re.compile(
    r"<\|(?:im_start|im_end|endoftext|vision_start|vision_end|vision_pad|image_pad|video_pad)\|>"
)

_INT64_MAX = 2**63 - 1
_ROLES = "system, developer, user, assistant"
_PARTS = "text everywhere, image_url and video_url in user messages"


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class TextPart(_Strict):
    """``{"type": "text", "text": …}``."""

    type: Literal["text"]
    text: str


class ImageURL(_Strict):
    """Address of a picture: ``http(s)`` or a base64 ``data:`` URL.

    ``detail`` ``auto`` and ``high`` both mean the profile's full pixel budget.
    """

    url: Annotated[str, Field(min_length=1)]
    detail: Literal["auto", "high"] = "auto"


class ImagePart(_Strict):
    """``{"type": "image_url", "image_url": {"url": …}}``."""

    type: Literal["image_url"]
    image_url: ImageURL


class VideoURL(_Strict):
    """Address of a video, or its frames as ``data:video/jpeg;base64,<f1>,<f2>…``."""

    url: Annotated[str, Field(min_length=1)]


class VideoPart(_Strict):
    """``{"type": "video_url", "video_url": {"url": …}}``."""

    type: Literal["video_url"]
    video_url: VideoURL


def _content_kind(value: object) -> str:
    return "@text" if isinstance(value, str) else "@parts"


def _part_kind(value: object) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"@{kind}" if isinstance(kind, str) else None


def _role(value: object) -> str | None:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    return f"@{role}" if isinstance(role, str) else None


# Tags begin with "@" so that an error's location can drop them again.
UserPart = Annotated[
    Annotated[TextPart, Tag("@text")]
    | Annotated[ImagePart, Tag("@image_url")]
    | Annotated[VideoPart, Tag("@video_url")],
    Discriminator(_part_kind),
]
OnlyTextPart = Annotated[Annotated[TextPart, Tag("@text")], Discriminator(_part_kind)]
UserContent = Annotated[
    Annotated[str, Tag("@text")] | Annotated[list[UserPart], Field(min_length=1), Tag("@parts")],
    Discriminator(_content_kind),
]
TextContent = Annotated[
    Annotated[str, Tag("@text")] | Annotated[list[TextPart], Field(min_length=1), Tag("@parts")],
    Discriminator(_content_kind),
]


class SystemMessage(_Strict):
    """Instructions; ``developer`` is OpenAI's newer name for the same role."""

    role: Literal["system", "developer"]
    content: TextContent
    name: str | None = None


class UserMessage(_Strict):
    """What a user says and shows."""

    role: Literal["user"]
    content: UserContent
    name: str | None = None


class AssistantMessage(_Strict):
    """An earlier answer, as this server or OpenAI's clients return it."""

    role: Literal["assistant"]
    content: TextContent
    name: str | None = None
    # Clients send answers back as they got them; these carry nothing a prompt could use.
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


Message = Annotated[
    Annotated[SystemMessage, Tag("@system")]
    | Annotated[SystemMessage, Tag("@developer")]
    | Annotated[UserMessage, Tag("@user")]
    | Annotated[AssistantMessage, Tag("@assistant")],
    Discriminator(_role),
]


class JSONSchema(_Strict):
    """OpenAI's wrapper around a JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(_Strict):
    """What the answer must parse as: free text, any JSON object, or JSON under a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class StreamOptions(_Strict):
    """``include_usage`` adds a last chunk that holds the token counts."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


Penalty = Annotated[float, Field(ge=-2, le=2)]
Stop = Annotated[str, Field(min_length=1)]
StopSpec = Annotated[
    Annotated[Stop, Tag("@text")] | Annotated[list[Stop], Field(max_length=4), Tag("@parts")],
    Discriminator(_content_kind),
]


class ChatRequest(BaseModel):
    """Body of ``POST /v1/chat/completions``; names and bounds are OpenAI's, then vLLM's."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    messages: Annotated[list[Message], Field(min_length=1)]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: StopSpec | None = None
    seed: Annotated[int, Field(ge=-_INT64_MAX - 1, le=_INT64_MAX)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    response_format: ResponseFormat | None = None
    # vLLM's additions to OpenAI's fields.
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    # Accepted for what they say when nothing else is asked for.
    tool_choice: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    add_generation_prompt: Literal[True] | None = None

    @property
    def output_limit(self) -> int | None:
        """Most tokens to generate, by OpenAI's newer name before its older one."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class RequestLimits(BaseModel):
    """What one request may hold; counts, and ``max_tokens`` in tokens (None: the window)."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    max_messages: int
    max_n: int
    max_tokens: int | None
    images: int
    videos: int


def parse_chat(body: bytes, limits: RequestLimits) -> ChatRequest:
    """Read a request body under ``limits``.

    Of a key given twice the last value holds, as in Python's ``json``.

    Raises:
        RequestError: ``InvalidJSON``, ``MissingParameter``, ``InvalidType``, ``InvalidValue``,
            ``UnsupportedParameter``, ``TooManyItems`` or ``ReservedToken``.
    """
    data = _parse_json(body)
    for name, remedy in UNSUPPORTED.items():
        # Clients that spell out the defaults (echo: false, tools: []) ask for nothing.
        if data.get(name):
            raise UnsupportedParameter(f"{name} is not served here: {remedy}.", param=name)
    # Before validation, so that 10,000 messages are not walked to be refused.
    messages = data.get("messages")
    if isinstance(messages, list) and len(messages) > limits.max_messages:
        raise TooManyItems(
            f"messages holds {len(messages)} messages; at most {limits.max_messages} are taken: "
            "drop or summarise the oldest ones.",
            param="messages",
        )
    try:
        request = ChatRequest.model_validate(data)
    except ValidationError as error:
        raise _as_request_error(error.errors(include_url=False)[0]) from None
    _check_fields(request, limits)
    _check_messages(request, limits)
    return request


def _parse_json(body: bytes) -> dict[str, Any]:
    try:
        data = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise InvalidJSON(f"The body is not valid JSON: {error}.") from None
    if not isinstance(data, dict):
        raise InvalidJSON('The body must be a JSON object, as {"messages": […]}.')
    return data


def _check_fields(request: ChatRequest, limits: RequestLimits) -> None:
    if request.n is not None and request.n > limits.max_n:
        raise InvalidValue(f"n is {request.n}; at most {limits.max_n} is served.", param="n")
    asked = request.output_limit
    name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    if asked is not None and limits.max_tokens is not None and asked > limits.max_tokens:
        raise InvalidValue(f"{name} is {asked}; at most {limits.max_tokens} is served.", param=name)
    if request.min_tokens and asked is not None and request.min_tokens > asked:
        raise InvalidValue(
            f"min_tokens is {request.min_tokens}, more than {name} ({asked}).", param="min_tokens"
        )
    if request.stream_options is not None and not request.stream:
        raise InvalidValue(
            "stream_options is given without stream: true; set stream or leave it out.",
            param="stream_options",
        )
    if request.top_logprobs and not request.logprobs:
        raise InvalidValue(
            f"top_logprobs is {request.top_logprobs} without logprobs: true; set logprobs.",
            param="top_logprobs",
        )
    for key in request.logit_bias or ():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise InvalidValue(
                f"logit_bias has the key {key[:40]!r}; keys are token ids as digits.",
                param="logit_bias",
            )
    schema = request.response_format
    if schema is not None and (schema.type == "json_schema") != (schema.json_schema is not None):
        raise InvalidValue(
            "response_format.json_schema goes with type json_schema, and only with it.",
            param="response_format.json_schema",
        )


def _check_messages(request: ChatRequest, limits: RequestLimits) -> None:
    images = videos = 0
    for index, message in enumerate(request.messages):
        for text in _adjacent_texts(message.content):
            if found := _RESERVED.search(text):
                raise ReservedToken(
                    f"messages[{index}].content contains the control token {found.group()}; "
                    "remove it from the text.",
                    param=f"messages[{index}].content",
                )
        if not isinstance(message.content, str):
            images += sum(isinstance(part, ImagePart) for part in message.content)
            videos += sum(isinstance(part, VideoPart) for part in message.content)
    for count, limit, noun in ((images, limits.images, "image"), (videos, limits.videos, "video")):
        if count > limit:
            raise TooManyItems(
                f"messages hold {count} {noun}s; at most {limit} per request: send fewer, or "
                f"raise media.limit_mm_per_prompt.{noun} in the server's profile.",
                param="messages",
            )


def _adjacent_texts(
    content: str | list[TextPart] | list[TextPart | ImagePart | VideoPart],
) -> Iterator[str]:
    """Yield the texts of a content, runs of adjacent text parts joined.

    The template puts adjacent parts side by side, where two halves make one control token.
    """
    if isinstance(content, str):
        yield content
        return
    run: list[str] = []
    for part in content:
        if isinstance(part, TextPart):
            run.append(part.text)
        elif run:
            yield "".join(run)
            run.clear()
    if run:
        yield "".join(run)


_TYPE_NAMES = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a string or an array",
    "dict_type": "an object",
    "model_type": "an object",
    "none_required": "null",
}


def _as_request_error(error: ErrorDetails) -> RequestError:
    param = _path(error["loc"])
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "missing":
        return MissingParameter(f"{param} is required.", param=param)
    if kind == "extra_forbidden":
        return UnsupportedParameter(f"{param} is not served here: leave it out.", param=param)
    if kind in _TYPE_NAMES:
        return InvalidType(
            f"{param} must be {_TYPE_NAMES[kind]}, not {_shown(given)}.", param=param
        )
    if kind.startswith("union_tag"):
        return _as_tag_error(
            param, given, "role" if "_role" in context["discriminator"] else "type"
        )
    message = error["msg"][:1].lower() + error["msg"][1:]
    return InvalidValue(f"{param}: {message}; {_shown(given)} was given.", param=param)


def _as_tag_error(param: str, given: object, field: str) -> RequestError:
    """Return the error for a message without a known role, or a part without a known type."""
    if not isinstance(given, dict):
        return InvalidType(f"{param} must be an object, not {_shown(given)}.", param=param)
    param = f"{param}.{field}"
    if field not in given:
        return MissingParameter(f"{param} is required.", param=param)
    if not isinstance(given[field], str):
        return InvalidType(f"{param} must be a string, not {_shown(given[field])}.", param=param)
    served = _ROLES if field == "role" else _PARTS
    return InvalidValue(f"{param} is {_shown(given[field])}; served are {served}.", param=param)


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith("@"):
            path += f".{step}" if path else step
    return path or "body"


def _shown(value: object) -> str:
    """Return a short JSON-like rendering; long strings (base64) are cut."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an empty array" if not value else "an array"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}… ({len(text)} characters)"
