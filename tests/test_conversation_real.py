"""Long conversations against the real engine: no policy ever ends in a context error."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import requests
from blake3 import blake3
from qwen2vl_client import AsyncClient, AsyncConversation, Client, Conversation
from qwen2vl_client.request import user_message

from tests.conftest import ServerProcess

TURNS = 60
WORDS = "and what else can you see in it, please, " * 7
"""Some 70 tokens a turn: 60 of them outgrow the demo's window of 4096."""
TOKENS = 3500
"""Of an answer that takes seconds."""


@pytest.mark.parametrize("policy", ["summarise", "drop_oldest_images", "drop_oldest_turns"])
def test_sixty_turns_with_pictures_by_the_client(
    server: ServerProcess, pictures: Path, policy: Any
) -> None:
    """A picture every fourth turn, 15 in all, of which a request takes 4."""
    shown = [pictures / "red_circle.jpg", pictures / "blue_square.png"]
    with Client(server.url, server.api_key) as client:
        conversation = Conversation(
            client, overflow=policy, max_tokens=2, summary_max_tokens=16, temperature=0
        )
        for number in range(TURNS):
            images = shown[number // 4 % 2] if number % 4 == 0 else None
            answer = conversation.ask(f"Question {number}: {WORDS}", images=images)
            assert answer.usage is not None
            assert answer.usage.prompt_tokens + 2 <= 4096
        kinds = {event.kind for event in conversation.events}
    expected = {
        "summarise": {"summarised"},
        "drop_oldest_turns": {"dropped_turns"},
        "drop_oldest_images": {"dropped_images", "dropped_turns"},
    }
    assert kinds == expected[policy]
    assert conversation.messages[0]["role"] == "system"
    assert [turn["role"] for turn in conversation.messages[1:3]] == ["user", "assistant"]


@pytest.mark.parametrize("policy", ["summarise", "drop_oldest_turns"])
def test_sixty_turns_with_pictures_by_the_server(
    server: ServerProcess, pictures: Path, policy: Any
) -> None:
    """The client re-sends everything each time, as OpenAI's clients do; the server makes room.

    The first turns fit anyway: the test begins where the window is nearly full.
    """
    with Client(server.url, server.api_key) as client:
        messages: list[dict[str, Any]] = []
        reports = []
        for number in range(TURNS):
            images = pictures / "red_circle.jpg" if number % 4 == 0 else None
            messages.append(user_message(f"Question {number}: {WORDS}", images) or {})
            if number >= 40:
                answer = client.chat(
                    messages=messages, overflow=policy, max_tokens=2, temperature=0
                )
                reports.append(answer.overflow)
            messages.append({"role": "assistant", "content": "Yes."})
        streamed = client.stream(messages=messages[:-1], overflow=policy, max_tokens=2)
        list(streamed)
    assert None not in reports, "there were too many pictures from the first of them on"
    last = reports[-1]
    assert last is not None
    assert last["policy"] == policy
    assert last["dropped_turns"] > 0
    assert streamed.answer.overflow is not None
    if policy == "summarise":
        made = [one["usage"]["completion_tokens"] for one in reports if one and "usage" in one]
        assert 1 <= sum(count > 0 for count in made) <= 4, "the others found a summary"


def test_dropping_pictures_by_the_server(server: ServerProcess, pictures: Path) -> None:
    """Short turns, a picture in each: sixty pictures, of which four are sent."""
    import base64

    url = base64.b64encode((pictures / "red_circle.jpg").read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{url}"}}
    messages: list[dict[str, Any]] = []
    for number in range(TURNS):
        text = {"type": "text", "text": f"Question {number}?"}
        messages += [
            {"role": "user", "content": [image, text]},
            {"role": "assistant", "content": "Yes."},
        ]
    body = {"messages": messages[:-1], "overflow": "drop_oldest_images", "max_tokens": 2}
    answer = requests.post(f"{server.url}/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["overflow"] == {"policy": "drop_oldest_images", "dropped_images": 56}


def test_a_short_conversation_computes_its_beginning_once(server: ServerProcess) -> None:
    """A second turn of about 100 tokens takes the first's from the KV cache, in blocks of 32."""
    first: list[Any] = [{"role": "user", "content": "What is a language model? Tell me, please."}]
    said = [
        {"role": "assistant", "content": "It writes."},
        {"role": "user", "content": "And what else?"},
    ]
    asked = {"max_tokens": 1, "temperature": 0}
    for messages in (first, first + said):
        before = server.metric("vllm:prefix_cache_hits_total")
        body = {"messages": messages, **asked}
        answer = requests.post(f"{server.url}/chat/completions", json=body, timeout=120).json()
    assert answer["usage"]["prompt_tokens"] < 128
    assert server.metric("vllm:prefix_cache_hits_total") - before >= 32


@pytest.mark.parametrize("way", ["close", "leave", "blocking"])
def test_a_closed_stream_frees_its_place(server: ServerProcess, way: str) -> None:
    """The server's gauge of answers goes back to where it was, before the answer's last token.

    Where this machine stands still, the answer may end before it is closed: then it is asked again.
    """

    def held() -> float:
        return server.metric('qwen2vl_admission_in_flight{kind="chat"}')

    def stop() -> float:
        with (
            Client(server.url, server.api_key) as client,
            client.stream("Describe it.", **asking) as stream,
        ):
            pieces = iter(stream)  # kept: dropping it closes the stream
            next(pieces)
            return held()

    async def stop_async() -> float:
        async with AsyncClient(server.url, server.api_key) as client:
            stream = await client.stream("Describe it.", **asking)
            async for _ in stream:
                before = await asyncio.to_thread(held)
                if way == "close":
                    await stream.close()
                break
            return before

    def frees() -> bool:
        before = server.metric("vllm:generation_tokens_total")
        assert held() == 0
        under_way = stop() if way == "blocking" else asyncio.run(stop_async())
        deadline = time.monotonic() + 60
        while held() or server.metric("vllm:num_requests_running"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        made = server.metric("vllm:generation_tokens_total") - before
        return under_way == 1 and made < TOKENS

    asking: dict[str, Any] = {"min_tokens": TOKENS, "max_tokens": TOKENS}
    assert any(frees() for _ in range(5))


def test_media_and_timings_of_the_real_server(server: ServerProcess, pictures: Path) -> None:
    """What the model saw, and what the same would cost, agree with the tokens counted."""

    async def ask() -> None:
        async with AsyncClient(server.url, server.api_key, upload_above=0) as client:
            assert await client.ready()
            conversation = AsyncConversation(client, max_tokens=8)
            stream = await conversation.stream("What is it?", images=pictures / "red_circle.jpg")
            assert [text async for text in stream]
            answer = stream.answer
            (seen,) = answer.media
            assert seen.visual_tokens
            told = await client.explain(
                "What is it?", images=pictures / "red_circle.jpg", max_tokens=8
            )
            assert told.visual_tokens == seen.visual_tokens
            assert answer.usage is not None
            assert told.prompt_tokens == answer.usage.prompt_tokens
            assert answer.timings.first_token is not None
            assert answer.timings.first_token < answer.timings.total
            times = answer.timings.server
            assert times.keys() >= {"queue", "fetch", "decode", "first-token", "total"}
            assert 0 < times["first-token"] < times["total"] <= answer.timings.first_token
            whole = await client.chat("What is it?", images=pictures / "red_circle.jpg")
            assert 0 < whole.timings.server["answer"] < whole.timings.total
            digest = blake3((pictures / "red_circle.jpg").read_bytes()).hexdigest()
            ids = [file.id for file in await client.files.list()]
            assert ids.count(f"file-{digest}") == 1

    asyncio.run(ask())
