"""A problem in a picture, solved step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qwen2vl_client.answer import Answer
from qwen2vl_client.media import ImageSource
from qwen2vl_client.prompts import PromptsGiven, chosen
from qwen2vl_client.tasks.task import EXACT, Task, Use, json_format, json_of, pictures, texts_of

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
    """Solve the problem in a picture; the steps come before the answer, as thought does."""
    given = {"response_format": json_format("solution", SCHEMA), **fields}
    return Task(chosen(prompts).solve, _read, pictures(image), fields=given, defaults=EXACT)


def _read(answer: Answer) -> Solution:
    value = json_of(answer)
    return Solution(texts_of(value.get("steps")), "".join(texts_of([value.get("answer")])), answer)
