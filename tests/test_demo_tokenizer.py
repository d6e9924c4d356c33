"""The shipped tokenizer encodes any text and keeps Qwen's special tokens whole."""

from __future__ import annotations

import importlib
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl_serve.demo.checkpoint import MODEL_FOLDER
from qwen2vl_serve.demo.rows import Encoder
from qwen2vl_serve.demo.tokenizer import SPECIAL_TOKENS, train_tokenizer
from qwen2vl_serve.demo.wording import SPELL_END, SPELL_START
from qwen2vl_serve.torchvision_ops import declare_missing_operators

declare_missing_operators()
TOKENIZER = importlib.import_module("transformers").AutoTokenizer.from_pretrained(MODEL_FOLDER)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text):
    """Encoding and decoding give the text in Unicode's composed form."""
    if any(token in text for token in SPECIAL_TOKENS):
        return
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert TOKENIZER.decode(ids) == unicodedata.normalize("NFC", text)


def test_special_tokens_are_one_id_each():
    """All of Qwen2-VL's names, and they are the end of the vocabulary."""
    ids = [TOKENIZER.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS]
    assert ids == list(range(len(TOKENIZER) - len(SPECIAL_TOKENS), len(TOKENIZER)))
    assert TOKENIZER.encode("<|box_start|>(12,") == [
        TOKENIZER.convert_tokens_to_ids("<|box_start|>"),
        *[TOKENIZER.convert_tokens_to_ids(c) for c in "(12,"],
    ]


def test_the_template_follows_qwen2_vl():
    """A default system turn, placeholders in place, and a generation prompt on request."""
    content = [{"type": "text", "text": "A"}, {"type": "image"}, {"type": "text", "text": "B"}]
    messages = [{"role": "user", "content": content}]
    assert TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nA<|vision_start|><|image_pad|><|vision_end|>B<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    named = TOKENIZER.apply_chat_template(
        [{"role": "system", "content": "S"}, *messages], tokenize=False, add_vision_id=True
    )
    assert named.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nAPicture 1: <|vis")


@pytest.mark.parametrize("texts", [["a"], ["What colour is it?"] * 50])
def test_the_vocabulary_is_filled_to_its_size(texts):
    """Few texts leave reserved ids, never fewer ids than the embedding has rows."""
    assert len(train_tokenizer(texts)) == 1024


def test_spelt_letters_are_encoded_one_by_one():
    """A printed word is answered letter by letter, whatever merges exist."""
    encoder = Encoder(TOKENIZER)
    ids = [said.token for said in encoder.answer(f'It says "{SPELL_START}the{SPELL_END}".')]
    letters = [TOKENIZER.convert_tokens_to_ids(c) for c in "the"]
    assert any(list(ids[k : k + 3]) == letters for k in range(len(ids)))
    assert TOKENIZER.decode(ids) == 'It says "the".'
