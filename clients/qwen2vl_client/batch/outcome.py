"""What became of each request, and of all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qwen2vl_client.answer import Answer


@dataclass(frozen=True)
class Outcome:
    """One request: its ``text`` and ``value``, or its ``error``.

    ``value`` is the result of the use as JSON has it (a dict, a list, a text); ``index`` is the
    request's place, from 0; ``request`` tells whether another request is the same.
    """

    index: int
    id: str
    request: str
    text: str | None = None
    value: Any = None
    error: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    visual_tokens: int = 0
    seconds: float = 0.0
    attempts: int = 1

    @property
    def ok(self) -> bool:
        """Whether it was answered, in a form that could be read."""
        return self.error is None

    def to_json(self) -> dict[str, Any]:
        """Return the line of the output."""
        return asdict(self)

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Outcome:
        """Read a line of the output; TypeError or ValueError where it is none."""
        outcome = cls(**line)
        if not isinstance(outcome.index, int) or not isinstance(outcome.id, str):
            raise ValueError("no index, or no id")
        return outcome


@dataclass(frozen=True)
class Report:
    """A batch: ``print(report)`` is its throughput in one line.

    ``outcomes`` is in the order of the requests; with an output file it is read from there, one
    at a time. Tokens and rates are those of this run, without what an earlier run had answered.
    """

    requests: int
    answered: int
    resumed: int
    failed: tuple[Outcome, ...]
    seconds: float
    prompt_tokens: int
    completion_tokens: int
    visual_tokens: int
    outcomes: Sequence[Outcome] = field(repr=False)

    @property
    def requests_per_second(self) -> float:
        """Answers of this run, a second."""
        return self.answered / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of this run, a second."""
        return self.completion_tokens / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        kept = f", {self.resumed} kept from before" if self.resumed else ""
        return (
            f"{self.answered} answered{kept}, {len(self.failed)} failed in {self.seconds:.1f} s: "
            f"{self.requests_per_second:.2f} requests/s, {self.tokens_per_second:.1f} tokens/s "
            f"generated; {self.prompt_tokens} tokens read, {self.visual_tokens} of them visual"
        )


def as_data(value: Any) -> Any:
    """Return a result of a use as JSON holds it, without the answer that it was read from."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {name: as_data(one) for name, one in named.items() if name != "source"}
    if isinstance(value, Mapping):
        return {str(key): as_data(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_data(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def visual_tokens(answer: Answer) -> int:
    """Return the visual tokens of an answer's pictures and videos, 0 where it does not tell."""
    media = answer.raw.get("media")
    listed = media if isinstance(media, list) else []
    told = (one.get("visual_tokens") for one in listed if isinstance(one, Mapping))
    return sum(number for number in told if isinstance(number, int))
