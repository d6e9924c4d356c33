"""How the processes of an engine on CPUs begin: copies of one that has imported vLLM."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import requests

from tests.conftest import ServerProcess


def gone(processes: list[psutil.Process], seconds: float = 60) -> bool:
    """Whether all have ended, or do so before long."""
    left = psutil.wait_procs(processes, seconds)[1]
    return all(one.status() == psutil.STATUS_ZOMBIE for one in left)


def test_cores_are_copies_and_end_with_their_server(
    launch_server: Callable[..., ServerProcess],
) -> None:
    """Between server and core stands what forks: it holds no port, and no SIGTERM ends it.

    Where the server is killed nothing is left of it, and its port is free.
    """
    server = launch_server("--profile", "demo")
    server.wait_ready()
    port = urlsplit(server.url).port
    process = psutil.Process(server.process.pid)
    forks = next(one for one in process.children() if "Forks" in one.name())
    (core,) = forks.children()
    assert "EngineCore" in core.name()
    for copy in (forks, core):
        assert all(one.laddr.port != port for one in copy.net_connections("inet"))
    forks.send_signal(signal.SIGTERM)
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    answer = requests.post(f"{server.url}/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200
    assert forks.is_running()
    everything = [process, *process.children(recursive=True)]
    os.kill(process.pid, signal.SIGKILL)
    server.process.wait(60)
    assert gone(everything)
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_signal_to_the_whole_group_still_drains(
    launch_server: Callable[..., ServerProcess],
) -> None:
    """As some service managers send it: what is under way is finished, and the status is 0."""
    server = launch_server("--profile", "demo")
    server.wait_ready()
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "ignore_eos": True}
    url = f"{server.url}/chat/completions"
    stream = requests.post(url, json=body | {"max_tokens": 100}, stream=True, timeout=60)
    os.killpg(server.process.pid, signal.SIGTERM)
    assert stream.text.endswith("data: [DONE]\n\n")
    assert server.ended() == 0


def test_kernels_are_looked_for_in_all_modules_but_llvmlites(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those are back afterwards, also where looking fails."""
    from qwen2vl_serve.vllm_engine import forking

    for name in ("llvmlite", "llvmlite.binding", "llvmlite_of_another"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    before = dict(sys.modules)
    seen: list[Any] = []

    def rebind(overrides: Any) -> None:
        seen.extend((overrides, {name for name in sys.modules if name.startswith("llvmlite")}))
        raise ValueError("failed")

    with pytest.raises(ValueError, match="failed"):
        forking._but_for_llvmlite(rebind, "these")
    assert seen == ["these", {"llvmlite_of_another"}]
    assert sys.modules.keys() == before.keys()


@pytest.mark.parametrize(("cpu", "python"), [(False, (3, 11, 7)), (True, (3, 14, 0))])
def test_on_cards_and_on_later_pythons_nothing_is_forked(
    cpu: bool, python: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There vLLM starts its processes as it does by itself."""
    from qwen2vl_serve.vllm_engine import forking

    monkeypatch.setattr(forking, "current_platform", SimpleNamespace(is_cpu=lambda: cpu))
    monkeypatch.setattr(forking.sys, "version_info", python)
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    way = forking.engine_utils.get_mp_context
    forking.share_imports()
    assert forking.engine_utils.get_mp_context is way


def test_a_process_takes_the_environment_of_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the process that forked it, which knows nothing of what was set since."""
    from qwen2vl_serve.vllm_engine import forking

    found: list[str | None] = []
    process = forking._Process(target=lambda: found.append(os.environ.get("SET_LATER")))
    monkeypatch.setattr(forking.context.ForkServerProcess, "start", lambda _: None)
    monkeypatch.setenv("SET_LATER", "before the start")
    process.start()
    monkeypatch.setenv("SET_LATER", "after it")
    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    try:
        process.run()
    finally:
        os.environ.clear()
        os.environ.update(before)
        signal.signal(signal.SIGTERM, handler)
    assert found == ["before the start"]
