"""Conversations that do not burst, against the real application over an engine with a window."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen2vl_client import (
    AsyncClient,
    AsyncConversation,
    BadRequestError,
    Client,
    Conversation,
    InvalidArgumentError,
    ServerError,
)
from qwen2vl_client.pixels import png
from qwen2vl_client.wording import wording_for, wordings

from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.engine import Usage
from qwen2vl_serve.profile import load_profile
from qwen2vl_serve.protocol.chat import ChatRequest
from tests import stub_server as stub
from tests.context.test_overflow import WindowEngine, facts, texts
from tests.served import Served, served
from tests.test_client_async import awaited
from tests.test_client_files import requests_to

EXPLAIN = "/v1/chat/completions/explain"
CHAT = "/v1/chat/completions"


def picture(number: int) -> bytes:
    """A small picture, one for each number."""
    return png(np.full((28, 28, 3), number, np.uint8))


FILM = b"\x00\x00\x00\x18ftypmp42 not looked into by the client"


@dataclass
class Talker(WindowEngine):
    """Refuses what does not fit, tells its usage, and sums up by repeating what has an ``=``.

    ``failure`` is raised for questions, ``summary_failure`` for summaries.
    """

    summary_failure: Exception | None = None

    async def complete(
        self, request: ChatRequest, media: Sequence[Any], request_id: str, usage: Usage
    ) -> bytes:
        if is_summary(request):
            self._refuse(request, media, usage)
            self.requests.append(request)
            if self.summary_failure is not None:
                raise self.summary_failure
            text = " ".join(facts(request).split()[: request.output_limit])
            answer: dict[str, Any] = {"model": "demo", "choices": [
                {"index": 0, "message": {"role": "assistant", "content": text}}
            ]}  # fmt: skip
            usage.completion_tokens = len(text.split())
        else:
            answer = json.loads(await super().complete(request, media, request_id, usage))
        told = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
        return json.dumps({**answer, "usage": told}, separators=(",", ":")).encode()

    async def stream(
        self, request: ChatRequest, media: Sequence[Any], request_id: str, usage: Usage
    ) -> AsyncGenerator[str, None]:
        async for chunk in super().stream(request, media, request_id, usage):
            yield chunk
        told = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
        yield json.dumps({"choices": [], "usage": told}, separators=(",", ":"))


def is_summary(request: ChatRequest) -> bool:
    return any(texts(request)[-1] == f"user: {one.instruction}" for one in wordings().values())


@contextmanager
def talking(
    window: int = 200, *overrides: str, **options: Any
) -> Iterator[tuple[Client, Served, Talker]]:
    engine = Talker(window=window)
    with (
        served(load_profile("demo", overrides), Keys(()), engine) as server,
        Client(f"{server.root}/v1", "", "demo", max_retries=0, **options) as client,
    ):
        yield client, server, engine


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Served, Talker]]:
    engine = Talker(window=200)
    profile = load_profile("demo", ["media.limit_mm_per_prompt.image=3"])
    with served(profile, Keys(()), engine) as server:
        yield server, engine


POLICIES = ["summarise", "drop_oldest_images", "drop_oldest_turns"]
WORDS = st.integers(1, 60).map(lambda count: " ".join(["w"] * count))
NAMES = st.sampled_from(["", "", "as in picture 1", "the second image", "第3张图"])
TURNS = st.lists(st.tuples(st.integers(0, 2), WORDS, NAMES), min_size=1, max_size=14)


@settings(deadline=None, max_examples=60)
@given(
    turns=TURNS,
    policy=st.sampled_from(POLICIES),
    window=st.integers(40, 500),
    keep_last=st.integers(0, 4),
    answer=st.integers(1, 40),
    streamed=st.booleans(),
)
def test_a_question_fails_only_where_it_does_not_fit_alone(
    shared: tuple[Served, Talker],
    *,
    turns: list[tuple[int, str, str]],
    policy: Any,
    window: int,
    keep_last: int,
    answer: int,
    streamed: bool,
) -> None:
    """Then the server's own error comes through.

    The system message and the question are always sent, turns keep their order, user and
    assistant alternate.
    """
    server, engine = shared
    engine.window = window
    engine.requests.clear()
    with Client(f"{server.root}/v1", "", "demo", max_retries=0) as client:
        conversation = Conversation(
            client, "be brief", overflow=policy, keep_last=keep_last, max_tokens=answer,
            summary_max_tokens=30,
        )  # fmt: skip
        for number, (count, words, name) in enumerate(turns):
            question = f"q{number} {words} {name}".strip()
            images = [picture(number * 2 + n) for n in range(count)]
            before = conversation.messages
            alone = client.explain(
                question, images=images or None, system="be brief", max_tokens=answer
            )
            try:
                if streamed:
                    list(conversation.stream(question, images=images or None))
                else:
                    conversation.ask(question, images=images or None)
            except BadRequestError as error:
                assert error.code == "context_length_exceeded"
                assert not alone.fits
                assert conversation.messages == before
                continue
            assert alone.fits
            sent = texts(engine.requests[-1])
            assert sent[0] == "system: be brief"
            assert sent[-1].replace("# ", "").endswith(question)
            roles = [line.split(":")[0] for line in sent[1:]]
            assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
            told = [int(found) for line in sent for found in re.findall(r"\bq(\d+)", line)]
            assert told == sorted(told)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_label_is_never_what_does_not_fit(shared: tuple[Served, Talker], policy: Any) -> None:
    """Found by the test above: a question that fits alone, to the token, is sent unlabelled."""
    server, engine = shared
    engine.window = 58
    with Client(f"{server.root}/v1", "", "demo", max_retries=0) as client:
        conversation = Conversation(client, "be brief", overflow=policy, max_tokens=1)
        conversation.ask("one two three four five six", images=picture(1))
        conversation.ask("one two three four five six", images=picture(2))
        conversation.ask("one two three four five six", images=picture(3))
        assert texts(engine.requests[-1]) == [
            "system: be brief",
            "user: # one two three four five six",
        ]


class TestSummarise:
    def test_what_was_told_in_turn_two_is_still_sent(self) -> None:
        """The stand-in's summary is known: it keeps what has an ``=``; here for 60 turns."""
        with talking() as (client, _, engine):
            conversation = Conversation(
                client, overflow="summarise", max_tokens=20, summary_max_tokens=60
            )
            conversation.ask("hello")
            conversation.ask("my cat=Tom")
            for number in range(58):
                conversation.ask(f"and what is it that follows number {number} ?")
                assert "cat=Tom" in " ".join(texts(engine.requests[-1]))
            kinds = {event.kind for event in conversation.events}
        assert kinds == {"summarised"}
        assert 1 < len(conversation.events) < 20
        event = conversation.events[-1]
        assert event.summary is not None
        assert "cat=Tom" in event.summary
        assert event.turns > 0
        assert event.tokens > 0

    def test_the_last_turns_stay_word_for_word(self) -> None:
        """With ``keep_last=3`` that many and the new question follow the summary and its reply."""
        with talking() as (client, _, engine):
            conversation = Conversation(
                client, overflow="summarise", keep_last=3, max_tokens=20, summary_max_tokens=20
            )
            while not conversation.events:
                number = len(conversation.messages) // 2
                conversation.ask(f"question {number} of some words to fill the window")
            sent = texts(engine.requests[-1])
            kept = [
                line
                for turn in range(number - 3, number + 1)
                for line in (
                    f"user: question {turn} of some words to fill the window",
                    "assistant: A red circle.",
                )
            ]
            assert wordings()["en"].heading in sent[1]
            assert sent[2] == f"assistant: {wordings()['en'].reply}"
            assert sent[3:] == kept[:-1]

    def test_the_prompt_can_be_set_and_speaks_the_conversation_s_language(self) -> None:
        """``summary_prompt`` is sent as it is; unset it is Chinese for Chinese, else English."""
        for prompt, words, asked in (
            ("Kurz!", "some words to fill it up", "Kurz!"),
            (None, "还有 什么 可以 说 的 呢", wordings()["zh"].instruction),
            (None, "some words to fill it up", wordings()["en"].instruction),
        ):
            with talking(120) as (client, _, engine):
                conversation = Conversation(
                    client, overflow="summarise", summary_prompt=prompt, max_tokens=9,
                    summary_max_tokens=5,
                )  # fmt: skip
                for _ in range(20):
                    conversation.ask(words)
                lasts = {texts(request)[-1] for request in engine.requests}
            assert lasts == {f"user: {words}", f"user: {asked}"}

    @pytest.mark.parametrize("failing", ["summary_failure", "failure"])
    def test_a_summary_that_fails_leaves_the_conversation_as_it_was(self, failing: str) -> None:
        """Also where the question fails after its summary; asked again later, both succeed."""
        with talking(120) as (client, _, engine):
            conversation = Conversation(client, overflow="summarise", max_tokens=9)
            while len(engine.requests) < 6:
                conversation.ask("some words to fill it up")
            before = conversation.messages
            setattr(engine, failing, RuntimeError("broken"))
            for _ in range(3):
                engine.requests.clear()
                with pytest.raises(ServerError, match="HTTP 500"):
                    conversation.ask("word " * 50)
                first, last = (is_summary(engine.requests[index]) for index in (0, -1))
                assert (first, last) == (True, failing == "summary_failure")
                assert (conversation.messages, conversation.events) == (before, [])
            setattr(engine, failing, None)
            conversation.ask("word " * 50)
        assert {event.kind for event in conversation.events} == {"summarised"}


