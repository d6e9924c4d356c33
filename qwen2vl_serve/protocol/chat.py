"""The chat request as this server accepts it: strict types, named bounds, nothing coerced.

Fields that OpenAI's clients send for bookkeeping (``user``, ``metadata`` …) are accepted without
effect, as its API defines; a field that would change the answer and is not served here is
refused, never ignored. ``validation.parse_chat`` reads a body into these models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    model_validator,
)

from qwen2vl_serve.profile import Overflow
from qwen2vl_serve.protocol.content import (
    MOST,
    Detail,
    Frames,
    Positive,
    Rate,
    Strict,
    TextContent,
    UserContent,
    VideoFields,
    text_or_parts,
)
from qwen2vl_serve.protocol.tools import MOST_TOOLS, NamedTool, Tool, ToolCall

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
    # Of one picture or video, where they stand; at the top they would be passed over.
    "extra_body": "put its fields beside messages, as the openai package does",
    "images_kwargs": "put its fields into mm_processor_kwargs",
    "num_frames": "use nframes, or media_io_kwargs.video.num_frames",
    "pages": "put it into the part that names the file",
    "size": "use min_pixels and max_pixels, or resized_height and resized_width",
    "video_end": "put it into the part that names the video",
    "video_start": "put it into the part that names the video",
    "best_of": "use n",
    "verbosity": "say in a message how long the answer is to be",
}

# Values of these that ask for nothing, beside those that do so anywhere.
ASKING_NOTHING: Mapping[str, Any] = {
    "best_of": 1,
    "chat_template_kwargs": {"enable_thinking": False},
    "reasoning_effort": "none",
}

_INT64_MAX = 2**63 - 1


def _role(value: object) -> str | None:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    return f"@{role}" if isinstance(role, str) else None


class _Said(Strict):
    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """Leave out what clients that have one class for all messages leave empty."""
        if not isinstance(given, dict) or None not in given.values():
            return given
        known = cls.model_fields
        return {name: one for name, one in given.items() if one is not None or name in known}


class SystemMessage(_Said):
    """Instructions; ``developer`` is OpenAI's newer name for the same role."""

    role: Literal["system", "developer"]
    content: TextContent
    name: str | None = None


class UserMessage(_Said):
    """What a user says and shows."""

    role: Literal["user"]
    content: UserContent
    name: str | None = None


class AssistantMessage(_Said):
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


class ToolMessage(_Said):
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


class JSONSchema(Strict):
    """OpenAI's wrapper around a JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """What the answer must parse as: free text, any JSON object, or JSON under a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None


class StreamOptions(Strict):
    """``include_usage`` adds a last chunk that holds the token counts."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class MMProcessorKwargs(VideoFields):
    """vLLM's way to speak of every picture and video of a request at once."""

    detail: Detail | None = None


class VideoIOKwargs(Strict):
    """vLLM's words for the sampling of every video; ``num_frames`` beside ``fps`` is the most."""

    num_frames: Frames | None = None
    fps: Rate | None = None


class MediaIOKwargs(Strict):
    """vLLM's way to say how media are read, as far as a request may say it."""

    video: VideoIOKwargs | None = None


Natural = Annotated[int, Field(ge=0, le=MOST)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Stop = Annotated[str, Field(min_length=1)]
StopSpec = Annotated[
    Annotated[Stop, Tag("@text")] | Annotated[list[Stop], Field(max_length=4), Tag("@parts")],
    Discriminator(text_or_parts),
]


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("@text")]
    | Annotated[NamedTool, Tag("@parts")],
    Discriminator(text_or_parts),
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
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    n: Positive | None = None
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
    top_k: Annotated[int, Field(ge=-1, le=MOST)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Natural | None = None
    stop_token_ids: Annotated[list[Natural], Field(max_length=64)] | None = None
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
    nframes: Annotated[Frames | None, _HEARD_HERE] = None
    min_frames: Annotated[Positive | None, _HEARD_HERE] = None
    max_frames: Annotated[Frames | None, _HEARD_HERE] = None
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

    # No field, which a client could send.
    _most_tokens: int | None = PrivateAttr(default=None)

    def held_to(self, most_tokens: int | None) -> None:
        """Say how long an answer may be whose request says nothing of that; None: the window."""
        self._most_tokens = most_tokens

    @property
    def most_tokens(self) -> int | None:
        """Most tokens to generate, by request or profile; of these the window may leave less.

        What the request asks for is ``output_limit``, and is never cut.
        """
        return self.output_limit or self._most_tokens

    @property
    def output_limit(self) -> int | None:
        """Most tokens to generate, by OpenAI's newer name before its older one."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def output_field(self) -> str:
        """The name under which ``output_limit`` was asked for."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

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
