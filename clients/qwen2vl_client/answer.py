"""What a call returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen2vl_client.errors import APIResponseError


@dataclass(frozen=True)
class Usage:
    """Tokens of one request; a picture's visual tokens count as prompt tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def from_raw(cls, raw: object) -> Usage | None:
        """Read the ``usage`` object of an answer; None where the server sent none."""
        if not isinstance(raw, Mapping):
            return None
        prompt = int(raw.get("prompt_tokens") or 0)
        completion = int(raw.get("completion_tokens") or 0)
        return cls(prompt, completion, int(raw.get("total_tokens") or prompt + completion))


@dataclass(frozen=True)
class Answer:
    """The model's answer; ``print(answer)`` prints its text.

    ``finish_reason`` is "stop" where the model was done and "length" where ``max_tokens`` cut
    it; ``seconds`` is the time from the call to the last byte, retries included;
    ``request_id`` finds the request in the server's log; ``raw`` is the whole JSON answer
    (with ``n`` > 1 it holds the other choices).
    """

    text: str
    finish_reason: str | None
    model: str
    usage: Usage | None
    request_id: str | None
    seconds: float
    raw: dict[str, Any] = field(repr=False, compare=False)

    def __str__(self) -> str:
        return self.text

    def __contains__(self, words: str) -> bool:
        return words in self.text

    @classmethod
    def from_raw(cls, raw: dict[str, Any], request_id: str | None, seconds: float) -> Answer:
        """Read a ``chat.completion`` object; ``APIResponseError`` where it is none."""
        try:
            choice = raw["choices"][0]
            text = choice["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise APIResponseError(
                f"the answer holds no choices[0].message.content; its fields are {sorted(raw)}"
            ) from error
        return cls(
            text=text if isinstance(text, str) else "",  # null beside tool calls
            finish_reason=choice.get("finish_reason"),
            model=str(raw.get("model") or ""),
            usage=Usage.from_raw(raw.get("usage")),
            request_id=request_id,
            seconds=seconds,
            raw=raw,
        )


@dataclass(frozen=True)
class Model:
    """A model that the server offers; ``max_model_len`` is its window in tokens if told."""

    id: str
    max_model_len: int | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        return self.id
