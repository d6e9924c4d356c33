"""Several engines behind one: which answers what, what a loss costs, what a newcomer is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.engine import Adapter, EngineState, Medium, ServedModel, Usage
from qwen2vl_serve.engines import Engines, member, several_engines
from qwen2vl_serve.engines.content import Content, content_of
from qwen2vl_serve.engines.router import LEAST_TOKENS, OVERHANG, Router
from qwen2vl_serve.errors import EngineUnavailable, InvalidValue, ModelNotFound, Overloaded
from qwen2vl_serve.launch.serve import _changes
from qwen2vl_serve.profile import load_profile
from qwen2vl_serve.protocol.chat import ChatRequest
from tests.fake_engine import FakeEngine
from tests.served import served

LONG = "a question of more than sixty-four letters, which is more than a block of sixteen tokens"


class Shown:
    """A picture that is known by its key alone."""

    param = "messages[0]"
    size = (28, 28)

    def __init__(self, key: str, visual_tokens: int = 64) -> None:
        self.key, self.visual_tokens = key, visual_tokens

    def pixels(self) -> Any:
        raise AssertionError("nobody is to look at it")


def chat(*turns: str, system: str = "", pictures: int = 0, **fields: Any) -> ChatRequest:
    """Return a request of user's and assistant's turns in alternation."""
    roles = ("user", "assistant")
    messages: list[dict[str, Any]] = [
        {"role": roles[place % 2], "content": text} for place, text in enumerate(turns)
    ]
    if pictures:
        url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        text = {"type": "text", "text": turns[0]}
        messages[0] = {"role": "user", "content": [*[url] * pictures, text]}
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return ChatRequest.model_validate({"messages": messages, **fields})


def test_a_conversation_holds_its_earlier_turns() -> None:
    """Each turn of a user's is a key, the same one in all later requests of that conversation."""
    first = content_of(chat("one", system="be kind"), [])
    later = content_of(chat("one", "an answer", "two", system="be kind"), [])
    assert len(first.turns) == 1
    assert later.turns[0] == first.turns[0]
    assert later.turns[1][1] >= later.turns[0][1]


@pytest.mark.parametrize(
    "other",
    [
        chat("one", system="be rude"),
        chat("other", system="be kind"),
        chat("one", system="be kind", model="adapter"),
        chat("one", "two", "three", system="be kind"),
    ],
)
def test_other_content_has_other_keys(other: ChatRequest) -> None:
    """A system prompt, a text, a model's name and the turns so far all make a difference."""
    here = chat("one", "an answer", "three", system="be kind")
    last = content_of(here, []).turns[-1]
    assert last not in content_of(other, []).turns


def test_texts_do_not_run_into_each_other() -> None:
    """What stands in two parts is not what stands in one."""
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}]
    others = [{"type": "text", "text": "a"}, {"type": "text", "text": "bc"}]
    keys = {
        content_of(
            ChatRequest.model_validate({"messages": [{"role": "user", "content": one}]}), []
        ).turns[0][0]
        for one in (parts, others)
    }
    assert len(keys) == 2


def test_pictures_are_known_by_their_content() -> None:
    """Another picture at the same address is another turn; tokens of pictures count."""
    asked = chat("what is it?", pictures=1)
    red, blue = (content_of(asked, [Shown(key)]) for key in ("red", "blue"))
    assert red.turns[0][0] != blue.turns[0][0]
    assert red.turns[0][1] >= 64
    assert red.media == ((b"red", 64),)


def made(*keys: int, media: Sequence[int] = ()) -> Content:
    """Return the content of a conversation of these turns, of a hundred tokens each."""
    turns = tuple((b"%d" % key, 100 * (place + 1)) for place, key in enumerate(keys))
    return Content(turns, tuple((b"m%d" % key, 64) for key in media))


Asked = tuple[list[int], int, bool]
asked_for = st.tuples(
    st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(1, 4), st.booleans()
)


@given(st.lists(asked_for, max_size=60), st.integers(1, 4), st.randoms(use_true_random=False))
def test_no_engine_is_given_more_than_its_share_and_a_half(
    requests: list[Asked], engines: int, chance: Any
) -> None:
    """Whatever is known where, whatever ends when: the bound holds at each choice."""
    router, under_way = Router(engines, remembered=8), []
    for keys, answers, ends in requests:
        if ends and under_way:
            under_way.pop(chance.randrange(len(under_way))).__exit__(None, None, None)
        loads = list(router._answers)
        among = sorted(chance.sample(range(engines), chance.randint(1, engines)))
        chosen = router.choose(made(*keys), answers, among)
        assert chosen in among
        share = (sum(loads[one] for one in among) + answers) / len(among)
        assert loads[chosen] < OVERHANG * share + 1
        work = router.under_way(chosen, answers)
        work.__enter__()
        under_way.append(work)
        assert len(router._known[chosen]) <= 8
    for work in under_way:
        work.__exit__(None, None, None)
    assert router._answers == [0] * engines


