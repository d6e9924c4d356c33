"""What ``bench.fleet`` measures at a fleet: a scripted one on loopback; no time is judged."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench import fleet
from bench.fleet_client import Answer, Client, Known
from bench.fleet_measure import measured
from bench.fleet_model import WARM, Outcome, Service
from bench.fleet_replay import ENOUGH, Figures, Predicted, Recorded, Replay, together
from qwen2vl_serve.fleet.affinity import content_key, order
from qwen2vl_serve.fleet.asking import REPLICA_HEADER

SECONDS = 0.005
"""Of every answer of the scripted fleet."""

RECORDED = Path(__file__).parents[1] / "bench" / "recorded" / "fleet"
"""Folders of files of ``replay --json``: runs of one fleet, each after a ``measure`` of its own."""

README = Path(__file__).parents[1] / "bench" / "README.md"


class ScriptedFleet:
    """Replicas that know pictures and answer after ``SECONDS``; ``routing`` is the fleet's own.

    ``loads`` are the requests that each has, ``states`` all numbers of them that there were,
    largest first. With ``short`` an answer has one token fewer than was asked for.
    """

    def __init__(self, replicas: int, routing: str = "affinity", *, short: bool = False) -> None:
        self.loads = {f"replica-{number}": 0 for number in range(replicas)}
        self.routing = routing
        self.short = short
        self.bodies: list[dict[str, Any]] = []
        self.states: set[tuple[int, ...]] = set()
        self.looked = Counter[tuple[str, str]]()
        self._known: set[tuple[str, str]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if head.startswith(b"get /metrics"):
            page = "".join(
                f'qwen2vl_cache_{what}_total{{replica="{name}",cache="known"}} {number}.0\n'
                for (name, what), number in self.looked.items()
            ).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n" % len(page))
            writer.write(b"connection: close\r\n\r\n" + page)
        else:
            body = await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0]))
            await self._answer(body, writer)
        writer.close()

    async def _answer(self, body: bytes, writer: asyncio.StreamWriter) -> None:
        asked = json.loads(body)
        self.bodies.append(asked)
        key = content_key(body)
        preferred = order(key, self.loads)
        name = preferred[0] if self.routing == "affinity" else random.choice(preferred)
        self.looked[name, "hits" if (name, key) in self._known else "misses"] += 1
        self._known.add((name, key))
        self.loads[name] += 1
        self.states.add(tuple(sorted(self.loads.values(), reverse=True)))
        await asyncio.sleep(SECONDS)
        self.loads[name] -= 1
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
        writer.write(b"%b: %b\r\nconnection: close\r\n\r\n" % (REPLICA_HEADER, name.encode()))
        tokens = asked["max_tokens"] - self.short
        for _ in range(tokens):
            writer.write(b'data: {"choices":[{"delta":{"content":"A"}}]}\n\n')
        writer.write(b'data: {"choices":[],"usage":{"completion_tokens":%d}}\n\n' % tokens)
        writer.write(b"data: [DONE]\n\n")


@contextmanager
def running(scripted: ScriptedFleet) -> Iterator[str]:
    """Serve in a thread; yield the port, as a word of the command."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(scripted.serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield str(server.sockets[0].getsockname()[1])
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def measure(port: str, path: Path, *words: str) -> int:
    return fleet.main(
        ["measure", port, "--requests", "24", "--tokens", "3", "--json", str(path), *words]
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the command writes, in folders that it makes."""
    return tmp_path / "of" / "today" / "kept.json"


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line in which the command says what is wrong."""
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("fleet: ")


def test_measure_keeps_replicas_as_busy_as_it_says(path: Path) -> None:
    """One, then two answers at one replica, then at both, and two beside one; nothing else."""
    scripted = ScriptedFleet(2)
    with running(scripted) as port:
        assert measure(port, path, "--replicas", "2", "--places", "2", "--each", "4") == 0
    assert {(1, 0), (2, 0), (1, 1), (2, 2), (2, 1)} == scripted.states
    assert {body["max_tokens"] for body in scripted.bodies} == {3}
    assert all(body["ignore_eos"] and body["stream"] for body in scripted.bodies)
    kept = json.loads(path.read_text())
    assert kept["conditions"]["tokens"] == 3
    assert kept["conditions"]["replicas"] == 2
    service = Service(**kept["service"])
    service.require()
    assert (len(service.hit), len(service.miss), service.places, service.together) == (24, 24, 2, 2)


class Law(Client):
    """A fleet without sockets, whose answers take what a law says of those that are given."""

    def __init__(self, replicas: int) -> None:
        super().__init__(0, "demo")
        self.replicas = replicas
        self.known: set[bytes] = set()

    def new(self, number: int) -> list[bytes]:
        return [b"%d" % next(self._numbers) for _ in range(number)]

    async def ask(self, request: bytes) -> Answer:
        seconds = 1.0 if request in self.known else 1.5
        self.known.add(request)
        return Answer(seconds, str(int(request) % self.replicas))

    async def busy(self, clients: Sequence[Known], each: int) -> list[list[float]]:
        at = Counter(one.replica for one in clients)
        total, busy = len(clients), len(at)
        beside = 1.0 if busy == 1 else {2: 1.2, 3: 1.8}[busy] + 0.5 * (total / busy - 1)
        return [[(1 + 0.25 * (at[one.replica] - 1)) * beside] * each for one in clients]


def test_measure_finds_the_law() -> None:
    """Both tables, as they were made, and what the model expects where replicas differ."""
    found, conditions = asyncio.run(
        measured(Law(3), requests=12, replicas=3, places=3, each=2, cached=9)
    )
    assert (found.hit, found.miss, found.cached) == ([1.0] * 12, [1.5] * 12, 9)
    assert found.crowd == pytest.approx([1.0, 1.25, 1.5])
    assert [*found.neighbours[0]] == pytest.approx([1.2, 1.7, 2.2])
    assert [*found.neighbours[1]] == pytest.approx([1.8, 2.3, 2.8])
    assert conditions["capacity"] == pytest.approx(9 / (1.5 * 2.8))
    beside = 1.8 + 0.5 * 2 / 3
    assert conditions["lopsided"] == pytest.approx([1.5 * beside, beside, beside])
    assert conditions["lopsided_predicted"] == pytest.approx(conditions["lopsided"])


def test_what_is_faster_by_chance_slows_nothing() -> None:
    """A crowd that looks faster than one alone, or than without neighbours, is as fast."""

    class Eager(Law):
        async def busy(self, clients: Sequence[Known], each: int) -> list[list[float]]:
            return [[1 - len(clients) / 100] * each for _ in clients]

    found, _ = asyncio.run(measured(Eager(2), requests=4, replicas=2, places=2, each=2, cached=9))
    assert (found.crowd, found.neighbours) == ([1.0, 1.0], [[1.0, 1.0]])


def test_a_fleet_that_does_not_keep_pictures_in_one_place_is_not_measured(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random routing: which replica is busy cannot be chosen from outside."""
    with running(ScriptedFleet(2, "random")) as port:
        assert measure(port, path, "--replicas", "2") == 1
    assert told(capsys) == "two replicas were asked about one picture: routing must be affinity"
    assert not path.exists()


def test_more_places_than_the_fleet_leaves_at_a_replica_are_not_measured(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fifth goes to the other one, as the affinity's bound has it."""
    with running(ScriptedFleet(2)) as port:
        assert measure(port, path, "--replicas", "2", "--places", "5") == 1
    assert "came from another replica than before" in (line := told(capsys))
    assert line.endswith("with args.at_ease of at least --places")


@pytest.mark.parametrize("replicas", [1, 3])
def test_a_fleet_of_another_size_is_not_measured(
    replicas: int, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There are two."""
    with running(ScriptedFleet(2)) as port:
        assert measure(port, path, "--replicas", str(replicas)) == 1
    assert told(capsys).startswith(f"2 replicas answered, --replicas is {replicas} ")


def test_an_answer_that_is_not_whole_is_no_time(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has a token fewer than was asked for."""
    with running(ScriptedFleet(1, short=True)) as port:
        assert measure(port, path) == 1
    assert told(capsys).startswith("a request was not answered in full: ")


def test_no_two_runs_have_a_picture_in_common() -> None:
    """Nor two requests of one: a fleet that was measured before does not know it."""
    first, second = Client(1, "demo"), Client(1, "demo")
    assert len({*first.new(3), *second.new(3), *first.new(3)}) == 9


def test_replay_tells_what_it_found_beside_what_was_predicted_and_keeps_it(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same requests at the scripted fleet and in the model, kept to be simulated again."""
    service = Service([SECONDS], [SECONDS], [1.0] * 4, 100, [[1.0] * 4])
    before = {"conditions": {"tokens": 3}, "service": dataclasses.asdict(service)}
    times = tmp_path / "service.json"
    times.write_text(json.dumps(before))
    scripted = ScriptedFleet(2)
    words = ["--service", str(times), "--tokens", "3", "--replicas", "2", "--json", str(path)]
    with running(scripted) as port:
        code = fleet.main(
            ["replay", port, *words, "--rate", "40", "--pause", "1", "--seconds", "3"]
        )
    assert code == 0
    kept = json.loads(path.read_text())
    run = Replay(**kept["replay"])
    assert run == Replay(2, "affinity", 40.0, 3.0, 1.0, 3.0, 1)
    requests = run.requests()
    assert len(scripted.bodies) == len(requests)
    assert Counter(Counter(str(body["messages"]) for body in scripted.bodies).values()) == Counter(
        Counter(request.key for request in requests).values()
    )
    assert kept["measured_before"] == before

    predicted = Predicted.by(run.simulated(service))
    assert predicted.least.hit_rate <= predicted.mean.hit_rate <= predicted.most.hit_rate

    found, answers = kept["measured"], sum(one.at >= requests[-1].at * WARM for one in requests)
    assert found["answers"] == len(found["seconds"]) == answers
    assert min(found["seconds"]) >= SECONDS
    assert found["hit_rate"] == pytest.approx(predicted.mean.hit_rate, abs=0.1)
    assert sum(kept["conditions"]["answers_by_replica"]) == answers
    assert kept["conditions"]["client_cpu"] > 0
    assert kept["conditions"]["late_p99"] >= 0

    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 2 ")]
    assert [line.split(" | ")[-1].rstrip(" |") for line in rows] == [
        "predicted, mean of 20 simulations",
        "the least and the most of them",
        f"measured, {answers} answers (of fewer than 500 the p99 is chance)",
    ]


def test_figures_are_means_over_the_simulations() -> None:
    """And their extremes, and the most crowded replica of any."""
    found = Predicted.by([Outcome("", 2, [1.0], 1, 3), Outcome("", 2, [1.0, 3.0], 1, 2)])
    assert found.mean == Figures(0.75, 1.0, 2.0)
    assert (found.least, found.most) == (Figures(0.5, 1.0, 1.0), Figures(1.0, 1.0, 3.0))
    assert found.crowded == 3


fleets = sorted(path for path in RECORDED.iterdir() if path.is_dir())

HIT_RATE, P50, P99 = 0.03, 0.15, 0.30
"""How far a prediction may be from what was measured: absolute, and shares of what was measured."""


def test_fleets_of_two_and_of_three_replicas_are_recorded() -> None:
    """Without them nothing says that the model is right."""
    assert {path.name for path in fleets} >= {"2-affinity", "3-affinity"}


@pytest.mark.parametrize("folder", fleets, ids=lambda folder: folder.name)
def test_the_model_agrees_with_a_fleet_that_ran(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Simulated again with the times measured before each run, and the conversations that it had.

    The table of bench/README has what ``recorded`` prints of them.
    """
    files = sorted(folder.iterdir())
    contents = [json.loads(file.read_text()) for file in files]
    for kept in contents:
        assert kept["measured_before"]["conditions"]["tokens"] == kept["conditions"]["tokens"]
    runs = [Recorded.of(kept) for kept in contents]
    assert len({str(one.run) for one in runs}) == len(runs)
    assert {f"{one.run.replicas}-{one.run.routing}" for one in runs} == {folder.name}
    told, outcome = together(runs)
    assert len(outcome.seconds) >= ENOUGH
    predicted, found = told.mean, Figures.of(outcome)
    assert predicted.hit_rate == pytest.approx(found.hit_rate, abs=HIT_RATE)
    assert predicted.p50 == pytest.approx(found.p50, rel=P50)
    assert predicted.p99 == pytest.approx(found.p99, rel=P99)

    fleet.beside(runs[0].run.replicas, runs[0].run.routing, told, outcome)
    first, _, last = capsys.readouterr().out.splitlines()[2:]
    (of, *before), (_, *after) = (line.split(" | ")[1:5] for line in (first, last))
    pairs = (f"{one}, {other}" for one, other in zip(before, after, strict=True))
    size = folder.name.partition("-")[0]
    assert f"| {size} | {of} | {' | '.join(pairs)} |" in README.read_text("utf-8")


def test_runs_of_several_fleets_are_not_told_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 2 names them, and so does a file that is none; those of one are told together."""
    service = dataclasses.asdict(Service([SECONDS], [SECONDS], [1.0] * 4, 100, [[1.0] * 4]))
    files = []
    for routing in ("affinity", "random"):
        run = dataclasses.asdict(Replay(2, routing, 4.0, 3.0, 1.0, 3.0, 1))
        measured = {"hit_rate": 0.5, "seconds": [1.0, 2.0]}
        kept = {"replay": run, "measured_before": {"service": service}, "measured": measured}
        files.append(tmp_path / f"{routing}.json")
        files[-1].write_text(json.dumps(kept))
    for given, said in (
        (files, "must all be of one fleet, are 2 by affinity, 2 by random"),
        ([tmp_path / "none.json"], "must be a file that replay wrote, is "),
    ):
        with pytest.raises(SystemExit, match="2"):
            fleet.main(["recorded", *map(str, given)])
        assert f"argument RUN: {said}" in capsys.readouterr().err
    assert fleet.main(["recorded", str(files[0]), str(files[0])]) == 0
    assert "| 0.500 | 1.00 | 2.00 | – | measured, 4 answers (" in capsys.readouterr().out
