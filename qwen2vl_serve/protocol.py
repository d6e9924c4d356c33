"""The chat request as this server accepts it: strict types, named bounds, nothing coerced.

Fields that OpenAI's clients send for bookkeeping (``user``, ``metadata`` …) are accepted without
effect, as its API defines; a field that would change the answer and is not served here is
refused, never ignored. ``validation.parse_chat`` reads a body into these models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from qwen2vl_serve.tools import MOST_TOOLS, NamedTool, Tool, ToolCall

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
    "function_call": "use tool_choice",
    "functions": "use tools",
    "guided_choice": "use response_format",
    "guided_grammar": "use response_format",
    "guided_json": "use response_format",
    "guided_regex": "use response_format",
    "include_reasoning": "this model does not reason apart from its answer",
    "kv_transfer_params": "leave it out",
    "length_penalty": "beam search is not served",
    "logprob_token_ids": "use top_logprobs",
    "mm_payload": "leave it out",
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
    "truncate_prompt_tokens": "shorten the messages",
    "truncation_side": "shorten the messages",
    "use_beam_search": "leave it out",
    "vllm_xargs": "leave it out",
    "watermarking": "leave it out",
    "web_search_options": "this server does not search",
}

_INT64_MAX = 2**63 - 1


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class TextPart(_Strict):
    """``{"type": "text", "text": …}``."""

    type: Literal["text"]
    text: str


Positive = Annotated[int, Field(ge=1)]


class PixelFields(_Strict):
    """How large the model shall see a picture, in pixels; clamped to the profile's bounds."""

    min_pixels: Positive | None = None
    max_pixels: Positive | None = None
    resized_height: Positive | None = None
    resized_width: Positive | None = None


Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class VideoFields(PixelFields):
    """Which frames of a video the model shall see, and how large; names of qwen_vl_utils.

    ``min_pixels`` and ``max_pixels`` bound one frame, ``total_pixels`` all of them together.
    """

    fps: Rate | None = None
    nframes: Annotated[int, Field(ge=2)] | None = None
    min_frames: Positive | None = None
    max_frames: Annotated[int, Field(ge=2)] | None = None
    total_pixels: Positive | None = None


UPLOAD = "upload:"
"""Scheme under which an uploaded file's id is an address like any other."""

NonEmpty = Annotated[str, Field(min_length=1)]
Detail = Literal["auto", "low", "high"]


class ImageURL(PixelFields):
    """A picture: by ``url`` (``http(s)``, base64 ``data:``, ``file:``) or by ``file_id``.

    ``detail`` ``auto`` and ``high`` both mean the profile's default, ``low`` 448 × 448 pixels.
    """

    url: NonEmpty | None = None
    file_id: NonEmpty | None = None
    detail: Detail = "auto"

    @model_validator(mode="after")
    def _one_address(self) -> Self:
        _need_one_of(self, "url", "file_id")
        return self

    @property
    def address(self) -> str:
        """Where the bytes are: ``url``, or ``upload:`` and the file's id."""
        return self.url or f"{UPLOAD}{self.file_id}"


class PictureFields(PixelFields):
    """What stands beside a picture; of a PDF, ``pages`` are shown: ``2``, ``1-3`` or ``4-``."""

    pages: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}(-([1-9][0-9]{0,4})?)?$")] | None = None


class ImagePart(PictureFields):
    """``{"type": "image_url", "image_url": {"url": …}}``, pixel fields beside it or inside."""

    type: Literal["image_url"]
    image_url: ImageURL
    detail: Detail | None = None

    _key: str = PrivateAttr("image_url")
    _of_video: VideoFields | None = PrivateAttr(None)
    _page: bytes | None = PrivateAttr(None)
    _further: bool = PrivateAttr(False)

    @property
    def key(self) -> str:
        """Under which key of the part the client put the picture."""
        return self._key

    @property
    def of_video(self) -> VideoFields | None:
        """What a ``file`` part says for the case that it is a video."""
        return self._of_video

    @property
    def page(self) -> bytes | None:
        """The picture itself, where it was drawn from a PDF."""
        return self._page

    @property
    def further(self) -> bool:
        """Whether it stands for one more page of the part before it, in the client's request."""
        return self._further

    def showing(self, pages: Sequence[bytes]) -> list[ImagePart]:
        """Return parts like this one, one for each drawn page."""
        parts: list[ImagePart] = []
        for page in pages:
            part = self.model_copy(update={"pages": None})
            part._page, part._further = page, bool(parts)
            parts.append(part)
        return parts


class FileReference(_Strict):
    """OpenAI's object of an uploaded file, or of one that is sent along as a ``data:`` URL."""

    file_id: NonEmpty | None = None
    file_data: NonEmpty | None = None
    filename: str | None = None

    @model_validator(mode="after")
    def _one_address(self) -> Self:
        _need_one_of(self, "file_id", "file_data")
        return self


