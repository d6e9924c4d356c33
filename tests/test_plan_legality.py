"""What forbids a start whatever the memory: the whole table of splits, and what cards can do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qwen2vl_serve.machine.hardware import GIB
from qwen2vl_serve.plan import Verdict, find_remedies, plan_for
from qwen2vl_serve.plan.architectures import published
from qwen2vl_serve.plan.assessment import Assessment
from qwen2vl_serve.plan.capacity import capacity
from qwen2vl_serve.plan.cards import KINDS, parse_cards, table
from qwen2vl_serve.plan.legality import findings
from qwen2vl_serve.profile import load_profile, make_profile

LEGAL = {
    "Qwen2-VL-2B-Instruct": {1, 2, 4},
    "Qwen2-VL-7B-Instruct": {1, 2, 4},
    "Qwen2-VL-72B-Instruct": {1, 2, 4, 8, 16},
    "Qwen2.5-VL-3B-Instruct": {1, 2, 4},
    "Qwen2.5-VL-7B-Instruct": {1, 2, 4},
    "Qwen2.5-VL-32B-Instruct": {1, 2, 4, 8},
    "Qwen2.5-VL-72B-Instruct": {1, 2, 4, 8, 16},
}
LEGAL_QUANTISED = {
    "Qwen2-VL-2B-Instruct": {1, 2},
    "Qwen2-VL-7B-Instruct": {1, 2, 4},
    "Qwen2-VL-72B-Instruct": {1, 2, 4, 8},
    "Qwen2.5-VL-3B-Instruct": {1, 2},
    "Qwen2.5-VL-7B-Instruct": {1, 2, 4},
    "Qwen2.5-VL-32B-Instruct": {1, 2, 4, 8},
    "Qwen2.5-VL-72B-Instruct": {1, 2, 4, 8},
}
SPLITS = [
    pytest.param(f"Qwen/{name}{variant}", legal, id=f"{name}{variant}")
    for variant, sets in (
        ("", LEGAL),
        ("-AWQ", LEGAL_QUANTISED),
        ("-GPTQ-Int4", LEGAL_QUANTISED),
        ("-GPTQ-Int8", LEGAL_QUANTISED),
    )
    for name, legal in sets.items()
]


def plan(gpus: str = "1xh200", model: str = "Qwen/Qwen2-VL-7B-Instruct", **set_: Any) -> Assessment:
    values: dict[str, Any] = {
        "model": {"model": model, **set_.pop("of_model", {})},
        "hardware": {"device": "cuda"},
        "engine": {"max_model_len": 4096, **set_},
        "media": {"limit_mm_per_prompt": {"image": 1}},
    }
    return plan_for(make_profile(values), parse_cards(gpus))


def fields(found: Assessment) -> set[str]:
    return {problem.field for problem in found.problems}


@pytest.mark.parametrize("tensor", range(1, 33))
@pytest.mark.parametrize(("model", "legal"), SPLITS)
def test_every_tensor_split_of_every_model(model: str, legal: set[int], tensor: int) -> None:
    """Heads, KV heads, widths, vision heads and quantisation groups have to divide."""
    found = plan("32xh200", model, tensor_parallel_size=tensor)
    assert ("engine.tensor_parallel_size" in fields(found)) == (tensor not in legal)
    if tensor not in legal:
        assert found.verdict is Verdict.NO
        ways = ", ".join(map(str, sorted(legal)))
        assert f"can be {ways}, times" in str(found.problems[0])


def test_the_3b_splits_over_eight_with_its_encoder_whole() -> None:
    """3420 is what eight ranks do not divide; with `data` the encoder is not split."""
    split = plan("8xh200", "Qwen/Qwen2.5-VL-3B-Instruct", tensor_parallel_size=8)
    assert "mm_encoder_tp_mode=data" in str(split.problems[0])
    whole = plan(
        "8xh200", "Qwen/Qwen2.5-VL-3B-Instruct", tensor_parallel_size=8, mm_encoder_tp_mode="data"
    )
    assert whole.problems == ()
    assert whole.stages[0].parts.vision.low > 8 * split.stages[0].parts.vision.low * 0.9


def test_eight_cards_of_the_7b_are_four_by_two() -> None:
    """28 heads do not divide by 8: the plan of eight cards needs two stages."""
    assert plan("8x3090", tensor_parallel_size=8).verdict is Verdict.NO
    two = plan("8x3090", tensor_parallel_size=4, pipeline_parallel_size=2)
    assert two.problems == ()
    assert "copy of the vision encoder" in " ".join(map(str, two.findings))


@pytest.mark.parametrize(
    ("gpus", "settings", "field", "words"),
    [
        ("1x3090", {"pipeline_parallel_size": 29}, "engine.pipeline_parallel_size", "28 layers"),
        ("3x3090", {"tensor_parallel_size": 4}, "engine.tensor_parallel_size", "needs 4 cards"),
        ("1x3090", {"tensor_parallel_size": 2}, "engine.tensor_parallel_size", "there is 1"),
        ("1xv100-32g", {}, "hardware.card", "7.5 or newer"),
        ("1xt4", {"of_model": {"dtype": "bfloat16"}}, "model.dtype", "model.dtype=half"),
        ("1xt4", {"kv_cache_dtype": "fp8"}, "engine.kv_cache_dtype", "8.0"),
        ("1xt4", {"kv_cache_dtype": "bfloat16"}, "engine.kv_cache_dtype", "float16"),
        ("1x3090", {"max_model_len": 40000}, "engine.max_model_len", "32768"),
        (
            "1x3090",
            {"max_num_seqs": 64, "max_num_batched_tokens": 32},
            "engine.max_num_batched_tokens",
            "max_num_seqs 64",
        ),
        (
            "1x2080",
            {"gpu_memory_utilization": 0.99},
            "engine.gpu_memory_utilization",
            "are asked for",
        ),
    ],
)
def test_a_setting_that_forbids_the_start(
    gpus: str, settings: dict[str, Any], field: str, words: str
) -> None:
    """Each names the field, what the limit is and what to do."""
    found = plan(gpus, **settings)
    assert found.verdict is Verdict.NO
    assert [words in str(problem) for problem in found.problems if problem.field == field] == [True]


PLAIN, AWQ, GPTQ = (f"Qwen/Qwen2-VL-7B-Instruct{kind}" for kind in ("", "-AWQ", "-GPTQ-Int4"))


@pytest.mark.parametrize(
    ("model", "asked", "legal"),
    [
        (AWQ, "awq", True),
        (AWQ, "awq_marlin", True),
        (AWQ, "gptq", False),
        (AWQ, "fp8", False),
        (GPTQ, "auto_gptq", True),
        (GPTQ, "gptq_marlin", True),
        (GPTQ, "awq", False),
        (GPTQ, "compressed-tensors", False),
        (PLAIN, "fp8", True),
        (PLAIN, "mxfp8", True),
        (PLAIN, "int8_per_channel_weight_only", True),
        (PLAIN, "awq", False),
        (PLAIN, "gptq_marlin", False),
        (PLAIN, "modelopt", False),
    ],
)
def test_what_is_asked_for_is_how_the_checkpoint_is_packed(
    model: str, asked: str, legal: bool
) -> None:
    """Another packing than the files' own is refused, and unset by the remedy; what vLLM packs at
    load needs files that are not packed."""
    found = plan("1xl40s", model, of_model={"quantization": asked})
    assert ("model.quantization" in fields(found)) != legal
    if not legal:
        assert found.verdict is Verdict.NO
        (problem,) = found.problems
        assert asked in problem.text
        assert problem.text.endswith("leave it out")
        (remedy,) = find_remedies(found)
        assert remedy.plan.profile.model.quantization is None


@pytest.mark.parametrize(("asked", "legal"), [("awq", True), ("awq_marlin", False)])
def test_only_cards_know_awq_by_its_kernels(asked: str, legal: bool) -> None:
    """vLLM's CPU platform leaves AWQ's name as the checkpoint has it (``auto_awq.py``)."""
    values = {
        "model": {"model": AWQ, "quantization": asked, "dtype": "half"},
        "hardware": {"device": "cpu", "cpu_kvcache_gib": 1},
    }
    found = plan_for(make_profile(values), ())
    assert ("model.quantization" in fields(found)) != legal


@pytest.mark.parametrize("card", table(), ids=lambda card: card.name)
def test_what_each_card_can(card: Any) -> None:
    """bfloat16 and FlashAttention from 8.0 on; quantised kernels from 7.5; nothing below."""
    values = {
        "model": {"model": "Qwen/Qwen2-VL-2B-Instruct-AWQ", "dtype": "bfloat16"},
        "hardware": {"device": "cuda"},
        "engine": {"max_model_len": 4096, "gpu_memory_utilization": 0.85},
        "media": {"limit_mm_per_prompt": {"image": 1}},
    }
    found = fields(plan_for(make_profile(values), [card]))
    assert ("model.dtype" in found) == (card.capability < (8, 0))
    assert ("model.quantization" in found) == (card.capability < (7, 5))
    assert ("hardware.card" in found) == (card.capability < (7, 5))


def test_unset_dtype_is_half_on_old_cards() -> None:
    """vLLM falls back by itself where nothing is asked for."""
    found = plan("1x2080ti-22g")
    assert found.problems == ()
    assert found.deployment.dtype == "float16"
    assert plan("1x3090").deployment.dtype == "bfloat16"


def test_replicas_need_cards_of_their_own() -> None:
    """Data parallelism multiplies the cards, and the requests that are held at once."""
    found = plan("4x3090", tensor_parallel_size=2)
    twice = replace(found.deployment, replicas=2)
    assert twice.cards == 4
    asked = plan("4x3090", tensor_parallel_size=2, data_parallel_size=2)
    assert (asked.deployment, asked.problems) == (twice, ())
    assert not any(finding.fatal for finding in findings(twice, parse_cards("4x3090")))
    told = [str(finding) for finding in findings(twice, parse_cards("3x3090")) if finding.fatal]
    assert len(told) == 1
    assert "TP 2 × PP 1 × DP 2 needs 4 cards, and there are 3" in told[0]
    one, two = found, replace(found, deployment=twice)
    assert capacity(two, 4096).by_cache == 2 * capacity(one, 4096).by_cache


def test_cards_that_stay_idle_are_told() -> None:
    """More cards than are used are no fault, but worth knowing."""
    found = plan("4x3090")
    assert found.problems == ()
    assert "uses 1 of 4 cards" in " ".join(map(str, found.findings))


def test_ranks_across_machines_are_told() -> None:
    """A tensor split wider than a machine crosses the network in every layer."""
    found = plan("2x4xh100", "Qwen/Qwen2-VL-72B-Instruct", tensor_parallel_size=8)
    told = " ".join(map(str, found.findings))
    assert "put pipeline stages on the machines" in told
    assert "need ray" in told


def test_the_smallest_of_different_cards_counts() -> None:
    """Two 3090 and one 3060 are three cards of the 3060's size."""
    mixed = plan("2x3090+1x3060", pipeline_parallel_size=3)
    assert "the cards differ" in " ".join(map(str, mixed.findings))
    assert mixed.stages[2].total < mixed.stages[0].total
    assert mixed.kv_tokens.likely == min(stage.cache.tokens.likely for stage in mixed.stages)


