"""The simulated fleet against what is known of queues, and its traffic against its habits."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import socket
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import simpy
from hypothesis import given
from hypothesis import strategies as st

from bench import fleet
from bench.fleet_model import POLICIES, Loads, Machine, Service, Shared, fewest, simulate
from bench.fleet_traffic import Habits, Request, trace
from qwen2vl_serve.fleet.options import Routing

MEAN = 0.5
"""Seconds of an answer in the tests of formulae."""

SERVICE = {
    "hit": [0.1],
    "miss": [0.4],
    "crowd": [1 + 0.1 * others for others in range(8)],
    "cached": 500,
    "neighbours": [[1.2] * 8],
}
"""What ``measure`` found with two replicas, in the tests of the command."""


def serving(
    hit: Sequence[float],
    miss: Sequence[float],
    slowdown: float,
    places: int,
    cached: int,
    *,
    neighbours: Sequence[Sequence[float]] = (),
) -> Service:
    """Replicas where each other answer lengthens one by the same share, ``slowdown``."""
    return Service(
        hit, miss, [1 + slowdown * others for others in range(places)], cached, neighbours
    )


def exponential(places: int, number: int = 20_000) -> Service:
    """Answers whose times are exponential; with or without a cache they are the same."""
    rng = random.Random(3)
    times = [rng.expovariate(1 / MEAN) for _ in range(number)]
    scale = MEAN / statistics.mean(times)
    times = [scale * one for one in times]
    return serving(times, times, 0.0, places, 10)


def poisson(rate: float, seconds: float, seed: int = 5) -> list[Request]:
    rng = random.Random(seed)
    at, found = 0.0, []
    while (at := at + rng.expovariate(rate)) < seconds:
        found.append(Request(at, f"key-{len(found)}"))
    return found


def erlang_wait(rate: float, places: int) -> float:
    """Mean seconds in an M/M/c queue, from arrival to end: Erlang's C formula."""
    load = rate * MEAN
    terms = [load**k / math.factorial(k) for k in range(places)]
    last = load**places / math.factorial(places) * places / (places - load)
    return last / (sum(terms) + last) * MEAN / (places - load) + MEAN


@pytest.mark.parametrize(("places", "load"), [(1, 0.5), (1, 0.8), (4, 0.7), (8, 0.9)])
def test_one_replica_is_an_m_m_c_queue(places: int, load: float) -> None:
    """Mean time in the system within a tenth of the formula."""
    rate = load * places / MEAN
    found = simulate(poisson(rate, 60_000 / rate), 1, exponential(places), "random")
    assert statistics.mean(found.seconds) == pytest.approx(erlang_wait(rate, places), rel=0.1)


def test_random_routing_makes_queues_of_their_own() -> None:
    """Three replicas with a third of the arrivals each; one queue for all would be faster."""
    rate = 3 * 0.7 / MEAN
    requests, service = poisson(rate, 60_000 / rate), exponential(1)
    mean = {
        policy: statistics.mean(simulate(requests, 3, service, policy).seconds)
        for policy in ("random", "least busy")
    }
    assert mean["random"] == pytest.approx(erlang_wait(rate / 3, 1), rel=0.1)
    assert erlang_wait(rate, 3) < mean["least busy"] < mean["random"]


def test_hits_without_load_are_the_conversations_own() -> None:
    """Affinity finds every turn but the first, random routing only what chance leaves there."""
    habits = Habits(2.0, turns=4.0, pause=5.0, popular=0.0)
    requests = trace(habits, 2000.0)
    service = serving([0.001], [0.001], 0.0, 100, 10**6)
    rates = {name: simulate(requests, 10, service, name).hit_rate for name in POLICIES}
    assert rates["affinity"] == pytest.approx(1 - 1 / 4, abs=0.02)
    # Of the n-th turn's n - 1 earlier ones each was there with the chance of a tenth.
    expected = sum(0.25 * 0.75**n * (1 - 0.9**n) for n in range(200))
    assert rates["random"] == pytest.approx(expected, abs=0.02)


