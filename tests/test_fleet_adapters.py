"""An adapter on two replicas of the demo model, on vLLM's CPU engine behind Ray.

``FLEET=1 pytest tests/test_fleet_adapters.py -s`` takes some 3 GiB and a few minutes and prints its
figures.
"""

from __future__ import annotations

import base64
import io
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
import requests
from PIL import Image, ImageDraw

from tests.test_fleet import ROOT, FleetProcess, content, environment, replica, running

pytestmark = pytest.mark.skipif(not os.environ.get("FLEET"), reason="asked for by FLEET=1")
__all__ = ["environment"]
SAILOR = ROOT / "qwen2vl_serve" / "demo" / "adapters" / "sailor"
TURNS = 3
BLOCK = 32
"""``engine.block_size`` of the demo profile: what is known of a prompt is whole blocks."""


@pytest.fixture(scope="module")
def fleet(environment: object) -> Iterator[FleetProcess]:
    with running(
        environment,  # type: ignore[arg-type]
        profile="demo",
        set=["files.max_files=0", f"adapters.lora_modules.sailor={SAILOR}"],
        replicas=2,
    ) as process:
        yield process


def circle(colour: str, margin: int) -> list[dict[str, Any]]:
    """A conversation about a picture of a circle."""
    image = Image.new("RGB", (224, 224), "white")
    ImageDraw.Draw(image).ellipse((margin, margin, 224 - margin, 224 - margin), fill=colour)
    held = io.BytesIO()
    image.save(held, "PNG")
    url = "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()
    picture = {"type": "image_url", "image_url": {"url": url}}
    words = {"type": "text", "text": "What colour is the circle?"}
    return [{"role": "user", "content": [picture, words]}]


def figures(fleet: FleetProcess, name: str, labels: str = "") -> Counter[str]:
    """A figure of each replica."""
    sample = re.compile(rf'{name}\{{replica="([^"]+)"[^}}]*{labels}[^}}]*\}} (\S+)')
    told = Counter[str]()
    for replica_name, value in sample.findall(fleet.get("/metrics").text):
        told[replica_name] += int(float(value))
    told.pop("gateway", None)
    return told


def test_an_adapter_is_on_every_replica_and_its_conversations_stay(fleet: FleetProcess) -> None:
    """16 conversations of three turns, half with the adapter, several at once: each stays where its
    beginning is known, and none is answered by the other model."""
    parents = {one["id"]: one.get("parent") for one in fleet.get("/v1/models").json()["data"]}
    assert parents["sailor"] == "qwen2-vl-demo"
    asked = list(product(("demo", "sailor"), ("red", "green", "blue", "yellow"), (20, 60)))
    where: dict[Any, set[str]] = {one: set() for one in asked}
    counted = Counter[str]()

    def ask(model: str, colour: str, margin: int) -> None:
        answer = fleet.ask(
            messages=circle(colour, margin), model=model, temperature=0, max_tokens=16
        )
        said = content(answer)
        assert said.startswith("Aye!") == (model == "sailor"), said
        assert colour in said
        where[model, colour, margin].add(replica(answer))
        counted[replica(answer)] += model == "sailor"

    before = figures(fleet, "vllm:prefix_cache_hits_total")
    begun = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(TURNS):
            list(pool.map(lambda one: ask(*one), asked))
    seconds = time.monotonic() - begun
    hits = figures(fleet, "vllm:prefix_cache_hits_total")
    hits.subtract(before)
    print(f"\n{TURNS * len(asked)} answers in {seconds:.1f} s, of sailor {dict(counted)}", end="; ")
    print(f"known prompt tokens {dict(hits)}", flush=True)
    assert {len(names) for names in where.values()} == {1}
    assert len(set.union(*where.values())) == 2
    assert set(figures(fleet, "qwen2vl_adapters").values()) == {1}
    assert +figures(fleet, "qwen2vl_adapter_requests_total", 'adapter="sailor"') == +counted
    assert hits.total() >= BLOCK * len(asked) * (TURNS - 1)


def test_an_adapter_is_not_loaded_into_one_of_the_replicas(fleet: FleetProcess) -> None:
    """The gateway says where a fleet's adapters come from, and no replica knows the name."""
    body = {"lora_name": "other", "lora_path": str(SAILOR)}
    answer = requests.post(fleet.root + "/v1/load_lora_adapter", json=body, timeout=30)
    assert answer.status_code == 404
    assert "adapters.lora_modules" in answer.json()["error"]["message"]
    for number in range(8):
        error = fleet.ask(f"conversation {number}", model="other").json()["error"]
        assert error["code"] == "model_not_found"
