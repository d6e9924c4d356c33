"""One use of the model: what is asked and how the answer is read, apart from who sends it."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, overload

from qwen2vl_client.answer import Answer, repaired
from qwen2vl_client.errors import AnswerError, InvalidArgumentError
from qwen2vl_client.media import ContentPart, image_part, sources, video_part
from qwen2vl_client.request import SYSTEM_PROMPT

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
P = ParamSpec("P")

#: What uses send unless a call says otherwise: the likeliest answer, and repetition allowed, for
#: tables, coordinates and code repeat themselves. Room for a page of text.
EXACT: Mapping[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 2048}

_JSON = json.JSONDecoder()
_BRACKET = re.compile(r"[{\[]")
_FENCED = re.compile(r"```[\w+-]*[ \t]*\r?\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)


class Asker(Protocol):
    """What a use needs of a client."""

    @property
    def chat(self) -> Callable[..., Answer]:
        """``Client.chat``."""


class AsyncAsker(Protocol):
    """The same of a client whose ``chat`` is awaited."""

    @property
    def chat(self) -> Callable[..., Awaitable[Answer]]:
        """``AsyncClient.chat``."""


@dataclass(frozen=True)
class Task(Generic[T_co]):
    """A question about pictures or videos, and ``read``, which makes its answer a result.

    Pictures are kept as they were given and read when the task is run. ``video_fields`` stand
    beside each video in the request (``fps``, ``max_pixels`` …); ``fields`` are sampling and
    other fields of the API, which go before the use's own ``defaults`` and before those of a
    ``batch``. ``read`` raises ``AnswerError`` for an answer it can make nothing of.
    """

    text: str | None
    read: Callable[[Answer], T_co]
    images: tuple[Any, ...] = ()
    videos: tuple[Any, ...] = ()
    video_fields: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = SYSTEM_PROMPT
    messages: Sequence[Mapping[str, Any]] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Return what ``chat`` is called with; reads no file unless ``video_fields`` are given."""
        given = {"system": self.system, **self.defaults, **self.fields}
        if self.video_fields and self.videos:
            return {**given, "messages": [*self.messages, self._turn()]}
        return {
            **given,
            "text": self.text,
            "images": list(self.images) or None,
            "videos": list(self.videos) or None,
            "messages": self.messages,
        }

    @overload
    def run(self, client: Asker) -> T_co: ...
    @overload
    def run(self, client: AsyncAsker) -> Coroutine[Any, Any, T_co]: ...
    def run(self, client: Any) -> Any:
        """Ask, and return the result; of an asynchronous client, what is to be awaited."""
        answer = client.chat(**self.arguments())
        return self._awaited(answer) if inspect.isawaitable(answer) else self.read(answer)

    async def _awaited(self, answer: Awaitable[Answer]) -> T_co:
        return self.read(await answer)

    def _turn(self) -> dict[str, Any]:
        parts: list[ContentPart] = [image_part(image) for image in self.images]
        parts += [{**video_part(video), **self.video_fields} for video in self.videos]
        if self.text is not None:
            parts.append({"type": "text", "text": self.text})
        return {"role": "user", "content": parts}


class Use(Generic[P, T]):
    """A use as a function of a client and of what its builder takes.

    ``use(client, …)`` asks and returns the result; with an asynchronous client it is awaited.
    ``use.task(…)`` returns the question itself, for ``batch``.
    """

    def __init__(self, build: Callable[P, Task[T]]) -> None:
        self._build = build
        functools.update_wrapper(self, build)

    @overload
    def __call__(self, client: Asker, /, *args: P.args, **kwargs: P.kwargs) -> T: ...
    @overload
    def __call__(
        self, client: AsyncAsker, /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, T]: ...
    def __call__(self, client: Any, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Ask, and return the result."""
        return self._build(*args, **kwargs).run(client)

    def task(self, *args: P.args, **kwargs: P.kwargs) -> Task[T]:
        """Return the question without asking it."""
        return self._build(*args, **kwargs)


@dataclass(frozen=True)
class Reply:
    """An answer in words. ``complete`` is false where ``max_tokens`` cut it."""

    text: str
    source: Answer = field(repr=False)

    def __str__(self) -> str:
        return self.text

    @property
    def complete(self) -> bool:
        """Whether the model came to its end."""
        return self.source.finish_reason != "length"


def as_reply(answer: Answer) -> Reply:
    """Read an answer as the words that it is."""
    return Reply(answer.text.strip(), answer)


def pictures(given: Any, least: int = 1) -> tuple[Any, ...]:
    """Return what was given as a tuple of pictures, at least ``least``."""
    found = tuple(sources(given))
    if len(found) < least:
        raise InvalidArgumentError(f"{len(found)} pictures were given; this needs {least}")
    return found


def json_format(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``response_format`` that binds an answer to a JSON schema."""
    return {"type": "json_schema", "json_schema": {"name": name, "schema": dict(schema)}}


def unfenced(text: str) -> str:
    """Return what stands between the first Markdown fences, or the text where there are none."""
    found = _FENCED.search(text)
    return (found[1] if found else text).strip()


def json_of(answer: Answer) -> dict[str, Any]:
    """Return the JSON object in an answer; ``AnswerError`` where there is none or it was cut."""
    code = unfenced(answer.text)
    begin = _BRACKET.search(code)
    try:
        value, _ = _JSON.raw_decode(code, begin.start() if begin else 0)
        if isinstance(value, dict):
            return repaired(value)
    except (ValueError, RecursionError):
        pass
    if answer.finish_reason == "length" and len(answer.text) - len(answer.text.rstrip()) > 40:
        # JSON allows blanks between its parts, so a model that is lost may write them for ever.
        raise AnswerError(
            "the answer ran off into blanks before its JSON was whole; frequency_penalty=0.5 ends "
            f"that (it begins with {answer.text.rstrip()[:80]!r})",
            answer,
        )
    if answer.finish_reason == "length":
        raise AnswerError(
            "the answer was cut by max_tokens before its JSON was whole; raise max_tokens "
            f"(it begins with {answer.text[:80]!r})",
            answer,
        )
    raise AnswerError(f"the answer is no JSON object; it begins with {answer.text[:80]!r}", answer)


def list_of(value: Mapping[str, Any], name: str, answer: Answer) -> list[Any]:
    """Return a list of an answer's JSON by its name; ``AnswerError`` where it is none."""
    found = value.get(name)
    if not isinstance(found, list):
        raise AnswerError(
            f"the answer's JSON holds no list {name!r}; it begins with {answer.text[:80]!r}", answer
        )
    return found


def texts_of(value: object) -> tuple[str, ...]:
    """Return a JSON list as texts; none where it is no list."""
    return tuple(text_of(one) for one in value) if isinstance(value, list) else ()


def text_of(value: object) -> str:
    """Return a JSON value as text: null is empty, what is no text is written as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
