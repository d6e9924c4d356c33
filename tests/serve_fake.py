"""``python -m tests.serve_fake --port N MODE [--verbose] [SECTION.FIELD=VALUE …]``.

A scripted engine; the launcher and all above the seam are the real ones.

MODE: ``up``, ``long`` (a stream takes 5 minutes), ``figures`` (tells its weights and KV cache),
``stopped`` (by SIGTERM at its first line), ``slow-boot`` (hangs while starting), ``no-boot`` (fails
while starting) or ``no-import`` (fails while vLLM is imported). SIGUSR1 makes any engine hang,
SIGUSR2 move again, SIGRTMIN is its end.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import types
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from qwen2vl_serve.engine import Adapter
from qwen2vl_serve.errors import ServeError
from qwen2vl_serve.launch.serve import serve
from qwen2vl_serve.profile import Profile, load_profile
from tests.fake_engine import FakeEngine

FIGURES = """\
INFO 11-20 [x.py:1] Model loading took 0.01 GiB memory and 0.100000 seconds
INFO 11-20 [x.py:1] GPU KV cache size: 262,144 tokens, \
Maximum concurrency for 4,096 tokens per request: 64.00x
"""


class BrokenSeam:
    """Finds the seam and cannot load it, as vLLM under a torchvision for another torch."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name == "qwen2vl_serve.vllm_engine":
            raise RuntimeError("operator torchvision::nms does not exist")


def main(port: str, mode: str, *overrides: str) -> int:
    profile = os.environ.get("FAKE_PROFILE", "demo")
    console = os.fdopen(os.dup(1), "w", buffering=1)
    warm = threading.Event()

    def report(line: str) -> None:
        print(line, file=console)
        if mode == "stopped" and line.startswith("log"):
            signal.raise_signal(signal.SIGTERM)
        if line.startswith("warm-up"):
            warm.set()

    @asynccontextmanager
    async def start_engine(
        profile: Profile, adapters: Mapping[str, Adapter]
    ) -> AsyncIterator[FakeEngine]:
        print("words of the engine that belong into its log")
        if mode == "slow-boot":
            time.sleep(600)  # as vLLM does: it blocks the event loop while it waits
        if mode == "no-boot":
            print("ERROR 11-20 [x.py:1] ValueError: No available memory for the cache blocks")
            raise RuntimeError("Engine core initialization failed. See root cause above.")
        if mode == "figures":
            print(FIGURES, end="", flush=True)
            warm.wait()
        engine = FakeEngine(words=["word "] * (6000 if mode == "long" else 40), pause=0.05)
        signal.signal(signal.SIGUSR1, lambda *_: setattr(engine, "hung", True))

        def go_on(*_: object) -> None:
            """Whatever is left of an answer comes at once."""
            engine.hung, engine.pause = False, 0.0

        signal.signal(signal.SIGUSR2, go_on)
        signal.signal(signal.SIGRTMIN, lambda *_: setattr(engine, "dead", True))
        for name, adapter in adapters.items():
            await engine.load_adapter(name, adapter)
        yield engine

    if mode == "no-import":
        sys.meta_path.insert(0, BrokenSeam)
    else:
        seam = types.ModuleType("qwen2vl_serve.vllm_engine")
        seam.start_engine = start_engine  # type: ignore[attr-defined]
        seam.share_imports = lambda: None  # type: ignore[attr-defined]
        sys.modules[seam.__name__] = seam
    try:
        fields = [f"port={port}", *(one for one in overrides if one != "--verbose")]
        read = lambda: load_profile(profile, fields)  # noqa: E731
        return serve(
            read(),
            verbose="--verbose" in overrides,
            report=report,
            read_again=read,
        )
    except ServeError as error:
        print(f"{type(error).__name__}: {error}", file=console)
        return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[2:]))