def test_a_card_in_use_has_no_room() -> None:
    """A probed card that others hold memory of is refused as vLLM refuses it."""
    (card,) = parse_cards("1x3090").cards
    values = {"model": {"model": "Qwen/Qwen2-VL-2B-Instruct"}, "hardware": {"device": "cuda"}}
    found = plan_for(make_profile(values), [replace(card, free_gib=10.0)])
    assert "are free on RTX 3090 24 GB" in str(found.problems[0])


def test_every_kind_of_card_has_sizes() -> None:
    """No card without a size; what NVML reports is not more than what is sold."""
    for kind in KINDS.values():
        assert kind.sizes
        assert all(0.9 * gb <= gib <= gb for gb, gib in kind.sizes)
    assert published("Qwen/Qwen2-VL-7B") is not None


def test_eager_stages_are_sound() -> None:
    """vLLM's workers for cards run once before they are asked; on CPUs ours do."""
    profile = load_profile("demo", ["engine.pipeline_parallel_size=2", "hardware.device=cpu"])
    assert plan_for(profile, ()).problems == ()
    assert plan("2x3090", pipeline_parallel_size=2, enforce_eager=True).problems == ()


def test_single_precision_of_a_packed_model_is_made_half() -> None:
    """As the finding says."""
    found = plan("1xl40s", AWQ, of_model={"dtype": "float32"})
    assert [problem.field for problem in found.problems] == ["model.dtype"]
    (remedy,) = find_remedies(found)
    assert remedy.plan.profile.model.dtype == "half"


def test_weights_left_to_the_host_are_told() -> None:
    """No more than there are, and what that costs."""
    found = plan("1xl40s", cpu_offload_gb=9999)
    weights = plan("1xl40s").stages[0].parts.weights.likely / GIB
    told = next(str(one) for one in found.findings if one.field == "engine.cpu_offload_gb")
    assert f"{weights:.2f} GiB of weights for each card lie in the host's memory" in told
    assert found.problems == ()
