"""Whether vLLM's engine does anything, seen from what it reports of its steps."""

from __future__ import annotations

from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.v1.metrics.loggers import AggregateStatLoggerBase


class Progress(AggregateStatLoggerBase):  # type: ignore[misc]  # vLLM ships no type information
    """One of vLLM's stat loggers: called at each step, it counts those that bring something.

    A step that gives out no token counts when it has filled the KV cache further, as a long
    prompt's do. A scheduler that turns without scheduling anything does not.
    """

    def __init__(self) -> None:  # vLLM's factories pass a configuration; this is not made by one
        self.steps = 0
        self._usage = 0.0

    @classmethod
    def of(cls, client: EngineClient) -> Progress:
        """Return one that is told of the steps of ``client``'s engine."""
        progress = cls()
        client.logger_manager.stat_loggers.append(progress)
        return progress

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,  # noqa: ARG002  (vLLM's signature)
        engine_idx: int = 0,  # noqa: ARG002
    ) -> None:
        """Take note of a step; called by vLLM."""
        if iteration_stats is not None:
            self.steps += 1
        elif scheduler_stats is not None and scheduler_stats.kv_cache_usage != self._usage:
            self._usage = scheduler_stats.kv_cache_usage
            self.steps += 1

    def log_engine_initialized(self) -> None:
        """Do nothing; vLLM asks for it."""
