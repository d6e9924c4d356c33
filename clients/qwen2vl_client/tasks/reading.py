"""Text in a picture, as text."""

from __future__ import annotations

from typing import Any

from qwen2vl_client.media import ImageSource
from qwen2vl_client.prompts import PromptsGiven, chosen
from qwen2vl_client.tasks.task import EXACT, Reply, Task, Use, as_reply, pictures


@Use
def ocr(
    image: ImageSource, *, question: str | None = None, prompts: PromptsGiven = "en", **fields: Any
) -> Task[Reply]:
    """Read the text in a picture; ``question`` replaces the prompt.

    Small print needs pixels: ``mm_processor_kwargs={"max_pixels": …}`` shows more of them to the
    model, within what the server allows.
    """
    text = question or chosen(prompts).read
    return Task(text, as_reply, pictures(image), fields=fields, defaults=EXACT)
