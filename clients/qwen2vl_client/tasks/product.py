"""Customer service over a photo: answers from the picture and from a text that is given."""

from __future__ import annotations

from typing import Any

from qwen2vl_client.media import ImageSource
from qwen2vl_client.prompts import PromptsGiven, chosen, filled
from qwen2vl_client.tasks.task import EXACT, Reply, Task, Use, as_reply, pictures


@Use
def ask_product(
    image: ImageSource,
    question: str,
    knowledge: str,
    *,
    prompts: PromptsGiven = "en",
    **fields: Any,
) -> Task[Reply]:
    """Answer a customer's question about a photo, from it and from ``knowledge``.

    ``knowledge`` (prices, terms, a manual) goes into the system prompt and costs its tokens with
    every call; for several questions in a row give that prompt to a ``Conversation``.
    """
    system = filled(chosen(prompts).product, knowledge=knowledge)
    return Task(question, as_reply, pictures(image), system=system, fields=fields, defaults=EXACT)
