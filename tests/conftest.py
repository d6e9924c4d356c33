"""Fixtures: the app over a scripted engine, and the real server on vLLM's CPU engine."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import settings
from requests.adapters import HTTPAdapter

from tests.hostile.sites import Sites, sites
from tests.ports import quiet_port

ENGINES = {
    "test_engines_real", "test_install", "test_lora_real", "test_quantised_real", "test_reference",
    "test_reference_later", "test_rehearsal", "test_vllm_engine", "test_vllm_forking",
}  # fmt: skip
"""Files that start engines of their own."""

SHIPPED = Path(__file__).parents[1] / "qwen2vl_serve" / "demo" / "adapters"
HELD = 6
"""So many adapters at a time are held by ``lora_server``."""

BOOT_SECONDS = 300
"""A 2-core machine under load boots the demo model in about 20 to 60 s."""


def pytest_configure() -> None:
    """Judge no example by its time: a shared machine may stop for seconds in any of them.

    Nor by its environment.
    """
    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")
    # What an operator of this machine has set would change what servers do and plans say.
    ours = [name for name in os.environ if name.startswith("QWEN2VL_")]
    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_USE_MODELSCOPE", *ours):
        os.environ.pop(name, None)
    # Proxies are for what lies beyond this machine.
    for name in ("no_proxy", "NO_PROXY"):
        told = os.environ.get(name)
        os.environ[name] = ",".join(filter(None, [told, "127.0.0.1,127.0.0.2,localhost"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines of a file's own come first, while the session's does not take its memory yet."""
    order = {}
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        own = item.path.stem in ENGINES
        order[item] = (not own or "server" in fixtures, "fetching_server" in fixtures)
    items.sort(key=order.__getitem__)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several workers one has all files that need an engine; the others share the rest.

    Marks of groups would say so test by test, but pytest 9.2 keeps them from xdist 3.8.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByEngine(LoadScopeScheduling):  # type: ignore[misc]  # xdist is there when this is called
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "engine" if needs_engine(config.rootpath / file) else file

    return ByEngine(config, log)


@cache
def needs_engine(file: Path) -> bool:
    """Whether tests of a file start engines, or ask that of the session."""
    asks = re.search(r"\bserver: ServerProcess|\bfetching_server\b", file.read_text("utf-8"))
    return file.stem in ENGINES or asks is not None


@dataclass
class ServerProcess:
    """A `serve` command under test: its address, its lines, its exit."""

    process: subprocess.Popen[str]
    reader: threading.Thread
    lines: list[str] = field(default_factory=list)
    api_key: str | None = None
    url: str = ""
    """Base address for OpenAI clients, ending in /v1."""

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def wait_ready(self, seconds: float = BOOT_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for line in list(self.lines):
                if found := re.match(r"ready\s+(\S+/v1)", line):
                    self.url = found[1]
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.process.kill()
        pytest.fail("the server did not start:\n" + "\n".join(self.lines[-30:]))

    def metric(self, line_start: str) -> float:
        """Return the value of the first metric line that begins with ``line_start``."""
        with requests.Session() as session:
            # Where this process stands still before it has asked, the server closes.
            session.mount("http://", HTTPAdapter(max_retries=3))
            text = session.get(f"{self.root}/metrics", timeout=60).text
        for line in text.splitlines():
            if line.startswith(line_start):
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"no metric {line_start}")

    def ended(self, seconds: float = 60) -> int:
        """Wait for its end and its last line; return the exit status."""
        status = self.process.wait(seconds)
        self.reader.join(seconds)
        return status

    def stop(self, seconds: float = 120) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.ended(seconds)


