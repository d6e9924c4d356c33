"""From a profile to its engine: one of vLLM's, or several behind one."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers.api_server.entry import (
    build_async_engine_client_from_engine_args,
)
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.envs import enable_envs_cache
from vllm.platforms import current_platform
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.utils.gc_utils import freeze_gc_heap

from qwen2vl_serve.engine import Adapter, Engine
from qwen2vl_serve.engines import Engines, several_engines
from qwen2vl_serve.errors import APIError, BootError
from qwen2vl_serve.profile import Profile, equal_shares
from qwen2vl_serve.vllm_engine import connector, tools
from qwen2vl_serve.vllm_engine.adapters import Models, places
from qwen2vl_serve.vllm_engine.encoding import PromptEncoder, encode_with
from qwen2vl_serve.vllm_engine.engine import Chat, VLLMEngine
from qwen2vl_serve.vllm_engine.patches import make_patches
from qwen2vl_serve.vllm_engine.rank import rank
from qwen2vl_serve.vllm_engine.shared_figures import SharedFigures

_CPUS = "VLLM_CPU_OMP_THREADS_BIND"
# Names, since each worker's process imports them.
_BOUND_WORKER = "qwen2vl_serve.vllm_engine.processors.BoundWorker"
_STAGED_WORKER = "qwen2vl_serve.vllm_engine.staged_worker.StagedWorker"
_WITHIN_CORE = "qwen2vl_serve.vllm_engine.within_core.WithinCore"


@asynccontextmanager
async def start_engine(profile: Profile, adapters: Mapping[str, Adapter]) -> AsyncIterator[Engine]:
    """Boot vLLM with ``profile.engine_args()``, load ``adapters``; shut it down on the way out.

    Whatever vLLM raises at start passes unchanged: the launcher explains it.
    """
    connector.register()
    tools.register()
    arguments = profile.engine_args() | places(profile.engine.max_cpu_loras or 0)
    engines = arguments.pop("data_parallel_size")
    args = AsyncEngineArgs(**arguments)
    if current_platform.is_cpu():
        if profile.worker_in_core:
            args.distributed_executor_backend = _WITHIN_CORE
        else:
            args.worker_cls = _STAGED_WORKER if args.pipeline_parallel_size > 1 else _BOUND_WORKER
    start = _one(profile, args) if engines == 1 else _several(profile, args, engines)
    async with start as engine:
        # vLLM's front end asks the environment for one of its variables at every token. Its own
        # workers keep them once they have started; its API server does not.
        enable_envs_cache()
        freeze_boot()
        for name, adapter in adapters.items():
            try:
                await engine.load_adapter(name, adapter)
            except APIError as error:
                raise BootError(f"adapters.lora_modules.{name}: {error.message}") from None
        yield engine


def freeze_boot() -> None:
    """Keep what the boot made out of garbage collections, as vLLM's own server does.

    Python collects the oldest generation when a quarter as many objects have come as survived its
    last collection (CPython's ``long_lived_pending``). Without another collection behind the freeze
    those that are frozen count, some 800,000: cycles of 200,000 objects would wait to be freed.
    """
    freeze_gc_heap()
    gc.collect()


@asynccontextmanager
async def _one(profile: Profile, args: AsyncEngineArgs) -> AsyncIterator[VLLMEngine]:
    async with build_async_engine_client_from_engine_args(args) as client:
        engine = _behind(client, profile)
        await engine.warm_up()
        yield engine


def _several(
    profile: Profile, args: AsyncEngineArgs, engines: int
) -> AbstractAsyncContextManager[Engines]:
    if current_platform.is_cpu() and _CPUS not in os.environ:
        # vLLM would bind them all to the same ones.
        os.environ[_CPUS] = equal_shares(profile.workers)
    figures = SharedFigures(engines)

    @asynccontextmanager
    async def start(index: int) -> AsyncIterator[VLLMEngine]:
        async with rank(args, index, figures) as client:
            # Warms up for a second or so, while others answer if it takes a lost one's place.
            engine = await asyncio.to_thread(_behind, client, profile)
            await engine.warm_up()
            yield engine

    server = profile.server
    return several_engines(
        [partial(start, index) for index in range(engines)],
        hang_seconds=server.hang_seconds,
        probe_seconds=server.probe_seconds,
        replace_hung=server.exit_on_hang,
    )


def _behind(client: EngineClient, profile: Profile) -> VLLMEngine:
    """Put vLLM's serving classes in front of an engine that is up."""
    renderer = client.renderer
    # vLLM makes sure that each item has data or a key by looking at the data, which decodes
    # every video again, known or not. Each of ours has both.
    renderer._validate_mm_uuids = _no_look
    # It is asked for at every request, and transformers' tokenizer looks it up each time.
    renderer.get_eos_token_id = partial(int, renderer.get_eos_token_id())
    make_patches(renderer.mm_processor)
    names = profile.model.served_names
    models = Models(client, [BaseModelPath(name, profile.model.path) for name in names])
    encoder = PromptEncoder(renderer.tokenizer)
    encode_with(encoder, renderer)
    chat = _chat(client, models)
    tool_chat = None
    if profile.server.tools != "off":
        tool_chat = _chat(client, models, tools.TEMPLATE, tools.SERVED)
    return VLLMEngine(client, chat, encoder, profile.engine.max_cpu_loras or 0, tool_chat)


def _no_look(*_: object) -> None:
    """Stand in for vLLM's check that media have data or a key."""


def _chat(
    client: EngineClient,
    models: Models,
    template: str | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Chat:
    """Return vLLM's chat serving, under ``template`` or the model's own."""
    given = {
        "request_logger": None,
        "chat_template": template,
        "chat_template_content_format": "auto",
        **options,
    }
    renderer = OnlineRenderer(model_config=client.model_config, renderer=client.renderer, **given)
    renderer.warmup()
    return Chat(client, models, "assistant", online_renderer=renderer, **given)
