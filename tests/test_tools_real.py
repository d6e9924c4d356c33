"""Tools on the real engine, through OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import requests

from tests.conftest import ServerProcess

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Paris", "Köln", "北京"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "days", "unit"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {
    "type": "function",
    "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}},
}
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def check(call: Any) -> None:
    """The call names a tool, and its arguments obey that tool's schema."""
    assert call.type == "function"
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_time":
        assert arguments == {} or isinstance(arguments, dict)
        return
    assert call.function.name == "get_weather"
    assert arguments.keys() == {"city", "days", "unit"}
    assert arguments["city"] in ("Paris", "Köln", "北京")
    assert 1 <= arguments["days"] <= 9
    assert arguments["unit"] in ("celsius", "fahrenheit")


@pytest.mark.parametrize("choice", [NAMED, "required"], ids=["named", "required"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_call_that_is_asked_for_obeys_its_schema(
    client: openai.OpenAI, choice: Any, seed: int
) -> None:
    """The demo model was taught no tools; the grammar holds it to the schema nevertheless."""
    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "How warm is it in Köln?"}],
        tools=[WEATHER],
        tool_choice=choice,
        parallel_tool_calls=False,
        max_tokens=400,
        temperature=1.5,
        seed=seed,
    )
    (call,) = answer.choices[0].message.tool_calls or []
    check(call)
    assert not answer.choices[0].message.content


def test_a_call_comes_as_a_stream_of_deltas(client: openai.OpenAI) -> None:
    """The pieces of name and arguments make the same call as a whole answer."""
    asked: Any = {
        "model": "demo",
        "messages": [{"role": "user", "content": "How warm is it in Köln?"}],
        "tools": [WEATHER],
        "tool_choice": NAMED,
        "parallel_tool_calls": False,
        "max_tokens": 400,
        "temperature": 0,
        "seed": 1,
    }
    whole = client.chat.completions.create(**asked).choices[0].message.tool_calls[0]
    name, arguments, ids = "", "", set()
    for chunk in client.chat.completions.create(**asked, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or () if chunk.choices else ():
            assert delta.index == 0
            name += delta.function.name or ""
            arguments += delta.function.arguments or ""
            ids |= {delta.id} - {None}
    assert len(ids) == 1
    assert name == whole.function.name
    assert json.loads(arguments) == json.loads(whole.function.arguments)


def test_a_result_with_a_picture_is_seen(client: openai.OpenAI, red_circle: str) -> None:
    """A tool's answer may hold a picture, and the model answers about it, in text."""
    asked = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_time", "arguments": "{}"},
    }
    messages: Any = [
        {"role": "user", "content": "What colour is the circle?"},
        {"role": "assistant", "tool_calls": [asked]},
        {
            "role": "tool",
            "tool_call_id": "call_1",
            "content": [{"type": "image_url", "image_url": {"url": red_circle}}],
        },
        {"role": "user", "content": "What colour is the circle?"},
    ]
    answer = client.chat.completions.create(
        model="demo", messages=messages, max_tokens=20, temperature=0
    )
    assert "red" in (answer.choices[0].message.content or "").lower()


def test_without_a_choice_the_model_may_just_answer(client: openai.OpenAI, red_circle: str) -> None:
    """``auto`` and ``none`` leave it its words; those that asked for none see no tools."""
    content: Any = [
        {"type": "image_url", "image_url": {"url": red_circle}},
        {"type": "text", "text": "What colour is the circle?"},
    ]
    answers = {}
    for choice in ("auto", "none", None):
        given: Any = {} if choice is None else {"tools": [CLOCK], "tool_choice": choice}
        answers[choice] = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": content}],
            max_tokens=20,
            temperature=0,
            **given,
        )
    assert answers["none"].choices[0].message.content == answers[None].choices[0].message.content
    assert answers["none"].usage.prompt_tokens == answers[None].usage.prompt_tokens
    assert answers["auto"].usage.prompt_tokens > answers[None].usage.prompt_tokens
    assert answers["auto"].choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_the_prompt_is_counted_as_it_is_rendered(
    client: openai.OpenAI, server: ServerProcess
) -> None:
    """Explanations and answers agree on the tokens of tools, calls and results."""
    called = {"id": "a", "type": "function", "function": {"name": "get_time", "arguments": ""}}
    messages: Any = [
        {"role": "user", "content": "How warm is it in Köln?"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [
                {
                    "id": "a",
                    "type": "function",
                    "function": {"name": "get_time", "arguments": '{ "x":"é" }'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "12 °C"},
        {"role": "assistant", "tool_calls": [called, called]},
        {
            "role": "tool",
            "tool_call_id": "a",
            "content": [{"type": "text", "text": one} for one in ("warm", "er")],
        },
    ]
    body = {"model": "demo", "messages": messages, "tools": [WEATHER, CLOCK]}
    told = requests.post(f"{server.url}/chat/completions/explain", json=body, timeout=30).json()
    answer = client.chat.completions.create(**body, max_tokens=1)
    assert answer.usage is not None
    assert told["prompt_tokens"] == answer.usage.prompt_tokens


def test_a_schema_that_calls_cannot_be_held_to_is_refused(client: openai.OpenAI) -> None:
    """What the grammar would pass over is refused, so that arguments always obey."""
    tool: Any = {
        "type": "function",
        "function": {
            "name": "roll",
            "parameters": {"properties": {"n": {"type": "integer", "multipleOf": 3}}},
        },
    }
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "x"}], tools=[tool]
        )
    assert caught.value.param == "tools[0].function.parameters"
