"""Class I: sampling fields outside of their bounds, and on them."""

from __future__ import annotations

from typing import Any

from tests.hostile.case import Case, asked, refused, served

TITLE = "sampling"

HELLO = b'{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, '

OUTSIDE: list[tuple[str, Any]] = [
    ("temperature", -1), ("temperature", -0.001), ("top_p", 0), ("top_p", 1.1), ("top_p", -1),
    ("n", 0), ("n", -1), ("n", 2**63), ("max_tokens", 0), ("max_tokens", -1),
    ("max_completion_tokens", 0), ("max_completion_tokens", -5), ("presence_penalty", 2.1),
    ("presence_penalty", -2.1), ("frequency_penalty", 3), ("frequency_penalty", -1e300),
    ("repetition_penalty", 0), ("repetition_penalty", -1), ("min_p", -0.1), ("min_p", 1.1),
    ("top_k", -2), ("min_tokens", -1), ("seed", 2**64), ("stop", [""]), ("stop", ""),
    ("stop_token_ids", ["x"]), ("stop_token_ids", [10**9]), ("logit_bias", {"x": 1}),
    ("logit_bias", {"-5": 1}),
    ("logit_bias", {"99999999": 1}), ("logit_bias", {"5": 101}), ("logit_bias", {"5": -1e300}),
]  # fmt: skip

OURS: list[tuple[str, Any]] = [
    ("temperature", 2.1), ("temperature", 1e300), ("repetition_penalty", 1e300),
    ("stop", ["a", "b", "c", "d", "e"]), ("stop_token_ids", [1] * 65), ("n", 9),
]  # fmt: skip
"""OpenAI's bounds or this project's, which vLLM does not have."""

BOUNDS: list[dict[str, Any]] = [
    {"temperature": 0}, {"temperature": 2}, {"top_p": 1}, {"temperature": 1, "top_p": 1e-9},
    {"temperature": 1.0, "n": 8}, {"presence_penalty": -2}, {"frequency_penalty": 2}, {"top_k": -1},
    {"top_k": 1}, {"seed": -(2**63)}, {"stop": ["a", "b", "c", "d"]}, {"logit_bias": {"5": -100}},
    {"logprobs": True, "top_logprobs": 20}, {"logprobs": True, "top_logprobs": 0},
    {"min_tokens": 1}, {"logit_bias": {}}, {"stop": []},
]  # fmt: skip

VALUE, TYPE = "invalid_value", "invalid_type"


def cases() -> list[Case]:
    """Return the class."""
    return [
        *(refused("I", shown(n, v), asked(**{n: v}), VALUE, TYPE) for n, v in OUTSIDE),
        *(refused("I", shown(n, v), asked(**{n: v}), VALUE, param=n, ours=True) for n, v in OURS),
        refused("I", "several answers, all alike", asked(n=2, temperature=0), VALUE),
        refused("I", "temperature NaN", HELLO + b'"temperature": NaN}', "invalid_json"),
        refused("I", "temperature 1e999", HELLO + b'"temperature": 1e999}', "invalid_json", VALUE),
        refused("I", "top_p Infinity", HELLO + b'"top_p": Infinity}', "invalid_json"),
        refused("I", "top_logprobs 21", asked(logprobs=True, top_logprobs=21), VALUE),
        refused("I", "top_logprobs -1", asked(logprobs=True, top_logprobs=-2), VALUE),
        refused("I", "top_logprobs without logprobs", asked(top_logprobs=3), VALUE),
        refused("I", "min_tokens over max_tokens", asked(min_tokens=5), VALUE, param="min_tokens"),
        refused("I", "stream_options without stream", asked(stream_options={}), VALUE),
        refused(
            "I",
            "a schema that is none",
            asked(
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "cube"}},
                }
            ),
            VALUE,
        ),
        refused(
            "I",
            "a schema without its format",
            asked(response_format={"type": "json_schema"}),
            VALUE,
        ),
        *(served("I", shown(*list(one.items())[-1]), asked(**one)) for one in BOUNDS),
    ]


def shown(name: str, value: Any) -> str:
    """Return the name of a case."""
    text = str(value)
    return f"{name} {text if len(text) < 30 else text[:27] + '…'}"