def test_requests_that_nobody_knows_are_spread_evenly() -> None:
    """One after another they go round; at once they go where least is under way."""
    router = Router(3)
    assert sorted(router.choose(made(key), 1, (0, 1, 2)) for key in range(6)) == [0, 0, 1, 1, 2, 2]
    with router.under_way(0, 2), router.under_way(1, 1):
        assert router.choose(made(9), 1, (0, 1, 2)) == 2


def test_a_conversation_stays_where_it_began_until_that_engine_has_too_much() -> None:
    """Its engine may have half as much again as its share; then another takes it, and knows it."""
    router = Router(2)
    home = router.choose(made(1), 1, (0, 1))
    other = 1 - home
    assert [router.choose(made(1, 2), 1, (0, 1)) for _ in range(5)] == [home] * 5
    with router.under_way(home, 2):
        assert router.choose(made(1, 2), 1, (0, 1)) == home
    with router.under_way(home, 3):
        assert router.choose(made(1, 2, 3), 1, (0, 1)) == other
    with router.under_way(home, 1):
        assert router.choose(made(1, 2, 3, 4), 1, (0, 1)) == other
    assert router.choose(made(1, 2), 1, (home,)) == home


def test_a_picture_leads_another_question_to_its_engine() -> None:
    """As far as its own turn is not better known elsewhere."""
    router = Router(2)
    first = router.choose(made(1, media=[7]), 1, (0, 1))
    second = router.choose(made(2), 1, (0, 1))
    assert (first, second) == (0, 1)
    assert router.choose(made(3, media=[7]), 1, (0, 1)) == first
    assert router.choose(made(2, 4, media=[7]), 1, (0, 1)) == second


def test_what_is_shorter_than_a_block_leads_nowhere() -> None:
    """Everybody begins with Hello; nothing is cached of that."""
    router = Router(2)
    hello = Content(((b"hello", LEAST_TOKENS - 1),), ())
    assert [router.choose(hello, 1, (0, 1)) for _ in range(4)] == [0, 1, 0, 1]


def test_a_new_engine_knows_nothing() -> None:
    """The caches of the one before are gone with it."""
    router = Router(2)
    home = router.choose(made(1), 1, (0, 1))
    assert router.known(home, made(1)) == 100
    router.forget(home)
    assert router.known(home, made(1)) == 0


class Crowd:
    """Scripted engines to be started; ``made`` are those of each place, the present one last."""

    def __init__(self, count: int = 2, **fields: Any) -> None:
        self.made: list[list[FakeEngine]] = [[] for _ in range(count)]
        self.fields = fields
        self.refused = 0
        self.starting: list[int] = []
        self.ended: list[int] = []

    @asynccontextmanager
    async def start(self, index: int) -> AsyncIterator[FakeEngine]:
        self.starting.append(index)
        if self.refused:
            self.refused -= 1
            raise RuntimeError("no memory yet")
        engine = Adaptable(**self.fields)
        self.made[index].append(engine)
        try:
            yield engine
        finally:
            engine.dead = True
            self.ended.append(index)

    def __getitem__(self, index: int) -> FakeEngine:
        return self.made[index][-1]

    @property
    def asked(self) -> list[int]:
        """How many requests each place's present engine was given."""
        return [len(engines[-1].requests) for engines in self.made]

    def run(
        self,
        test: Callable[[Engines], Awaitable[None]],
        *,
        hang_seconds: float = 60,
        **options: Any,
    ) -> None:
        async def main() -> None:
            starts = [partial(self.start, index) for index in range(len(self.made))]
            options.setdefault("replace_hung", True)
            options.setdefault("probe_seconds", 0)
            async with several_engines(starts, hang_seconds=hang_seconds, **options) as engines:
                await test(engines)

        asyncio.run(main())


