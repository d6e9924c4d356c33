"""The way from a question over a call to an answer, with OpenAI's client and a scripted engine."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import openai
import pytest
from PIL import Image

from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.engine import Medium, Usage
from qwen2vl_serve.media.picture import Picture
from qwen2vl_serve.profile import load_profile
from qwen2vl_serve.protocol.chat import AssistantMessage, ChatRequest, ToolMessage
from tests.fake_engine import FakeEngine
from tests.served import served
from tests.test_examples import run_example

ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


class Agent(FakeEngine):
    """Calls the first tool with what its ``arguments`` say; then tells what it was told."""

    arguments: str = '{"a": 2, "b": 3}'

    async def complete(
        self, request: ChatRequest, media: Sequence[Medium], request_id: str, usage: Usage
    ) -> bytes:
        last = request.messages[-1]
        if isinstance(last, ToolMessage):
            self.words = ["It is ", str(last.content)]
            return await super().complete(request, media, request_id, usage)
        answer = json.loads(await super().complete(request, media, request_id, usage))
        answer["choices"][0] |= {
            "message": {"role": "assistant", "content": None, "tool_calls": [self.call(request)]},
            "finish_reason": "tool_calls",
        }
        return json.dumps(answer).encode()

    async def stream(
        self, request: ChatRequest, media: Sequence[Medium], request_id: str, usage: Usage
    ) -> AsyncGenerator[str, None]:
        call = self.call(request)
        head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "demo"}
        start = call | {"index": 0, "function": call["function"] | {"arguments": ""}}
        rest = [
            {"index": 0, "function": {"arguments": letter}}
            for letter in call["function"]["arguments"]
        ]
        for delta in [{"role": "assistant"}, *({"tool_calls": [one]} for one in (start, *rest))]:
            choice = {"index": 0, "delta": delta, "finish_reason": None}
            yield json.dumps(head | {"choices": [choice]})

    def call(self, request: ChatRequest) -> dict[str, Any]:
        assert request.tools is not None
        name = request.tools[0].function.name
        function = {"name": name, "arguments": self.arguments}
        return {"id": "call_1", "type": "function", "function": function}


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_is_made_run_and_answered(stream: bool) -> None:
    """Two turns: what the model asked for goes back as it came, and the result beside it."""
    engine = Agent()
    messages: list[Any] = [{"role": "user", "content": "What is 2 + 3?"}]
    profile = load_profile("demo", ["server.tools=experimental"])
    with (
        served(profile, Keys(), engine) as server,
        openai.OpenAI(base_url=f"{server.root}/v1", api_key="none") as client,
    ):
        if stream:
            with client.chat.completions.stream(
                model="demo", messages=messages, tools=[ADD]
            ) as events:
                message = events.get_final_completion().choices[0].message
        else:
            asked = client.chat.completions.create(model="demo", messages=messages, tools=[ADD])
            assert asked.choices[0].finish_reason == "tool_calls"
            message = asked.choices[0].message
        (call,) = message.tool_calls or []
        numbers = json.loads(call.function.arguments)
        result = {"role": "tool", "tool_call_id": call.id, "content": str(sum(numbers.values()))}
        answer = client.chat.completions.create(
            model="demo", messages=[*messages, message, result], tools=[ADD]
        )
        assert answer.choices[0].message.content == "It is 5"
    sent = engine.requests[-1].messages
    assert isinstance(sent[1], AssistantMessage)
    assert sent[1].tool_calls is not None
    assert sent[1].tool_calls[0].function.values == numbers


@pytest.mark.parametrize(("words", "kept"), [(10, 3), (3975, 1)])
def test_pictures_of_a_result_reach_the_engine(words: int, kept: int) -> None:
    """As those of users do, in their order; where they do not fit the oldest are dropped."""
    engine = FakeEngine()

    def shown(width: int) -> dict[str, Any]:
        data = io.BytesIO()
        Image.new("RGB", (width, 224), "red").save(data, "PNG")
        url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": url}}

    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": [shown(168)]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": [shown(196), shown(224)]},
        {"role": "user", "content": "word " * words},
    ]
    profile = load_profile("demo", ["server.tools=experimental"])
    with served(profile, Keys(), engine) as server:
        answer = server.chat(messages=messages, overflow="drop_oldest_images", max_tokens=1)
    assert answer.status_code == 200, answer.text
    (media,) = engine.media
    widths = [168, 196, 224]
    assert [one.size[0] for one in media if isinstance(one, Picture)] == widths[-kept:]


def test_the_example_calls_its_function_and_answers_from_the_result() -> None:
    """As a user starts it."""
    engine = Agent()
    engine.arguments = '{"colour": "red"}'
    profile = load_profile("demo", ["server.tools=experimental"])
    with served(profile, Keys(), engine) as server:
        done = run_example("tools.py", url=f"{server.root}/v1")
    assert done.returncode == 0, done.stderr
    called, answered, _ = done.stdout.splitlines()
    assert called == "in_stock('red'): There are 12 red sheets in stock."
    assert answered == "It is There are 12 red sheets in stock."
