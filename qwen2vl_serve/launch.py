"""``serve``: engine → app → uvicorn, from the first line to the exit status.

While the engine boots, its processes write their flood to a log file; this module follows that
file and reports one line a phase.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import importlib
import io
import json
import logging
import os
import resource
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from qwen2vl_serve import request_log, tracing
from qwen2vl_serve.adapters import named_adapters, with_adapters
from qwen2vl_serve.api import TAKEN_LIMITS
from qwen2vl_serve.api_keys import API_KEY_VARIABLE
from qwen2vl_serve.app import build_app
from qwen2vl_serve.auth import Keys
from qwen2vl_serve.batches.store import BatchStore
from qwen2vl_serve.boot_log import BootLog
from qwen2vl_serve.download import have_model
from qwen2vl_serve.engine import Engine, EngineState
from qwen2vl_serve.errors import BootError, EngineUnavailable, PreflightError, SetupError
from qwen2vl_serve.forecast import Start, StartTimes, comparison, expose, foresee
from qwen2vl_serve.http_server import HTTPServer, Signals, Stopped
from qwen2vl_serve.idle_memory import IdleMemory, give_back
from qwen2vl_serve.keys_file import KeysFile
from qwen2vl_serve.media import resample
from qwen2vl_serve.media.fetch import Fetcher, FetchPolicy
from qwen2vl_serve.media.files import FileStore
from qwen2vl_serve.media.image import FORMATS
from qwen2vl_serve.media.loader import MediaBudget, MediaLoader
from qwen2vl_serve.media.sampling import frame_rules
from qwen2vl_serve.media.sizing import picture_bounds
from qwen2vl_serve.media.video import VideoLimits
from qwen2vl_serve.plan.advice import advice
from qwen2vl_serve.preflight import vllm_build
from qwen2vl_serve.profile import Profile
from qwen2vl_serve.profile_media import FilesSection
from qwen2vl_serve.reload import Reload
from qwen2vl_serve.wire import bounded_http

Report = Callable[[str], None]
"""Takes one line for the operator's eyes."""

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
        PreflightError: the port was taken since the preflight, no log file can be written,
            traces are asked for and cannot be made, or an adapter cannot be served.
        BootError: the engine did not start; the message names the cause and the log file.
    """
    asked = profile
    profile = have_model(profile, request_log.reporter(profile.server.log_format, report))
    profile = with_adapters(profile, named_adapters(profile))
    keys = Keys(profile.api_keys(), KeysFile(profile.keys_path))
    traces = tracing.tracer()
    os.environ.update(engine_environment(profile))
    listener = _listen(profile)
    # Port 0 has become a real one, which address and log file are named after.
    profile = profile.at_port(listener.getsockname()[1])
    path = _fresh_log(profile.log_path.absolute())
    signals = Signals()
    stall = profile.server.boot_stall_seconds
    lines, report = report, request_log.reporter(profile.server.log_format, report)
    with (
        _output_to(path),
        BootLog(path, report, verbose=verbose, stall_seconds=stall) as boot,
    ):
        report(f"log     {path}")
        _log_to(lines, request_log.formatter(profile.server.log_format))
        try:
            foreseen = foresee(profile)
            server = _Server(
                profile, asked, keys, listener, report, boot, signals, foreseen, read_again, traces
            )
            return _run(server)
        except Stopped:
            report("stopped while starting")
            return 0
        finally:
            listener.close()
            if traces is not None:
                traces.close()
            # vLLM's client complains when it is collected at the very end; now the log has it.
            gc.unfreeze()
            gc.collect()


def _run(server: _Server) -> int:
    import uvloop  # noqa: PLC0415  # comes with vLLM, which the base install lacks

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(server.run())


@dataclass
class _Server:
    """``asked`` is the profile as it was read; ``profile`` has what followed from it filled in."""

    profile: Profile
    asked: Profile
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
        # Compiles while vLLM is imported. It is gone before vLLM forks, and before a wait in which
        # a signal that another thread receives would not be noticed.
        compiler = threading.Thread(target=resample.equals_pillow)
        compiler.start()
        try:
            start_engine = self._import_engine()
            compiler.join()
            loader, batches = media_loader(self.profile), batch_store(self.profile)
            async with start_engine(self.profile) as engine:
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

    def _import_engine(self) -> Callable[..., contextlib.AbstractAsyncContextManager[Engine]]:
        """Import vLLM: seconds, so it has a phase of its own."""
        self.boot.enter("import")
        try:
            seam = importlib.import_module("qwen2vl_serve.vllm_engine")
        except ImportError as error:
            raise BootError(
                f"vLLM cannot be imported ({error}); install the extra this machine needs: "
                "pip install 'qwen2vl-serve[cpu]' or 'qwen2vl-serve[gpu]'."
            ) from error
        self.boot.enter("engine")
        return seam.start_engine  # type: ignore[no-any-return]  # imported by name

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
        self.report(f"try     {curl(url, with_key=bool(self.keys))}")


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


def media_loader(profile: Profile, *, shared: bool = False) -> MediaLoader:
    """Return the loader for the profile's ``media`` and ``files`` sections.

    ``shared``: other servers use the folder for uploads as well.

    Raises:
        PreflightError: the folder for uploads cannot be used.
        ProfileError: a proxy of the environment is of no use.
    """
    media, limits = profile.media, profile.limits
    policy = FetchPolicy(
        max_bytes=media.max_download_bytes,
        total_seconds=media.download_seconds,
        ports=frozenset(media.allowed_ports),
        allowed_domains=frozenset(media.allowed_domains),
        denied_domains=frozenset(media.denied_domains),
        allowed_networks=media.allowed_networks,
        proxy=None if media.proxy is None else media.proxy.get_secret_value(),
    )
    video_limits = VideoLimits(
        max_bytes=media.max_video_bytes,
        max_frames=media.max_video_frames,
        max_pixels=media.max_video_pixels,
        seconds=media.video_decode_seconds,
    )
    return MediaLoader(
        Fetcher(policy),
        picture_bounds(media),
        media.max_image_pixels,
        frame_rules(media),
        video_limits,
        folders=media.allowed_local_paths,
        files=_file_store(profile.files, shared=shared),
        formats=frozenset(name for name, ours in FORMATS.items() if ours in media.formats),
        fast_decode=media.fast_decode,
        budget=MediaBudget(
            limits.max_media_bytes, limits.max_media_pixels, limits.max_media_frames
        ),
        max_decoding_bytes=media.max_decoding_bytes,
        max_held_bytes=media.max_held_bytes,
    )


def _file_store(files: FilesSection, *, shared: bool) -> FileStore | None:
    if files.max_files == 0:
        return None
    folder = None if files.folder is None else Path(files.folder).expanduser()
    try:
        return FileStore(
            folder,
            max_files=files.max_files,
            max_bytes=files.max_bytes,
            ttl_seconds=files.ttl_seconds,
            shared=shared,
        )
    except OSError as error:
        raise PreflightError(
            f"files.folder: cannot use {folder} ({error.strerror}); name another place."
        ) from None


def batch_store(profile: Profile) -> BatchStore | None:
    """Return the store of the profile's ``batches`` section, None where they are off.

    Raises:
        PreflightError: its folder cannot be used.
    """
    section = profile.batches
    if not section.enabled:
        return None
    folder = profile.batches_path
    try:
        return BatchStore(folder, ttl_seconds=section.ttl_seconds, max_bytes=section.max_bytes)
    except BlockingIOError:
        raise PreflightError(
            f"batches.folder: another server uses {folder}; name another place."
        ) from None
    except OSError as error:
        raise PreflightError(
            f"batches.folder: cannot use {folder} ({error.strerror}); name another place."
        ) from None


def server_url(profile: Profile) -> str:
    """Return the address that a client on this machine uses, without ``/v1``."""
    scheme = "https" if profile.server.ssl_certfile else "http"
    host, port = profile.server.host, profile.server.port
    if host in ("0.0.0.0", "::"):  # noqa: S104  # compared with, not bound to
        host = "127.0.0.1"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def curl(url: str, *, with_key: bool) -> str:
    """Return a command line that asks the server at ``url`` about a picture it carries."""
    body = {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": _picture()}},
                    {"type": "text", "text": "What colour is the circle?"},
                ],
            }
        ]
    }
    words = ["curl", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    line = shlex.join([*words, "-d", json.dumps(body, separators=(",", ":"))])
    return f'{line} -H "Authorization: Bearer ${API_KEY_VARIABLE}"' if with_key else line


def _picture() -> str:
    from PIL import Image, ImageDraw  # noqa: PLC0415  # comes with vLLM

    picture = Image.new("P", (112, 112), 0)
    picture.putpalette([255, 255, 255, 220, 30, 30])
    ImageDraw.Draw(picture).ellipse((24, 24, 88, 88), fill=1)
    data = io.BytesIO()
    picture.save(data, "PNG", bits=1, optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def engine_environment(profile: Profile) -> dict[str, str]:
    """Return what vLLM's processes must find in their environment before vLLM is imported."""
    chosen = {
        "VLLM_MEDIA_CONNECTOR": "qwen2vl_serve",
        "VLLM_NO_USAGE_STATS": "1",
        # As `vllm serve` sets it: a fork would copy the locks that other threads hold.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        **profile.environment(),
    }
    on_cpu = vllm_build() == "cpu"
    if on_cpu:
        # oneDNN keeps the code of every shape of a product that it has met, 1,024 of them: with
        # prompts and pictures of all sizes the worker grew by 450 MiB, which looks like a leak.
        chosen["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "128"
    if profile.engine.enforce_eager and on_cpu:
        # The ranks of log probabilities would be compiled all the same at their first use: half a
        # minute in which nobody is answered, or the engine's end where there is no C++ compiler.
        chosen["TORCH_COMPILE_DISABLE"] = "1"
    # An operator's own setting wins over the profile's.
    told = {name: value for name, value in chosen.items() if name not in os.environ}
    model = profile.model
    if all(Path(name).is_dir() for name in (model.path, model.tokenizer or model.path)):
        # Nothing is left to fetch, and vLLM would want ModelScope's package, of which our
        # downloads need a small part only.
        told["VLLM_USE_MODELSCOPE"] = "False"
    return told


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


def _fresh_log(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # vLLM's words may quote what clients sent: for its owner's eyes, also where it was there.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        path.chmod(0o600)
    except OSError as error:
        raise PreflightError(
            f"server.log_file: cannot write {path} ({error.strerror}); name another place."
        ) from None
    return path


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Send file descriptors 1 and 2, which child processes inherit, to ``path``."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    try:
        yield
    except BaseException:
        # What went wrong is told to the operator; after a good end nothing more is, and what
        # vLLM still says while the interpreter ends belongs into the log.
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        raise
    finally:
        for descriptor in kept:
            os.close(descriptor)


def _log_to(report: Report, formatter: logging.Formatter) -> None:
    """Report the server's own log lines (one a request); what went wrong is kept in the file."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            report(self.format(record))

    requests = logging.getLogger("qwen2vl_serve.requests")
    requests.setLevel(logging.INFO)
    requests.propagate = False
    others = logging.getLogger("qwen2vl_serve")
    for logger, handler in ((requests, Handler()), (others, logging.StreamHandler())):
        handler.setFormatter(formatter)
        logger.addHandler(handler)
