"""The planner's arithmetic against vLLM's own code, without an engine and without weights."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen2vl_serve.machine import hardware
from qwen2vl_serve.plan import plan_for
from qwen2vl_serve.plan.architectures import published
from qwen2vl_serve.plan.weights import stage_weights
from qwen2vl_serve.profile import load_profile

ROOT = Path(__file__).parents[1]
MODELS = (
    "Qwen/Qwen2-VL-2B-Instruct",
    "Qwen/Qwen2-VL-7B-Instruct",
    "Qwen/Qwen2.5-VL-3B-Instruct",
    "Qwen/Qwen2.5-VL-72B-Instruct",
    "Qwen/Qwen2-VL-7B-Instruct-AWQ",
)
LIMIT = "media.limit_mm_per_prompt"
LARGE = "media.max_pixels=12845056 media.client_max_pixels=12845056"
MIDDLE = "media.max_pixels=1003520 media.client_max_pixels=1003520"
FRAMES = "media.videos_kwargs.client_max_pixels=602112"
FEW = "engine.max_num_batched_tokens=512 engine.max_num_seqs=4"
SETTINGS = (
    "engine.max_model_len=4096",
    f"{LIMIT}.video=0 {MIDDLE}",
    f"{LIMIT}.video=2 {MIDDLE} {FRAMES} {FEW} engine.max_model_len=8192",
    f"{LIMIT}.image=0 engine.max_model_len=8192",
    f"{LIMIT}.video=0 {LARGE} engine.max_model_len=8192 engine.max_num_seqs=16",
    f"{LARGE} media.videos_kwargs.client_max_pixels=12845056 engine.max_model_len=8192",
)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")


def facts(*words: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm_facts", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("FACT ")]
    return [json.loads(line.removeprefix("FACT ")) for line in lines]


def test_weights_are_those_of_the_modules_that_vllm_builds() -> None:
    """Every split and stage, to a few bytes a layer: scales of attention are not counted."""
    found = facts("weights", *MODELS)
    assert {fact["name"] for fact in found} == set(MODELS)
    for fact in found:
        model = published(fact["name"])
        assert model is not None
        ours = stage_weights(
            model, tensor_parallel=fact["ranks"], stages=fact["stages"], dtype_bytes=2
        )
        assert ours[fact["stage"]].total.exact == pytest.approx(fact["bytes"], abs=4096), fact


def test_the_encoder_is_profiled_with_what_we_plan() -> None:
    """Largest medium, how often it is taken, the encoder's budget, and vLLM's defaults."""
    for settings, fact in zip(SETTINGS, facts("budgets", *SETTINGS), strict=True):
        profile = load_profile("demo", settings.split())
        plan = plan_for(profile, (), host=hardware.host()).deployment
        assert plan.picture is not None
        assert fact == {
            "kind": plan.picture.kind,
            "tokens": plan.picture.tokens,
            "items": plan.picture.items,
            "budget": plan.picture.budget,
            "max_num_batched_tokens": plan.max_num_batched_tokens,
            "max_num_seqs": plan.max_num_seqs,
            "block": plan.block,
        }, settings