class FilePart(VideoFields, PictureFields):
    """OpenAI's ``{"type": "file", "file": {"file_id": …}}``; it becomes an ``ImagePart``.

    What the file is, is known when it is read: the video fields are for the case that it is one.
    """

    type: Literal["file"]
    file: FileReference


class InputImagePart(PictureFields):
    """``input_image`` of OpenAI's Responses; it becomes an ``ImagePart``."""

    type: Literal["input_image"]
    image_url: NonEmpty | None = None
    file_id: NonEmpty | None = None
    detail: Detail = "auto"

    @model_validator(mode="after")
    def _one_address(self) -> Self:
        _need_one_of(self, "image_url", "file_id")
        return self


def _need_one_of(model: BaseModel, first: str, second: str) -> None:
    if (getattr(model, first) is None) == (getattr(model, second) is None):
        raise PydanticCustomError("one_of", "give one", {"names": (first, second)})


def _from_file(value: object) -> ImagePart:
    given = FilePart.model_validate(value)
    part = _image_part(given, "file", file_id=given.file.file_id, url=given.file.file_data)
    part._of_video = VideoFields(**given.model_dump(include=set(VideoFields.model_fields)))
    return part


def _from_input_image(value: object) -> ImagePart:
    part = InputImagePart.model_validate(value)
    key = "file_id" if part.image_url is None else "image_url"
    return _image_part(part, key, url=part.image_url, file_id=part.file_id, detail=part.detail)


def _image_part(given: PictureFields, key: str, **inside: Any) -> ImagePart:
    beside = given.model_dump(include=set(PictureFields.model_fields))
    part = ImagePart(type="image_url", image_url=ImageURL(**inside), **beside)
    part._key = key
    return part


class VideoURL(VideoFields):
    """A video: by ``url``, or by ``file_id``.

    The ``url`` may hold its frames as ``data:video/jpeg;base64,<f1>,<f2>…``.
    """

    url: NonEmpty | None = None
    file_id: NonEmpty | None = None

    @model_validator(mode="after")
    def _one_address(self) -> Self:
        _need_one_of(self, "url", "file_id")
        return self

    @property
    def address(self) -> str:
        """Where the bytes are: ``url``, or ``upload:`` and the file's id."""
        return self.url or f"{UPLOAD}{self.file_id}"


class VideoPart(VideoFields):
    """``{"type": "video_url", "video_url": {"url": …}}``, video fields beside it or inside."""

    type: Literal["video_url"]
    video_url: VideoURL

    _key: str = PrivateAttr("video_url")

    @property
    def key(self) -> str:
        """Under which key of the part the client put the video."""
        return self._key

    @classmethod
    def of_file(cls, part: ImagePart) -> VideoPart:
        """Return the video that a ``file`` part turned out to be, with its fields."""
        beside = {} if part.of_video is None else part.of_video.model_dump()
        video = cls(type="video_url", video_url=VideoURL(url=part.image_url.address), **beside)
        video._key = part.key
        return video


def _content_kind(value: object) -> str:
    return "@text" if isinstance(value, str) else "@parts"


MediaURL = Annotated[str, Field(min_length=1)]


