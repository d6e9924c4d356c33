"""The processors that an engine without a worker computes on; ``test_vllm_engine`` serves by it."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")


@pytest.mark.parametrize(
    ("chosen", "bound", "threads"),
    [
        ([[0]], [{0}], [1]),
        ([[1, 7]], [{1}], [2]),  # as OpenMP, which passes over what is not there
        ([[7]], [], [1]),
        ([], [], []),  # nobind
    ],
)
def test_it_binds_itself_as_a_worker_would_be_bound(
    monkeypatch: pytest.MonkeyPatch, chosen: list[list[int]], bound: Any, threads: Any
) -> None:
    """To those of the processors chosen by vLLM that there are, before anything is computed."""
    from qwen2vl_serve.vllm_engine import within_core

    done: list[Any] = []
    counts: list[int] = []

    class Manager:
        def __init__(self, _: object) -> None:
            self.cpu_lists = chosen

    monkeypatch.setattr(within_core, "OMPProcessManager", Manager)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cpus: done.append(set(cpus)))
    monkeypatch.setattr(within_core.torch, "set_num_threads", counts.append)
    parent = within_core.UniProcExecutor
    monkeypatch.setattr(parent, "_init_executor", lambda _: done.append("worker"))
    executor = object.__new__(within_core.WithinCore)
    executor.vllm_config = None
    executor._init_executor()
    assert done == [*bound, "worker"]
    assert counts == threads
