"""vLLM's CPU worker for pipeline stages that compile nothing."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker


class StagedWorker(CPUWorker):  # type: ignore[misc]  # vLLM ships no type information
    """Computes one token before it is asked, in eager mode too.

    The first run allocates what a stage receives from the one before, for the longest step. On
    cards vLLM makes one in every mode; its CPU worker makes none in eager mode, and the first
    request kills the engine.
    """

    def determine_available_memory(self) -> int:
        """Return the bytes of the KV cache, after the run."""
        self.model_runner._dummy_run(1)
        return int(super().determine_available_memory())
