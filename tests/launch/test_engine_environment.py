"""What vLLM's processes find in their environment, and whose word goes before."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
import uuid
from pathlib import Path

import pytest

from qwen2vl_serve.launch.engine_environment import engine_environment, engine_sockets
from qwen2vl_serve.profile import load_profile

SOCKETS = "VLLM_RPC_BASE_PATH"


def test_engines_are_spawned_as_those_of_vllm_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """On cards vLLM would fork a process with threads; an operator's own word goes before."""
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    profile = load_profile("single-3090")
    assert engine_environment(profile)["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    assert "VLLM_WORKER_MULTIPROC_METHOD" not in engine_environment(profile)


@pytest.mark.parametrize(("build", "bound"), [("cpu", "128"), ("cuda", None)])
def test_the_code_that_a_cpu_keeps_for_shapes_is_bounded(
    monkeypatch: pytest.MonkeyPatch, build: str, bound: str | None
) -> None:
    """A worker that meets prompts of every length stays as large as it is."""
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.setattr("qwen2vl_serve.machine.installed.vllm_build", lambda: build)
    profile = load_profile("demo")
    assert engine_environment(profile).get("ONEDNN_PRIMITIVE_CACHE_CAPACITY") == bound
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    assert "ONEDNN_PRIMITIVE_CACHE_CAPACITY" not in engine_environment(profile)


@pytest.mark.parametrize(
    ("build", "settings", "bound"),
    [
        ("cpu", [], "nobind"),
        ("cpu", ["engine.tensor_parallel_size=2"], "nobind"),
        ("cpu", ["hardware.cpu_threads_bind=3"], "3"),
        ("cuda", [], None),
    ],
)
def test_replicas_of_a_machine_are_not_bound_to_the_same_cpus(
    monkeypatch: pytest.MonkeyPatch, build: str, settings: list[str], bound: str | None
) -> None:
    """vLLM's choice is the same for each; where the profile names them it is obeyed."""
    variable = "VLLM_CPU_OMP_THREADS_BIND"
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("qwen2vl_serve.machine.installed.vllm_build", lambda: build)
    profile = load_profile("demo", settings)
    assert engine_environment(profile, replica=True).get(variable) == bound
    assert engine_environment(profile).get(variable) != "nobind"
    monkeypatch.setenv(variable, "0,1")
    assert variable not in engine_environment(profile, replica=True)


@pytest.mark.parametrize(
    ("build", "eager", "off"), [("cpu", True, True), ("cpu", False, False), ("cuda", True, False)]
)
def test_an_eager_engine_on_a_cpu_compiles_nothing(
    monkeypatch: pytest.MonkeyPatch, build: str, eager: bool, off: bool
) -> None:
    """Not even at the first log probabilities; the operator's own word goes before."""
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    monkeypatch.setattr("qwen2vl_serve.machine.installed.vllm_build", lambda: build)
    profile = load_profile("demo", [f"engine.enforce_eager={str(eager).lower()}"])
    assert ("TORCH_COMPILE_DISABLE" in engine_environment(profile)) == off
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "0")
    assert "TORCH_COMPILE_DISABLE" not in engine_environment(profile)


def test_vllm_asks_no_hub_for_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would import a package for ModelScope that our own downloads do not need."""
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "True")
    assert engine_environment(load_profile("demo"))["VLLM_USE_MODELSCOPE"] == "False"
    for setting in ("model=someone/model", "model.tokenizer=someone/tokenizer"):
        assert "VLLM_USE_MODELSCOPE" not in engine_environment(load_profile("demo", [setting]))


def test_sockets_have_a_folder_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its owner's alone, and gone at the end with what is in it; an operator's own is used."""
    monkeypatch.delenv(SOCKETS, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    with engine_sockets():
        folder = Path(os.environ[SOCKETS])
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "socket").touch()
    assert (folder.exists(), SOCKETS in os.environ) == (False, False)
    monkeypatch.setenv(SOCKETS, str(tmp_path))
    with engine_sockets():
        assert os.environ[SOCKETS] == str(tmp_path)
    assert tmp_path.exists()


@pytest.mark.parametrize(("length", "own"), [(55, True), (75, False)])
def test_a_path_that_no_socket_could_have_is_not_made(
    monkeypatch: pytest.MonkeyPatch, length: int, own: bool
) -> None:
    """Where the folder for temporary files has a long name, vLLM uses that one as it did."""
    monkeypatch.delenv(SOCKETS, raising=False)
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        base = Path(f"{short}/".ljust(length, "x"))
        base.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(base))
        with engine_sockets():
            assert (SOCKETS in os.environ) == own
            if own:
                with socket.socket(socket.AF_UNIX) as one:
                    one.bind(f"{os.environ[SOCKETS]}/{uuid.uuid4()}")
        assert list(base.iterdir()) == []
