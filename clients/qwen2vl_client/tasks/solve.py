"""A problem in a picture, solved step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qwen2vl_client.answer import Answer
from qwen2vl_client.errors import AnswerError
from qwen2vl_client.media import ImageSource
from qwen2vl_client.prompts import PromptsGiven, chosen
from qwen2vl_client.tasks.task import (
    EXACT,
    Task,
    Use,
    json_format,
    json_of,
    list_of,
    pictures,
    text_of,
    texts_of,
)

SCHEMA = {
    "type": "object",
    "properties": {
        "steps": {"type": "array", "items": {"type": "string"}, "maxItems": 40},
        "answer": {"type": "string"},
    },
    "required": ["steps", "answer"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Solution:
    """The steps in their order, and the result alone."""

    steps: tuple[str, ...]
    answer: str
    source: Answer = field(repr=False)

    def __str__(self) -> str:
        numbered = [f"{number}. {step}" for number, step in enumerate(self.steps, 1)]
        return "\n".join([*numbered, f"= {self.answer}"])


@Use
def solve(image: ImageSource, *, prompts: PromptsGiven = "en", **fields: Any) -> Task[Solution]:
    """Solve the problem in a picture; the steps come before the answer, as thought does.

    ``AnswerError`` where one of the two is missing.
    """
    given = {"response_format": json_format("solution", SCHEMA), **fields}
    return Task(chosen(prompts).solve, _read, pictures(image), fields=given, defaults=EXACT)


def _read(answer: Answer) -> Solution:
    value = json_of(answer)
    steps = texts_of(list_of(value, "steps", answer))
    if value.get("answer") is None:
        raise AnswerError(f"the solution has no answer: {answer.text[:80]!r}", answer)
    return Solution(steps, text_of(value["answer"]), answer)
