"""A fleet on a real Ray cluster on loopback, over scripted engines: three replicas, one address.

``FLEET=1 pytest tests/test_fleet.py`` runs it. It takes an environment with Ray (70 MB) and several
minutes, and on busy cores Ray gives up its start; what needs no cluster is tested each time in
``test_fleet_*.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml

from bench.traffic import drawn_jpeg
from tests.fleet_environment import ray_environment
from tests.thirdparty.environments import Environment, NoNetwork

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not os.environ.get("FLEET"), reason="asked for by FLEET=1")

START_SECONDS = 900
PACKAGES = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'clients'}"}
CHAT = "/v1/chat/completions"
REPLICAS = 3


@dataclass
class FleetProcess:
    process: subprocess.Popen[str]
    root: str
    lines: list[str] = field(default_factory=list)
    _said: threading.Condition = field(default_factory=threading.Condition)

    def listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._said:
                self.lines.append(line.rstrip())
                self._said.notify_all()

    def ready(self, times: int) -> None:
        with self._said:
            if not self._said.wait_for(lambda: self.lines.count("ready") >= times, START_SECONDS):
                pytest.fail("the fleet did not start:\n" + "\n".join(self.lines[-30:]))

    def deploy(self, **options: Any) -> None:
        """Start everything anew, one after the other, and return when that is done."""
        before = self.lines.count("ready")
        assert self.process.stdin is not None
        self.process.stdin.write(f"deploy {json.dumps(options)}\n")
        self.process.stdin.flush()
        self.ready(before + 1)

    def ask(self, words: str = "Hello", **fields: Any) -> requests.Response:
        body = {"messages": [{"role": "user", "content": words}], **fields}
        return requests.post(self.root + CHAT, json=body, timeout=60)

    def get(self, path: str, **options: Any) -> requests.Response:
        return requests.get(self.root + path, timeout=30, **options)

    def processes(self) -> list[psutil.Process]:
        """The replicas' processes, by the names that Ray gives them."""
        mine = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in mine if "ServeReplica:fleet:Replicas" in _title(one)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def content(answer: requests.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def environment() -> Environment:
    try:
        return ray_environment()
    except NoNetwork as error:
        pytest.skip(f"Ray cannot be installed here: {str(error)[:200]}")


@contextlib.contextmanager
def running(environment: Environment, **options: Any) -> Iterator[FleetProcess]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [environment.python, "-m", "tests.fleet_process", str(port), json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=PACKAGES,
        start_new_session=True,
    )
    fleet = FleetProcess(process, f"http://127.0.0.1:{port}")
    threading.Thread(target=fleet.listen, daemon=True).start()
    try:
        fleet.ready(1)
        yield fleet
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        for one in children:
            with contextlib.suppress(psutil.Error):
                one.kill()
        process.kill()


@pytest.fixture(scope="module")
def fleet(
    environment: Environment, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FleetProcess]:
    folder = tmp_path_factory.mktemp("files")
    with running(
        environment,
        profile="demo",
        seam="tests.fleet_engine",
        set=[f"files.folder={folder}"],
        replicas=REPLICAS,
        replica_cpus=0.5,
    ) as process:
        yield process


def replica(answer: requests.Response) -> str:
    return answer.headers["x-qwen2vl-replica"]


def test_a_conversation_and_a_picture_stay_where_they_are_cached(fleet: FleetProcess) -> None:
    """Of 30 conversations every turn but the first is a hit, and all replicas have some."""
    where: dict[str, set[str]] = {}
    found = Counter[str]()
    for turn in range(3):
        for number in range(30):
            messages = [{"role": "user", "content": f"conversation {number}"}]
            for _ in range(turn):
                messages += [
                    {"role": "assistant", "content": "a"},
                    {"role": "user", "content": "b"},
                ]
            answer = fleet.ask(messages=messages)
            found[content(answer).split()[0]] += 1
            where.setdefault(str(number), set()).add(replica(answer))
    assert found == {"miss": 30, "hit": 60}
    assert {len(names) for names in where.values()} == {1}
    assert len(set.union(*where.values())) == REPLICAS


def test_it_is_one_server_to_its_clients(fleet: FleetProcess) -> None:
    """Models, readiness, ids, streams, errors and figures are as of one."""
    assert fleet.get("/v1/models").json()["data"][0]["id"] == "demo"
    assert fleet.get("/health/ready").json() == {"status": "ready"}
    answer = requests.post(
        fleet.root + CHAT,
        json={"messages": [{"role": "user", "content": "Hello"}], "stream": True},
        headers={"x-request-id": "mine"},
        timeout=30,
    )
    assert answer.headers["x-request-id"] == "mine"
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")
    wrong = fleet.ask(temperature=9)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "temperature")
    assert fleet.ask(model="nobody").json()["error"]["code"] == "model_not_found"
    assert fleet.get("/nowhere").json()["error"]["code"] == "not_found"
    told = set(re.findall(r'qwen2vl_requests_total\{replica="([^"]+)"', fleet.get("/metrics").text))
    assert len(told) == REPLICAS + 1, "each replica, and the gateway"