class Adaptable(FakeEngine):
    """Refuses adapters whose folder says so."""

    async def load_adapter(self, name: str, adapter: Adapter) -> ServedModel:
        if self.dead:
            raise EngineUnavailable("The engine has stopped.")
        if adapter.folder.name in self.words:
            raise InvalidValue("no such layer", param="lora_path")
        return await super().load_adapter(name, adapter)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost engines start anew without a pause."""
    monkeypatch.setattr(member, "FIRST_PAUSE", 0.02)


async def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def answered(engines: Engines, request: ChatRequest, media: Sequence[Medium] = ()) -> str:
    body = json.loads(await engines.complete(request, media, "id", Usage()))
    return str(body["choices"][0]["message"]["content"])


async def streamed(engines: Engines, request: ChatRequest) -> list[str]:
    async with aclosing(engines.stream(request, (), "id", Usage())) as chunks:
        return [chunk async for chunk in chunks]


def test_the_first_engine_starts_alone_and_all_are_stopped() -> None:
    """The others start together once it is up."""
    crowd = Crowd(3)

    async def test(engines: Engines) -> None:
        assert crowd.starting[0] == 0
        assert sorted(crowd.starting) == [0, 1, 2]
        assert engines.states == ["serving"] * 3

    crowd.run(test)
    assert sorted(crowd.ended) == [0, 1, 2]


def test_a_start_that_fails_leaves_none_behind() -> None:
    """What one of them raises passes unchanged, and the others are ended."""
    crowd = Crowd(3)

    @asynccontextmanager
    async def fails(index: int) -> AsyncIterator[FakeEngine]:
        if index == 1:
            raise RuntimeError("out of memory")
        async with crowd.start(index) as engine:
            yield engine

    async def main() -> None:
        starts = [partial(fails, index) for index in range(3)]
        async with several_engines(starts, hang_seconds=0, probe_seconds=0, replace_hung=True):
            raise AssertionError("it must not start")

    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(main())
    assert 0 in crowd.ended
    assert len(crowd.ended) == sum(map(len, crowd.made))


def test_answers_come_from_all_engines_and_a_conversation_from_one() -> None:
    """New conversations go round, streamed or not; their later turns follow them."""
    crowd = Crowd()

    async def test(engines: Engines) -> None:
        for number in range(4):
            assert await answered(engines, chat(f"{number} {LONG}")) == "A red circle."
        assert crowd.asked == [2, 2]
        for _ in range(3):
            assert len(await streamed(engines, chat(f"0 {LONG}", "yes", "and then?"))) == 3
        assert sorted(crowd.asked) == [2, 5]

    crowd.run(test)


@pytest.mark.parametrize("killed", [0, 1])
def test_what_has_not_begun_goes_to_another_engine(killed: int) -> None:
    """An engine that dies before its first word loses no request, whole (0) or streamed (1)."""
    crowd = Crowd(pause=0.1)

    async def test(engines: Engines) -> None:
        whole = asyncio.create_task(answered(engines, chat("one")))
        await until(lambda: crowd[0].running == 1)
        stream = asyncio.create_task(streamed(engines, chat("two")))
        await until(lambda: crowd[1].running == 1)
        crowd[killed].dead = True
        assert await whole == "A red circle."
        assert len(await stream) == 3
        assert len(crowd.made[1 - killed][0].requests) == 2

    crowd.run(test)


def test_an_answer_that_has_begun_ends_with_its_engine() -> None:
    """It is not begun again by another, as the client has read its beginning."""
    crowd = Crowd(pause=0.02)

    async def test(engines: Engines) -> None:
        chunks = engines.stream(chat("one"), (), "id", Usage())
        await anext(chunks)
        (here,) = [engine for (engine,) in crowd.made if engine.running]
        here.dead = True
        with pytest.raises(EngineUnavailable, match="ask again, another serves"):
            await anext(chunks)
        assert sum(crowd.asked) == 1

    crowd.run(test)


def test_an_engines_own_refusal_is_passed_on() -> None:
    """A full queue is an ``EngineUnavailable`` as well, and no reason to leave the engine."""
    crowd = Crowd(failure=Overloaded("full"))

    async def test(engines: Engines) -> None:
        with pytest.raises(Overloaded):
            await answered(engines, chat("one"))
        with pytest.raises(Overloaded):
            await streamed(engines, chat("two"))
        assert engines.states == ["serving", "serving"]
        assert crowd.asked == [1, 1]

    crowd.run(test)


def test_a_lost_engine_is_started_anew_while_the_other_serves() -> None:
    """Noticed by ``check``; starts that fail are tried again; then it takes requests."""
    crowd = Crowd()

    async def test(engines: Engines) -> None:
        crowd.refused = 2
        crowd[1].dead = True
        await engines.check()
        assert engines.states == ["serving", "starting"]
        for number in range(3):
            await answered(engines, chat(f"{number} {LONG}"))
        assert len(crowd[0].requests) == 3
        await until(lambda: engines.states == ["serving", "serving"])
        assert len(crowd.made[1]) == 2
        assert crowd.starting == [0, 1, 1, 1, 1]
        assert crowd.ended == [1]
        await answered(engines, chat("new"))
        assert len(crowd[1].requests) == 1

    crowd.run(test)


def test_a_lost_engine_is_taken_away_though_the_server_ends_meanwhile() -> None:
    """Its processes may take seconds to go, and the server does not leave them behind."""
    crowd = Crowd()
    going, gone = asyncio.Event(), []

    @asynccontextmanager
    async def slow_to_end(index: int) -> AsyncIterator[FakeEngine]:
        async with crowd.start(index) as engine:
            try:
                yield engine
            finally:
                going.set()
                await asyncio.sleep(0.1)
                gone.append(index)

    async def main() -> None:
        starts = [partial(slow_to_end, index) for index in range(2)]
        options = {"hang_seconds": 60, "probe_seconds": 0, "replace_hung": True}
        async with several_engines(starts, **options) as engines:
            crowd[1].dead = True
            await engines.check()
            await going.wait()

    asyncio.run(main())
    assert sorted(gone) == [0, 1]


def test_with_the_last_engine_everything_ends() -> None:
    """``check`` says so at once, though others are being started."""
    crowd = Crowd()

    async def test(engines: Engines) -> None:
        crowd.refused = 1_000
        for index in (0, 1):
            await engines.check()
            crowd[index].dead = True
        with pytest.raises(EngineUnavailable, match="None of the 2 engines"):
            await engines.check()
        with pytest.raises(EngineUnavailable):
            await answered(engines, chat("one"))
        with pytest.raises(EngineUnavailable):
            await engines.probe()
        assert engines.version == "fake 1"
        assert engines.count_tokens(chat("one two")) == 2

    crowd.run(test)


def test_one_that_hangs_is_replaced_and_its_requests_go_on() -> None:
    """It counts as lost after ``hang_seconds``; nothing else stops for it."""
    crowd = Crowd()

    async def test(engines: Engines) -> None:
        crowd[0].hung = True
        waiting = asyncio.create_task(answered(engines, chat("one")))
        await until(lambda: crowd[0].running == 1)
        assert engines.pending == 0, "not all of them have work"
        await until_checked(engines, lambda: engines.states[0] == "starting")
        assert await waiting == "A red circle."
        await until(lambda: engines.states == ["serving", "serving"])
        assert len(crowd.made[0]) == 2

    crowd.run(test, hang_seconds=0.2)


def test_one_that_hangs_may_be_left_to_recover() -> None:
    """It gets no requests until it moves, and keeps those that it has."""
    crowd = Crowd()

    async def test(engines: Engines) -> None:
        crowd[0].hung = True
        waiting = asyncio.create_task(answered(engines, chat("one")))
        await until_checked(engines, lambda: engines.states == ["hung", "serving"])
        for number in range(2):
            await answered(engines, chat(f"{number}"))
        assert crowd.asked == [1, 2]
        crowd[0].hung = False
        assert await waiting == "A red circle."
        await until_checked(engines, lambda: engines.states == ["serving", "serving"])

    crowd.run(test, hang_seconds=0.2, replace_hung=False)


async def until_checked(engines: Engines, condition: Callable[[], bool]) -> None:
    """Wait as the launcher does, looking after the engines all the while."""
    async with asyncio.timeout(60):
        while not condition():
            await engines.check()
            await asyncio.sleep(0.02)


def test_each_idle_engine_is_probed_by_itself() -> None:
    """One that is never asked would be found dead by a client."""
    crowd = Crowd()

    async def test(engines: Engines) -> None:
        await until_checked(engines, lambda: crowd[0].probes > 0 and crowd[1].probes > 0)
        before = crowd[0].probes
        crowd[1].dead = True
        await engines.probe()
        assert crowd[0].probes > before

    crowd.run(test, probe_seconds=0.05)


ADAPTER = Adapter(Path("/adapters/ocr"), 8, None, 4, 0, "digest")


def test_an_adapter_is_loaded_everywhere_and_into_newcomers() -> None:
    """Models are everybody's; an engine that is started anew has what the others have."""
    crowd = Crowd()

    async def test(engines: Engines) -> None:
        model = await engines.load_adapter("ocr", ADAPTER)
        assert (model.id, model.parent) == ("ocr", "demo")
        assert [one.id for one in engines.models] == ["demo", "alias", "ocr"]
        assert all("ocr" in engine.adapters for (engine,) in crowd.made)
        crowd[0].dead = True
        await engines.check()
        await until(lambda: engines.states == ["serving", "serving"])
        assert "ocr" in crowd[0].adapters
        await engines.unload_adapter("ocr")
        assert not any(engines_[-1].adapters for engines_ in crowd.made)
        assert [one.id for one in engines.models] == ["demo", "alias"]
        with pytest.raises(ModelNotFound):
            await engines.unload_adapter("ocr")

    crowd.run(test)


