"""The body of a chat request: the tutorials' defaults and what a call adds to them."""

from __future__ import annotations

import difflib
import json
import numbers
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict

from qwen2vl_client.errors import InvalidArgumentError
from qwen2vl_client.media import ContentPart, image_part, sources, video_part

Message: TypeAlias = Mapping[str, Any]

SYSTEM_PROMPT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

#: Sent unless a call says otherwise; a field given as None is left out of the request.
DEFAULT_SAMPLING: Mapping[str, Any] = {
    "temperature": 0.7,
    "top_p": 0.8,
    "repetition_penalty": 1.05,
    "max_tokens": 1024,
}


class Sampling(TypedDict, total=False):
    """The fields that ``chat`` and ``stream`` take by keyword, by their names in the API.

    A field that is None is left out, so that the server's own default holds. Names that are
    not listed here are sent as they are: the server decides about them.
    """

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    max_tokens: int | None
    max_completion_tokens: int | None
    min_tokens: int | None
    stop: str | list[str] | None
    stop_token_ids: list[int] | None
    include_stop_str_in_output: bool | None
    ignore_eos: bool | None
    skip_special_tokens: bool | None
    spaces_between_special_tokens: bool | None
    seed: int | None
    n: int | None
    logprobs: bool | None
    top_logprobs: int | None
    logit_bias: dict[str, float] | None
    response_format: dict[str, Any] | None
    tools: list[dict[str, Any]] | None
    tool_choice: str | dict[str, Any] | None
    parallel_tool_calls: bool | None
    modalities: list[str] | None
    add_generation_prompt: bool | None
    mm_processor_kwargs: dict[str, Any] | None
    media_io_kwargs: dict[str, Any] | None
    min_pixels: int | None
    max_pixels: int | None
    resized_height: int | None
    resized_width: int | None
    detail: Literal["auto", "low", "high"] | None
    fps: float | None
    nframes: int | None
    min_frames: int | None
    max_frames: int | None
    total_pixels: int | None
    vl_high_resolution_images: bool | None
    include_media_info: bool | None
    stream_options: dict[str, Any] | None


Overflow: TypeAlias = Literal[
    "error", "shrink", "drop_oldest_images", "drop_oldest_turns", "summarise"
]
"""What the server does with a request that does not fit into its window."""


class ChatFields(Sampling, total=False):
    """All fields of a chat, with what a conversation decides for itself."""

    overflow: Overflow | None


def user_message(text: str | None, images: Any = None, videos: Any = None) -> dict[str, Any] | None:
    """Return the user's turn: pictures, videos, then the text; None where nothing is given."""
    if text is not None and not isinstance(text, str):
        raise InvalidArgumentError(
            f"text must be a string, not {type(text).__name__}; pictures go into images="
        )
    parts: list[ContentPart] = [image_part(source) for source in sources(images)]
    parts += [video_part(source) for source in sources(videos)]
    if not parts:
        return None if text is None else {"role": "user", "content": text}
    if text is not None:
        parts.append({"type": "text", "text": text})
    return {"role": "user", "content": parts}


def with_system(messages: Sequence[Message], system: str | None) -> list[dict[str, Any]]:
    """Return the messages with ``system`` in front, unless they bring their own."""
    turns = checked_messages(messages)
    if system is None:
        return turns
    if has_system(turns):
        if system != SYSTEM_PROMPT:
            raise InvalidArgumentError(
                "messages already hold a system (or developer) message and system= was given as "
                "well: drop one of the two"
            )
        return turns
    return [{"role": "system", "content": system}, *turns]


def checked_messages(given: Any) -> list[dict[str, Any]]:
    """Return messages as a list; ``InvalidArgumentError`` names what is none."""
    listed = isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping)
    if not listed:
        raise InvalidArgumentError(
            f"messages={given!r:.80} must be a list of messages, as "
            '[{"role": "user", "content": "…"}]; a question goes into text='
        )
    messages: list[dict[str, Any]] = []
    for place, message in enumerate(given):
        if not isinstance(message, Mapping):
            raise InvalidArgumentError(
                f"messages[{place}]={message!r:.80} must be a mapping, as "
                '{"role": "user", "content": "…"}'
            )
        messages.append(dict(message))
    return messages


def has_system(messages: object) -> bool:
    """Tell whether there is a system message among what is given as messages.

    ``developer`` is OpenAI's newer name of the role.
    """
    return isinstance(messages, list | tuple) and any(
        isinstance(message, Mapping) and message.get("role") in ("system", "developer")
        for message in messages
    )


