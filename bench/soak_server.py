"""A server that is started again whenever it fails, as systemd would, and what each life said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil

from bench.servers import BOOT_SECONDS, STOP_SECONDS, BenchError

PAUSE_SECONDS = 1.0
"""Between the end of a server and the next start (``RestartSec=``)."""

LOOK_SECONDS = 2.0

DIE_SECONDS = 90.0
"""How long a server may take to end when its engine is gone."""

Kill = Callable[[psutil.Process], None]
"""Ends the engine of a server's process."""


@dataclass
class Life:
    """One server process, from its start to its end; times on the monotonic clock.

    ``requests`` are its log's lines by request id, ``sizes`` the resident bytes of each of its
    processes as (seconds, bytes), ``status`` is how it ended.
    """

    process: subprocess.Popen[str]
    begun: float
    ready: float = 0.0
    killed: float = 0.0
    ended: float = 0.0
    status: int | None = None
    requests: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    sizes: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    tail: list[str] = field(default_factory=list)

    def counted(self) -> Counter[tuple[int, str]]:
        """Return how many requests under ``/v1`` the log tells of, by status and code."""
        return Counter(
            (one["status"], one.get("code", ""))
            for lines in self.requests.values()
            for one in lines
            if one["route"].startswith("/v1/")
        )


class Supervisor:
    """Keeps one server running until ``stop``; ``lives`` are its processes, the last one now."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.command = command
        self.environment = environment
        self.lives: list[Life] = []
        self.faults: list[str] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Start the server and wait until it is ready.

        Raises:
            BenchError: it is not.
        """
        self._thread.start()
        self.wait_ready()

    def wait_ready(self) -> Life:
        """Wait until the server that runs is ready, and return its life.

        Raises:
            BenchError: it did not become ready in time.
        """
        end = time.monotonic() + BOOT_SECONDS
        while time.monotonic() < end and not self.faults:
            if self.lives and self.lives[-1].ready and not self.lives[-1].killed:
                return self.lives[-1]
            time.sleep(0.1)
        if self.faults:
            raise BenchError("; ".join(self.faults))
        tail = "\n".join(self.lives[-1].tail[-15:]) if self.lives else ""
        raise BenchError(f"the server did not become ready; it said last:\n{tail}")

    def kill_engine(self, kill: Kill) -> None:
        """Kill the engine and wait until the server has ended; its end is judged.

        Raises:
            BenchError: there was no engine to kill.
        """
        life = self.wait_ready()
        life.killed = time.monotonic()
        kill(psutil.Process(life.process.pid))
        try:
            status = life.process.wait(DIE_SECONDS)
        except subprocess.TimeoutExpired:
            self.faults.append(f"a server without engine still ran after {DIE_SECONDS:.0f} s")
            return
        if status == 0:
            self.faults.append("a server whose engine was killed ended with status 0")

    def down(self, begun: float, ended: float) -> bool:
        """Whether there was no server that answers at some time between the two moments."""
        gaps = [
            (one.killed or one.ended, following.ready or float("inf"))
            for one, following in zip(self.lives, self.lives[1:], strict=False)
        ]
        last = self.lives[-1]
        if last.killed or last.ended:
            gaps.append((last.killed or last.ended, float("inf")))
        return any(start <= ended and begun <= end for start, end in gaps)

    def stop(self) -> None:
        """End the server in order; another status than 0 is a fault."""
        self._stopping.set()
        process = self.lives[-1].process
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.faults.append("the server did not end on SIGTERM")
        self._end(process)
        self._thread.join(STOP_SECONDS)
        if self.lives[-1].status not in (0, None):
            self.faults.append(f"the server ended with status {self.lives[-1].status} on SIGTERM")

    def abandon(self) -> None:
        """Leave no server behind, whatever has happened."""
        self._stopping.set()
        if self.lives:
            self._end(self.lives[-1].process)

    def _run(self) -> None:
        while not self._stopping.is_set():
            process = subprocess.Popen(  # noqa: S603  (our own words)
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=self.environment,
                start_new_session=True,
            )
            life = Life(process, time.monotonic())
            self.lives.append(life)
            looking = threading.Thread(target=self._look, args=[life], daemon=True)
            looking.start()
            self._read(life)
            life.status = process.wait()
            life.ended = time.monotonic()
            looking.join()
            self._end(process)
            if life.status == 0:
                return
            if not life.killed and not self._stopping.is_set():
                self.faults.append(
                    f"the server ended by itself with status {life.status}: {life.tail[-3:]}"
                )
            self._stopping.wait(PAUSE_SECONDS)

    def _read(self, life: Life) -> None:
        assert life.process.stdout is not None  # noqa: S101  (for the type checker)
        for line in life.process.stdout:
            life.tail = [*life.tail[-30:], line.rstrip()]
            try:
                told = json.loads(line)
            except ValueError:
                continue
            if told.get("event") == "request":
                life.requests.setdefault(told["id"], []).append(told)
            elif str(told.get("event", "")).startswith("ready http"):
                life.ready = time.monotonic()

    def _look(self, life: Life) -> None:
        """Note the memory of the server's processes, by name."""
        while life.process.poll() is None and not life.killed:
            with suppress(psutil.Error):
                process = psutil.Process(life.process.pid)
                for one in (process, *process.children(recursive=True)):
                    name = "server" if one.pid == process.pid else one.name()
                    found = (time.monotonic() - life.begun, one.memory_info().rss)
                    if life.ready and found[1] and not self._stopping.is_set():
                        life.sizes.setdefault(name, []).append(found)
            time.sleep(LOOK_SECONDS)

    @staticmethod
    def _end(process: subprocess.Popen[str]) -> None:
        """Leave nothing behind of a server's processes."""
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def kill_engine_core(server: psutil.Process) -> None:
    """Kill vLLM's process that schedules.

    Raises:
        BenchError: the server has none.
    """
    for one in server.children(recursive=True):
        if "EngineCore" in " ".join((one.name(), *one.cmdline())):
            one.kill()
            return
    raise BenchError("the server has no EngineCore process")
