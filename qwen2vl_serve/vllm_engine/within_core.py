"""vLLM's executor for an engine of one worker on CPUs: no process beside the engine core's."""

from __future__ import annotations

from vllm.v1.executor.uniproc_executor import UniProcExecutor

from qwen2vl_serve.vllm_engine.processors import compute_on_its_own


class WithinCore(UniProcExecutor):  # type: ignore[misc]  # vLLM ships no type information
    """Computes in the thread that schedules, on the processors that a worker would be bound to.

    vLLM's CPU platform starts a process for the worker, as it binds OpenMP's threads by variables
    that are read when a process starts (``platforms/cpu.py``). Threads inherit the binding of the
    one that starts them, so the same is had by binding that one before it computes anything; the
    threads of the sockets have started before and stay unbound.
    """

    def _init_executor(self) -> None:
        compute_on_its_own(self.vllm_config, 0)
        super()._init_executor()
