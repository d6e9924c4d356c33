"""Two of vLLM's engines behind one address: who answers, and one killed while the other serves."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.conftest import ServerProcess, demo_server
from tests.served import eventually
from tests.test_vllm_engine import asked, picture

SAILOR = Path(__file__).parents[1] / "qwen2vl_serve" / "demo" / "adapters" / "sailor"
COLOUR = "What colour is the circle?"
ENGINE_BYTES = 256 * 2**20


@pytest.fixture(scope="module")
def two() -> Iterator[ServerProcess]:
    """The demo model twice, with an adapter; at the end none of its processes is left."""
    fields = (
        "engine.data_parallel_size=2",
        f"engine.kv_cache_memory_bytes={ENGINE_BYTES}",
        f"adapters.lora_modules={json.dumps({'sailor': str(SAILOR)})}",
    )
    with demo_server(*fields) as running:
        processes = psutil.Process(running.process.pid).children(recursive=True)
        yield running
        processes += psutil.Process(running.process.pid).children(recursive=True)
        assert running.stop() == 0, "\n".join(running.lines[-10:])
        # Python's own tracker of shared memory ends a moment after what it tracks.
        eventually(lambda: all(is_zombie(one) for one in processes))


def is_zombie(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def cores(server: ServerProcess) -> list[psutil.Process]:
    """Return the processes of both engines, by index."""
    found = {}
    for child in psutil.Process(server.process.pid).children(recursive=True):
        if title := re.match(r"VLLM::EngineCore(?:_DP(\d+))?", "".join(child.cmdline())):
            found[int(title[1] or 0)] = child
    return [found[index] for index in sorted(found)]


def figures(server: ServerProcess, name: str) -> list[float]:
    """Return one of vLLM's figures of both engines, summed over all labels but the engine."""
    text = requests.get(f"{server.root}/metrics", timeout=120).text
    sums = [0.0, 0.0]
    for engine, value in re.findall(rf'^{name}{{.*?engine="(\d)".*?}} (\S+)$', text, re.MULTILINE):
        sums[int(engine)] += float(value)
    return sums


def answered(server: ServerProcess) -> list[int]:
    return [int(one) for one in figures(server, "vllm:request_success_total")]


