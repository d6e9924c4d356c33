"""vLLM's figures of several engines in one process, labelled by the engine's index.

Each ``AsyncLLM`` makes a Prometheus logger of its own, which takes the others' figures out of
prometheus_client's registry.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import SchedulerStats


class SharedFigures:
    """Makes what ``AsyncLLM`` takes for a kind of logger: the first call makes it, others get it.

    ``factory`` has to be a class, as vLLM tells by that what it is given.
    """

    def __init__(self, engines: int) -> None:
        made: list[PrometheusStatLogger] = []

        class Figures(PrometheusStatLogger):  # type: ignore[misc]  # vLLM ships no type information
            def __new__(cls, *_: Any, **__: Any) -> PrometheusStatLogger:
                if not made:
                    made.append(super().__new__(cls))
                return made[0]

            def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:  # noqa: ARG002  (vLLM's signature)
                if not hasattr(self, "engine_indexes"):
                    super().__init__(vllm_config, list(range(engines)))
                    self._told = False

            def log_engine_initialized(self) -> None:
                if not self._told:
                    self._told = True
                    super().log_engine_initialized()

        self.factory = Figures
        self._made = made

    def clear(self, engine: int) -> None:
        """Tell that nothing runs in an engine, which can no longer do so itself."""
        for figures in self._made:
            figures.record(SchedulerStats(), None, engine_idx=engine)
