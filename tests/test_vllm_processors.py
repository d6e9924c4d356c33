"""The processors that an engine's worker on CPUs computes on; ``test_vllm_engine`` serves by it."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is done, in its order, by a process that may use two processors."""
    from qwen2vl_serve.vllm_engine import processors

    done: list[Any] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cpus: done.append(set(cpus)))
    monkeypatch.setattr(processors.torch, "set_num_threads", done.append)
    return done


def choose(monkeypatch: pytest.MonkeyPatch, lists: list[list[int]]) -> None:
    """Let vLLM choose these for the workers of an engine."""
    from qwen2vl_serve.vllm_engine import processors

    class Manager:
        def __init__(self, _: object) -> None:
            self.cpu_lists = lists

    monkeypatch.setattr(processors, "OMPProcessManager", Manager)


@pytest.mark.parametrize(
    ("chosen", "bound"),
    [
        ([[0]], [{0}, 1]),
        ([[1, 7]], [{1}, 2]),  # as OpenMP, which passes over what is not there
        ([[7]], [1]),
        ([], []),  # nobind
    ],
)
def test_an_engine_of_one_process_binds_itself_as_a_worker_would_be_bound(
    done: list[Any], monkeypatch: pytest.MonkeyPatch, chosen: list[list[int]], bound: list[Any]
) -> None:
    """To those of the processors chosen by vLLM that there are, before anything is computed."""
    from qwen2vl_serve.vllm_engine import within_core

    choose(monkeypatch, chosen)
    parent = within_core.UniProcExecutor
    monkeypatch.setattr(parent, "_init_executor", lambda _: done.append("worker"))
    executor = object.__new__(within_core.WithinCore)
    executor.vllm_config = None
    executor._init_executor()
    assert done == [*bound, "worker"]


def test_each_of_several_workers_takes_its_own(
    done: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its rank; those of several stages as well."""
    from qwen2vl_serve.vllm_engine import processors, staged_worker

    choose(monkeypatch, [[0], [1]])
    monkeypatch.setattr(
        processors.CPUWorker, "__init__", lambda _, *given, **named: done.append((given, named))
    )
    processors.BoundWorker("config", 1, "more", rank=1)
    staged_worker.StagedWorker("config", 0)
    assert done == [{1}, 1, (("config", 1, "more"), {"rank": 1}), {0}, 1, (("config", 0), {})]
