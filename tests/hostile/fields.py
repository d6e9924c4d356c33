"""Class B: fields of another type, unknown fields, fields that clients may not set."""

from __future__ import annotations

from typing import Any

from tests.hostile.case import Case, asked, refused, served
from tests.hostile.pictures import png_url

TITLE = "types and fields"

TYPES: dict[str, tuple[dict[str, Any], str]] = {
    "messages missing": ({"max_tokens": 1}, "missing_required_parameter"),
    "messages null": (asked() | {"messages": None}, "invalid_type"),
    "messages an object": (asked() | {"messages": {"role": "user"}}, "invalid_type"),
    "messages a string": (asked() | {"messages": "Hello"}, "invalid_type"),
    "messages of strings": (asked() | {"messages": ["Hello"]}, "invalid_type"),
    "messages of nulls": (asked() | {"messages": [None]}, "invalid_type"),
    "stream an object": (asked(stream={}), "invalid_type"),
    "stream 2": (asked(stream=2), "invalid_type"),
    "max_tokens 5.5": (asked(max_tokens=5.5), "invalid_type"),
    "max_tokens a list": (asked(max_tokens=[1]), "invalid_type"),
    "max_tokens a word": (asked(max_tokens="five"), "invalid_type"),
    "temperature a word": (asked(temperature="hot"), "invalid_type"),
    "temperature a list": (asked(temperature=[0.5]), "invalid_type"),
    "top_p an object": (asked(top_p={}), "invalid_type"),
    "n a fraction": (asked(n=1.5), "invalid_type"),
    "seed a word": (asked(seed="x"), "invalid_type"),
    "stop a number": (asked(stop=5), "invalid_type"),
    "stop of numbers": (asked(stop=[5]), "invalid_type"),
    "model a number": (asked(model=5), "invalid_type"),
    "model an object": (asked(model={"id": "demo"}), "invalid_type"),
    "logit_bias a list": (asked(logit_bias=[1]), "invalid_type"),
    "logit_bias of words": (asked(logit_bias={"5": "x"}), "invalid_type"),
    "response_format a string": (asked(response_format="json"), "invalid_type"),
    "response_format unknown": (asked(response_format={"type": "yaml"}), "invalid_value"),
    "stream_options a list": (asked(stream=True, stream_options=[]), "invalid_type"),
}

CONVERTED: dict[str, dict[str, Any]] = {
    'stream "yes"': asked(stream="yes"),
    'max_tokens "5"': asked(max_tokens="5"),
    "max_tokens true": asked(max_tokens=True),
    "max_tokens 5.0": asked(max_tokens=5.0),
    'temperature "0.5"': asked(temperature="0.5"),
    "temperature true": asked(temperature=True),
    'logprobs "true"': asked(logprobs="true"),
    "content a number": asked(5),
}

# What changes the server's memory, its schedule or another's answer.
DANGEROUS: dict[str, Any] = {
    "chat_template": "{% for x in range(10**9) %}{% endfor %}",
    "chat_template_kwargs": {"tokenize": False, "chat_template": "x"},
    "kv_transfer_params": {"do_remote_prefill": True, "remote_host": "10.0.0.1"},
    "prompt_embeds": "gASVAA==",
    "documents": [{"title": "x", "text": "y"}] * 1000,
}

# What vLLM serves by design, or takes without effect.
OTHER: dict[str, Any] = {
    "add_special_tokens": True,
    "allowed_token_ids": [1],
    "bad_words": ["x"],
    "cache_salt": "x",
    "continue_final_message": True,
    "echo": True,
    "functions": [{"name": "f"}],
    "guided_regex": "(a+)+$",
    "prompt_logprobs": 1,
    "priority": -1000,
    "request_id": "x" * 500,
    "reasoning_effort": "high",
    "return_token_ids": True,
    "structured_outputs": {"regex": "(a+)+$"},
    "truncate_prompt_tokens": 1,
    "use_beam_search": True,
    "vllm_xargs": {"a": 1},
}


def pixels(kwargs: object) -> dict[str, Any]:
    """A picture under request-wide pixel fields."""
    part = {"type": "image_url", "image_url": {"url": png_url()}}
    return asked([part], mm_processor_kwargs=kwargs)


def cases() -> list[Case]:
    """Return the class."""
    return [
        *(refused("B", name, body, code) for name, (body, code) in TYPES.items()),
        *(refused("B", name, body, "invalid_type", ours=True) for name, body in CONVERTED.items()),
        *(
            refused("B", name, asked(**{name: value}), "unsupported_parameter", param=name)
            for name, value in DANGEROUS.items()
        ),
        refused(
            "B",
            "tools",
            asked(tools=[{"type": "function", "function": {"name": "f"}}]),
            "unsupported_parameter",
            param="tools",
            ours=True,
            needs="no tools",
        ),
        *(
            refused("B", name, asked(**{name: value}), "unsupported_parameter", ours=True)
            for name, value in OTHER.items()
        ),
        refused(
            "B",
            "all frames of a video",
            asked(media_io_kwargs={"video": {"num_frames": -1}}),
            "invalid_value",
            param="media_io_kwargs.video.num_frames",
            ours=True,
        ),
        refused("B", "max_pixels 0", lambda: pixels({"max_pixels": 0}), "invalid_value"),
        refused("B", "max_pixels of letters", lambda: pixels({"max_pixels": "x"}), "invalid_type"),
        refused(
            "B",
            "a keyword of the processor",
            lambda: pixels({"return_tensors": "x"}),
            "unsupported_parameter",
        ),
        *(
            refused(
                "B",
                f"model {name[:20]!r}",
                asked(model=name),
                "model_not_found",
                status=404,
                ours=not name,
            )
            for name in ("gpt-4o", "", "../../etc/passwd", "x" * 100_000, "demo\u0000")
        ),
        served("B", "a field that nobody knows", asked(no_such_field={"a": [1]})),
        served("B", "user and metadata", asked(user="u", metadata={"a": "b"}, store=False)),
        served("B", "null for every option", asked(temperature=None, stop=None, n=None)),
    ]