class TestPictures:
    @pytest.mark.parametrize("policy", ["summarise", "drop_oldest_turns"])
    def test_one_that_is_named_again_stays_when_its_turn_goes(self, policy: Any) -> None:
        """With its number before it, which the model can no longer count."""
        with talking(570) as (client, _, engine):
            conversation = Conversation(
                client, overflow=policy, keep_last=1, max_tokens=9, summary_max_tokens=20
            )
            for number in range(3):
                words = "word " * 30
                conversation.ask(f"what is this, {number}? {words}", images=picture(number))
            conversation.ask("word " * 330 + "and what is in picture 2 ?")
            sent = texts(engine.requests[-1])
        assert conversation.events[-1].kind != "dropped_images"
        assert "Picture 2: #" in sent[1]
        assert "Picture 1: #" not in " ".join(sent)

    @pytest.mark.parametrize(
        ("words", "number"),
        [
            ("and what is in picture two ?", 2),
            ("and what is in the last picture ?", 3),
            ("and what is in the previous image ?", 3),
            ("上 面 说 的 上一张图 呢", 3),
            ("那么 最后一张图片 里 有 什么", 3),
        ],
    )
    def test_one_that_is_named_in_words_stays_as_well(self, words: str, number: int) -> None:
        """The last is that of the conversation, though later turns showed none."""
        with talking(500) as (client, _, engine):
            conversation = Conversation(
                client, overflow="drop_oldest_turns", keep_last=1, max_tokens=9
            )
            for shown in range(3):
                conversation.ask(f"what is this, {shown}? {'word ' * 30}", images=picture(shown))
            conversation.ask("and now? " + "word " * 30)
            conversation.ask("word " * 330 + words)
            sent = " ".join(texts(engine.requests[-1]))
        kept = re.findall(r"(?:Picture|图片) (\d)[:：] #", sent)
        assert kept == [str(number)]

    def test_the_last_picture_of_an_earlier_turn_is_the_one_before_it(self) -> None:
        """Of a question that stays: what it was about stays, though others were shown since."""
        with talking(4096, "media.limit_mm_per_prompt.image=3") as (client, _, engine):
            conversation = Conversation(client, overflow="drop_oldest_images", max_tokens=9)
            conversation.ask("what is this?", images=picture(0))
            conversation.ask("compare it with the last picture", images=picture(1))
            conversation.ask("and this?", images=picture(2))
            conversation.ask("and this?", images=picture(3))
            sent = " ".join(texts(engine.requests[-1]))
        assert "Picture 1: #" in sent
        assert "Picture 2: #" not in sent

    def test_the_oldest_go_first_and_those_that_are_named_last(self) -> None:
        """Words stand for a picture that went; the second, named again, outlives the third."""
        with talking(4096, "media.limit_mm_per_prompt.image=3") as (client, _, engine):
            conversation = Conversation(client, overflow="drop_oldest_images", max_tokens=9)
            for number in range(4):
                conversation.ask(f"what is this, {number}?", images=picture(number))
            sent = " ".join(texts(engine.requests[-1]))
            assert sent.count("#") == 3
            assert wordings()["en"].removed in texts(engine.requests[-1])[1]
            conversation.ask("compare it with picture 2", images=picture(9))
            sent = " ".join(texts(engine.requests[-1]))
        assert [event.kind for event in conversation.events] == ["dropped_images"] * 2
        assert "Picture 2: #" in sent
        assert "Picture 3: #" not in sent
        assert "Picture 4: #" in sent
        assert "Picture 5: # compare" in sent

    @pytest.mark.parametrize("policy", POLICIES)
    def test_more_pictures_than_a_request_takes_are_no_error(self, policy: Any) -> None:
        """``limit_mm_per_prompt`` is told by the server, and is a window of its own."""
        with talking(4096) as (client, _, _):
            conversation = Conversation(
                client, overflow=policy, max_tokens=9, summary_max_tokens=20
            )
            for number in range(12):
                conversation.ask(f"what is this, {number}?", images=picture(number))
            assert conversation.events
            with pytest.raises(BadRequestError) as caught:
                conversation.ask("five", images=[picture(n) for n in range(5)])
        assert caught.value.code == "too_many_items"

    @pytest.mark.parametrize("policy", POLICIES)
    @pytest.mark.parametrize("told", [True, False])
    def test_more_videos_than_a_request_takes_are_no_error_either(
        self, policy: Any, told: bool
    ) -> None:
        """Whether the server tells its limit, or refuses; the pictures are not at fault."""
        limits = {"limit_mm_per_prompt": {"image": 4, "video": 1}} if told else {}
        shown: list[tuple[int, int]] = []

        def step(handler: stub.Handler) -> None:
            request = handler.stub.requests[-1]
            sent = json.dumps(request.body)
            videos = sent.count('"type": "video_url"')
            if request.path.endswith("/explain"):
                stub.failure(404, "not_found")(handler)
            elif videos > 1:
                assert not told
                stub.failure(400, "too_many_items")(handler)
            else:
                shown.append((sent.count('"type": "image_url"'), videos))
                stub.completion("yes")(handler)

        with stub.running(step) as server:
            server.models[0] |= limits
            with Client(server.url, "", "stub-model", upload_above=None) as client:
                conversation = Conversation(client, overflow=policy, keep_last=4, max_tokens=9)
                conversation.ask("a picture", images=picture(1))
                for _ in range(3):
                    conversation.ask("a film", videos=FILM)
                    assert shown[-1][1] == 1
        if policy != "drop_oldest_turns":
            assert shown[-1] == (1, 1)
            assert {event.kind for event in conversation.events} == {"dropped_videos"}
            assert [event.videos for event in conversation.events] == [1, 1]
            assert wordings()["en"].removed_video in json.dumps(conversation.messages)

    def test_a_turn_is_summed_up_without_the_video_that_a_summary_cannot_take(self) -> None:
        """As one with a picture is: what was said beside it is kept."""

        def step(handler: stub.Handler) -> None:
            request = handler.stub.requests[-1]
            sent = json.dumps(request.body)
            if request.path.endswith("/explain"):
                stub.failure(404, "not_found")(handler)
            elif "answers for ever" in sent and len(sent) > 1500:
                stub.failure(400, "context_length_exceeded")(handler)
            elif wordings()["en"].instruction in sent and "video_url" in sent:
                stub.failure(400, "too_many_items")(handler)
            else:
                stub.completion("yes")(handler)

        with stub.running(step) as server, Client(server.url, "", "stub-model") as client:
            conversation = Conversation(client, overflow="summarise", keep_last=1, max_tokens=9)
            conversation.ask("fact 0", videos=FILM)
            conversation.ask("fact 1", videos=FILM, images=picture(1))
            conversation.ask("fact 2")
            conversation.ask("answers for ever " + "word " * 200)
        (event,) = conversation.events
        assert (event.kind, event.turns, event.lost) == ("summarised", 2, 0)
        summed = [
            json.dumps(one.body) for one in server.requests
            if wordings()["en"].instruction in json.dumps(one.body)
        ]  # fmt: skip
        for number in range(2):
            assert any(f"fact {number}" in one and "video_url" not in one for one in summed)