def test_a_stream_comes_as_it_is_made(fleet: FleetProcess) -> None:
    """40 words, 0.05 s apart: the first is there long before the last."""
    body = {"messages": [{"role": "user", "content": "long one"}], "stream": True}
    with requests.post(fleet.root + CHAT, json=body, stream=True, timeout=30) as answer:
        chunks = (line for line in answer.iter_lines() if line.startswith(b"data: {"))
        times = [time.monotonic() for _ in chunks]
    assert len(times) == 42
    assert times[-1] - times[0] > 1.0


def test_an_upload_is_found_by_every_replica(fleet: FleetProcess) -> None:
    """Asked until each replica has described it; a picture by its id is answered."""
    form = {"files": {"file": ("a.jpg", drawn_jpeg(1))}, "data": {"purpose": "vision"}}
    uploaded = requests.post(fleet.root + "/v1/files", timeout=30, **form)  # type: ignore[arg-type]
    assert uploaded.status_code == 200, uploaded.text
    file_id = uploaded.json()["id"]
    asked = set()
    deadline = time.monotonic() + 60
    while len(asked) < REPLICAS and time.monotonic() < deadline:
        with ThreadPoolExecutor(6) as pool:
            for answer in pool.map(lambda _: fleet.get(f"/v1/files/{file_id}"), range(6)):
                assert answer.status_code == 200, answer.text
                asked.add(replica(answer))
    picture = {"type": "image_url", "image_url": {"file_id": file_id}}
    words = {"type": "text", "text": "What is it?"}
    content(fleet.ask(messages=[{"role": "user", "content": [picture, words]}]))


def test_a_client_that_leaves_ends_its_generation(fleet: FleetProcess) -> None:
    """The replica's log has it as left, and no gauge holds it."""
    body = {"messages": [{"role": "user", "content": "long leaving"}], "stream": True}
    with requests.post(fleet.root + CHAT, json=body, stream=True, timeout=30) as answer:
        next(answer.iter_lines())
    ended = r'qwen2vl_requests_total\{replica="(?!gateway)[^"]*",.*status="499"\} 1'
    deadline = time.monotonic() + 20
    while not re.search(ended, fleet.get("/metrics").text):
        assert time.monotonic() < deadline
        time.sleep(0.2)


class Load:
    """Clients that ask again and again until told to stop; what each answer was."""

    def __init__(
        self, fleet: FleetProcess, clients: int = 8, words: str = "client", **fields: Any
    ) -> None:
        self.fleet = fleet
        self.words = words
        self.slowest = 0.0
        self.fields = fields
        self.stopped = threading.Event()
        self.statuses = Counter[Any]()
        self.pool = ThreadPoolExecutor(clients)
        self.work = [self.pool.submit(self._ask, number) for number in range(clients)]

    def _ask(self, client: int) -> None:
        number = 0
        while not self.stopped.is_set():
            number += 1
            begun = time.monotonic()
            try:
                answer = self.fleet.ask(f"{self.words} {client}, question {number}", **self.fields)
                self.statuses[answer.status_code if answer.status_code != 200 else "ok"] += 1
                if answer.status_code != 200:
                    self.statuses[answer.text[:200]] += 1
            except requests.RequestException as error:
                self.statuses[repr(error)[:200]] += 1
            self.slowest = max(self.slowest, time.monotonic() - begun)

    def stop(self) -> Counter[Any]:
        self.stopped.set()
        for one in self.work:
            one.result(120)
        return self.statuses


