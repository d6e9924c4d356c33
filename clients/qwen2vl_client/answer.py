"""What a call returns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen2vl_client.errors import APIResponseError
from qwen2vl_client.media_info import MediaInfo, media_of

_NO_TIMES: Mapping[str, float] = {}


@dataclass(frozen=True)
class Usage:
    """Tokens of one request; a picture's visual tokens count as prompt tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def from_raw(cls, raw: object) -> Usage | None:
        """Read the ``usage`` object of an answer; None where the server sent none.

        Raises ``APIResponseError`` where it holds no counts.
        """
        if not isinstance(raw, Mapping):
            return None
        try:
            prompt = int(raw.get("prompt_tokens") or 0)
            completion = int(raw.get("completion_tokens") or 0)
            return cls(prompt, completion, int(raw.get("total_tokens") or prompt + completion))
        except (TypeError, ValueError, OverflowError) as error:
            raise APIResponseError(f"the answer's usage holds no counts: {raw!r:.120}") from error


@dataclass(frozen=True)
class Timings:
    """Seconds: ``total`` from the call to the last byte, uploads and retries included.

    ``first_token`` is the time to the first text of a stream (None of a whole answer); ``server``
    holds what the server tells in a ``Server-Timing`` header, by name.
    """

    total: float
    first_token: float | None = None
    server: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ToolCall:
    """A function that the model asks for; ``arguments`` is JSON as the model wrote it."""

    id: str
    name: str
    arguments: str

    @property
    def values(self) -> dict[str, Any]:
        """The arguments by name; ``APIResponseError`` where they are no JSON object."""
        try:
            values = json.loads(self.arguments)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise APIResponseError(
                f"the arguments for {self.name} are no JSON object: {self.arguments[:120]!r}"
            )
        return values


