"""The simulated fleet against what is known of queues, and its traffic against its habits."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path

import pytest

from bench import fleet
from bench.fleet_model import POLICIES, Loads, Service, fewest, simulate
from bench.fleet_traffic import Habits, Request, trace

MEAN = 0.5
"""Seconds of an answer in the tests of formulae."""


def exponential(places: int, number: int = 20_000) -> Service:
    """Answers whose times are exponential; with or without a cache they are the same."""
    rng = random.Random(3)
    times = [rng.expovariate(1 / MEAN) for _ in range(number)]
    scale = MEAN / statistics.mean(times)
    times = [scale * one for one in times]
    return Service(times, times, 0.0, places, 10)


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
    service = Service([0.001], [0.001], 0.0, 100, 10**6)
    rates = {name: simulate(requests, 10, service, name).hit_rate for name in POLICIES}
    assert rates["affinity"] == pytest.approx(1 - 1 / 4, abs=0.02)
    # Of the n-th turn's n - 1 earlier ones each was there with the chance of a tenth.
    expected = sum(0.25 * 0.75**n * (1 - 0.9**n) for n in range(200))
    assert rates["random"] == pytest.approx(expected, abs=0.02)


def test_a_small_cache_forgets() -> None:
    """With room for one picture a replica knows it only when asked again at once."""
    requests = [Request(float(n), "ab"[n // 2 % 2]) for n in range(400)]
    one = simulate(requests, 1, Service([0.1], [0.1], 0.0, 1, 1), "affinity")
    two = simulate(requests, 1, Service([0.1], [0.1], 0.0, 1, 2), "affinity")
    assert (one.hit_rate, two.hit_rate) == (0.5, 1.0)


def test_answers_slow_each_other() -> None:
    """Who begins beside another takes longer by the measured share."""
    service = Service([1.0], [1.0], 0.25, 2, 10)
    found = simulate([Request(1.0, "a"), Request(1.1, "b")], 1, service, "random")
    assert sorted(found.seconds) == pytest.approx([1.0, 1.25])


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_is_answered_and_every_load_given_back(policy: str) -> None:
    """Whatever chooses; equal seeds give equal outcomes."""
    requests = trace(Habits(5.0, pause=2.0), 60.0)
    service = Service([0.1], [0.4], 0.1, 4, 100)
    found, again = (simulate(requests, 7, service, policy) for _ in range(2))
    assert found == again
    told = sum(one.at >= requests[-1].at * 0.25 for one in requests)
    assert len(found.seconds) == told
    assert min(found.seconds) >= 0.1 - 1e-9


def test_affinity_sends_a_hot_picture_to_more_than_one() -> None:
    """All ask about one picture: nobody has twice the mean."""
    requests = [Request(number / 1000, "hot") for number in range(5000)]
    found = simulate(requests, 10, Service([0.5], [0.5], 0.0, 1000, 10), "affinity")
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
    service = Service([0.2], [0.6], 0.0, 2, 1000)
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


def test_the_command_prints_its_tables(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every size with every policy, then the smallest fleet of each and its cost."""
    times = {"hit": [0.1], "miss": [0.4], "slowdown": 0.1, "places": 8, "cached": 500}
    file = tmp_path / "service.json"
    file.write_text(json.dumps({"service": times}))
    words = ["simulate", "--service", str(file), "--users", "1e5", "--seconds", "30"]
    assert fleet.main([*words, "--sizes", "2", "20", "--price", "2"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [(one[0], one[1]) for one in rows[2:10]] == [
        (f"| {size}", policy) for size in (2, 20) for policy in POLICIES
    ]
    for policy, cells in zip(POLICIES, rows[12:], strict=True):
        assert cells[0] == f"| {policy}"
        cost = int(cells[1]) * 2 * 24 / 3e5 * 1000
        assert float(cells[-1].rstrip(" |")) == pytest.approx(cost, abs=1e-4)


@pytest.mark.parametrize("words", [["simulate", "--users", "0"], ["simulate", "--p99", "soon"], []])
def test_unusable_options_are_refused(words: list[str]) -> None:
    """Status 2."""
    with pytest.raises(SystemExit) as ended:
        fleet.main(words)
    assert ended.value.code == 2