def eventually(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the time allowed"
        time.sleep(0.2)


def test_a_killed_replica_loses_no_request_that_had_not_begun(fleet: FleetProcess) -> None:
    """8 clients, SIGKILL to a replica under way: only answers; a stream ends with an error."""
    load = Load(fleet)
    time.sleep(1)
    victims: Sequence[psutil.Process] = fleet.processes()
    assert len(victims) == REPLICAS
    body = {"messages": [{"role": "user", "content": "long victim"}], "stream": True}
    with requests.post(fleet.root + CHAT, json=body, stream=True, timeout=60) as answer:
        lines = answer.iter_lines()
        first = [next(lines) for _ in range(4)]
        words = re.search(rb'"content": ?"(\d+) "', b"".join(first))
        assert words is not None, first
        psutil.Process(int(words[1])).send_signal(signal.SIGKILL)
        rest = [line for line in lines if line]
    assert b"[DONE]" not in rest[-1]
    assert json.loads(rest[-1].removeprefix(b"data: "))["error"]["code"] == "engine_unavailable"
    time.sleep(2)
    statuses = load.stop()
    assert set(statuses) == {"ok"}, statuses
    # Ray starts another in its place.
    eventually(lambda: len(fleet.processes()) == REPLICAS)


def test_a_new_version_is_rolled_out_without_an_error(fleet: FleetProcess) -> None:
    """Every process is another afterwards; clients notice nothing."""
    before = {one.pid for one in fleet.processes()}
    load = Load(fleet, 4)
    fleet.deploy()
    eventually(lambda: not before & {one.pid for one in fleet.processes()})
    time.sleep(1)
    statuses = load.stop()
    assert set(statuses) == {"ok"}, statuses
    assert fleet.get("/health/ready").status_code == 200


def test_both_commands_called_serve_can_be_had(environment: Environment) -> None:
    """``qwen2vl-serve serve`` is ours and ``python -m ray.serve.scripts`` Ray's, wherever."""

    def said(*words: str) -> str:
        done = subprocess.run(
            [environment.python, "-m", *words, "--help"],
            capture_output=True, text=True, cwd=ROOT, timeout=120, env=PACKAGES,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "--profile" in said("qwen2vl_serve.cli", "serve")
    assert "deploy" in said("ray.serve.scripts")


def test_a_fleet_that_others_reach_without_keys_is_not_made(
    environment: Environment, tmp_path: Path
) -> None:
    """Deploying it fails, before a replica starts."""
    program = (
        "from qwen2vl_serve.fleet.application import fleet\n"
        "fleet({'profile': 'demo', 'set': ['files.max_files=0', 'server.host=0.0.0.0']})\n"
    )
    done = subprocess.run(
        [environment.python, "-c", program],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
        env={**PACKAGES, "XDG_CONFIG_HOME": str(tmp_path), "QWEN2VL_API_KEY": ""},
    )  # fmt: skip
    assert done.returncode == 1
    assert "PreflightError: server.host: 0.0.0.0 without a key" in done.stderr


@pytest.mark.parametrize(
    "file", sorted((ROOT / "deploy" / "ray").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_files_are_what_ray_and_we_read(
    environment: Environment, file: Path, tmp_path: Path
) -> None:
    """Ray's schema takes each, and Ray builds its application where the file of keys is there."""
    keys, deployed = tmp_path / "keys", tmp_path / file.name
    keys.write_text("sk-1\n")
    deployed.write_text(file.read_text().replace("/etc/qwen2vl/keys", str(keys)))
    program = (
        "import sys, yaml\n"
        "from ray.serve._private import api\n"
        "from ray.serve.schema import ServeDeploySchema\n"
        "from qwen2vl_serve.fleet.application import fleet\n"
        "read = ServeDeploySchema(**yaml.safe_load(open(sys.argv[1])))\n"
        "build = api.call_user_app_builder_with_args_if_necessary\n"
        "build(fleet, read.applications[0].args)\n"
    )
    done = subprocess.run(
        [environment.python, "-c", program, deployed],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
        env=PACKAGES,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(file.read_text())["http_options"]["port"] == 8000
