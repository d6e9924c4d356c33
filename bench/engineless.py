"""Our server in a process of its own, with an engine that only looks at what it is shown.

All above the seam is the real thing: launcher, uvicorn, routes, fetching, decoding. In the place of
vLLM stands the tests' scripted engine, which here asks for the pixels of every picture and the
frames of every video, as vLLM does of what it has not seen before. There is no second process, and
none of vLLM's caches.

``python -m bench.engineless [SECTION.FIELD=VALUE …]`` is that process. A line on its standard
input asks how it stands (``State``) and is answered by a line of JSON.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import psutil

from bench.servers import BenchError
from qwen2vl_serve.engine import Adapter, Medium
from qwen2vl_serve.launch.serve import serve
from qwen2vl_serve.media.clip import Video
from qwen2vl_serve.media.loader import MediaLoader
from qwen2vl_serve.media.picture import Picture
from qwen2vl_serve.profile import Profile, load_profile
from qwen2vl_serve.protocol.chat import ChatRequest
from qwen2vl_serve.uploads import FilesAPI
from tests.fake_engine import FakeEngine

BOOT_SECONDS = 60.0
STOP_SECONDS = 20.0


class LookingEngine(FakeEngine):
    """Answers with the size and the mean of all that it was shown; keeps nothing."""

    async def _words(
        self, _request: ChatRequest, media: Sequence[Medium]
    ) -> AsyncGenerator[str, None]:
        # All before the first word, as an engine does: afterwards the server lets go of them.
        seen = [await asyncio.to_thread(_look, medium) for medium in media]
        for words in seen:
            yield words
        yield "That is all."


def _look(medium: Medium) -> str:
    """Read every pixel; raises ``TypeError`` where they are not what the protocol promises."""
    if isinstance(medium, Picture):
        shown = medium.pixels()
        width, height = medium.size
        promised = shown.shape == (height, width, 3)
    elif isinstance(medium, Video):
        shown = medium.frames()
        promised = shown.ndim == 4 and shown.shape[3] == 3 and shown.shape[0] % 2 == 0
    else:
        raise TypeError(f"an engine got a {type(medium).__name__}")
    if str(shown.dtype) != "uint8" or not promised:
        raise TypeError(f"an engine got {shown.dtype} {shown.shape}")
    return f"{shown.shape} {shown.mean():.1f} "


@dataclass(frozen=True)
class State:
    """How the server's process stands; sizes in bytes.

    ``held`` and ``waiting`` are those of all gates together, ``receiving`` the uploads under way,
    ``peak`` the most resident memory since the last time that this was asked.
    """

    held: int
    waiting: int
    receiving: int
    threads: int
    descriptors: int
    children: int
    rss: int
    peak: int

    @property
    def idle(self) -> bool:
        """Whether nothing holds a slot."""
        return not (self.held or self.waiting or self.receiving or self.children)


@dataclass(frozen=True)
class Engineless:
    """A running server, its process and the folder for all its temporary files."""

    root: str
    port: int
    process: subprocess.Popen[str]
    temporary: Path
    log: Path

    def state(self, *, trim: bool = False) -> State:
        """Ask how it stands; with ``trim`` malloc gives back first what it can.

        Raises:
            BenchError: it is gone.
        """
        try:
            assert self.process.stdin is not None  # noqa: S101  (for the type checker)
            self.process.stdin.write("trim\n" if trim else "state\n")
            self.process.stdin.flush()
            return State(**json.loads(_line(self.process, "{")))
        except OSError:
            raise BenchError(f"the server is gone, status {self.process.poll()}") from None

    def rss(self) -> int:
        """Return the resident memory of the process in bytes."""
        return int(psutil.Process(self.process.pid).memory_info().rss)


@contextmanager
def engineless(*overrides: str) -> Iterator[Engineless]:
    """Run a server with the demo profile and ``overrides``; it is gone when the block is left.

    Raises:
        BenchError: it did not become ready.
    """
    with tempfile.TemporaryDirectory(prefix="engineless-") as folder:
        temporary = Path(folder) / "temporary"
        temporary.mkdir()
        log = Path(folder) / "server.log"
        process = subprocess.Popen(  # noqa: S603  (our own module)
            [sys.executable, "-m", "bench.engineless", f"server.log_file={log}", *overrides],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        try:
            root = _line(process, "ready").split()[1].removesuffix("/v1")
            yield Engineless(root, int(root.rpartition(":")[2]), process, temporary, log)
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _line(process: subprocess.Popen[str], start: str) -> str:
    """Return the next line of the server's that begins with ``start``."""
    told = []
    assert process.stdout is not None  # noqa: S101  (for the type checker)
    for line in process.stdout:
        if line.startswith(start):
            return line
        told.append(line)
    raise BenchError("the server has ended:\n" + "".join(told[-15:]))


def main(overrides: Sequence[str]) -> int:
    """Serve until a signal; lines come in from the parent, states go out."""

    @asynccontextmanager
    async def start_engine(
        _profile: Profile, _adapters: Mapping[str, Adapter]
    ) -> AsyncIterator[FakeEngine]:
        importlib.import_module("torch")  # as vLLM does; else the first video would wait for it
        yield LookingEngine()

    seam = types.ModuleType("qwen2vl_serve.vllm_engine")
    seam.start_engine = start_engine  # type: ignore[attr-defined]  # a module made on the spot
    seam.share_imports = lambda: None  # type: ignore[attr-defined]  # as above
    sys.modules[seam.__name__] = seam
    console = os.fdopen(os.dup(1), "w", buffering=1)
    threading.Thread(target=_tell, args=[console], daemon=True).start()
    return serve(
        load_profile("demo", ["port=0", *overrides]),
        verbose=False,
        # Into the log with the line for every request: the parent reads for one alone.
        report=lambda line: print(line, file=console if line.startswith("ready") else sys.stderr),
    )


def _tell(console: TextIO) -> None:
    process = psutil.Process()
    for line in sys.stdin:
        gc.collect()
        if line.startswith("trim"):
            ctypes.CDLL(None).malloc_trim(0)
        lines = [one.decoding for one in gc.get_objects() if isinstance(one, MediaLoader)]
        state = State(
            held=sum(line.held for line in lines),
            waiting=sum(line.waiting for line in lines),
            receiving=sum(
                o.admission.places.held for o in gc.get_objects() if isinstance(o, FilesAPI)
            ),
            threads=process.num_threads(),
            descriptors=process.num_fds(),
            children=len(process.children()),
            rss=process.memory_info().rss,
            peak=_peak(),
        )
        print(json.dumps(asdict(state)), file=console, flush=True)


def _peak() -> int:
    """Return the high-water mark of resident memory in bytes, and begin a new one: proc(5)."""
    status = Path("/proc/self/status").read_text()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
