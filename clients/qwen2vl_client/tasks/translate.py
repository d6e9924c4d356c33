"""Text in a picture, in another language."""

from __future__ import annotations

from typing import Any

from qwen2vl_client.media import ImageSource
from qwen2vl_client.prompts import PromptsGiven, chosen, filled
from qwen2vl_client.tasks.task import EXACT, Reply, Task, Use, as_reply, pictures


@Use
def translate(
    image: ImageSource, language: str = "English", *, prompts: PromptsGiven = "en", **fields: Any
) -> Task[Reply]:
    """Translate the text in a picture into ``language``, named as the prompt's language names it.

    With ``prompts="zh"`` that is ``language="英文"``.
    """
    text = filled(chosen(prompts).translate, language=language)
    return Task(text, as_reply, pictures(image), fields=fields, defaults=EXACT)
