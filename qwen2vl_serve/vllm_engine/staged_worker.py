"""vLLM's CPU worker for pipeline stages."""

from __future__ import annotations

from vllm.config import CompilationMode

from qwen2vl_serve.vllm_engine.processors import BoundWorker


class StagedWorker(BoundWorker):
    """Computes one token before it is asked, where vLLM's own would leave out its warm-up.

    The first run allocates what a stage receives from the one before, for the longest step. On
    cards vLLM makes one in every mode; its CPU worker makes none where nothing is compiled, and
    the first request kills the engine. Its second runner (V2) allocates when it loads the model.
    """

    def determine_available_memory(self) -> int:
        """Return the bytes of the KV cache, after the run."""
        mode = self.compilation_config.mode
        if mode == CompilationMode.NONE and not self.use_v2_model_runner:
            self.model_runner._dummy_run(1)
        return int(super().determine_available_memory())