class TestCalls:
    def test_short_turns_are_counted_without_asking(self) -> None:
        """What the server told of the last answer, and what the next can take at most."""
        with talking(4096) as (client, server, _):
            conversation = Conversation(client, overflow="summarise", max_tokens=100)
            for number in range(20):
                conversation.ask(f"question {number}")
            assert requests_to(server, EXPLAIN) == 0
            assert requests_to(server, CHAT) == 20
            assert requests_to(server, "/v1/models") == 1

    @pytest.mark.parametrize("policy", POLICIES)
    def test_one_explanation_a_turn_at_most(self, policy: Any) -> None:
        """Forty turns, some with pictures, are made to fit, and no request is answered with 400."""
        with talking(400) as (client, server, _):
            conversation = Conversation(
                client, overflow=policy, max_tokens=20, summary_max_tokens=20
            )
            for number in range(40):
                before = requests_to(server, EXPLAIN)
                conversation.ask(
                    f"question {number} of a few words",
                    images=picture(number) if number % 5 == 0 else None,
                )
                assert requests_to(server, EXPLAIN) - before <= 1
            assert requests_to(server, EXPLAIN, 400) == 0
            assert requests_to(server, CHAT, 400) == 0
            assert conversation.events

    def test_nothing_is_asked_for_with_the_policy_error(self) -> None:
        """The default: no list of models, no explanation; the server's refusal comes through."""
        with talking(60) as (client, server, _):
            conversation = Conversation(client, max_tokens=9)
            conversation.ask("hello")
            with pytest.raises(BadRequestError) as caught:
                conversation.ask("word " * 60)
            assert caught.value.code == "context_length_exceeded"
            assert requests_to(server, EXPLAIN) == requests_to(server, "/v1/models") == 0

    @pytest.mark.parametrize(("told", "refusals"), [(1900, 0), (1000, 1)])
    def test_a_server_that_explains_nothing_is_adapted_to(self, told: int, refusals: int) -> None:
        """Known is its window alone; what it refuses is made shorter until it does not."""
        refusal = stub.failure(400, "context_length_exceeded")
        usage = {"prompt_tokens": told, "completion_tokens": 20}
        script = [stub.completion("yes", usage=usage), *[refusal] * refusals]
        script += [stub.failure(404, "not_found"), stub.completion("shorter")]
        with stub.running(*script) as server, Client(server.url, "", "stub-model") as client:
            conversation = Conversation(client, overflow="drop_oldest_turns", max_tokens=20)
            conversation.ask("one")
            assert conversation.ask("two " * 50).text == "shorter"
        assert [event.kind for event in conversation.events] == ["dropped_turns"]
        sent = [turn["content"] for turn in server.requests[-1].body["messages"]]
        assert "one" not in sent

    @pytest.mark.parametrize("models", [None, [], [{"id": "other", "max_model_len": 9}]])
    def test_a_server_without_a_list_of_models_is_only_asked(
        self, models: list[dict[str, Any]] | None
    ) -> None:
        """Without a list (404), or one without the model, no window is known: no explanation."""
        with stub.running(stub.completion("yes")) as server, Client(server.url, "", "m") as client:
            server.models = models
            conversation = Conversation(client, overflow="summarise")
            assert conversation.ask("one").text == "yes"
            assert conversation.ask("two").text == "yes"
        paths = [request.path for request in server.requests if request.method == "POST"]
        assert paths == [CHAT] * 2

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"overflow": "shrink"}, "summarise"),
            ({"keep_last": -1}, "keep_last"),
            ({"summary_max_tokens": 0}, "summary_max_tokens"),
            ({"summary_prompt": 7}, "summary_prompt=7 must be a text"),
            ({"system": ["a"]}, r"system=\['a'\] must be a text or None"),
            ({"model": "m"}, r"model= is no sampling field: give it to the client, Client\(model="),
            ({"timeout": 5}, "timeout= is no sampling field: give it to the client or with the"),
            ({"images": "a.jpg"}, "images= is no sampling field: give them with the question"),
            ({"image": "a.jpg"}, "use images="),
        ],
    )
    def test_options_that_make_no_sense_are_refused(
        self, options: dict[str, Any], words: str
    ) -> None:
        """At once and by name: the server's ``shrink``, -1 turns to keep, a summary of 0 tokens."""
        with pytest.raises(InvalidArgumentError, match=words):
            Conversation(Client("http://127.0.0.1:9"), **options)

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"max_tokens": "abc"}, "max_tokens='abc' must be a whole number of tokens"),
            ({"max_tokens": float("inf")}, "max_tokens=inf must be"),
            ({"max_completion_tokens": [1]}, r"max_completion_tokens=\[1\] must be"),
            ({"model": "m"}, "give it to the client"),
            ({"stream": True}, r"use stream\(\)"),
            ({"picture": "a.jpg"}, "use images="),
        ],
    )
    def test_a_question_with_fields_that_make_no_sense_is_refused(
        self, given: dict[str, Any], words: str
    ) -> None:
        """By name, and the conversation is as it was."""
        with talking() as (client, _, engine):
            conversation = Conversation(client, overflow="summarise")
            with pytest.raises(InvalidArgumentError, match=words):
                conversation.ask("x", **given)
            assert engine.requests == []
            assert len(conversation.messages) == 1


