"""The client and the figures of ``bench.overload``; no server is timed."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import psutil
import pytest
from PIL import Image

from bench import overload, overload_client
from bench.overload_client import TOKENS, Outcome, ask, closed_loop, open_loop, pictures, text
from bench.overload_figures import Calm, Flood, Result, percentile, table
from bench.pauses import Pauses, watched
from tests.served import eventually

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
TOKEN = b'data: {"choices":[{"delta":{"content":"A"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":%d}}\n\n'
DONE = b"data: [DONE]\n\n"
WHOLE = [HEAD, ROLE, TOKEN * TOKENS, USAGE % TOKENS, DONE]
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\n{}"

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def answering(
    *pieces: bytes, pause: float = 0.0, written: list[float] | None = None
) -> AsyncIterator[int]:
    """A server that answers every request with these pieces, each ``written`` when, and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length: ")[2].split()[0])
        json.loads(await reader.readexactly(size))
        for piece in pieces:
            if written is not None:
                written.append(asyncio.get_running_loop().time())
            writer.write(piece)
            await asyncio.sleep(pause)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize(
    ("pieces", "end", "has_first"),
    [
        (WHOLE, "answered", True),
        ([HEAD, ROLE, TOKEN, USAGE % 1, DONE], "failed", True),
        ([HEAD, ROLE, TOKEN * TOKENS, USAGE % TOKENS], "failed", True),
        ([HEAD, ROLE, DONE], "failed", False),
        ([REFUSAL], "refused", False),
        ([REFUSAL.replace(b"503", b"429")], "refused", False),
        ([REFUSAL.replace(b"503", b"500")], "failed", False),
        ([], "failed", False),
    ],
)
def test_an_answer_is_whole_refused_or_failed(
    pieces: list[bytes], end: str, has_first: bool
) -> None:
    """Whole is a stream with all its tokens and its end; a chunk without text is no token."""

    async def run() -> None:
        async with answering(*pieces) as port:
            outcome = await ask(port, next(text("demo")))
        assert outcome.end == end
        assert (outcome.first is not None) == has_first
        assert (outcome.head is not None) == bool(pieces)

    asyncio.run(run())


def test_the_first_token_is_timed_not_the_first_byte() -> None:
    """It comes after the third piece was written, and the head before that."""

    async def run() -> None:
        written: list[float] = []
        async with answering(*WHOLE, pause=0.1, written=written) as port:
            outcome = await ask(port, next(text("demo")))
        assert outcome.head is not None
        assert outcome.first is not None
        assert outcome.began + outcome.head < written[2] <= outcome.began + outcome.first

    asyncio.run(run())


def test_a_client_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a first token in time it closes; a server that is not there fails at once."""
    monkeypatch.setattr(overload_client, "PATIENCE_SECONDS", 0.1)

    async def run() -> None:
        async with answering(HEAD, ROLE, *[b""] * 20, pause=0.1) as port:
            outcome = await ask(port, next(text("demo")))
            assert outcome.end == "gave up"
        assert (await ask(port, next(text("demo")))).end == "failed"

    asyncio.run(run())


def test_a_flood_does_not_wait_for_answers() -> None:
    """So many requests a second, however slow the answers; a closed loop waits for each."""

    async def run() -> None:
        async with answering(*WHOLE, pause=0.1) as port:
            begun = time.monotonic()
            flood = await open_loop(port, text("demo"), 100.0, 1.0)
            taken = time.monotonic() - begun
            calm = await closed_loop(port, text("demo"), 2, 1.0)
        assert 60 <= len(flood) <= 140
        assert {one.end for one in flood} == {"answered"}
        assert taken < len(flood) * 0.5 * 0.8, "one after another, half a second each"
        assert [len(outcomes) <= 3 for outcomes in calm] == [True, True], "half a second for each"

    asyncio.run(run())


def body_of(request: bytes) -> Any:
    head, _, body = request.partition(b"\r\n\r\n")
    assert b"Content-Length: %d" % len(body) in head
    return json.loads(body)


def test_every_request_is_another_one() -> None:
    """Texts and pictures differ, so that no cache answers; pictures are valid files."""
    for kind in (text, pictures):
        found = list(itertools.islice(kind("demo"), 130))
        assert len(set(found)) == 130
    urls = [
        body_of(one)["messages"][0]["content"][0]["image_url"]["url"]
        for one in itertools.islice(pictures("demo"), 70)
    ]
    files = [base64.b64decode(url.partition(",")[2], validate=True) for url in urls]
    assert len(set(files)) == 70
    for data in files[:3]:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            assert image.size == (280, 280)


CALM = Calm(0.01, 0.02, 50.0, 16)
FLOOD = Flood(
    offered=500, goodput=49, answered=2940, refused=27000, gave_up=0, failed=0, first_p50=0.03,
    first_p99=0.055, refusal_p50=0.002, refusal_p99=0.02, rss_before=2**28, rss_peak=2**29,
    rss_after=2**28, client_cpu=0.2, api_cpu=0.6, late_p99=0.002, after=0.015,
)  # fmt: skip
GOOD = Result("text", "ours", CALM, FLOOD)


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, []),
        ({"goodput": 40.0}, ["goodput"]),
        ({"first_p99": 0.07}, ["first token"]),
        ({"first_p99": None}, ["first token"]),
        ({"refusal_p99": 0.06}, ["refusal"]),
        ({"refusal_p99": None, "refused": 0}, []),
        ({"after": 0.2}, ["as before afterwards"]),
        ({"after": None}, ["as before afterwards"]),
        ({"failed": 1}, ["whole answers"]),
    ],
)
def test_the_goals_are_judged(change: dict[str, Any], missed: list[str]) -> None:
    """Each by its own figure; nobody refused is no fault."""
    assert replace(GOOD, flood=replace(FLOOD, **change)).missed() == missed


def test_the_table_has_a_column_for_each_result() -> None:
    """Ratios to the calm, milliseconds, and the goals; every line is as long as the first."""
    lines = table([replace(GOOD, server="stock"), GOOD]).splitlines()
    assert lines[0] == "|  | text, stock | text, ours | goal |"
    assert "| goodput / capacity | 0.98 | 0.98 | ≥ 0.95 |" in lines
    assert "| first token p99, flood / single | 2.8 | 2.8 | ≤ 3 |" in lines
    assert {line.count("|") for line in lines} == {5}


@pytest.mark.parametrize(
    ("count", "share", "wanted"), [(100, 0.99, 99), (100, 0.5, 50), (1, 0.99, 1), (3, 1.0, 3)]
)
def test_percentiles_are_values_that_were_measured(count: int, share: float, wanted: int) -> None:
    """The smallest that so many are not above."""
    assert percentile(list(range(count, 0, -1)), share) == wanted
    assert percentile([], share) is None


@pytest.mark.parametrize("given_", ["0", "-1", "soon"])
def test_an_unusable_time_is_refused(given_: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2, and the option is named."""
    with pytest.raises(SystemExit) as ended:
        overload.main(["--seconds", given_])
    assert ended.value.code == 2
    assert "--seconds" in capsys.readouterr().err