@dataclass(frozen=True)
class Answer:
    """The model's answer; ``print(answer)`` prints its text.

    ``finish_reason`` is "stop" where the model was done and "length" where ``max_tokens`` cut
    it; ``seconds`` is the time from the call to the last byte, retries included;
    ``request_id`` finds the request in the server's log; ``raw`` is the whole JSON answer.
    ``media`` tells of each picture and video what the model saw of it; ``overflow`` what the
    server did to make the request fit (None: nothing); ``tool_calls`` the functions that the
    model asks for; with ``n`` > 1 ``texts`` holds all answers.
    """

    text: str
    finish_reason: str | None
    model: str
    usage: Usage | None
    request_id: str | None
    seconds: float
    raw: dict[str, Any] = field(repr=False, compare=False)
    media: tuple[MediaInfo, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    timings: Timings = field(default=Timings(0.0), compare=False)
    overflow: dict[str, Any] | None = None

    def __str__(self) -> str:
        return self.text

    def __contains__(self, words: str) -> bool:
        return words in self.text

    @property
    def texts(self) -> list[str]:
        """The texts of all choices, in their order."""
        return [_text(choice["message"].get("content")) for choice in self.raw["choices"]]

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a turn for ``messages``, tool calls included.

        Half of a surrogate pair, which no request can hold, becomes U+FFFD.
        """
        message = {"role": "assistant", "content": self.text}
        calls = self.raw["choices"][0]["message"].get("tool_calls")
        return repaired({**message, "tool_calls": calls} if calls else message)

    @classmethod
    def from_raw(
        cls,
        raw: dict[str, Any],
        request_id: str | None,
        seconds: float,
        *,
        first_token: float | None = None,
        server: Mapping[str, float] = _NO_TIMES,
    ) -> Answer:
        """Read a ``chat.completion`` object; ``APIResponseError`` where it is none."""
        try:
            choice = raw["choices"][0]
            message = choice["message"]
            calls = tuple(_tool_call(call) for call in message.get("tool_calls") or ())
            text = message.get("content") if calls else message["content"]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise APIResponseError(
                f"the answer holds no choices[0].message.content; its fields are {sorted(raw)}"
            ) from error
        overflow = raw.get("overflow")
        return cls(
            text=_text(text),
            finish_reason=choice.get("finish_reason"),
            model=str(raw.get("model") or ""),
            usage=Usage.from_raw(raw.get("usage")),
            request_id=request_id,
            seconds=seconds,
            raw=raw,
            media=media_of(raw),
            tool_calls=calls,
            timings=Timings(seconds, first_token, server),
            overflow=overflow if isinstance(overflow, dict) else None,
        )


def repaired(message: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object in which half of a surrogate pair is U+FFFD, which UTF-8 can express."""
    raw = json.dumps(message, ensure_ascii=False).encode("utf-16", "surrogatepass")
    whole: dict[str, Any] = json.loads(raw.decode("utf-16", "replace"))
    return whole


def _text(content: object) -> str:
    return content if isinstance(content, str) else ""  # null beside tool calls


def _tool_call(raw: Mapping[str, Any]) -> ToolCall:
    function = raw["function"]
    given = function.get("arguments") or "{}"  # some servers send the object itself
    arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return ToolCall(str(raw.get("id") or ""), function["name"], arguments)


@dataclass(frozen=True)
class Model:
    """A model that the server offers; ``max_model_len`` is its window in tokens if told."""

    id: str
    max_model_len: int | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        return self.id

    @classmethod
    def from_raw(cls, raw: dict[str, Any]) -> Model:
        """Read an entry of the list of models, which has an ``id``."""
        window = raw.get("max_model_len")
        return cls(str(raw["id"]), window if isinstance(window, int) else None, raw)


@dataclass(frozen=True)
class Explanation:
    """What a request costs, in tokens, told without generating; see ``docs/http-api.md``.

    ``fits`` says whether prompt and ``max_tokens`` fit into ``max_model_len``, and each item into
    ``max_item_tokens``; ``largest_max_pixels`` is what would, where they do not (None: nothing).
    """

    prompt_tokens: int
    text_tokens: int
    visual_tokens: int
    max_model_len: int
    fits: bool
    largest_max_pixels: int | None
    media: tuple[MediaInfo, ...]
    raw: dict[str, Any] = field(repr=False, compare=False)

    @property
    def context_left(self) -> int:
        """Tokens of the window that the prompt leaves."""
        return max(self.max_model_len - self.prompt_tokens, 0)

    @classmethod
    def from_raw(cls, raw: dict[str, Any]) -> Explanation:
        """Read the answer of the explain route; ``APIResponseError`` where it is none."""
        try:
            budget = raw.get("largest_max_pixels")
            return cls(
                prompt_tokens=int(raw["prompt_tokens"]),
                text_tokens=int(raw["text_tokens"]),
                visual_tokens=int(raw["visual_tokens"]),
                max_model_len=int(raw["max_model_len"]),
                fits=bool(raw["fits"]),
                largest_max_pixels=None if budget is None else int(budget),
                media=media_of(raw),
                raw=raw,
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise APIResponseError(
                f"the explanation lacks a field; it has {sorted(raw)}"
            ) from error


@dataclass(frozen=True)
class StoredFile:
    """A file that the server keeps; give it, or its ``id``, wherever a picture or video goes.

    ``bytes`` is its size, times are in seconds since the epoch.
    """

    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int | None
    raw: dict[str, Any] = field(repr=False, compare=False)

    def __str__(self) -> str:
        return self.id

    @classmethod
    def from_raw(cls, raw: object) -> StoredFile:
        """Read OpenAI's file object; ``APIResponseError`` where it is none."""
        if not isinstance(raw, dict) or not isinstance(raw.get("id"), str):
            raise APIResponseError(f"the answer is no file object: {str(raw)[:120]!r}")
        expires = raw.get("expires_at")
        try:
            return cls(
                raw["id"],
                str(raw.get("filename") or ""),
                str(raw.get("purpose") or ""),
                int(raw.get("bytes") or 0),
                int(raw.get("created_at") or 0),
                None if expires is None else int(expires),
                raw,
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise APIResponseError(f"the answer is no file object: {str(raw)[:120]!r}") from error
