"""One of several engines on a machine: an ``AsyncLLM`` with processes and devices of its own."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress

import psutil
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM

from qwen2vl_serve.vllm_engine.shared_figures import SharedFigures

_LOOK_SECONDS = 0.1
_LEFT_SECONDS = 5.0
"""How long the workers of an engine that has ended are given to notice it."""

_configuring = threading.Lock()
"""vLLM fills in a configuration by asking the platform and the environment: one at a time."""

_up: set[int] = set()
"""Processes of the engines that have started and not been ended."""


@asynccontextmanager
async def rank(
    args: AsyncEngineArgs, index: int, figures: SharedFigures
) -> AsyncIterator[AsyncLLM]:
    """Start the engine that is number ``index`` of several; on the way out nothing is left of it.

    Whatever it had under way then ends with ``EngineDeadError``.
    """
    client = await _Boot(lambda: _client(args, index, figures)).client()
    processes = _processes(client)
    pids = {process.pid for process in processes}
    _up.update(pids)
    try:
        # As vLLM's own launcher does: what it was warmed up with is not kept.
        await client.reset_mm_cache()
        yield client
    finally:
        _up.difference_update(pids)
        await _end(client, processes)
        figures.clear(index)


def config_of(args: AsyncEngineArgs, index: int) -> VllmConfig:
    """Return vLLM's configuration of the engine that is number ``index`` of several.

    vLLM knows ranks that run by themselves ("offline" in ``v1/engine/utils.py``). By this number
    it chooses cards (``v1/worker/gpu_worker.py``: the local rank is moved by TP × PP for each
    engine before it), CPUs (``utils/ompmultiprocessing.py``: so many entries of
    ``VLLM_CPU_OMP_THREADS_BIND``) and the label of its figures.
    """
    config = args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    parallel = config.parallel_config
    parallel.data_parallel_rank = index
    parallel.data_parallel_index = index
    parallel.data_parallel_rank_local = index
    return config


def _client(args: AsyncEngineArgs, index: int, figures: SharedFigures) -> AsyncLLM:
    with _configuring:
        config = config_of(args, index)
    return AsyncLLM.from_vllm_config(
        config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        stat_loggers=[figures.factory],
        enable_log_requests=args.enable_log_requests,
        aggregate_engine_logging=args.aggregate_engine_logging,
        disable_log_stats=args.disable_log_stats,
    )


class _Boot:
    """Makes an ``AsyncLLM`` in a thread, as making one blocks until its engine is up.

    The thread is none of a pool's: those are waited for when the process ends.
    """

    def __init__(self, make: Callable[[], AsyncLLM]) -> None:
        self._make = make
        self._made: Future[AsyncLLM] = Future()
        self._thread = threading.Thread(target=self._run, name="engine-boot", daemon=True)

    async def client(self) -> AsyncLLM:
        """Return the client once its engine is up; cancelled, leave neither behind."""
        self._thread.start()
        try:
            # Turns of the loop are also when a signal is noticed.
            while self._thread.is_alive():
                await asyncio.sleep(_LOOK_SECONDS)
        except BaseException:
            self._abandon()
            raise
        return self._made.result()

    def _run(self) -> None:
        try:
            self._made.set_result(self._make())
        except BaseException as error:
            self._made.set_exception(error)

    def _abandon(self) -> None:
        """End the engine that is starting; the thread ends by that."""
        while self._thread.is_alive():
            for child in multiprocessing.active_children():
                if child.name.startswith("EngineCore") and child.pid not in _up:
                    child.kill()
            self._thread.join(_LOOK_SECONDS)
        if self._made.exception() is None:
            self._made.result().shutdown()


def _processes(client: AsyncLLM) -> list[psutil.Process]:
    """Return the engine's processes, its workers included."""
    found: list[psutil.Process] = []
    for process in client.engine_core.resources.engine_manager.processes:
        with suppress(psutil.Error):
            core = psutil.Process(process.pid)
            found += [core, *core.children(recursive=True)]
    return found


async def _end(client: AsyncLLM, processes: list[psutil.Process]) -> None:
    """Stop an engine, dead or alive, and kill what has not gone by then: it holds memory."""
    handler = client.output_handler
    if handler is not None and not client.get_num_unfinished_requests():
        handler.cancel()
    await asyncio.to_thread(client.engine_core.shutdown, client.vllm_config.shutdown_timeout)
    # It tells requests of the end, if there are any; ``shutdown`` would stop it before it does.
    if handler is not None:
        await asyncio.wait({handler}, timeout=1)
    client.shutdown()
    await asyncio.to_thread(_take_away, processes)


def _take_away(processes: list[psutil.Process]) -> None:
    deadline = time.monotonic() + _LEFT_SECONDS
    while (left := [one for one in processes if _runs(one)]) and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
    for process in left:
        with suppress(psutil.Error):
            process.kill()


def _runs(process: psutil.Process) -> bool:
    """Whether a process holds anything; a zombie, which its parent has not looked at, does not."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