def test_what_a_pause_met_is_set_aside() -> None:
    """Times that overlap one, or what piles up behind it, do not count; others do."""
    pauses = Pauses([(10.0, 10.5), (20.0, 20.2)])
    taken = [
        Outcome("answered", 9.0, 12.0, first=0.5),
        Outcome("answered", 9.8, 12.0, first=0.3),
        Outcome("answered", 10.55, 12.0, first=0.02),
        Outcome("answered", 10.7, 12.0, late=0.3, first=0.02),
        Outcome("answered", 10.7, 12.0, first=0.03),
        Outcome("refused", 11.0, 12.0, head=0.01),
    ]
    assert overload.times(taken, pauses, lambda one: one.first) == [0.5, 0.03]
    assert pauses.within(10.25, 20.1) == pytest.approx(0.35)
    assert Pauses().within(0.0, 100.0) == 0


def test_a_rate_is_that_of_whole_answers() -> None:
    """Eight clients in step, 0.8 s for an answer, are ten a second whenever one stops looking.

    What is still under way at that time counts with the time that it takes; refused ones count
    with theirs, and a pause of the machine not at all.
    """
    for seconds in (2.0, 3.1, 8.0):
        count = math.ceil(seconds / 0.8)
        ends = [100.0 + 0.8 * number for number in range(1, count + 1)]
        loop = [[Outcome("answered", end - 0.8, end) for end in ends]] * 8
        assert overload.answer_rate(loop, 100.0, Pauses()) == pytest.approx(10.0)
        paused = Pauses([(100.0, 100.0 + (ends[-1] - 100.0) / 2)])
        assert overload.answer_rate(loop, 100.0, paused) == pytest.approx(20.0)
    refused = [[Outcome("answered", 100.0, 101.0), Outcome("refused", 101.1, 102.0)]]
    assert overload.answer_rate(refused, 100.0, Pauses()) == pytest.approx(0.5)


def test_pauses_are_seen() -> None:
    """A watcher that is stopped for a while, as all would be, tells when."""
    others = {*psutil.Process().children()}
    with watched() as pauses:
        children = {*psutil.Process().children()} - others
        for child in children:
            eventually(lambda child=child: child.num_ctx_switches().voluntary > 300)  # type: ignore[misc]
        begun = time.monotonic()
        for child in children:
            child.suspend()
        time.sleep(0.3)
        for child in children:
            child.resume()
        ended = time.monotonic()
        for child in children:
            slept = child.num_ctx_switches().voluntary + 3  # by then it has told
            eventually(lambda child=child, slept=slept: child.num_ctx_switches().voluntary > slept)  # type: ignore[misc]
    assert pauses.within(begun - 0.1, ended + 0.1) >= 0.25
