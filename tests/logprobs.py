"""What transformers thinks of an answer: the reference for served log-probabilities."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from PIL import Image


def logprobs(
    reference: tuple[Any, Any], image: Image.Image, question: str, said: str, count: int
) -> Sequence[float]:
    """Return the log-probabilities of the last ``count`` tokens of an answer, its end included.

    ``reference`` is transformers' model and its processor.
    """
    model, processor = reference
    torch: Any = importlib.import_module("torch")
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(text=[text + said + "<|im_end|>"], images=[image], return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs).logits[0].log_softmax(-1)
    ids = inputs["input_ids"][0]
    return [float(logits[-count - 1 + k, ids[-count + k]]) for k in range(count)]
