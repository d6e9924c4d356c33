"""Two replicas with the demo model on vLLM's CPU engine behind Ray: too heavy to run unasked.

``FLEET=1 pytest tests/test_fleet_real.py -s`` takes some 3 GiB and several minutes and prints
its figures.
"""

from __future__ import annotations

import base64
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from bench.fleet_client import known
from bench.traffic import drawn_jpeg
from tests.test_fleet import FleetProcess, Load, content, environment, eventually, running

pytestmark = pytest.mark.skipif(not os.environ.get("FLEET"), reason="asked for by FLEET=1")
__all__ = ["environment"]
PICTURES, TURNS = 12, 4


@pytest.fixture(scope="module")
def fleet(environment: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetProcess]:
    folder = tmp_path_factory.mktemp("files")
    options = {"profile": "demo", "set": [f"files.folder={folder}"], "replicas": 2}
    with running(environment, replica_cpus=1, **options) as process:  # type: ignore[arg-type]
        yield process


def hit_rate(fleet: FleetProcess, first: int) -> float:
    """Ask about new pictures in turn, some clients at once; how often a replica knew them."""
    port = int(fleet.root.rpartition(":")[2])
    before = known(port)

    def ask(number: int) -> None:
        url = "data:image/jpeg;base64," + base64.b64encode(drawn_jpeg(number)).decode()
        picture = {"type": "image_url", "image_url": {"url": url}}
        for turn in range(TURNS):
            words = {"type": "text", "text": f"What is in the picture? ({turn})"}
            messages = [{"role": "user", "content": [picture, words]}]
            content(fleet.ask(messages=messages, max_tokens=8))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(first, first + PICTURES)))
    hits, misses = (now - then for now, then in zip(known(port), before, strict=True))
    return hits / (hits + misses)


def test_the_fleet_on_the_real_engine(fleet: FleetProcess) -> None:
    """Hits against random routing, a replica killed under load, a new version under load.

    Engines that are on one machine have all of its processors.
    """
    begun = time.monotonic()
    for replica in fleet.processes():
        engines = replica.children(recursive=True)
        assert engines
        for one in engines:
            assert set(one.cpu_affinity()) == os.sched_getaffinity(0)
    near = hit_rate(fleet, 1000)
    print(f"\naffinity: {near:.3f} of {PICTURES * TURNS} pictures known", flush=True)
    assert near == pytest.approx(1 - 1 / TURNS)

    load = Load(fleet, 4, max_tokens=8)
    time.sleep(3)
    fleet.processes()[0].kill()
    time.sleep(10)
    killed = load.stop()
    print(f"a replica killed under load: {dict(killed)}", flush=True)
    assert set(killed) == {"ok"}
    eventually(lambda: len(fleet.processes()) == 2, 300)

    before = {one.pid for one in fleet.processes()}
    load = Load(fleet, 2, max_tokens=8)
    fleet.deploy(routing="random")
    eventually(lambda: not before & {one.pid for one in fleet.processes()}, 300)
    rolled: Counter[object] = load.stop()
    print(f"a new version under load: {dict(rolled)}", flush=True)
    assert set(rolled) == {"ok"}

    far = hit_rate(fleet, 2000)
    print(f"random: {far:.3f}; all in {time.monotonic() - begun:.0f} s", flush=True)
    assert far < near
