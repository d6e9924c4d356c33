"""From a rendered prompt to token ids, where clients wrote control tokens that shall mean nothing.

Such tokens come broken by ``control_tokens.MARK``. A tokenizer that is left alone would join them
again; this one reads them as the characters that they are made of.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

from vllm.renderers.base import BaseRenderer

from qwen2vl_serve.protocol.control_tokens import MARK


class PromptEncoder:
    """Encodes prompts with a tokenizer of transformers that is backed by the package tokenizers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # A copy: the switch is the tokenizer's own state, and the original serves other threads.
        self._plain = type(tokenizer.backend_tokenizer).from_str(
            tokenizer.backend_tokenizer.to_str()
        )
        self._plain.encode_special_tokens = True
        self._special = {
            added.content: number
            for number, added in tokenizer.added_tokens_decoder.items()
            if added.special
        }
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``: without a ``MARK`` those that the tokenizer gives.

        With one, tokens that are whole are special and all between them is plain, as it is when
        the tokenizer itself splits a text at its special tokens.
        """
        if MARK not in text:
            return list(self._tokenizer.encode(text, add_special_tokens=False))
        ids: list[int] = []
        for piece in self._split(text):
            if piece in self._special:
                ids.append(self._special[piece])
            else:
                plain = piece.replace(MARK, "")
                ids += self._plain.encode(plain, add_special_tokens=False).ids
        return ids


def encode_with(encoder: PromptEncoder, renderer: BaseRenderer) -> None:
    """Have ``renderer`` encode prompts that hold a ``MARK`` by ``encoder``."""
    tokenize = renderer.tokenize_prompt_async

    async def tokenize_prompt_async(prompt: Any, params: Any) -> Any:
        text = prompt.get("prompt")
        if isinstance(text, str) and MARK in text:
            # vLLM's own first look, which refuses texts far too long before they are encoded.
            params.apply_pre_tokenization(renderer.tokenizer, prompt)
            ids = await asyncio.to_thread(encoder.encode, text)
            prompt = {**prompt, "prompt": text.replace(MARK, ""), "prompt_token_ids": ids}
        return await tokenize(prompt, params)

    renderer.tokenize_prompt_async = tokenize_prompt_async
