"""The engine's log, followed while it boots: one line a phase, a stall, the cause of a failure."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from qwen2vl_serve.boot.failures import explain
from qwen2vl_serve.boot.phases import PHASES, WAITING

_PLACE = {phase.name: place for place, phase in enumerate(PHASES)}
_SHARDS = re.compile(r"checkpoint shards: +(\d+)% Completed \| (\d+)/(\d+)")
_LOADED = re.compile(r"Model loading took ([\d.]+) GiB")
_LINE_CHARACTERS = 64 * 1024
"""Most of a line that is read at once: it may have no end."""
_LOOK_SECONDS = 0.1


class BootLog:
    """Follows ``path`` in a thread and calls ``report`` with one line a phase.

    With ``verbose`` every line of the log is reported as well, for as long as it is open. A log
    that stays silent for ``stall_seconds`` while the engine boots is reported with the phase
    and what that usually means; again after twice, four times … the time.
    """

    def __init__(
        self,
        path: Path,
        report: Callable[[str], None],
        *,
        verbose: bool,
        stall_seconds: float = math.inf,
    ) -> None:
        self._path = path
        self._report = report
        self._verbose = verbose
        self._begun = time.monotonic()
        self._place = -1
        self._shards = ""
        self._booting = True
        self.weights_gib: float | None = None
        """Weights of the fullest card, once the engine has told them; on the CPU it never does."""
        self.kv_tokens: int | None = None
        """Tokens that the KV cache holds, once the engine has told it."""
        self._stall_seconds = stall_seconds
        self._next_stall = stall_seconds
        self._alive_at = self._begun
        self._waiting = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="boot-log", daemon=True)

    def __enter__(self) -> BootLog:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._thread.join(timeout=2)

    def enter(self, phase: str, detail: str = "") -> None:
        """Report that ``phase`` begins, once, with the seconds since the start.

        A phase that is over does not begin again: workers of one engine are not in step.
        """
        if self._booting and _PLACE[phase] > self._place:
            self._place = _PLACE[phase]
            self._live()
            seconds = time.monotonic() - self._begun
            self._report(f"{phase:<8}{PHASES[self._place].does}{detail} ({seconds:.1f} s)")

    def ready(self) -> None:
        """Report no more phases."""
        self._booting = False

    def cause(self, error: Exception, plan: Callable[[], str | None] = lambda: None) -> str:
        """Return one line: why the engine did not start, what to do, and where the log is.

        ``plan`` is asked for advice where memory does not suffice; None leaves the table's.
        """
        reason, failure = explain(self._path.read_text("utf-8", "replace"), error)
        advice = None if failure is None else (failure.memory and plan()) or failure.advice
        remedy = f"; {advice}" if advice else ""
        return f"the engine did not start: {reason}{remedy}. Log: {self._path}"

    def _follow(self) -> None:
        with self._path.open(encoding="utf-8", errors="replace") as log:
            line = ""
            while True:
                closing = self._closing.is_set() or not (self._booting or self._verbose)
                piece = log.readline(_LINE_CHARACTERS)
                line += piece
                if line.endswith("\n") or len(line) >= _LINE_CHARACTERS:
                    self._read(line.rstrip("\n"))
                    line = ""
                elif closing and not piece:
                    return
                elif not piece:
                    self._look_for_a_stall()
                    self._closing.wait(_LOOK_SECONDS)

    def _read(self, line: str) -> None:
        if self._verbose:
            self._report(line)
        if WAITING[1].search(line):
            self._waiting = True
            return
        self._live()
        for phase in PHASES:
            for _, sign in phase.signs:
                if found := sign.search(line):
                    detail = ""
                    if found.groups():
                        self.kv_tokens = int(found[1].replace(",", ""))
                        detail = f"; the KV cache holds {found[1]} tokens, {found[2]} full windows"
                    self.enter(phase.name, detail)
        if found := _LOADED.search(line):
            self.weights_gib = max(float(found[1]), self.weights_gib or 0.0)
        if found := _SHARDS.search(line):
            self._report_shards(found[1], found[2], found[3])

    def _live(self) -> None:
        self._alive_at = time.monotonic()
        self._next_stall = self._stall_seconds
        self._waiting = False

    def _look_for_a_stall(self) -> None:
        silent = time.monotonic() - self._alive_at
        if not self._booting or self._place < 0 or silent < self._next_stall:
            return
        self._next_stall *= 2
        phase = PHASES[self._place]
        worker = "; vLLM says that a worker does not answer" if self._waiting else ""
        self._report(
            f"stall   {phase.name}: nothing happened for {silent:.0f} s while {phase.does}{worker}"
            f". Usually {phase.usually}"
        )

    def _report_shards(self, percent: str, done: str, of: str) -> None:
        shards = f"{done}/{of}"
        if self._booting and done != "0" and of != "1" and shards != self._shards:
            self._shards = shards
            self._report(f"weights {shards} files, {percent} %")
