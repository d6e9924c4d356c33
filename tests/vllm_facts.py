"""Run by a test in a process of its own: what vLLM's own code says of sizes and defaults, as JSON.

Models are built on the meta device, without a number in memory, as one rank of groups that do not
exist. Usage: ``python -m tests.vllm_facts weights NAME…`` or ``budgets SETTINGS…``.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm import AsyncEngineArgs
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.encoder_budget import MultiModalBudget
from vllm.usage.usage_lib import UsageContext
from vllm.utils.torch_utils import set_default_torch_dtype

from qwen2vl_serve.plan.architectures import Architecture, published
from qwen2vl_serve.profile import load_profile
from qwen2vl_serve.profile.sections import DEMO_MODEL_FOLDER
from tests.test_plan_architectures import config_of

SPLITS = ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (4, 2), (2, 3))
TOKENS = {
    "image_token_id": 1022,
    "video_token_id": 1023,
    "vision_start_token_id": 1019,
    "vision_end_token_id": 1020,
}


class Group(SimpleNamespace):
    """A group of ranks of which only this one runs."""

    def __init__(self, real: Any, **fields: Any) -> None:
        super().__init__(**fields)
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


def folder(model: Architecture) -> Path:
    """Write a checkpoint's folder without weights: the demo's tokenizer, the model's sizes."""
    path = Path(tempfile.mkdtemp())
    for file in DEMO_MODEL_FOLDER.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, path / file.name)
    gated = model.vision is not None and model.vision.gated
    kind = "Qwen2_5_VL" if gated else "Qwen2VL"
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24]}
    config = config_of(model) | TOKENS
    config |= {"architectures": [f"{kind}ForConditionalGeneration"], "rope_scaling": rope}
    config |= {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    return path


def weights(names: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the bytes of parameters and buffers of each stage's first rank."""
    for name in names:
        model = published(name)
        assert model is not None
        config = AsyncEngineArgs(
            model=str(folder(model)),
            dtype="half" if model.quantisation else "bfloat16",
            max_model_len=4096,
            enforce_eager=True,
            limit_mm_per_prompt={"image": 1, "video": 0},
            kv_cache_memory_bytes=2**28,
            load_format="dummy",
        ).create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        with set_current_vllm_config(config):
            if parallel_state._TP is None:
                address = f"file://{tempfile.mkdtemp()}/group"
                parallel_state.init_distributed_environment(1, 0, address, 0, "gloo")
                parallel_state.initialize_model_parallel(1, 1)
            for ranks, stages in SPLITS:
                if model.shape().obstacle(ranks) is None:
                    for stage in range(stages):
                        yield {
                            "name": name, "ranks": ranks, "stages": stages, "stage": stage,
                            "bytes": held(config, ranks, stages, stage),
                        }  # fmt: skip


def held(config: VllmConfig, ranks: int, stages: int, stage: int) -> int:
    tensor, pipeline = parallel_state._TP, parallel_state._PP
    _ROPE_DICT.clear()
    config.compilation_config.static_forward_context.clear()
    first, last = stage == 0, stage == stages - 1
    parallel_state._TP = Group(tensor, world_size=ranks, rank_in_group=0)
    parallel_state._PP = Group(
        pipeline,
        world_size=stages,
        rank_in_group=stage,
        is_first_rank=first,
        is_last_rank=last,
    )
    try:
        with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"):
            model = initialize_model(vllm_config=config)
    finally:
        parallel_state._TP, parallel_state._PP = tensor, pipeline
    tensors = {id(one): one for one in (*model.parameters(), *model.buffers())}
    return sum(one.numel() * one.element_size() for one in tensors.values())


def budgets(settings: list[str]) -> Iterator[dict[str, Any]]:
    """Yield what the encoder is profiled with, and the defaults, of the demo under settings."""
    for overrides in settings:
        profile = load_profile("demo", overrides.split())
        config = AsyncEngineArgs(**profile.engine_args()).create_engine_config(
            usage_context=UsageContext.OPENAI_API_SERVER
        )
        budget = MultiModalBudget(config, MULTIMODAL_REGISTRY, enable_cache=False)
        kind = budget.get_modality_with_max_tokens()
        yield {
            "kind": kind,
            "tokens": budget.mm_max_toks_per_item[kind],
            "items": budget.mm_max_items_per_batch[kind],
            "budget": budget.get_encoder_budget(),
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "block": config.cache_config.block_size,
        }


if __name__ == "__main__":
    facts = {"weights": weights, "budgets": budgets}[sys.argv[1]]
    for fact in facts(sys.argv[2:]):
        print("FACT", json.dumps(fact), flush=True)
