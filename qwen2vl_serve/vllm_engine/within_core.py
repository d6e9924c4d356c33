"""vLLM's executor for an engine of one worker on CPUs: no process beside the engine core's."""

from __future__ import annotations

import os

import torch
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.executor.uniproc_executor import UniProcExecutor


class WithinCore(UniProcExecutor):  # type: ignore[misc]  # vLLM ships no type information
    """Computes in the thread that schedules, on the processors that a worker would be bound to.

    vLLM's CPU platform starts a process for the worker, as it binds OpenMP's threads by variables
    that are read when a process starts (``platforms/cpu.py``). Threads inherit the binding of the
    one that starts them, so the same is had by binding that one before it computes anything.
    """

    def _init_executor(self) -> None:
        for chosen in OMPProcessManager(self.vllm_config).cpu_lists:
            # Those that are not there are passed over, as OpenMP does.
            if found := os.sched_getaffinity(0).intersection(chosen):
                # The threads of the sockets have started before and stay unbound.
                os.sched_setaffinity(0, found)
            torch.set_num_threads(len(chosen))
        super()._init_executor()
