"""The engine's log, followed while it boots: one line a phase, and the cause of a failure."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

# Lines of vLLM 0.32 that mark the beginning of a phase, in the order of a boot.
_PHASES = (
    ("weights", re.compile(r"Starting to load model|Loading weights with")),
    ("memory", re.compile(r"Loading weights took|Model loading took")),
    ("warm-up", re.compile(r"KV cache size: ([\d,]+) tokens, Maximum concurrency .*?: ([\d.]+)x")),
)
_SHARDS = re.compile(r"checkpoint shards: +(\d+)% Completed \| (\d+)/(\d+)")
_DOES = {
    "import": "importing vLLM",
    "engine": "starting the engine's processes",
    "weights": "loading the weights",
    "memory": "measuring memory",
    "warm-up": "warming up",
}
# An exception's own line, with or without vLLM's log prefix before it.
_EXCEPTION = re.compile(r"(?:^|\] )(?:\w+\.)*(\w*(?:Error|Exception|Interrupt)): (.+)$")
# Said by every process above the one that failed.
_ECHOES = ("Engine core initialization failed", "See root cause above", "WorkerProc initialization")
# What the tutorials' readers run into, and the knob that turns it.
_ADVICE = (
    (
        re.compile(r"No available memory for the cache|KV cache is needed|larger than the maximum"),
        "lower engine.max_model_len or raise engine.gpu_memory_utilization",
    ),
    (
        re.compile(r"out of memory|less than desired GPU memory utilization", re.IGNORECASE),
        "free the card or lower gpu_memory_utilization, max_model_len or media.max_pixels",
    ),
    (
        re.compile(r"rope_scaling|rope_type|mrope"),
        "config.json was written for another transformers; set its rope_type to default",
    ),
    (
        re.compile(r"list index out of range"),
        "the checkpoint is incomplete or of another family; compare its files with the hub's",
    ),
)


class BootLog:
    """Follows ``path`` in a thread and calls ``report`` with one line a phase.

    With ``verbose`` every line of the log is reported as well, for as long as it is open.
    """

    def __init__(self, path: Path, report: Callable[[str], None], *, verbose: bool) -> None:
        self._path = path
        self._report = report
        self._verbose = verbose
        self._begun = time.monotonic()
        self._phase = ""
        self._shards = ""
        self._booting = True
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
        """Report that ``phase`` begins, once, with the seconds since the start."""
        if self._booting and phase != self._phase:
            self._phase = phase
            seconds = time.monotonic() - self._begun
            self._report(f"{phase:<8}{_DOES[phase]}{detail} ({seconds:.1f} s)")

    def ready(self) -> None:
        """Report no more phases."""
        self._booting = False

    def cause(self, error: Exception) -> str:
        """Return one line: why the engine did not start, what to do, and where the log is."""
        text = self._path.read_text("utf-8", "replace")
        found = [
            f"{match[1]}: {match[2]}"
            for line in text.splitlines()
            if (match := _EXCEPTION.search(line)) and not any(echo in line for echo in _ECHOES)
        ]
        # The failing process logs first; those above it repeat it in their own words.
        reason = (found[0] if found else f"{type(error).__name__}: {error}").strip()
        reason = " ".join(reason.split())[:400].rstrip(".")
        advice = next((f"; {advice}" for sign, advice in _ADVICE if sign.search(reason)), "")
        return f"the engine did not start: {reason}{advice}. Log: {self._path}"

    def _follow(self) -> None:
        with self._path.open(encoding="utf-8", errors="replace") as log:
            line = ""
            while True:
                closing = self._closing.is_set() or not (self._booting or self._verbose)
                piece = log.readline()
                line += piece
                if line.endswith("\n"):
                    self._read(line.rstrip("\n"))
                    line = ""
                elif closing and not piece:
                    return
                elif not piece:
                    self._closing.wait(0.1)

    def _read(self, line: str) -> None:
        if self._verbose:
            self._report(line)
        for phase, mark in _PHASES:
            if found := mark.search(line):
                detail = ""
                if found.groups():
                    detail = f"; the KV cache holds {found[1]} tokens, {found[2]} full windows"
                self.enter(phase, detail)
        if found := _SHARDS.search(line):
            self._report_shards(found[1], found[2], found[3])

    def _report_shards(self, percent: str, done: str, of: str) -> None:
        shards = f"{done}/{of}"
        if self._booting and done != "0" and of != "1" and shards != self._shards:
            self._shards = shards
            self._report(f"weights {shards} files, {percent} %")