def start_server(
    *arguments: str,
    environment: dict[str, str] | None = None,
    command: list[str] | None = None,
    stdin: int = subprocess.DEVNULL,
) -> ServerProcess:
    """Start `serve` with a free port and collect its lines; does not wait for readiness."""
    words = command or [sys.executable, "-m", "qwen2vl_serve.cli", "serve"]
    process = subprocess.Popen(
        [*words, "--port", "0", *arguments],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(environment or {})},
        start_new_session=True,
    )
    lines: list[str] = []

    def collect() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))  # noqa: PERF401  # others look at it meanwhile

    reader = threading.Thread(target=collect, daemon=True)
    reader.start()
    return ServerProcess(process, reader, lines)


def end(server: ServerProcess) -> None:
    """Leave no process of the server behind, however the test went."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait(60)


@contextlib.contextmanager
def demo_server(*settings: str, key: str | None = None) -> Iterator[ServerProcess]:
    """The demo profile under ``settings`` on the real engine, ready; at the end it stops with 0."""
    environment = None if key is None else {"QWEN2VL_API_KEY": key}
    words = (f"--set={one}" for one in settings)
    running = start_server("--profile", "demo", *words, environment=environment)
    running.api_key = key
    try:
        running.wait_ready()
        yield running
        assert running.stop() == 0, "\n".join(running.lines[-10:])
    finally:
        end(running)


@pytest.fixture(scope="session")
def hostile_sites() -> Iterator[Sites]:
    """The sites on loopback that hostile addresses lead to."""
    with sites() as both:
        yield both


@pytest.fixture(scope="session")
def server(
    hostile_sites: Sites, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """The demo profile on the real engine, with all that is off by default; one a session.

    It may fetch from one address of loopback, and loses patience with slow sites sooner.
    """
    settings = (
        *hostile_sites.settings(),
        "media.download_seconds=5",
        "limits.header_seconds=15",
        "server.tools=experimental",
        "batches.enabled=true",
        f"batches.folder={tmp_path_factory.mktemp('batches')}",
    )
    with demo_server(*settings) as running:
        yield running


@pytest.fixture(scope="session")
def fetching_server() -> Iterator[tuple[ServerProcess, int]]:
    """Another on the real engine: it wants a key, and may fetch from one port of this machine."""
    port = quiet_port()
    settings = (
        "media.allowed_networks=[127.0.0.1/32]",
        f"media.allowed_ports=[80, 443, {port}]",
        "server.tools=experimental",
    )
    with demo_server(*settings, key="sk-your-key") as running:
        yield running, port


@pytest.fixture(scope="session")
def loadable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder from which ``lora_server`` may load."""
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="session")
def lora_server(loadable: Path) -> Iterator[ServerProcess]:
    """The demo model with its four adapters on the real engine, and room for two more."""
    names = ("sailor", "mirror", "clerk", "seller")
    modules = json.dumps({name: str(SHIPPED / name) for name in names})
    fields = [
        "server.tools=experimental",
        f"adapters.lora_modules={modules}",
        f"adapters.allowed_paths=[{loadable}]",
        f"engine.max_cpu_loras={HELD}",
    ]
    with demo_server(*fields, key="the-operators-key") as running:
        yield running


@pytest.fixture
def launch_server() -> Iterator[Callable[..., ServerProcess]]:
    """Start servers of a test's own; all are gone when the test ends."""
    started: list[ServerProcess] = []

    def launch(*arguments: str, **options: object) -> ServerProcess:
        one = start_server(*arguments, **options)  # type: ignore[arg-type]
        started.append(one)
        return one

    yield launch
    for one in started:
        end(one)


@pytest.fixture(scope="session")
def pictures() -> Path:
    """The folder of the example pictures that ship with the client."""
    return Path(__file__).parents[1] / "clients" / "examples" / "pictures"


@pytest.fixture(scope="session")
def red_circle(pictures: Path) -> str:
    """A picture of those as a ``data:`` URL."""
    data = base64.b64encode((pictures / "red_circle.jpg").read_bytes()).decode()
    return f"data:image/jpeg;base64,{data}"


@pytest.fixture(scope="session")
def compiled() -> None:
    """What resizes is compiled before, as the launcher does: seconds on a busy machine."""
    from qwen2vl_serve.media import resample

    resample.equals_pillow()