def test_a_small_cache_forgets() -> None:
    """With room for one picture a replica knows it only when asked again at once."""
    requests = [Request(float(n), "ab"[n // 2 % 2]) for n in range(400)]
    one = simulate(requests, 1, serving([0.1], [0.1], 0.0, 1, 1), "affinity")
    two = simulate(requests, 1, serving([0.1], [0.1], 0.0, 1, 2), "affinity")
    assert (one.hit_rate, two.hit_rate) == (0.5, 1.0)


def times(requests: list[Request], service: Service) -> list[float]:
    """Seconds that each request took at one replica, in the order in which they ended."""
    return simulate(requests, 1, service, "random").seconds


def test_one_answer_alone_takes_its_time() -> None:
    """However much others would slow it, and when there was another before."""
    service = serving([1.0], [1.0], 0.25, 8, 10)
    assert times([Request(1.0, "a"), Request(2.5, "b")], service) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("together", [2, 5])
def test_answers_that_are_given_together_take_the_time_measured_for_so_many(together: int) -> None:
    """Of two each takes 1.25 of what one takes alone, of five twice as much."""
    service = serving([1.0], [1.0], 0.25, 8, 10)
    requests = [Request(1.0, str(number)) for number in range(together)]
    assert times(requests, service) == pytest.approx([1 + 0.25 * (together - 1)] * together)


def test_an_answer_that_joins_slows_the_one_that_had_begun() -> None:
    """Half of the first is done alone, the rest beside the second, at 0.8 of the speed; then the
    second, which has half of its own left, is alone again."""
    service = serving([1.0], [1.0], 0.25, 8, 10)
    first = 0.5 + 0.5 / 0.8
    second = 0.5 / 0.8 + 0.5
    assert times([Request(1.0, "a"), Request(1.5, "b")], service) == pytest.approx([first, second])


def test_a_short_answer_ends_before_a_long_one_that_had_begun() -> None:
    """The long one has gone on meanwhile at the speed of two."""
    env = simpy.Environment()
    shared = Shared(env, serving([1.0], [1.0], 1.0, 8, 10).speed)
    taken: list[float] = []

    def one(at: float, seconds: float) -> Iterator[Any]:
        yield env.timeout(at)
        yield shared.answer(seconds)
        taken.append(env.now - at)

    for at, seconds in ((1.0, 2.0), (1.5, 0.4)):
        env.process(one(at, seconds))
    env.run()
    # At half speed for 0.8 s the long one does 0.4 of its 2 s; 0.5 were done, 1.1 are left.
    assert taken == pytest.approx([0.8, 0.5 + 0.8 + 1.1])


def test_who_waits_for_a_place_slows_nobody() -> None:
    """With one place they come one after the other, each as if alone."""
    service = serving([1.0], [1.0], 0.5, 1, 10)
    assert times([Request(1.0, "a"), Request(1.5, "b")], service) == pytest.approx([1.0, 1.5])


def test_no_work_is_lost_or_done_twice() -> None:
    """Of 500 answers that overlap as they come: the speed of each times their number, summed over
    the time, is what all of them take alone."""
    service = serving([1.0], [1.0], 0.3, 500, 10)
    rng = random.Random(7)
    env = simpy.Environment()
    shared = Shared(env, service.speed)
    steps: list[tuple[float, int]] = []
    works = [rng.expovariate(1) for _ in range(500)]

    def one(at: float, work: float) -> Iterator[Any]:
        yield env.timeout(at)
        steps.append((env.now, 1))
        yield shared.answer(work)
        steps.append((env.now, -1))

    for work in works:
        env.process(one(rng.uniform(0, 300), work))
    env.run()
    done, running, before, most = 0.0, 0, 0.0, 0
    for now, change in steps:
        if running:
            done += (now - before) * running * service.speed(running)
        running, before = running + change, now
        most = max(most, running)
    assert (running, len(steps)) == (0, 1000)
    assert most > 3, "they overlap"
    assert done == pytest.approx(sum(works))


def test_an_engine_whose_answers_share_one_speed_is_an_m_g_1_ps_queue() -> None:
    """Of answers of two lengths the mean time is the formula's, which knows only their mean."""
    short_and_long = [0.1] * 9 + [4.1]
    service = serving(short_and_long, short_and_long, 1.0, 10**6, 10)
    rate = 0.6 / MEAN
    found = simulate(poisson(rate, 60_000 / rate), 1, service, "random")
    assert statistics.mean(found.seconds) == pytest.approx(MEAN / (1 - 0.6), rel=0.1)


def side_by_side(requests: list[Request], service: Service, together: int) -> list[float]:
    """Seconds that each took, at the next of as many replicas, in the order in which they ended."""
    return simulate(requests, len(requests), service, "round robin", together=together).seconds


def test_two_replicas_of_a_machine_slow_each_other() -> None:
    """Half of the first is done alone, the rest at half the speed; then the second is alone."""
    service = serving([1.0], [1.0], 0.0, 1, 10, neighbours=[[2.0]])
    requests = [Request(1.0, "a"), Request(1.5, "b")]
    assert side_by_side(requests, service, 2) == pytest.approx([1.5, 1.5])


def test_three_replicas_of_a_machine_have_a_law_of_their_own() -> None:
    """Speeds of 1, 2/3 and 1/4 while one, two and three are busy; each does a second's work.

    The first does 1/2, 1/3 and 1/6; the second then has half of its own left and needs 3/4 s for
    it, and the third a third, alone.
    """
    service = serving([1.0], [1.0], 0.0, 1, 10, neighbours=[[1.5], [4.0]])
    requests = [Request(1.0, "a"), Request(1.5, "b"), Request(2.0, "c")]
    first, second = 0.5 + 0.5 + 4 / 6, 0.5 + 4 / 6 + 0.75
    third = 4 / 6 + 0.75 + 1 / 3
    assert side_by_side(requests, service, 3) == pytest.approx([first, second, third])


def test_who_is_on_another_machine_slows_nobody() -> None:
    """Of four replicas the first two and the last two; each has one answer."""
    service = serving([1.0], [1.0], 0.0, 1, 10, neighbours=[[3.0]])
    requests = [Request(1.0, "a"), Request(4.0, "b"), Request(1.0, "c"), Request(1.0, "d")]
    requests.sort(key=lambda one: one.at)  # a, c and d to the first three
    assert side_by_side(requests, service, 2) == pytest.approx([1.0, 3.0, 3.0, 1.0])


def test_a_machine_counts_the_answers_of_all_its_replicas() -> None:
    """Two at one and one at the other are one and a half each, between 1.2 and 2 times as long.

    The one alone takes 1.6 s. By then the two others, 1.5 times slower still, have two thirds.
    """
    service = serving([1.0], [1.0], 0.5, 2, 10, neighbours=[[1.2, 2.0]])
    requests = [Request(1.0, key) for key in "abc"]
    found = simulate(requests, 2, service, "round robin", together=2).seconds
    assert found == pytest.approx([1.6, 1.6 + 0.5, 1.6 + 0.5])
    four = simulate([*requests, Request(1.0, "d")], 2, service, "round robin", together=2).seconds
    assert four == pytest.approx([3.0] * 4), "1.5 for the other answer, 2 for the other replica"


TABLES = st.lists(st.floats(1.0, 5.0), min_size=8, max_size=8)
"""For up to eight answers at each replica."""


@given(
    crowd=TABLES,
    neighbours=st.lists(TABLES, min_size=2, max_size=2),
    answers=st.lists(
        st.tuples(st.floats(0.0, 5.0), st.floats(0.01, 3.0), st.integers(0, 2)),
        min_size=1,
        max_size=8,
    ),
)
def test_a_machine_neither_loses_work_nor_does_it_twice(
    crowd: list[float], neighbours: list[list[float]], answers: list[tuple[float, float, int]]
) -> None:
    """Whatever the law: the speed of each answer, over the time that it took, is its work."""
    service = Service([1.0], [1.0], [1.0, *crowd[1:]], 10, neighbours)
    env = simpy.Environment()
    machine = Machine()
    engines = [Shared(env, service.speed, machine) for _ in range(3)]
    steps: list[tuple[float, int, int]] = []

    def one(number: int) -> Iterator[Any]:
        at, work, engine = answers[number]
        yield env.timeout(at)
        steps.append((env.now, number, 1))
        yield engines[engine].answer(work)
        steps.append((env.now, number, -1))

    for number in range(len(answers)):
        env.process(one(number))
    env.run()
    done = [0.0] * len(answers)
    running: set[int] = set()
    before = 0.0
    for now, number, change in steps:
        at = [sum(answers[one][2] == engine for one in running) for engine in range(3)]
        for other in running:
            own = at[answers[other][2]]
            busy = sum(number > 0 for number in at)
            done[other] += (now - before) * service.speed(own, busy, len(running))
        before = now
        (running.add if change > 0 else running.remove)(number)
    assert not running
    assert machine.total == len(machine.busy) == 0
    assert done == pytest.approx([work for _, work, _ in answers])


def test_what_a_new_picture_takes_more_holds_up_all_answers_of_its_replica() -> None:
    """0.5 s of a new picture's 1.5 s: the other answer stands still, one elsewhere does not."""
    service = serving([1.0], [1.5], 0.0, 2, 10)
    requests = [Request(0.0, "a"), *(Request(4.0, "a") for _ in range(2)), Request(4.5, "b")]
    one = simulate(requests, 1, dataclasses.replace(service, crowd=[1.0] * 3), "affinity")
    assert one.seconds == pytest.approx([1.5, 1.5, 1.5])
    two = simulate([*requests[:3], Request(4.5, "b")], 2, service, "round robin")
    # The second replica has not seen "a" either, and both new ones are its.
    assert sorted(two.seconds) == pytest.approx([1.0, 1.5, 2.0])


@given(
    answers=st.lists(
        st.tuples(st.floats(0.0, 5.0), st.floats(0.01, 3.0), st.floats(0.0, 1.0)),
        min_size=1,
        max_size=8,
    )
)
def test_an_engine_works_alone_for_one_after_another(
    answers: list[tuple[float, float, float]],
) -> None:
    """Where a crowd slows nobody: an answer takes its own time and all such work meanwhile."""
    env = simpy.Environment()
    engine = Shared(env, lambda *_: 1.0)
    ended: dict[int, float] = {}

    def one(number: int) -> Iterator[Any]:
        at, seconds, alone = answers[number]
        yield env.timeout(at)
        yield engine.answer(seconds, alone)
        ended[number] = env.now

    for number in range(len(answers)):
        env.process(one(number))
    env.run()
    spans, free = [], 0.0
    for at, _, alone in sorted(answers, key=lambda each: each[0]):
        begun = max(at, free)
        spans.append((begun, free := begun + alone))
    for number, (at, seconds, _) in enumerate(answers):
        still = sum(max(0.0, min(end, ended[number]) - max(begun, at)) for begun, end in spans)
        assert ended[number] - at == pytest.approx(seconds + still)


@given(seed=st.integers(0, 1000), policy=st.sampled_from([*POLICIES]))
def test_neighbours_that_take_nothing_are_none(seed: int, policy: str) -> None:
    """On one machine or on three the same happens, if nothing is slower on one."""
    requests = trace(Habits(3.0, pause=2.0), 10.0, seed)
    service = serving([0.1, 0.3], [0.4], 0.2, 4, 20, neighbours=[[1.0] * 4] * 2)
    apart, together = (
        simulate(requests, 3, service, policy, together=number).seconds for number in (1, 3)
    )
    # Two that end at the same moment may be told either way round.
    assert sorted(apart) == pytest.approx(sorted(together))


def test_a_machine_whose_replicas_share_one_core_is_an_m_g_1_ps_queue() -> None:
    """Fifty replicas with hardly more than one answer each: together they are as fast as one."""
    short_and_long = [0.1] * 9 + [4.1]
    neighbours = [[float(busy)] * 20 for busy in range(2, 51)]
    service = serving(short_and_long, short_and_long, 1.0, 20, 10, neighbours=neighbours)
    rate = 0.6 / MEAN
    found = simulate(poisson(rate, 20_000 / rate), 50, service, "round robin", together=50)
    assert statistics.mean(found.seconds) == pytest.approx(MEAN / (1 - 0.6), rel=0.1)


def test_more_replicas_on_a_machine_than_were_measured_are_refused() -> None:
    """Nothing is known of them."""
    service = serving([1.0], [1.0], 0.0, 1, 10, neighbours=[[2.0]])
    with pytest.raises(ValueError, match="3 replicas on a machine, 2 were measured"):
        simulate([Request(1.0, "a")], 3, service, "affinity", together=3)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_is_answered_and_every_load_given_back(policy: str) -> None:
    """Whatever chooses; equal seeds give equal outcomes."""
    requests = trace(Habits(5.0, pause=2.0), 60.0)
    service = serving([0.1], [0.4], 0.1, 4, 100)
    found, again = (simulate(requests, 7, service, policy) for _ in range(2))
    assert found == again
    told = sum(one.at >= requests[-1].at * 0.25 for one in requests)
    assert len(found.seconds) == told
    assert min(found.seconds) >= 0.1 - 1e-9


def test_affinity_sends_a_hot_picture_to_more_than_one() -> None:
    """All ask about one picture: nobody has twice the mean."""
    requests = [Request(number / 1000, "hot") for number in range(5000)]
    found = simulate(requests, 10, serving([0.5], [0.5], 0.0, 1000, 10), "affinity")
    assert found.most <= 1.25 * 500 / 10 + 2


def test_the_traffic_has_its_habits() -> None:
    """Rate, turns of a conversation and share of shared pictures, within 5 %."""
    habits = Habits(20.0, turns=3.0, pause=10.0, popular=0.3, catalogue=100)
    requests = trace(habits, 2000.0)
    assert len(requests) / 2000 == pytest.approx(habits.requests, rel=0.05)
    shared = sum(one.key.startswith("shared") for one in requests)
    assert shared / len(requests) == pytest.approx(0.3, rel=0.05)
    assert [one.at for one in requests] == sorted(one.at for one in requests)
    halves = [sum(one.at < 1000 for one in requests), sum(one.at >= 1000 for one in requests)]
    assert halves[0] == pytest.approx(halves[1], rel=0.05), "busy from the start"
    assert Habits.of_users(86400, 3.0).conversations == 3.0


def test_the_smallest_fleet_is_the_smallest() -> None:
    """One fewer does not keep the time; where the most do not, there is none."""
    requests = trace(Habits(10.0, pause=2.0), 120.0)
    service = serving([0.2], [0.6], 0.0, 2, 1000)
    least = fewest(requests, service, "affinity", 1.5, 50)
    assert least is not None
    assert simulate(requests, least, service, "affinity").at(0.99) <= 1.5
    assert simulate(requests, least - 1, service, "affinity").at(0.99) > 1.5
    assert fewest(requests, service, "affinity", 0.1, 50) is None


def test_policies_choose_as_they_are_called() -> None:
    """In turn, and whoever has least."""
    loads = Loads([3, 1, 2])
    rng = random.Random(1)
    assert [POLICIES["round robin"](loads, rng)("", loads)] == [0]
    assert {POLICIES["least busy"](loads, rng)("", loads) for _ in range(9)} == {1}


def test_the_command_prints_its_tables(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    """Every size with every policy, then the smallest fleet of each and its cost."""
    words = ["simulate", "--service", str(file), "--users", "1e5", "--seconds", "30"]
    assert fleet.main([*words, "--sizes", "2", "20", "--price", "2", "--p99", "2"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [(one[0], one[1]) for one in rows[2:10]] == [
        (f"| {size}", policy) for size in (2, 20) for policy in POLICIES
    ]
    for policy, cells in zip(POLICIES, rows[12:], strict=True):
        assert cells[0] == f"| {policy}"
        cost = int(cells[1]) * 2 * 24 / 3e5 * 1000
        assert float(cells[-1].rstrip(" |")) == pytest.approx(cost, abs=1e-4)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """What ``measure`` writes."""
    path = tmp_path / "service.json"
    path.write_text(json.dumps({"conditions": {"tokens": 128}, "service": SERVICE}))
    return path


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says, in one line, before it ends with status 2 and prints no figure."""
    with pytest.raises(SystemExit) as ended:
        fleet.main(words)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    return line.removeprefix("fleet: ")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--users 0", "--users: must be more than 0, is 0"),
        ("--users inf", "--users: must be more than 0, is inf"),
        ("--p99 soon", "--p99: must be more than 0, is soon"),
        ("--sizes 10 0", "--sizes: must be a whole number from 1, is 0"),
        ("--sizes 1.5", "--sizes: must be a whole number from 1, is 1.5"),
        ("--turns 0.5", "--turns: must be at least 1, is 0.5"),
        ("--popular 7", "--popular: must be a share from 0 to 1, is 7"),
        ("--popular nan", "--popular: must be a share from 0 to 1, is nan"),
        (
            "--users 1 --seconds 1",
            "--seconds: must be enough for a request at 0.000104167 a second, is 1",
        ),
    ],
)
def test_unusable_options_of_simulate_are_refused(
    words: str, told: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the option's name, its limit and the value given."""
    command = ["simulate", "--service", str(file), *words.split()]
    assert refusal(command, capsys) == f"argument {told}"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--turns", "0.5"], "--turns: must be at least 1, is 0.5"),
        (["--pause", "0.2"], "--pause: must be at least 1, is 0.2"),
        (
            ["--rate", "0.0001", "--seconds", "1"],
            "--seconds: must be enough for a request at 0.0001 a second, is 1",
        ),
        (["--replicas", "none"], "--replicas: must be a whole number from 1, is none"),
        (["--replicas", "3"], "--replicas: must be at most 2, as --service was measured, is 3"),
        (["--tokens", "8"], "--tokens: must be 128, as --service was measured, is 8"),
        (["--tokens", "0"], "--tokens: must be a whole number from 1, is 0"),
    ],
)
def test_unusable_options_of_replay_are_refused(
    words: list[str], told: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is sent."""
    command = ["replay", "9", "--service", str(file), "--replicas", "2", *words]
    assert refusal(command, capsys) == f"argument {told}"


def test_only_what_a_fleet_can_be_told_is_replayed(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``replay`` measures a fleet, which knows fewer routings than the model."""
    words = ["replay", "9", "--service", str(file), "--replicas", "2", "--routing", "least busy"]
    said = refusal(words, capsys)
    assert said.startswith("argument --routing: invalid choice: 'least busy' (choose from ")
    assert {name for name in POLICIES if name in said.partition("(")[2]} == {*get_args(Routing)}


def test_a_port_that_is_none_is_refused(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of every command that asks a server."""
    for words in (["measure"], ["replay", "--service", str(file), "--replicas", "2"]):
        said = refusal([*words, "70000"], capsys)
        assert said == "argument port: must be a port from 1 to 65535, is 70000"


@pytest.mark.parametrize(
    "content",
    [
        None,
        "no JSON",
        "{}",
        json.dumps({"service": SERVICE | {"hit": []}}),
        json.dumps({"service": SERVICE | {"miss": [0.0]}}),
        json.dumps({"service": SERVICE | {"slowdown": -0.5}}),
        json.dumps({"service": SERVICE | {"places": 0}}),
        json.dumps({"service": SERVICE | {"cached": 0}}),
        json.dumps({"service": SERVICE | {"crowd": []}}),
        json.dumps({"service": SERVICE | {"crowd": [1.1] * 8}}),
        json.dumps({"service": SERVICE | {"crowd": [1.0] * 7 + [0.9]}}),
        json.dumps({"service": SERVICE | {"neighbours": [[1.0] * 7]}}),
        json.dumps({"service": SERVICE | {"neighbours": [[0.9] * 8]}}),
        json.dumps({"service": SERVICE | {"more": 1}}),
    ],
)
def test_what_measure_did_not_write_is_refused(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file, no JSON, other fields, times that nothing can have taken."""
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    said = refusal(["simulate", "--service", str(path)], capsys)
    assert said.startswith(f"argument --service: must be a file that measure wrote, is {path} (")


def test_a_fleet_that_does_not_answer_is_told_in_one_line(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 1, for the next time it may be there."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    words = ["--service", str(file), "--replicas", "1", "--rate", "100", "--seconds", "0.2"]
    assert fleet.main(["replay", str(port), *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fleet: ")


def test_no_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The line says what is wanted."""
    assert "COMMAND" in refusal([], capsys)
