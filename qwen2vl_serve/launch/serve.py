"""``serve``: engine → app → uvicorn, from the first line to the exit status.

While the engine boots, its processes write their flood to a log file; this module follows that
file and reports one line a phase.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI

from qwen2vl_serve.adapters.named import named_adapters, with_adapters
from qwen2vl_serve.api import TAKEN_LIMITS
from qwen2vl_serve.app import build_app
from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.auth.keys_file import KeysFile
from qwen2vl_serve.batches.store import BatchStore
from qwen2vl_serve.boot.forecast import Start, StartTimes, comparison, expose, foresee
from qwen2vl_serve.boot.log import BootLog
from qwen2vl_serve.download import have_model
from qwen2vl_serve.engine import Adapter, Engine, EngineState
from qwen2vl_serve.errors import BootError, EngineUnavailable, PreflightError, SetupError
from qwen2vl_serve.http import request_log, tracing
from qwen2vl_serve.http.wire import bounded_http
from qwen2vl_serve.launch.engine_environment import engine_environment, engine_sockets
from qwen2vl_serve.launch.first_request import curl, server_url
from qwen2vl_serve.launch.http_server import HTTPServer, Signals, Stopped
from qwen2vl_serve.launch.idle_memory import IdleMemory, give_back
from qwen2vl_serve.launch.output import Report, fresh_log, log_to, output_to
from qwen2vl_serve.launch.reload import Reload
from qwen2vl_serve.launch.resources import batch_store, media_loader
from qwen2vl_serve.media import resample
from qwen2vl_serve.media.loader import MediaLoader
from qwen2vl_serve.plan.advice import advice
from qwen2vl_serve.profile import Profile

_LAST_BYTES_SECONDS = 2

WATCH_SECONDS = 1.0
"""How often a running server asks whether its engine lives."""


def serve(
    profile: Profile,
    *,
    verbose: bool,
    report: Report,
    read_again: Callable[[], Profile] | None = None,
) -> int:
    """Serve ``profile`` until a signal ends it; return the exit status.

    0 after SIGTERM or SIGINT and a finished drain, 1 when the engine died or hung. On SIGHUP
    ``read_again`` returns the profile anew, of which the limits are taken. Standard output and
    error of this process and its children go to the log file from here on, so ``report`` must
    write elsewhere; ``verbose`` reports the log's lines as well.

    Raises:
        PreflightError: the port was taken since the preflight, no log file can be written or
            another server writes it, traces are asked for and cannot be made, or an adapter cannot
            be served.
        BootError: the engine did not start; the message names the cause and the log file.
    """
    asked = profile
    profile = have_model(profile, request_log.reporter(profile.server.log_format, report))
    adapters = named_adapters(profile)
    profile = with_adapters(profile, adapters)
    keys = Keys(profile.api_keys(), KeysFile(profile.keys_path))
    traces = tracing.tracer()
    os.environ.update(engine_environment(profile))
    listener = _listen(profile)
    # Port 0 has become a real one, which address and log file are named after.
    profile = profile.at_port(listener.getsockname()[1])
    signals = Signals()
    stall = profile.server.boot_stall_seconds
    lines, report = report, request_log.reporter(profile.server.log_format, report)
    try:
        with (
            engine_sockets(),
            fresh_log(profile.log_path.absolute()) as path,
            output_to(path),
            BootLog(path, report, verbose=verbose, stall_seconds=stall) as boot,
        ):
            report(f"log     {path}")
            log_to(lines, request_log.formatter(profile.server.log_format))
            try:
                foreseen = foresee(profile)
                server = _Server(
                    profile,
                    asked,
                    adapters,
                    keys,
                    listener,
                    report,
                    boot,
                    signals,
                    foreseen,
                    read_again,
                    traces,
                )
                return _run(server)
            finally:
                # vLLM's client complains when it is collected at the very end; now the log has it.
                gc.unfreeze()
                gc.collect()
    except Stopped:
        report("stopped while starting")
        return 0
    finally:
        listener.close()
        if traces is not None:
            traces.close()


def _run(server: _Server) -> int:
    import uvloop  # noqa: PLC0415  # comes with vLLM, which the base install lacks

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(server.run())


@dataclass
class _Server:
    """``asked`` is the profile as it was read; ``profile`` has what followed from it filled in."""

    profile: Profile
    asked: Profile
    adapters: Mapping[str, Adapter]
    keys: Keys
    listener: socket.socket
    report: Report
    boot: BootLog
    signals: Signals
    foreseen: Start
    read_again: Callable[[], Profile] | None
    traces: tracing.Tracer | None

    async def run(self) -> int:
        begun = time.monotonic()
        # First, as a folder may be another server's, and the import takes seconds. Uploads' starts
        # a thread where it holds some, which no fork may meet.
        batches = batch_store(self.profile)
        # Compiles while vLLM is imported. It is gone before vLLM forks, and before a wait in which
        # a signal that another thread receives would not be noticed.
        compiler = threading.Thread(target=resample.equals_pillow)
        compiler.start()
        try:
            seam = self._import_engine()
            compiler.join()
            seam.share_imports()
            loader = media_loader(self.profile)
            async with seam.start_engine(self.profile, self.adapters) as engine:
                try:
                    return await self._serve(engine, loader, batches, begun)
                finally:
                    await loader.close()
                    if batches is not None:
                        batches.close()
        except (BootError, SetupError):
            raise
        except Exception as error:
            # vLLM raises whatever failed; its workers' own words are in the log.
            logging.getLogger(__name__).exception("the engine did not start")
            cause = self.boot.cause(error, lambda: advice(self.profile))
            raise BootError(cause) from error

    def _import_engine(self) -> Any:
        """Import vLLM: seconds, so it has a phase of its own."""
        self.boot.enter("import")
        try:
            seam = importlib.import_module("qwen2vl_serve.vllm_engine")
        except ImportError as error:
            raise BootError(
                f"vLLM cannot be imported ({error}); install the extra this machine needs: "
                "pip install '.[cpu]' or '.[gpu]' in the checkout."
            ) from error
        self.boot.enter("engine")
        return seam

    async def _serve(
        self, engine: Engine, loader: MediaLoader, batches: BatchStore | None, begun: float
    ) -> int:
        app = build_app(engine, loader, self.profile, self.keys, self.traces, batches=batches)
        http = HTTPServer(
            _config(app, self.profile), app.state.api, self.profile.server.shutdown_timeout
        )
        runner = app.state.batches

        def started() -> None:
            self._report_ready(engine, http, time.monotonic() - begun)
            if runner is not None:
                runner.start()

        http.on_started = started
        reload = Reload(self.asked.at_port(self.profile.server.port), self.read_again, self.report)
        reload.register(http.api.take_limits, *(f"limits.{name}" for name in TAKEN_LIMITS))
        reload.register(lambda _: self.keys.reload())
        watch = asyncio.create_task(self._watch(engine, http))
        try:
            with self.signals.reaching(http, reload):
                await http.serve(sockets=[self.listener])
        finally:
            watch.cancel()
            http.api.pulse.stop()
            if runner is not None:
                await runner.close()
        self.report("engine lost, exit 1" if http.engine_lost else "drained, exit 0")
        return 1 if http.engine_lost else 0

    async def _watch(self, engine: Engine, http: HTTPServer) -> None:
        idle, pulse = IdleMemory(http.api.metrics), http.api.pulse
        hung, states = False, list(engine.states)
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if idle.look():
                await asyncio.to_thread(give_back)
            try:
                await engine.check()
                pulse.look()
                if pulse.hangs and self.profile.server.exit_on_hang:
                    pulse.require()
            except EngineUnavailable as error:
                self.report(f"error   {error}")
                http.lose_engine(error)
                return
            before, states = states, list(engine.states)
            for line in _changes(before, states):
                self.report(line)
            if pulse.hangs is not hung:
                hung = pulse.hangs
                self.report(
                    "error   the engine hangs" if hung else "ready   the engine moves again"
                )

    def _report_ready(self, engine: Engine, http: HTTPServer, seconds: float) -> None:
        self.boot.ready()
        actual = Start(self.boot.weights_gib, self.boot.kv_tokens, seconds)
        self.report(f"plan    {comparison(self.foreseen, actual)}")
        expose(self.foreseen, actual, http.api.metrics)
        StartTimes(self.profile).add(seconds)
        url = server_url(self.profile)
        names = ", ".join(model.id for model in engine.models)
        self.report(f"ready   {url}/v1 serves {names}, {seconds:.1f} s after the start")
        self.report(f"try     {curl(self.profile, with_key=bool(self.keys))}")


def _changes(before: Sequence[EngineState], now: Sequence[EngineState]) -> Iterator[str]:
    """Tell which of several engines was lost or is back; of a single one nothing changes."""
    left = f"{now.count('serving')} of {len(now)} serve"
    for index, (old, new) in enumerate(zip(before, now, strict=True)):
        match old, new:
            case _, _ if old == new:
                continue
            case _, "serving":
                yield f"ready   engine {index} serves again; {left}"
            case _, "hung":
                yield f"error   engine {index} hangs; {left}"
            case _:
                yield f"error   engine {index} is lost and is started anew; {left}"


def _config(app: FastAPI, profile: Profile) -> uvicorn.Config:
    server = profile.server
    config = uvicorn.Config(
        app,
        http=bounded_http(profile.limits, app.state.api.metrics.refused_unread),
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        # Our own drain is over by then; this is for the last bytes of what was cut.
        timeout_graceful_shutdown=_LAST_BYTES_SECONDS,
        ssl_certfile=server.ssl_certfile,
        ssl_keyfile=server.ssl_keyfile,
    )
    config.load()
    return config


def _listen(profile: Profile) -> socket.socket:
    """Bind the port before the engine boots, so that no minute is lost on a taken one."""
    host, port = profile.server.host, profile.server.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise PreflightError(
            f"server.port: cannot listen on {host}:{port} ({error.strerror}); "
            "stop what holds it or choose another with --port."
        ) from None
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return listener
