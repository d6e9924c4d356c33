"""The chunks that we write are those that vLLM writes, but for fields of nothing."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator, Iterable
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl_serve.engine import Usage
from qwen2vl_serve.protocol.chat import ChatRequest
from tests.conftest import ServerProcess

pytest.importorskip("vllm")


def outputs_of(pieces: Iterable[tuple[int, str, int, str | None]]) -> AsyncGenerator[Any, None]:
    """The engine's outputs: (answer, text, tokens, finish reason) each."""
    from vllm.outputs import CompletionOutput, RequestOutput

    async def generate() -> AsyncGenerator[Any, None]:
        for index, text, tokens, reason in pieces:
            output = CompletionOutput(
                index, text, [7] * tokens, None, None, finish_reason=reason, stop_reason=None
            )
            yield RequestOutput("r", None, [1, 2, 3], None, [output], reason is not None)

    return generate()


def theirs_of(request: Any, outputs: AsyncGenerator[Any, None]) -> AsyncGenerator[str, None]:
    """vLLM's own events of the same outputs."""
    from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

    chat = object.__new__(OpenAIServingChat)
    chat.__dict__.update(
        parser_cls=None,
        response_role="assistant",
        request_logger=None,
        system_fingerprint=None,
        enable_force_include_usage=False,
        enable_prompt_tokens_details=False,
        enable_per_request_metrics=False,
        enable_log_outputs=False,
        _include_reasoning_tokens_details=False,
    )
    given = (request, outputs, "chatcmpl-r", "demo", [], None)
    events: AsyncGenerator[str, None] = chat.chat_completion_stream_generator(
        *given, RequestResponseMetadata(request_id="r")
    )
    return events


def without_nothing(chunk: dict[str, Any]) -> dict[str, Any]:
    chunk["created"] = 0
    for choice in chunk["choices"]:
        if choice.get("token_ids", ...) is None:
            del choice["token_ids"]
    for name in ("prompt_token_ids", "prompt_text"):
        if chunk.get(name, ...) is None:
            del chunk[name]
    return chunk


async def read(events: AsyncGenerator[str, None]) -> list[dict[str, Any]]:
    texts = [event.removeprefix("data: ").strip() async for event in events]
    return [without_nothing(json.loads(text)) for text in texts if text != "[DONE]"]


def asked(usage: Usage, **fields: Any) -> Any:
    from qwen2vl_serve.vllm_engine.request import as_vllm

    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, **fields}
    request = as_vllm(ChatRequest.model_validate(body), [], "r", usage)
    request.count_prompt(3)
    return request


PIECE = st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 3))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(PIECE, max_size=5), min_size=1, max_size=3), st.booleans(), st.data())
def test_chunks_are_those_of_vllm(
    answers: list[list[tuple[str, int]]], include_usage: bool, data: st.DataObject
) -> None:
    """For one to three answers whose pieces come in any order: any text, pieces of no token."""
    from qwen2vl_serve.vllm_engine.chunks import plain_chunks

    order = data.draw(
        st.permutations([index for index, answer in enumerate(answers) for _ in answer])
    )
    rests = [iter(answer) for answer in answers]
    pieces: list[tuple[int, str, int, str | None]] = [
        (index, *next(rests[index]), None) for index in order
    ]
    pieces += [(index, "", 1, "stop") for index in range(len(answers))]
    fields = {"n": len(answers), "stream_options": {"include_usage": include_usage}}

    async def both() -> tuple[list[Any], list[Any]]:
        ours = plain_chunks(asked(usage, **fields), outputs_of(pieces), "chatcmpl-r", "demo")
        theirs = theirs_of(asked(Usage(), **fields), outputs_of(pieces))
        return await read(ours), await read(theirs)

    usage = Usage()
    ours, theirs = asyncio.run(both())
    assert ours == theirs
    assert usage.completion_tokens == sum(tokens for _, _, tokens, _ in pieces)


def test_what_the_engine_gives_up_is_an_error() -> None:
    """Not a chunk with ``finish_reason: error``; what came before has been counted."""
    from vllm.exceptions import GenerationError

    from qwen2vl_serve.vllm_engine.chunks import plain_chunks

    usage = Usage()
    pieces = [(0, "Hel", 1, None), (0, "", 0, "error")]

    async def read_all() -> None:
        chunks = plain_chunks(asked(usage), outputs_of(pieces), "r", "demo")
        assert [json.loads(await anext(chunks))["choices"][0]["delta"] for _ in range(2)] == [
            {"role": "assistant", "content": ""},
            {"content": "Hel"},
        ]
        with pytest.raises(GenerationError):
            await anext(chunks)

    asyncio.run(read_all())
    assert usage.completion_tokens == 1


def test_closing_the_chunks_closes_the_generation() -> None:
    """At once, not when the collector finds it."""
    from qwen2vl_serve.vllm_engine.chunks import plain_chunks

    closed = []

    async def endless() -> AsyncGenerator[Any, None]:
        try:
            for _ in itertools.count():
                async for one in outputs_of([(0, "x", 1, None)]):
                    yield one
        finally:
            closed.append(True)

    async def leave() -> bool:
        chunks = plain_chunks(asked(Usage()), endless(), "r", "demo")
        await anext(chunks)
        await chunks.aclose()
        return bool(closed)

    assert asyncio.run(leave())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 2, "temperature": 0.6, "seed": 5},
        {"stop": ["a"]},
        {"extra_body": {"include_stop_str_in_output": True}},
    ],
    ids=["plain", "two answers", "stop", "stop kept"],
)
def test_a_stream_is_the_one_that_vllm_writes(server: ServerProcess, fields: Any) -> None:
    """The real engine's answer, by us and, for the sake of running counts, by vLLM."""
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)

    def chunks(**options: bool) -> list[Any]:
        stream = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "Which colours are there?"}],
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True, **options},
            **{"temperature": 0, **fields},
        )
        return [without_nothing(chunk.model_dump(exclude_unset=True)) for chunk in stream]

    def told(stream: list[Any]) -> tuple[Any, ...]:
        texts: dict[int, str] = {}
        ends = {}
        for chunk in stream[:-1]:
            (choice,) = chunk["choices"]
            index = choice["index"]
            texts[index] = texts.get(index, "") + choice["delta"]["content"]
            ends[index] = (choice["finish_reason"], choice.get("stop_reason"))
        return texts, ends, stream[-1]["usage"], sorted(stream[0])

    ours, theirs = chunks(), chunks(continuous_usage_stats=True)
    for chunk in theirs[:-1]:
        del chunk["usage"]
    assert told(ours) == told(theirs)
