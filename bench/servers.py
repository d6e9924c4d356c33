"""Two servers over the same engine: stock ``vllm serve`` and ours, up at the same time."""

from __future__ import annotations

import ctypes
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from qwen2vl_serve.profile import Profile, load_profile

BOOT_SECONDS = 600.0
STOP_SECONDS = 20.0
HOST = "127.0.0.1"

_PR_SET_PDEATHSIG = 1
_CPU_CLOCK_OF_PROCESS = 2


@dataclass(frozen=True)
class Halves:
    """Processors of engines, and those of their HTTP servers and of the client.

    A card computes beside the processors that its HTTP server uses; a CPU engine shares them, and
    each of its threads waits for the one that was held up.
    """

    front: tuple[int, ...]
    engine: tuple[int, ...]

    @classmethod
    def of_machine(cls) -> Halves:
        """Halve what this process may use.

        Raises:
            BenchError: there is one processor only.
        """
        usable = sorted(os.sched_getaffinity(0))
        if len(usable) == 1:
            raise BenchError("there is one processor only: it cannot be halved")
        middle = len(usable) // 2
        return cls(tuple(usable[:middle]), tuple(usable[middle:]))

    def part(self, servers: Iterable[psutil.Process]) -> None:
        """Move this process and ``servers`` to the one half, the servers' children to the other."""
        for server in servers:
            for process in (server, *server.children(recursive=True)):
                half = self.front if process is server else self.engine
                with suppress(psutil.NoSuchProcess):  # processes come and go, and threads
                    for thread in process.threads():
                        with suppress(ProcessLookupError):
                            os.sched_setaffinity(thread.id, half)
        os.sched_setaffinity(0, self.front)


class BenchError(Exception):
    """A server did not start, or answered something else than was asked for."""


@dataclass(frozen=True)
class Server:
    """A running server: where it listens and which process answers HTTP."""

    name: str
    port: int
    pid: int
    model: str

    def cpu_seconds(self) -> float:
        """Return the CPU time that the API process has used, user and system, without children.

        It is the process's CPU clock as clock_getcpuclockid(3) names it: the sum that
        ``/proc/<pid>/stat`` shows as utime + stime, in nanoseconds instead of ticks of 10 ms.
        """
        return time.clock_gettime((~self.pid << 3) | _CPU_CLOCK_OF_PROCESS)


@contextmanager
def both(
    profile_name: str, folder: Path, ours: Sequence[str] = (), halves: Halves | None = None
) -> Iterator[tuple[Server, Server]]:
    """Start stock vLLM and our server with one profile; yield (stock, ours).

    ``ours`` sets fields for ours alone, such as stock does not have (``media.fast_decode=true``).
    With ``halves`` their engines compute on one and all else, this process too, on the other.
    Their output goes to ``stock.log`` and ``ours.log`` in ``folder``. Both are gone when the
    block is left, and also when this process is killed.

    Raises:
        BenchError: one of them did not become ready; the message ends with its last lines.
    """
    with ExitStack() as stack:
        running = []
        variables = environment_for(folder)
        if halves is not None:
            variables["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, halves.engine))
        ours_only = [word for field in ours for word in ("--set", field)]
        for name, command in (("stock", stock_command), ("ours", our_command)):
            profile = load_profile(profile_name, [f"host={HOST}", f"port={free_port()}"])
            log = folder / f"{name}.log"
            words = [*command(profile), *(ours_only if name == "ours" else ())]
            process = stack.enter_context(run_process(words, log, variables))
            port, model = profile.server.port, profile.model.served_names[0]
            running.append((process, log, Server(name, port, process.pid, model)))
        for process, log, server in running:
            wait_ready(process, log, server)
        if halves is not None:
            stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
            halves.part(psutil.Process(process.pid) for process, _, _ in running)
        (_, _, stock), (_, _, our_own) = running
        yield stock, our_own


@contextmanager
def ours(profile_name: str, folder: Path) -> Iterator[Server]:
    """Start our server alone, as ``both`` does.

    Raises:
        BenchError: it did not become ready.
    """
    profile = load_profile(profile_name, [f"host={HOST}", f"port={free_port()}"])
    log = folder / "ours.log"
    with run_process(our_command(profile), log, environment_for(folder)) as process:
        port, model = profile.server.port, profile.model.served_names[0]
        server = Server("ours", port, process.pid, model)
        wait_ready(process, log, server)
        yield server


def stock_command(profile: Profile) -> list[str]:
    """Return the command of vLLM's own server, with the arguments of ``vllm serve``.

    It is the module that ``vllm serve`` runs for one API process: the ``vllm`` command itself
    refuses to start where vLLM is installed under another name, as vllm-cpu is.
    """
    _, _, model, *options = profile.vllm_command()
    module = "vllm.entrypoints.launchers.api_server.entry"
    return [sys.executable, "-m", module, "--model", model, *options]


def our_command(profile: Profile) -> list[str]:
    """Return the command of this project's server."""
    words = [sys.executable, "-m", "qwen2vl_serve.cli", "serve", "--profile", profile.name]
    return [*words, "--host", profile.server.host, "--port", str(profile.server.port)]


def free_port() -> int:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def environment_for(folder: Path) -> dict[str, str]:
    """Return the variables of either server: no usage report, and our log beside the others."""
    return {**os.environ, "VLLM_NO_USAGE_STATS": "1", "XDG_STATE_HOME": str(folder)}


@contextmanager
def run_process(
    command: list[str], log: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``command`` in a session of its own and leave none of its processes behind."""
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 -- our own words
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=_end_with_parent,  # noqa: PLW1509 -- no threads yet
        )
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end_with_parent() -> None:
    """Have the kernel end this process when the benchmark is killed and cannot clean up."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def wait_ready(
    process: subprocess.Popen[bytes], log: Path, server: Server, path: str = "/v1/models"
) -> None:
    """Wait until ``path`` is answered with 200.

    Raises:
        BenchError: the process ended, or it took too long.
    """
    deadline = time.monotonic() + BOOT_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection(HOST, server.port, timeout=5)
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return
        time.sleep(0.2)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise BenchError(f"{server.name} did not become ready; {log} ends with:\n{tail}")
