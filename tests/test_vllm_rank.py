"""One of several engines as vLLM is told of it: its place, its figures, how its start is ended."""

from __future__ import annotations

import asyncio
import inspect
import multiprocessing
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import REGISTRY, generate_latest

from qwen2vl_serve.profile import load_profile


@pytest.fixture(scope="module")
def configs() -> list[Any]:
    """vLLM's configurations of two engines of the demo profile."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    from qwen2vl_serve.vllm_engine.rank import config_of

    arguments = load_profile("demo").engine_args()
    arguments.pop("data_parallel_size")
    args = AsyncEngineArgs(**arguments)
    return [config_of(args, index) for index in (0, 1)]


def test_each_engine_is_whole_and_knows_its_place(configs: list[Any]) -> None:
    """A size of one, so that none waits for another; the number by which vLLM tells them apart."""
    for index, config in enumerate(configs):
        parallel = config.parallel_config
        assert parallel.data_parallel_size == 1
        assert parallel.data_parallel_index == index
        assert parallel.data_parallel_rank_local == index
        assert not config.needs_dp_coordinator
    assert configs[0].instance_id != configs[1].instance_id


def test_vllm_gives_each_its_own_processors(
    configs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes as many entries of the binding as an engine has workers, those of its place."""
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1|5,7")
    bound = [OMPProcessManager(config).cpu_lists for config in configs]
    assert bound == [[[0, 1]], [[5, 7]]]


def test_vllm_gives_each_its_own_cards() -> None:
    """Without a card this is read in vLLM's source: the rank on the machine is moved by TP × PP."""
    from vllm.v1.worker import gpu_worker

    text = re.sub(r"\s+", " ", inspect.getsource(gpu_worker.Worker.init_device))
    assert "dp_local_rank = self.parallel_config.data_parallel_rank_local" in text
    assert "self.local_rank += dp_local_rank * tp_pcp_pp_world_size" in text


def text() -> str:
    return generate_latest(REGISTRY).decode()


@pytest.fixture
def clean_registry() -> Iterator[None]:
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    yield
    unregister_vllm_metrics()


@pytest.mark.usefixtures("clean_registry")
def test_figures_of_engines_stand_side_by_side_and_outlive_one(configs: list[Any]) -> None:
    """A second logger takes no figure away, and counts go on when an engine starts anew."""
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.metrics.stats import SchedulerStats

    from qwen2vl_serve.vllm_engine.shared_figures import SharedFigures

    figures = SharedFigures(2)

    def logger(index: int) -> Any:
        made = StatLoggerManager(configs[index], [index], [figures.factory])
        made.log_engine_initialized()
        return made

    def stats(hits: int) -> Any:
        one = SchedulerStats(num_running_reqs=3)
        one.prefix_cache_stats.queries = one.prefix_cache_stats.hits = hits
        return one

    loggers = [logger(index) for index in (0, 1)]
    for index, one in enumerate(loggers):
        one.record(stats(5 + index), None, engine_idx=index)
    hits = r'vllm:prefix_cache_hits_total\{engine="(\d)",model_name="qwen2-vl-demo"\} (\S+)'
    running = r'vllm:num_requests_running\{engine="(\d)",model_name="qwen2-vl-demo"\} (\S+)'
    assert re.findall(hits, text()) == [("0", "5.0"), ("1", "6.0")]
    assert re.findall(running, text()) == [("0", "3.0"), ("1", "3.0")]
    figures.clear(1)
    assert re.findall(running, text()) == [("0", "3.0"), ("1", "0.0")]
    logger(1).record(stats(1), None, engine_idx=1)
    assert re.findall(hits, text()) == [("0", "5.0"), ("1", "7.0")]
    for engine in (0, 1):
        assert re.search(rf'vllm:cache_config_info\{{.*engine="{engine}"', text())


def test_a_start_that_is_given_up_ends_its_process_and_its_thread() -> None:
    """Cancelled while vLLM waits for the engine's process; other engines' are left alone."""
    from qwen2vl_serve.vllm_engine import rank

    context = multiprocessing.get_context("spawn")
    started: list[Any] = []

    def engine() -> Any:
        process = context.Process(target=time.sleep, args=(60,), name="EngineCore", daemon=True)
        process.start()
        started.append(process)
        return process

    other = engine()
    rank._up.add(other.pid)

    def make() -> Any:
        engine().join()  # as vLLM does: it sees that the process has ended
        raise RuntimeError("Engine core initialization failed")

    async def give_up() -> None:
        boot = rank._Boot(make)
        task = asyncio.create_task(boot.client())
        while len(started) < 2:
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not boot._thread.is_alive()

    try:
        asyncio.run(give_up())
        assert not started[1].is_alive()
        assert other.is_alive()
    finally:
        rank._up.discard(other.pid)
        other.kill()


def test_what_a_start_raises_is_raised_where_it_is_awaited() -> None:
    """The launcher finds the cause by it."""
    from qwen2vl_serve.vllm_engine import rank

    def make() -> Any:
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        asyncio.run(rank._Boot(make).client())
