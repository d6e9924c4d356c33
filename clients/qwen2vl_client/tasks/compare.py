"""What several pictures have in common, and how they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwen2vl_client.media import ImageSource
from qwen2vl_client.prompts import PromptsGiven, chosen, filled
from qwen2vl_client.tasks.task import EXACT, Reply, Task, Use, as_reply, pictures


@Use
def compare(
    images: Sequence[ImageSource],
    *,
    question: str | None = None,
    prompts: PromptsGiven = "en",
    **fields: Any,
) -> Task[Reply]:
    """Compare two or more pictures; ``question`` replaces the prompt.

    How many pictures a request may hold is the server's ``limit_mm_per_prompt``, often 4.
    """
    shown, texts = pictures(images, least=2), chosen(prompts)
    asked = texts.compare_two if len(shown) == 2 else filled(texts.compare, count=len(shown))
    return Task(question or asked, as_reply, shown, fields=fields, defaults=EXACT)
