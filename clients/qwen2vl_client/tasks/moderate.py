"""Whether a picture may be published, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from qwen2vl_client.answer import Answer
from qwen2vl_client.errors import AnswerError, InvalidArgumentError
from qwen2vl_client.media import ImageSource
from qwen2vl_client.prompts import PromptsGiven, chosen, filled
from qwen2vl_client.tasks.task import EXACT, Task, Use, json_format, json_of, pictures, texts_of

Verdict = Literal["allow", "review", "block"]
VERDICTS: tuple[Verdict, ...] = ("allow", "review", "block")
#: The default categories; a call may name others.
CATEGORIES = (
    "violence",
    "sexual",
    "hate",
    "self_harm",
    "weapons",
    "drugs",
    "personal_data",
    "advertising",
)


@dataclass(frozen=True)
class Judgement:
    """A verdict, the categories that apply and what was seen. A model's view, not a person's."""

    verdict: Verdict
    categories: tuple[str, ...]
    reasons: tuple[str, ...]
    source: Answer = field(repr=False)

    @property
    def allowed(self) -> bool:
        """Whether the verdict is ``allow``."""
        return self.verdict == "allow"


@Use
def moderate(
    image: ImageSource,
    categories: Sequence[str] = CATEGORIES,
    *,
    prompts: PromptsGiven = "en",
    **fields: Any,
) -> Task[Judgement]:
    """Judge a picture; verdict and categories can only be those that are named here."""
    listed = [] if isinstance(categories, str) or not categories else list(categories)
    if not listed or not all(isinstance(name, str) for name in listed):
        raise InvalidArgumentError(f"categories={categories!r} must be a list of names")
    text = filled(chosen(prompts).moderate, categories=", ".join(categories))
    format_ = json_format("judgement", schema(categories))
    given = {"response_format": format_, **fields}
    return Task(text, _read, pictures(image), fields=given, defaults=EXACT)


def schema(categories: Sequence[str]) -> dict[str, Any]:
    """Return what the engine is bound to: bounded everywhere, so that every answer ends."""
    reason = {"type": "string", "maxLength": 100}
    named = {"type": "string", "enum": list(categories)}
    properties = {
        "reasons": {"type": "array", "items": reason, "maxItems": 5},
        "categories": {"type": "array", "items": named, "maxItems": len(categories)},
        "verdict": {"type": "string", "enum": list(VERDICTS)},
    }
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _read(answer: Answer) -> Judgement:
    value = json_of(answer)
    verdict = value.get("verdict")
    if verdict not in VERDICTS:
        raise AnswerError(f"the verdict {verdict!r} is none of {', '.join(VERDICTS)}", answer)
    found = tuple(dict.fromkeys(texts_of(value.get("categories"))))
    return Judgement(cast(Verdict, verdict), found, texts_of(value.get("reasons")), answer)