@awaited
async def test_the_asynchronous_conversation_is_the_same(tmp_path: Path) -> None:
    """The same turns make the same requests and the same events."""
    path = tmp_path / "a.json"

    def blocking(url: str) -> Conversation:
        with Client(url, "", "demo") as client:
            conversation = Conversation(client, overflow="summarise", max_tokens=20)
            for number in range(30):
                conversation.ask(f"question {number} x={number % 3}")
            return conversation

    with talking() as (_, server, engine):
        theirs = await asyncio.to_thread(blocking, f"{server.root}/v1")
        sent = [texts(request) for request in engine.requests]
        engine.requests.clear()
        async with AsyncClient(f"{server.root}/v1", "", "demo") as client:
            ours = AsyncConversation(client, overflow="summarise", max_tokens=20)
            for number in range(30):
                await ours.ask(f"question {number} x={number % 3}")
            assert ours.messages == theirs.messages
            assert ours.events == theirs.events != []
            assert [texts(request) for request in engine.requests] == sent
            ours.save(path)
            loaded = AsyncConversation.load(path, client)
            stream = await loaded.stream("and now?")
            assert "".join([text async for text in stream]) == loaded.messages[-1]["content"]


def test_the_language_is_that_of_what_was_said() -> None:
    """Chinese from a third of the letters on, else English; a picture's label has its number."""
    assert wording_for(["这是什么 picture"]) is wordings()["zh"]
    assert wording_for(["what is 这"]) is wordings()["en"]
    assert wording_for([]) is wordings()["en"]
    assert all(one.picture.format(number=3).count("3") == 1 for one in wordings().values())