class FramesPart(VideoFields):
    """``{"type": "video", "video": [url, …]}``: a video as its frames, in their order.

    Of frames ``fps`` is the rate at which they were taken. One address is a video's.
    """

    type: Literal["video"]
    video: Annotated[
        Annotated[MediaURL, Tag("@text")]
        | Annotated[list[MediaURL], Field(min_length=1), Tag("@parts")],
        Discriminator(_content_kind),
    ]


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
    | Annotated[
        ImagePart, BeforeValidator(_from_file, json_schema_input_type=FilePart), Tag("@file")
    ]
    | Annotated[
        ImagePart,
        BeforeValidator(_from_input_image, json_schema_input_type=InputImagePart),
        Tag("@input_image"),
    ]
    | Annotated[VideoPart, Tag("@video_url")]
    | Annotated[FramesPart, Tag("@video")],
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
    """An earlier answer, as this server or OpenAI's clients return it.

    One that only calls tools may come without ``content``.
    """

    role: Literal["assistant"]
    content: TextContent
    name: str | None = None
    # Clients send answers back as they got them; these carry nothing a prompt could use.
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MOST_TOOLS)] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    parsed: Any = None
    provider_specific_fields: dict[str, Any] | None = None  # where LiteLLM keeps these

    @model_validator(mode="before")
    @classmethod
    def _content(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("tool_calls") and given.get("content") is None:
            return {**given, "content": ""}
        return given


class ToolMessage(_Strict):
    """What a tool returned for the call of that id: text, and pictures as a user may show them."""

    role: Literal["tool"]
    content: UserContent
    tool_call_id: Annotated[str, Field(min_length=1, max_length=128)]
    name: str | None = None


Message = Annotated[
    Annotated[SystemMessage, Tag("@system")]
    | Annotated[SystemMessage, Tag("@developer")]
    | Annotated[UserMessage, Tag("@user")]
    | Annotated[AssistantMessage, Tag("@assistant")]
    | Annotated[ToolMessage, Tag("@tool")],
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


class MMProcessorKwargs(VideoFields):
    """vLLM's way to speak of every picture and video of a request at once."""

    detail: Detail | None = None


class VideoIOKwargs(_Strict):
    """vLLM's words for the sampling of every video; ``num_frames`` beside ``fps`` is the most."""

    num_frames: Annotated[int, Field(ge=2)] | None = None
    fps: Rate | None = None


class MediaIOKwargs(_Strict):
    """vLLM's way to say how media are read, as far as a request may say it."""

    video: VideoIOKwargs | None = None


Overflow = Literal["error", "shrink", "drop_oldest_images", "drop_oldest_turns", "summarise"]
"""What to do with a request that does not fit into the context window."""

Penalty = Annotated[float, Field(ge=-2, le=2)]
Stop = Annotated[str, Field(min_length=1)]
StopSpec = Annotated[
    Annotated[Stop, Tag("@text")] | Annotated[list[Stop], Field(max_length=4), Tag("@parts")],
    Discriminator(_content_kind),
]


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("@text")]
    | Annotated[NamedTool, Tag("@parts")],
    Discriminator(_content_kind),
]


# No field of the engine's request: every picture and video has its size when it gets there.
_HEARD_HERE = Field(exclude=True)


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
    # What Model Studio's and vLLM's users send about the pictures of a request.
    mm_processor_kwargs: MMProcessorKwargs | None = None
    media_io_kwargs: Annotated[MediaIOKwargs | None, _HEARD_HERE] = None
    min_pixels: Annotated[Positive | None, _HEARD_HERE] = None
    max_pixels: Annotated[Positive | None, _HEARD_HERE] = None
    resized_height: Annotated[Positive | None, _HEARD_HERE] = None
    resized_width: Annotated[Positive | None, _HEARD_HERE] = None
    fps: Annotated[Rate | None, _HEARD_HERE] = None
    nframes: Annotated[int | None, Field(ge=2), _HEARD_HERE] = None
    min_frames: Annotated[Positive | None, _HEARD_HERE] = None
    max_frames: Annotated[int | None, Field(ge=2), _HEARD_HERE] = None
    total_pixels: Annotated[Positive | None, _HEARD_HERE] = None
    detail: Annotated[Detail | None, _HEARD_HERE] = None
    vl_high_resolution_images: bool | None = None
    include_media_info: bool | None = None
    overflow: Overflow | None = None
    # Served where the profile says so; a choice that chooses nothing needs no tools.
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MOST_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    # Accepted for what they say when nothing else is asked for.
    modalities: list[Literal["text"]] | None = None
    add_generation_prompt: Literal[True] | None = None

    @property
    def output_limit(self) -> int | None:
        """Most tokens to generate, by OpenAI's newer name before its older one."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def said_of_all(self) -> Iterator[tuple[str, str, Any]]:
        """Yield what is said of all pictures and videos: field, its path in the body, value.

        The same may be said in several places.
        """
        given = self.mm_processor_kwargs or MMProcessorKwargs()
        for name in MMProcessorKwargs.model_fields:
            yield name, name, getattr(self, name)
            yield name, f"mm_processor_kwargs.{name}", getattr(given, name)
        video = (self.media_io_kwargs or MediaIOKwargs()).video or VideoIOKwargs()
        yield "fps", "media_io_kwargs.video.fps", video.fps
        sampled = (self.fps, given.fps, video.fps) != (None, None, None)
        name = "max_frames" if sampled else "nframes"
        yield name, "media_io_kwargs.video.num_frames", video.num_frames

    @property
    def of_all(self) -> MMProcessorKwargs:
        """What is said of all pictures and videos at once, wherever it stands."""
        said = {name: value for name, _, value in self.said_of_all() if value is not None}
        return MMProcessorKwargs.model_construct(**said)

    @property
    def uses_tools(self) -> bool:
        """Whether tools are offered, or were called before."""
        return (self.tools is not None and self.tool_choice != "none") or any(
            isinstance(message, ToolMessage)
            or (isinstance(message, AssistantMessage) and message.tool_calls)
            for message in self.messages
        )
