"""``deploy/grafana``: every panel and alert asked of a real Prometheus that scrapes the server."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import ServerProcess
from tests.deploy.debian import program
from tests.markdown import ROOT
from tests.ports import quiet_port
from tests.served import eventually
from tests.test_vllm_engine import asked, picture

FOLDER = ROOT / "deploy" / "grafana"
DASHBOARD = json.loads((FOLDER / "dashboards" / "qwen2vl-serve.json").read_text("utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ALERTS = yaml.safe_load((FOLDER / "alerts.yml").read_text("utf-8"))["groups"][0]["rules"]
NAME = re.compile(r"\b(?:vllm:|qwen2vl_|process_)\w+")
# Only there once it has happened.
RARE = {"qwen2vl_admission_refused_total"}


def expressions() -> dict[str, str]:
    """Each expression of the dashboard by its panel, the variables filled in as Grafana does."""
    found = {}
    for panel in PANELS:
        for target in panel["targets"]:
            text = target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")
            found[f"{panel['title']} {target['refId']}"] = text
    return found


def settings(folder: Path, target: str) -> Path:
    """Our file with another target, and with its other files in ``folder``."""
    text = (FOLDER / "prometheus.yml").read_text("utf-8")
    text = text.replace("server:8000", target).replace("/etc/prometheus", str(folder))
    (folder / "key").write_text("")
    (folder / "alerts.yml").write_text((FOLDER / "alerts.yml").read_text("utf-8"))
    path = folder / "prometheus.yml"
    path.write_text(text.replace("scrape_interval: 15s", "scrape_interval: 1s"))
    return path


class Prometheus:
    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}/api/v1"

    def query(self, expression: str) -> list[Any]:
        answer = requests.get(f"{self.root}/query", params={"query": expression}, timeout=60).json()
        assert answer["status"] == "success", f"{expression}: {answer}"
        return list(answer["data"]["result"])


@pytest.fixture(scope="module")
def prometheus(
    server: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """Debian's Prometheus under our settings, after it has seen traffic come and go."""
    binary = program("prometheus", "prometheus")
    folder, port = tmp_path_factory.mktemp("prometheus"), quiet_port()
    words = [
        *(binary, f"--config.file={settings(folder, server.root.removeprefix('http://'))}"),
        *(f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"),
    ]
    log = (folder / "log").open("w")
    process = subprocess.Popen(words, stdout=log, stderr=log)
    one = Prometheus(port)
    try:
        deadline = time.monotonic() + 120
        while not _up(one):
            assert time.monotonic() < deadline, (folder / "log").read_text()
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.2)
        for _ in range(3):
            traffic(server)
            time.sleep(1.2)
        yield one
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def _up(one: Prometheus) -> bool:
    try:
        return bool(one.query("up == 1"))
    except requests.RequestException:
        return False


def traffic(server: ServerProcess) -> None:
    """Text and pictures, streamed and whole, an upload and a fault."""
    chat = f"{server.url}/chat/completions"
    for body in (
        {"messages": asked("Hello, who are you?"), "stream": True},
        {"messages": asked("What colour is the circle?", picture("red"))},
        {"messages": asked("What colour is the circle?", picture("blue")), "max_tokens": 8},
        {"messages": []},
    ):
        requests.post(chat, json=body, timeout=120)


def families(server: ServerProcess) -> set[str]:
    """Every name that a sample of ``/metrics`` can have, also of what has none yet."""
    text = requests.get(f"{server.root}/metrics", timeout=60).text
    endings = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}
    found = set()
    for family in text_string_to_metric_families(text):
        found |= {family.name + ending for ending in endings.get(family.type, ("",))}
    return found


def test_every_name_is_one_that_the_server_has(server: ServerProcess) -> None:
    """No panel and no alert asks for a metric that vLLM or this server does not know."""
    known = families(server)
    asked_for = [*expressions().values(), *(alert["expr"] for alert in ALERTS)]
    names = {name for text in asked_for for name in NAME.findall(text)}
    assert names <= known
    # The dashboard is about both.
    assert any(name.startswith("vllm:") for name in names)
    assert any(name.startswith("qwen2vl_") for name in names)


def test_every_panel_shows_something(prometheus: Prometheus) -> None:
    """Prometheus takes each expression and finds series for it after ordinary traffic."""

    def empty() -> list[str]:
        return [
            where
            for where, text in expressions().items()
            if not prometheus.query(text) and not RARE & set(NAME.findall(text))
        ]

    # A rate wants two scrapes of the server, and a busy one may miss some.
    with suppress(AssertionError):
        eventually(lambda: not empty(), 10)
    assert empty() == []


def test_every_panel_has_a_place_of_its_own() -> None:
    """Panels do not overlap, ids are unique, each target asks the chosen data source."""
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + column, place["y"] + row)
            for column in range(place["w"])
            for row in range(place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    sources = {target["datasource"]["uid"] for panel in PANELS for target in panel["targets"]}
    assert sources == {"${datasource}"}
    variables = {one["name"] for one in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "instance"}


def test_no_alert_rings_for_a_server_that_is_well(prometheus: Prometheus) -> None:
    """Every alert's expression is taken, and finds nothing that stays wrong with the demo server.

    A scrape that a busy machine missed is one, until the next.
    """

    def ringing() -> list[str]:
        return [alert["alert"] for alert in ALERTS if prometheus.query(alert["expr"])]

    with suppress(AssertionError):
        eventually(lambda: not ringing(), 10)
    assert ringing() == []


def test_the_settings_pass_promtool(tmp_path: Path) -> None:
    """Prometheus's own checker reads the scrape settings and the rules without a complaint."""
    promtool = program("promtool", "prometheus")
    done = subprocess.run(
        [promtool, "check", "config", settings(tmp_path, "127.0.0.1:8000")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"SUCCESS: {len(ALERTS)} rules found" in done.stdout


def test_the_provisioned_files_name_each_other() -> None:
    """Grafana finds the dashboards and Prometheus where compose puts them."""
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text("utf-8"))["services"]
    provider = yaml.safe_load((FOLDER / "provisioning/dashboards/qwen2vl-serve.yml").read_text())
    path = provider["providers"][0]["options"]["path"]
    assert f"../deploy/grafana/dashboards:{path}:ro" in compose["grafana"]["volumes"]
    source = yaml.safe_load((FOLDER / "provisioning/datasources/prometheus.yml").read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    mounts = [volume.split(":")[-2] for volume in compose["prometheus"]["volumes"]]
    named = re.findall(r"/etc/prometheus/\S+", (FOLDER / "prometheus.yml").read_text())
    assert set(named) < set(mounts)
    for volume in compose["prometheus"]["volumes"] + compose["grafana"]["volumes"]:
        if volume.startswith("../"):
            assert (ROOT / "docker" / volume.split(":")[0]).exists(), volume
