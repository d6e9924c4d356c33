"""The processors that a worker on CPUs computes on."""

from __future__ import annotations

import os
from typing import Any

import torch
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.worker.cpu_worker import CPUWorker


def compute_on_its_own(vllm_config: Any, local_rank: int) -> None:
    """Bind this thread, and those that it starts, to what vLLM chose for the worker of that rank.

    vLLM binds OpenMP's threads by variables that are read when a process loads it. A process that
    was forked has loaded it before, and one that schedules as well was not started for a worker.
    Where ``VLLM_CPU_OMP_THREADS_BIND`` is ``nobind`` nothing is bound.
    """
    lists = OMPProcessManager(vllm_config).cpu_lists
    if not lists:
        return
    chosen = lists[local_rank]
    # Those that are not there are passed over, as OpenMP does.
    if found := os.sched_getaffinity(0).intersection(chosen):
        os.sched_setaffinity(0, found)
    torch.set_num_threads(len(chosen))


class BoundWorker(CPUWorker):  # type: ignore[misc]  # vLLM ships no type information
    """vLLM's CPU worker in a process of its own, however that was started."""

    def __init__(self, vllm_config: Any, local_rank: int, *given: Any, **named: Any) -> None:
        compute_on_its_own(vllm_config, local_rank)
        super().__init__(vllm_config, local_rank, *given, **named)
