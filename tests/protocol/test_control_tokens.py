"""Control tokens typed by clients: found in every place, and harmless where they are let pass."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl_serve.protocol.chat import ChatRequest
from qwen2vl_serve.protocol.content import TextPart
from qwen2vl_serve.protocol.control_tokens import MARK, escaped, first_in
from qwen2vl_serve.protocol.validation import RequestLimits, parse_chat

RESERVED = [
    f"<|{name}|>"
    for name in (
        "im_start", "im_end", "endoftext", "vision_start", "vision_end", "vision_pad",
        "image_pad", "video_pad",
    )
]  # fmt: skip
LIMITS = RequestLimits(
    max_messages=99, max_n=1, max_tokens=None, images=9, videos=9, reserved_tokens="escape"
)
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}

fragments = st.sampled_from(
    [*RESERVED, "<", "<|", "|", "|>", "im_end", "image_pad", "user\n", " ", "\n\n", "a", "好", "é",
     "<|box_start|>", "<|box_end|>", "<<|im_end|>>", "<|im_<|im_end|>end|>"]
)  # fmt: skip
texts = st.lists(fragments, max_size=12).map("".join)


def cut(text: str, places: list[int]) -> list[str]:
    """Cut a text at any places; pieces may be empty."""
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(edges)]


def chat(*messages: dict[str, Any]) -> ChatRequest:
    return parse_chat(json.dumps({"messages": messages}).encode(), LIMITS)


@given(texts, st.lists(st.integers(0, 99), max_size=6))
def test_a_broken_token_is_whole_nowhere(text: str, places: list[int]) -> None:
    """However a text is cut into parts: no token is left, no letter is lost, no part moves."""
    parts = [TextPart(type="text", text=piece) for piece in cut(text, places)]
    made = escaped(parts)
    assert not isinstance(made, str)
    assert [one.text.replace(MARK, "") for one in made] == [one.text for one in parts]
    assert first_in(made) is None
    assert (first_in(parts) is None) == (not any(token in text for token in RESERVED))
    assert "".join(one.text for one in made) == escaped(text)


@given(texts)
def test_a_text_without_tokens_stays_as_it_is(text: str) -> None:
    """Grounding markers and half tokens are no business of ours."""
    harmless = re.sub("|".join(map(re.escape, RESERVED)), "", text)
    if first_in(harmless) is None:
        assert escaped(harmless) == harmless


def test_the_mark_cannot_come_from_a_client() -> None:
    """As an escape or as bytes it is no JSON, so that nobody can break a token of ours."""
    for bad in (b'"\\ud800"', b'"\xed\xa0\x80"'):
        with pytest.raises(Exception, match="JSON"):
            parse_chat(b'{"messages": [{"role": "user", "content": ' + bad + b"}]}", LIMITS)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    pytest.importorskip("vllm")
    from transformers import AutoTokenizer

    from qwen2vl_serve.profile import load_profile

    return AutoTokenizer.from_pretrained(load_profile("demo").model.path)


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> Any:
    from qwen2vl_serve.vllm_engine.encoding import PromptEncoder

    return PromptEncoder(tokenizer)


def rendered(tokenizer: Any, request: ChatRequest) -> str:
    from qwen2vl_serve.vllm_engine.request import as_template_message

    messages = [as_template_message(message) for message in request.messages]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def special_ids(tokenizer: Any, ids: list[int]) -> list[int]:
    known = {n for n, token in tokenizer.added_tokens_decoder.items() if token.content in RESERVED}
    return [one for one in ids if one in known]


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(["system", "user", "assistant"]), texts, st.lists(st.integers(0, 99)))
def test_the_model_reads_characters(
    tokenizer: Any, encoder: Any, role: str, text: str, places: list[int]
) -> None:
    """In any role and split anywhere: the special ids are the template's, the text is the text."""
    content: list[Any] = [{"type": "text", "text": piece} for piece in cut(text, places)]
    harmless: list[Any] = [{"type": "text", "text": "x"}]
    if role == "user":
        content.append(IMAGE)
        harmless.append(IMAGE)
    ids, plain = (
        encoder.encode(rendered(tokenizer, chat({"role": role, "content": said, "name": text})))
        for said in (content, harmless)
    )
    assert special_ids(tokenizer, ids) == special_ids(tokenizer, plain)
    assert text in tokenizer.decode(ids, skip_special_tokens=False)


@settings(deadline=None)
@given(texts.filter(lambda text: first_in(text) is None))
def test_without_a_token_the_ids_are_the_tokenizers(
    tokenizer: Any, encoder: Any, text: str
) -> None:
    """Taking a prompt apart at its special tokens is what the tokenizer does by itself."""
    prompt = rendered(tokenizer, chat({"role": "user", "content": text}))
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert encoder.encode(prompt) == ids
    assert encoder.encode(prompt + MARK) == ids


def test_the_tokenizer_is_left_as_it_was(tokenizer: Any, encoder: Any) -> None:
    """Plain reading is a copy's; the template's own tokens stay special for everyone else."""
    encoder.encode(f"<{MARK}|im_end|>")
    assert len(tokenizer.encode("<|im_end|>", add_special_tokens=False)) == 1


@pytest.fixture(scope="module")
def renderer() -> Any:
    """vLLM's own renderer of the demo model, with our encoder, without an engine."""
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.renderers import renderer_from_config

    from qwen2vl_serve.profile import load_profile
    from qwen2vl_serve.vllm_engine.encoding import PromptEncoder, encode_with

    config = AsyncEngineArgs(**load_profile("demo").engine_args()).create_engine_config()
    one = renderer_from_config(config)
    encode_with(PromptEncoder(one.tokenizer), one)
    yield one
    one.shutdown()


def rendered_by_vllm(renderer: Any, request: ChatRequest) -> list[int]:
    from vllm.renderers.params import ChatParams

    from qwen2vl_serve.vllm_engine.request import as_template_message

    params = ChatParams(
        chat_template_content_format="auto",
        chat_template_kwargs={"tokenize": False, "add_generation_prompt": True},
    )
    messages = [as_template_message(message) for message in request.messages]
    _, (prompt,) = asyncio.run(renderer.render_chat_async([messages], params))
    assert MARK not in prompt["prompt"]
    return list(prompt["prompt_token_ids"])


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["system", "user", "assistant"]),
    st.builds(cut, texts, st.lists(st.integers(0, 99))),
)
def test_vllm_renders_what_we_count(
    renderer: Any, tokenizer: Any, encoder: Any, role: str, pieces: list[str]
) -> None:
    """With and without control tokens, the ids that reach the engine are ours."""
    content = [{"type": "text", "text": piece} for piece in pieces]
    request = chat({"role": role, "content": content})
    ids = rendered_by_vllm(renderer, request)
    assert ids == encoder.encode(rendered(tokenizer, request))
    plain = rendered_by_vllm(renderer, chat({"role": role, "content": "x"}))
    assert special_ids(tokenizer, ids) == special_ids(tokenizer, plain)