def chat_messages(
    earlier: Sequence[Message], turn: Message | None, system: str | None
) -> list[dict[str, Any]]:
    """Return what is sent: the system message, the earlier turns, this one."""
    turns = [*checked_messages(earlier), *([] if turn is None else [turn])]
    if not turns:
        raise InvalidArgumentError("nothing to ask: give a text, images, videos or messages")
    return with_system(turns, system)


def check_fields(given: Mapping[str, Any]) -> None:
    """Raise ``InvalidArgumentError`` for a keyword that is no field of the API.

    What a conversation or a stream is told elsewhere is one, and so is a near miss of a parameter:
    a server would ignore ``image=``, and answer without the picture.
    """
    for name in given:
        if name in _ELSEWHERE:
            raise InvalidArgumentError(f"{name}= is no sampling field: {_ELSEWHERE[name]}")
        if name not in ChatFields.__annotations__:
            for near in difflib.get_close_matches(name.lower(), _MEANT, 1, _NEAR):
                raise InvalidArgumentError(
                    f"{name}= is no parameter and no field of the API: use {_MEANT[near]}="
                )


_ELSEWHERE = {
    "stream": "use stream() for streams",
    "model": "give it to the client, Client(model=…)",
    "timeout": "give it to the client or with the question, ask(…, timeout=…)",
    "messages": "a conversation keeps its own",
    "system": "give it to the conversation, Conversation(client, system=…)",
    "text": "give it with the question, ask(text)",
    "images": "give them with the question, ask(text, images=…)",
    "videos": "give them with the question, ask(text, videos=…)",
}
"""What ``chat`` takes and a conversation does not, so that it would be sent as a field."""

_PICTURES = ("images", "image_urls", "image_paths", "imgs", "pictures", "pics", "photos", "files")
_MEANT = {
    **dict.fromkeys(_PICTURES, "images"),
    **dict.fromkeys(("videos", "video_urls", "clips"), "videos"),
    **dict.fromkeys(("messages", "history"), "messages"),
    **dict.fromkeys(("system", "system_prompt", "system_message"), "system"),
    **dict.fromkeys(("text", "prompt", "question"), "text"),
    "timeout": "timeout",
}
"""What a misspelt keyword may have meant, and the parameter's name."""

_NEAR = 0.8
"""How much of two names agrees (difflib's ratio): "image" and "images" do by 0.91."""


def sampling_fields(
    given: Mapping[str, Any], turns: Sequence[Message], *, stream: bool
) -> dict[str, Any]:
    """Return the defaults overlaid with ``given``, without the fields that are None.

    Where ``turns`` show something, the server is asked what the model saw of it.
    """
    check_fields(given)
    if stream and (given.get("n") or 1) != 1:
        raise InvalidArgumentError(f"n={given['n']}: a stream yields one text; use chat() for more")
    fields = {**DEFAULT_SAMPLING, **given}
    if given.get("max_completion_tokens") is not None and "max_tokens" not in given:
        del fields["max_tokens"]  # two names of one limit
    if any(shows_media(turn) for turn in turns):
        fields.setdefault("include_media_info", True)
    if stream:
        fields.setdefault("stream_options", {"include_usage": True})
        fields["stream"] = True
    return {name: value for name, value in fields.items() if value is not None}


def shows_media(turn: Message) -> bool:
    """Tell whether a message holds a picture or a video."""
    content = turn.get("content")
    return isinstance(content, list) and any(
        isinstance(part, Mapping) and part.get("type") != "text" for part in content
    )


def encode(body: Mapping[str, Any]) -> bytes:
    """Return the body as UTF-8 JSON; ``InvalidArgumentError`` names what JSON cannot hold."""
    try:
        text = json.dumps(body, ensure_ascii=False, allow_nan=False, default=plain)
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"a text holds half of a surrogate pair ({error.object[error.start]!r}), "
            "which UTF-8 cannot express: repair the text"
        ) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgumentError(
            f"{_unwritable(body)} cannot be written as JSON: {error}; give plain Python values"
        ) from error


def plain(value: object) -> float:
    """Return a number of another library, as numpy's, as Python's; ``TypeError`` for any other."""
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"an object of type {type(value).__name__} is no JSON")


def _unwritable(body: Mapping[str, Any]) -> str:
    for name, value in body.items():
        try:
            json.dumps(value, allow_nan=False, default=plain)
        except (TypeError, ValueError, RecursionError):
            return f"{name}={reprlib.repr(value)}"  # of anything deep or long the beginning
    return "the request"