def test_an_adapter_that_one_engine_lacks_is_taken_from_the_others() -> None:
    """As one that could not be put back where a load was undone."""
    crowd = Crowd()

    async def test(engines: Engines) -> None:
        await engines.load_adapter("ocr", ADAPTER)
        await crowd[0].unload_adapter("ocr")
        await engines.unload_adapter("ocr")
        assert not crowd[1].adapters

    crowd.run(test)


def test_an_adapter_that_one_engine_refuses_is_in_none() -> None:
    """What the name stood for before, it stands for again."""
    crowd = Crowd()

    async def test(engines: Engines) -> None:
        crowd[1].words = ["bad", "other"]
        with pytest.raises(InvalidValue):
            await engines.load_adapter("ocr", Adapter(Path("/bad"), 8, None, 4, 0, "x"))
        assert not crowd[0].adapters
        await engines.load_adapter("ocr", ADAPTER)
        with pytest.raises(InvalidValue):
            await engines.load_adapter("ocr", Adapter(Path("/other"), 8, None, 4, 0, "y"))
        assert crowd[0].adapters == crowd[1].adapters == {"ocr": ADAPTER}
        assert [one.id for one in engines.models] == ["demo", "alias", "ocr"]

    crowd.run(test)


def test_an_adapter_does_not_wait_for_an_engine_that_dies_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM leaves such a question without an answer for ever."""
    crowd = Crowd()
    monkeypatch.setattr(member, "_LOOK_SECONDS", 0.02)

    async def never(_name: str, _adapter: Adapter) -> ServedModel:
        await asyncio.sleep(3600)
        raise AssertionError

    async def test(engines: Engines) -> None:
        monkeypatch.setattr(crowd[0], "load_adapter", never)
        loading = asyncio.create_task(engines.load_adapter("ocr", ADAPTER))
        await asyncio.sleep(0.05)
        crowd[0].dead = True
        async with asyncio.timeout(60):
            assert (await loading).id == "ocr"
        await until(lambda: engines.states == ["serving", "serving"])
        assert "ocr" in crowd[0].adapters

    crowd.run(test)


def test_readiness_and_metrics_tell_of_each_engine(compiled: None) -> None:
    """Green while one serves, with what the others do; a single engine says what it always did."""

    class Two(FakeEngine):
        states: Sequence[EngineState] = ("serving", "starting")  # type: ignore[assignment]

    engine = Two()
    with served(load_profile("demo"), Keys(), engine) as server:
        ready = server.request("GET", "/health/ready")
        assert (ready.status_code, ready.json()) == (
            200,
            {"status": "degraded", "engines": ["serving", "starting"]},
        )
        text = server.request("GET", "/metrics").text
        assert 'qwen2vl_engines{state="serving"} 1.0' in text
        assert 'qwen2vl_engines{state="starting"} 1.0' in text
        assert 'qwen2vl_engines{state="hung"} 0.0' in text
        engine.states = ("serving", "serving")
        assert server.request("GET", "/health/ready").json()["status"] == "ready"
        engine.states = ("serving",)
        assert server.request("GET", "/health/ready").json() == {"status": "ready"}


def test_the_operator_is_told_of_losses_and_returns() -> None:
    """One line each, and nothing while nothing changes."""
    up: list[EngineState] = ["serving", "serving"]
    assert list(_changes(up, up)) == []
    assert list(_changes(up, ["serving", "starting"])) == [
        "error   engine 1 is lost and is started anew; 1 of 2 serve"
    ]
    assert list(_changes(["hung", "serving"], up)) == [
        "ready   engine 0 serves again; 2 of 2 serve"
    ]
    assert list(_changes(up, ["hung", "serving"])) == ["error   engine 0 hangs; 1 of 2 serve"]
