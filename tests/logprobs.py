"""What transformers thinks of an answer: the reference for served log-probabilities."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from PIL import Image


def logprobs(
    reference: tuple[Any, Any], image: Image.Image, question: str, said: Sequence[str]
) -> Sequence[float]:
    """Return the log-probability of each token of an answer, its end included.

    ``reference`` is transformers' model and its processor; ``said`` are the tokens as the answer's
    log-probabilities name them. They are not encoded anew: what was answered letter by letter
    would become other tokens.
    """
    model, processor = reference
    torch: Any = importlib.import_module("torch")
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    tokenizer = processor.tokenizer
    named = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    assert all(named.count(one) == 1 for one in said)
    answer = torch.tensor([[named.index(one) for one in said]])
    for name, added in (("input_ids", answer), ("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in inputs:
            more = answer if added is answer else torch.full_like(answer, added)
            inputs[name] = torch.cat([inputs[name], more], dim=1)
    with torch.inference_mode():
        logits = model(**inputs).logits[0].log_softmax(-1)
    begin = len(logits) - len(said) - 1
    return [float(logits[begin + place, token]) for place, token in enumerate(answer[0].tolist())]