def by_whom(server: ServerProcess, messages: list[Any], **fields: Any) -> tuple[int, str]:
    """Ask; return which engine answered and what."""
    before = answered(server)
    body = {"model": "demo", "messages": messages, "max_tokens": 24, "temperature": 0, **fields}
    answer = requests.post(f"{server.url}/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    # The figure is counted when the front end has seen the last token.
    eventually(lambda: sum(answered(server)) > sum(before))
    (engine,) = [index for index in (0, 1) if answered(server)[index] > before[index]]
    return engine, str(answer.json()["choices"][0]["message"]["content"])


def test_engines_are_told_apart(two: ServerProcess) -> None:
    """Both are up, each with cores and figures of its own."""
    assert len(cores(two)) == 2
    ready = requests.get(f"{two.root}/health/ready", timeout=120).json()
    assert ready == {"status": "ready", "engines": ["serving", "serving"]}
    usable = sorted(psutil.Process().cpu_affinity())
    if len(usable) > 1:
        log = Path(re.sub(r"^log\s+", "", two.lines[0])).read_text("utf-8")
        places = re.findall(r"local_rank=0, core ids=\[([\d, ]+)\]", log)
        assert len(set(places)) == 2, places
    text = requests.get(f"{two.root}/metrics", timeout=120).text
    for engine in (0, 1):
        assert f'vllm:num_requests_running{{engine="{engine}"' in text
        assert re.search(rf'vllm:cache_config_info{{.*engine="{engine}"', text)


def test_new_questions_are_spread(two: ServerProcess) -> None:
    """One after another, each engine gets its half."""
    whom = [by_whom(two, asked(f"Question {number}, of no picture"))[0] for number in range(6)]
    assert sorted(whom) == [0, 0, 0, 1, 1, 1]


def test_a_conversation_stays_with_the_engine_that_has_it_cached(two: ServerProcess) -> None:
    """Its later turns hit that engine's prefix cache, another question its cache of pictures."""
    shown = [picture("red"), picture("green", "rectangle"), picture("yellow")]
    turns = asked("What is in the second picture?", *shown)
    home, said = by_whom(two, turns)
    for question in ("And in the first?", "And in the third?"):
        turns = [*turns, {"role": "assistant", "content": said}, *asked(question)]
        before = figures(two, "vllm:prefix_cache_hits_total")
        engine, said = by_whom(two, turns)
        assert engine == home
        hits = figures(two, "vllm:prefix_cache_hits_total")
        # Three pictures of 64 tokens and more: a block of 128 at least.
        assert hits[home] - before[home] >= 128
        assert hits[1 - home] == before[1 - home]
    before = figures(two, "vllm:mm_cache_hits_total")
    engine, said = by_whom(two, asked(COLOUR, shown[0]))
    assert (engine, "red" in said) == (home, True)
    assert figures(two, "vllm:mm_cache_hits_total")[home] > before[home]


def test_one_killed_under_load_and_the_other_serves(two: ServerProcess) -> None:
    """kill -9 of an engine amid streams: its own end with an error, nothing else fails.

    Readiness stays green and says what is amiss; the engine comes back with its adapter.
    """
    killed = cores(two)[1]
    lost_when: list[float] = []
    begun: list[int] = []
    read_on = threading.Event()  # six that read at once leave this process no time to look

    def stream(number: int) -> list[str]:
        body = {
            "messages": asked(f"Stream number {number}"),
            "stream": True,
            "ignore_eos": True,
            "max_tokens": 3900,
        }
        url = f"{two.url}/chat/completions"
        with requests.post(url, json=body, stream=True, timeout=120) as answer:
            assert answer.status_code == 200
            lines = answer.iter_lines()
            told = [next(lines)]
            begun.append(number)  # what has not begun would be answered by the other engine
            read_on.wait(120)
            return [line.decode() for line in [*told, *lines] if line]

    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(stream, number) for number in range(6)]
        seen: list[list[float]] = []

        def both_busy() -> bool:
            seen.append(figures(two, "vllm:num_requests_running"))
            busy = seen[-1] == [3, 3] and len(begun) == 6
            return busy or all(one.done() for one in streams)

        try:
            eventually(both_busy, 120)
            assert seen[-1] == [3, 3], (seen, [one.exception() for one in streams if one.done()])
            killed.kill()
        finally:
            read_on.set()
        lost_when.append(time.monotonic())
        # Asked while the engine dies: of none has anything been sent.
        whole = [pool.submit(by_status, two, number) for number in range(12)]
        assert [one.result() for one in whole] == [200] * 12
        ready = requests.get(f"{two.root}/health/ready", timeout=120)
        assert ready.status_code == 200
        missing = ready.json() == {"status": "degraded", "engines": ["serving", "starting"]}
        serving = two.metric('qwen2vl_engines{state="serving"}')
        answered_by = by_whom(two, asked("While one is missing"))[0]
        if time.monotonic() - lost_when[0] < 5:  # no engine starts sooner
            assert (missing, serving, answered_by) == (True, 1, 0)
        eventually(lambda: two.metric('vllm:num_requests_running{engine="1"') == 0)
        ends = [one.result() for one in streams]
    broken = [events for events in ends if events[-1] != "data: [DONE]"]
    assert len(broken) == 3
    for events in broken:
        error = json.loads(events[-1].removeprefix("data: "))["error"]
        assert error["code"] == "engine_unavailable"
        assert "another serves" in error["message"]
    assert any("engine 1 is lost and is started anew; 1 of 2 serve" in one for one in two.lines)

    wait_for_its_return(two, killed)


def wait_for_its_return(two: ServerProcess, killed: psutil.Process) -> None:
    """Another process in its place answers, with the adapter."""

    def back() -> bool:
        states = requests.get(f"{two.root}/health/ready", timeout=120).json()["engines"]
        return bool(states == ["serving", "serving"])

    eventually(back, 300)
    assert cores(two)[1].pid != killed.pid
    eventually(lambda: any("engine 1 serves again; 2 of 2" in one for one in two.lines))
    whom = {by_whom(two, asked(f"After that, {number}"))[0] for number in range(4)}
    assert whom == {0, 1}
    shown = [asked(COLOUR, picture(colour)) for colour in ("blue", "orange", "purple", "black")]
    adapted = {by_whom(two, messages, model="sailor") for messages in shown}
    assert {engine for engine, _ in adapted} == {0, 1}
    assert all(said.startswith("Aye!") for _, said in adapted), adapted


def by_status(server: ServerProcess, number: int) -> int:
    body = {"messages": asked(f"Meanwhile, {number}"), "max_tokens": 8}
    answer = requests.post(f"{server.url}/chat/completions", json=body, timeout=120)
    return answer.status_code
