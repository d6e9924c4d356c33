"""A screenshot, as the code of a page."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen2vl_client.answer import Answer
from qwen2vl_client.errors import AnswerError
from qwen2vl_client.media import ImageSource
from qwen2vl_client.prompts import PromptsGiven, chosen
from qwen2vl_client.tasks.task import EXACT, Task, Use, pictures, unfenced

_BEGUN = re.compile(r"(?:<!doctype html|<html[\s>]).*", re.DOTALL | re.IGNORECASE)
_WHOLE = re.compile(rf"{_BEGUN.pattern}</html>", re.DOTALL | re.IGNORECASE)
_ELEMENT = re.compile(r"<[a-zA-Z][^<>]*>")


@dataclass(frozen=True)
class Page:
    """The code of a page. ``complete`` is false where ``max_tokens`` cut it.

    It is a model's code: look at it before you show it to others, scripts above all.
    """

    html: str
    source: Answer = field(repr=False)

    def __str__(self) -> str:
        return self.html

    @property
    def complete(self) -> bool:
        """Whether the model came to its end."""
        return self.source.finish_reason != "length"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page to a file, in UTF-8."""
        Path(path).write_text(self.html, encoding="utf-8")


@Use
def to_html(image: ImageSource, *, prompts: PromptsGiven = "en", **fields: Any) -> Task[Page]:
    """Write the code of a page that looks like a screenshot.

    ``AnswerError`` where the answer holds no HTML. A large page needs a larger ``max_tokens``.
    """
    return Task(chosen(prompts).html, _read, pictures(image), fields=fields, defaults=EXACT)


def _read(answer: Answer) -> Page:
    code = unfenced(answer.text)
    # A page that shows fences of its own is not cut at them.
    found = _WHOLE.search(code) or _WHOLE.search(answer.text) or _BEGUN.search(code)
    if found:
        code = found[0]
    elif not _ELEMENT.search(code):
        raise AnswerError(f"the answer holds no HTML; it begins with {code[:80]!r}", answer)
    return Page(code.strip(), answer)
