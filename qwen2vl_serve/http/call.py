"""One request while it is answered: what the log will tell of it, and how it can be ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from qwen2vl_serve.engine import Usage
from qwen2vl_serve.errors import APIError


class Call:
    """Made in the task that answers; ``Envelope`` puts it into ``scope["state"]["call"]``.

    Times are in seconds. ``queued`` is what was spent waiting for a place, ``first_token`` counts
    from ``started`` and is None where nothing was streamed. ``stages`` are what has been done so
    far, each with the value of ``time.perf_counter`` at its end.
    """

    __slots__ = (
        "_at_end", "_error", "_task",
        "code", "first_token", "id", "model", "queued", "stages", "started", "usage",
        "visual_tokens",
    )  # fmt: skip

    def __init__(self, request_id: str = "") -> None:
        self.id = request_id
        self.started = time.perf_counter()
        self.model: str | None = None
        self.code: str | None = None
        self.usage = Usage()
        self.visual_tokens = 0
        self.queued = 0.0
        self.first_token: float | None = None
        self.stages: list[tuple[str, float]] = []
        self._task = asyncio.current_task()
        self._error: APIError | None = None
        self._at_end: list[Callable[[], object]] = []

    def at_end(self, do: Callable[[], object]) -> None:
        """Have something done when the answer has ended, however it did."""
        self._at_end.append(do)

    def end(self) -> None:
        """Do it, the last first."""
        while self._at_end:
            self._at_end.pop()()

    def done(self, stage: str) -> None:
        """Note that a stage has ended, and with it that the next one begins."""
        self.stages.append((stage, time.perf_counter()))

    def begun(self) -> None:
        """Note that the first token is there."""
        self.done("first token")
        self.first_token = self.stages[-1][1] - self.started

    def timing(self) -> str:
        """Return what ``Server-Timing`` says as an answer begins: stages and all, in milliseconds.

        After the last stage came the whole answer, unless that is its first token.
        """
        now = time.perf_counter()
        stages = self.stages if self.first_token is not None else [*self.stages, ("answer", now)]
        told, begun = [], self.started
        for name, until in stages:
            told.append(f"{name.replace(' ', '-')};dur={(until - begun) * 1e3:.1f}")
            begun = until
        return ", ".join([*told, f"total;dur={(now - self.started) * 1e3:.1f}"])

    def cut(self, error: APIError) -> None:
        """End the answer with ``error``, wherever it is; only the first cut counts."""
        if self._error is None and self._task is not None:
            self._error = error
            self._task.cancel()

    def taken_back(self) -> APIError | None:
        """Take back the cancellation by ``cut`` and return its error; None for another's."""
        error, task = self._error, self._task
        if error is None or task is None or task.uncancel() > 0:
            return None
        return error
