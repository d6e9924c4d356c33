"""Real boots, as their logs tell them, against the planner.

The logs are of other vLLM versions, whose profile runs differ; what does not depend on the version
has to agree: weights, bytes of a token, blocks of a cache, and what is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from qwen2vl_serve.machine.hardware import GIB, Card
from qwen2vl_serve.plan import memory, plan_for
from qwen2vl_serve.plan.architectures import Architecture, Quantisation, Text, Vision, published
from qwen2vl_serve.plan.assessment import Assessment, Verdict
from qwen2vl_serve.profile import make_profile

QWEN3_VL_8B = Text(4096, 12288, 36, 32, 8, 128, 151936, False, 262144, qkv_bias=False, qk_norm=True)
QWEN3_VL_2B = Text(2048, 6144, 28, 16, 8, 128, 151936, True, 262144, qkv_bias=False, qk_norm=True)
QWEN3_VISION_8B = Vision(27, 1152, 16, 4304, 4096, False, 16, positions=2304, deep_mergers=3)
QWEN3_VISION_2B = Vision(24, 1024, 16, 4096, 2048, False, 16, positions=2304, deep_mergers=3)
TEXT_32B = Text(5120, 27648, 64, 40, 8, 128, 152064, False, 32768, mrope=False)
TEXT_7B = Text(3584, 18944, 28, 28, 4, 128, 152064, False, 32768, mrope=False)
AWQ = Quantisation("awq", 4, 128, zeros=True)
GPTQ = Quantisation("gptq", 4, 128)
LARGE = 12_845_056
"""Most pixels of a picture where nobody sets another bound: 16384 tokens."""


def vl(name: str) -> Architecture:
    found = published(name)
    assert found is not None
    return found


def qwen3(text: Text, vision: Vision) -> Architecture:
    return Architecture("Qwen3-VL", text, vision, kind="qwen3_vl")


@dataclass(frozen=True)
class Log:
    """One boot: sizes in GiB a card; None for what the log does not tell."""

    source: str
    model: Architecture
    tensor: int
    length: int
    total: float | None = None
    share: float = 0.9
    weights: float | None = None
    other: float | None = None
    activations: float | None = None
    cache: float | None = None
    tokens: int | None = None
    refused: bool = False
    pixels: int = 1_003_520
    videos: int = 0
    engine: Mapping[str, object] = field(default_factory=dict)
    card: str = "card"


# The log in the thread is of its second command, of 2025-04-15: engine V0, one picture, no video.
TWO_REQUESTS_ON_A100S = Log(
    "vllm#16570", vl("Qwen2.5-VL-72B-Instruct"), 4, 4096, 39.38, 0.95,
    weights=34.43, other=0.34, activations=2.51, cache=0.13, refused=True, pixels=LARGE,
    engine={"max_num_seqs": 2},
)  # fmt: skip
# These are in the documentation too, by their places in this list.
LOGS = [
    TWO_REQUESTS_ON_A100S,
    replace(
        TWO_REQUESTS_ON_A100S, source="vllm#16570, the fullest card", other=0.43, cache=0.04
    ),
    Log("vllm#15136", vl("Qwen2.5-VL-7B-Instruct"), 4, 8192, weights=3.9972),
    Log("gpustack#1800", vl("Qwen2.5-VL-7B-Instruct"), 1, 8192, 23.58, tokens=2400, refused=True),
    Log(
        "xinference#4926", Architecture("Qwen3-VL", QWEN3_VL_8B, None), 1, 262144,
        cache=6.94, tokens=50512, refused=True,
    ),
    Log(
        "vllm#15815", Architecture("Qwen2.5-32B", TEXT_32B, None), 2, 4096, 44.42,
        weights=30.71, other=0.30, activations=1.26, cache=7.71, tokens=3947 * 16,
    ),
    Log(
        "WeClone#101", Architecture("Qwen2.5-7B-AWQ", TEXT_7B, None, AWQ), 1, 3072, 15.99,
        weights=5.20, activations=1.41, cache=7.73, tokens=9048 * 16,
    ),
    Log(
        "vllm#13882", Architecture("Qwen2.5-7B-AWQ", TEXT_7B, None, AWQ), 1, 4096, 8.00, 0.70,
        weights=5.20, other=0.03, activations=1.42, cache=-1.05, refused=True,
    ),
]  # fmt: skip

# Boots of engine V1 with media as vLLM profiles them where nobody bounds them. An L4 has 22.03 GiB
# for CUDA, as other logs tell; the A100's is what 0.53 GiB for graphs are a share of, in the log.
VIDEO_ON_AN_A100 = Log(
    "notes on vLLM 0.23.0", vl("Qwen2.5-VL-7B-Instruct"), 1, 128_000, 79.22, 0.22,
    weights=15.67, cache=-14.28, refused=True, pixels=LARGE, videos=1, card="A100 80 GB",
)  # fmt: skip
PROFILED = [
    Log(
        "guide to vLLM 0.9.0.1 on KServe", vl("Qwen2.5-VL-7B-Instruct"), 1, 2048, 22.03,
        weights=15.6271, cache=1.81, tokens=33824, pixels=LARGE, card="L4",
    ),
    Log(
        "ray-project/ray, vLLM 0.11.0", vl("Qwen2.5-VL-3B-Instruct"), 1, 8192, 22.03,
        weights=7.1550, cache=9.26, tokens=269568, pixels=LARGE, card="L4",
    ),
]  # fmt: skip

VIDEO_ON_A_4090 = Log(
    "Korean lab notes on vLLM 0.27.1, WSL2", vl("Qwen2.5-VL-7B-Instruct"), 1, 8192, 23.99,
    weights=15.67, tokens=62736, pixels=LARGE, videos=1, card="RTX 4090",
)  # fmt: skip

FURTHER = [
    *PROFILED,
    VIDEO_ON_AN_A100,
    VIDEO_ON_A_4090,
    Log(
        "Unsloth on vLLM 0.9.2", vl("Qwen2.5-VL-3B-Instruct"), 1, 16384,
        cache=13.48, tokens=392576, pixels=LARGE,
        engine={"max_num_batched_tokens": 16384, "max_num_seqs": 1},
    ),
    Log("Lingshu-32B on vLLM 0.9.0.1", vl("Qwen2.5-VL-32B-Instruct"), 1, 8192, weights=62.43),
    Log(
        "UI-TARS on vLLM 0.6.6", vl("Qwen2-VL-7B-Instruct"), 1, 8192, 23.67,
        weights=15.5083, other=0.28, activations=1.16, cache=4.36, tokens=5102 * 16,
    ),
    Log(
        "a fine-tuned model on vLLM 0.13.0", vl("Qwen2-VL-7B-Instruct"), 1, 4096,
        weights=15.5320, cache=4.28, tokens=80144,
    ),
    Log(
        "the same, quantised", vl("Qwen2-VL-7B-Instruct-GPTQ-Int4"), 1, 4096,
        weights=6.4643, cache=13.35, tokens=249936,
    ),
    Log("vllm#27991", vl("Qwen2.5-VL-7B-Instruct-AWQ"), 1, 32768, weights=6.5936),
    Log("a Jetson on vLLM 0.9.3", vl("Qwen2.5-VL-7B-Instruct-AWQ"), 1, 4096, weights=6.5935),
    Log(
        "LLM-PBoC-Credit-Risk, vLLM 0.20.2", qwen3(QWEN3_VL_2B, QWEN3_VISION_2B), 1, 2048,
        weights=4.24, cache=8.13, tokens=76144, engine={"max_num_seqs": 1},
    ),
    Log(
        "mono_kernel, vLLM of April 2026", qwen3(QWEN3_VL_8B, QWEN3_VISION_8B), 1, 4096,
        weights=16.78, cache=22.46, tokens=163568, engine={"max_num_batched_tokens": 8192},
    ),
    Log(
        "Cosmos3-Nano on ROCm", qwen3(QWEN3_VL_8B, QWEN3_VISION_8B), 1, 8192,
        weights=16.78, cache=72.12, tokens=525136, engine={"max_num_batched_tokens": 8192},
    ),
    Log(
        "a Jetson Thor on vLLM 0.11.2", qwen3(QWEN3_VL_8B, QWEN3_VISION_8B), 1, 4096,
        cache=36.34, tokens=264592,
    ),
    Log(
        "one NPU", qwen3(QWEN3_VL_8B, QWEN3_VISION_8B), 1, 16384,
        weights=16.9570, cache=34.66, tokens=252288, engine={"max_num_batched_tokens": 16384},
    ),
    Log(
        "two NPUs", qwen3(QWEN3_VL_8B, QWEN3_VISION_8B), 2, 65536,
        weights=9.1948, cache=38.41, tokens=559232, engine={"max_num_batched_tokens": 32768},
    ),
]  # fmt: skip


def having(*fields: str) -> list[object]:
    return [
        pytest.param(log, id=log.source)
        for log in (*LOGS, *FURTHER)
        if all(getattr(log, field) is not None for field in fields)
    ]


def planned(log: Log, **engine: object) -> Assessment:
    """Plan the boot on cards of its size, with vLLM 0.32's defaults for what it does not say."""
    profile = make_profile(
        {
            "model": {"model": log.model.name},
            "hardware": {"device": "cuda"},
            "engine": {
                "tensor_parallel_size": log.tensor,
                "max_model_len": log.length,
                "gpu_memory_utilization": log.share,
                **log.engine,
                **engine,
            },
            "media": {
                "limit_mm_per_prompt": {"image": 1, "video": log.videos},
                "max_pixels": log.pixels,
                "videos_kwargs": {"client_max_pixels": log.pixels},
            },
        }
    )
    total = log.total or 24.0
    cards = [Card(index, log.card, total, total, (8, 6)) for index in range(log.tensor)]
    return plan_for(profile, cards, architecture=log.model)


def bytes_per_token(log: Log) -> int:
    return planned(log).deployment.kv_bytes_per_token()


@pytest.mark.parametrize("log", having("weights"))
def test_weights_of_a_card(log: Log) -> None:
    """Within 0.25 GiB, and the likely value within a tenth."""
    (stage,) = planned(log).stages
    assert stage.weights_gib == pytest.approx(log.weights, abs=0.1)
    exact = stage.parts.weights.low + stage.parts.vision.low
    assert exact / GIB == pytest.approx(log.weights, abs=0.25)


@pytest.mark.parametrize("log", having("cache", "tokens"))
def test_tokens_of_a_cache(log: Log) -> None:
    """A cache of the size that was logged holds the tokens that were logged, within 0.1 %."""
    each = bytes_per_token(log)
    # Sizes are logged with two decimals: half of the last one is the log's own uncertainty.
    rounding = 0.005 / log.cache
    assert log.cache * GIB / each == pytest.approx(log.tokens, rel=0.001 + rounding)
    held = memory.tokens_held(log.cache * GIB, each, 16)
    assert held == pytest.approx(log.tokens, rel=0.001 + rounding, abs=16)


@pytest.mark.parametrize(
    ("name", "tensor", "kib"),
    [
        ("Qwen2-VL-7B-Instruct", 1, 56),
        ("Qwen2-VL-7B-Instruct", 4, 14),
        ("Qwen2-VL-2B-Instruct", 4, 14),
        ("Qwen2.5-VL-72B-Instruct", 4, 80),
        ("Qwen2-VL-72B-Instruct", 16, 40),
    ],
)
def test_bytes_of_a_token_on_a_card(name: str, tensor: int, kib: int) -> None:
    """Ranks beyond the KV heads hold copies: 16 ranks of 8 heads hold one each."""
    log = Log("", vl(name), tensor, 4096, 141.0)
    assert bytes_per_token(log) == kib * 1024


def test_what_one_request_needs() -> None:
    """xinference#4926 says it: 262144 tokens of Qwen3-VL-8B need 36.0 GiB."""
    each = bytes_per_token(LOGS[4])
    null_block = each * 16
    assert memory.needed_bytes(262144, each, 16) - null_block == 36 * GIB


@pytest.mark.parametrize(
    ("source", "name", "gib"),
    [
        ("a trainer of 2026", "Qwen2.5-VL-3B-Instruct", 4.39),
        ("telesearch", "Qwen2.5-VL-32B-Instruct", 31.25),
    ],
)
def test_what_one_request_of_128000_tokens_needs(source: str, name: str, gib: float) -> None:
    """What vLLM says in its refusal of Qwen2.5-VL's own length."""
    each = bytes_per_token(Log(source, vl(name), 1, 128_000))
    needed = memory.needed_bytes(128_000, each, 16) - each * 16
    assert needed / GIB == pytest.approx(gib, abs=0.005)


@pytest.mark.parametrize("log", having("total", "weights", "other", "activations", "cache"))
def test_the_parts_add_up(log: Log) -> None:
    """Share less weights, activations and the rest is the cache, as vLLM reckons."""
    assert log.total is not None
    taken = (log.weights or 0) + (log.other or 0) + (log.activations or 0)
    share = memory.requested_bytes(log.total * GIB, log.share)
    left = memory.cache_bytes(share, memory.exactly(taken * GIB))
    assert left.likely / GIB == pytest.approx(log.cache, abs=0.02)


REFUSED = [pytest.param(log, id=log.source) for log in LOGS if log.refused]
FORESEEN = {
    "vllm#16570": Verdict.TIGHT,
    "vllm#16570, the fullest card": Verdict.TIGHT,
    "vllm#13882": Verdict.NO,
    "xinference#4926": Verdict.NO,
}
# The log is of 0.8.4's engine V0, as its title says, which the releases since have no more: it
# profiled prompts as a whole and a sampler that sorts. 0.32 leaves the cache 20 times the tokens.
ONLY_ON_V0 = "gpustack#1800"


@pytest.mark.parametrize("log", REFUSED)
def test_a_refused_log_agrees_with_itself(log: Log) -> None:
    """A cache as it was logged does not hold one request of the length that was asked for."""
    each = bytes_per_token(log)
    size = log.cache * GIB if log.cache is not None else (log.tokens or 0) * each
    assert size < memory.needed_bytes(log.length, each, 16)


@pytest.mark.parametrize("log", REFUSED)
def test_every_refusal_is_foreseen(log: Log) -> None:
    """No boot that was refused is said to fit, but for the one that the engine V0 alone refused."""
    plan = planned(log)
    if log.source == ONLY_ON_V0:
        assert plan.verdict is Verdict.FITS
        assert plan.kv_tokens.low > 20 * (log.tokens or 0)
    else:
        assert plan.verdict is FORESEEN[log.source]


def test_a_refusal_by_length_is_foreseen() -> None:
    """xinference#4926 on any card that leaves 6.94 GiB for the cache."""
    plan = planned(LOGS[4], kv_cache_memory_bytes=int(6.94 * GIB))
    assert plan.verdict is Verdict.NO
    assert plan.longest.likely == pytest.approx(50512, rel=0.001)


@pytest.mark.parametrize("log", [pytest.param(log, id=log.source) for log in LOGS[5:7]])
def test_what_booted_is_said_to_fit(log: Log) -> None:
    """And the cache that was left lies within the planned range."""
    plan = planned(log)
    assert plan.verdict is Verdict.FITS
    (stage,) = plan.stages
    assert log.cache is not None
    # 0.32 keeps counts of output tokens and takes graphs from the cache; these boots did not.
    size = replace(stage.cache.size, high=stage.cache.size.high + stage.parts.graphs.high)
    assert size.low < log.cache * GIB < size.high


@pytest.mark.parametrize("log", [pytest.param(log, id=log.source) for log in PROFILED])
def test_the_cache_beside_the_largest_picture_is_foreseen(log: Log) -> None:
    """What these boots left for the cache lies in the planned range, without graphs on both sides.

    Until 0.21 graphs were not taken from the cache.
    """
    (stage,) = planned(log).stages
    size, graphs = stage.cache.size, stage.parts.graphs
    assert log.cache is not None
    assert size.low + graphs.high < log.cache * GIB < size.high + graphs.low


def test_a_video_takes_more_than_the_share() -> None:
    """vLLM 0.23.0 profiled 7 × 16384 tokens, as 0.32 does, and had 14.28 GiB too few."""
    plan = planned(VIDEO_ON_AN_A100)
    picture = plan.deployment.picture
    assert picture is not None
    assert (picture.kind, picture.items, picture.budget) == ("video", 1, 114_688)
    assert plan.deployment.max_num_batched_tokens == 2048
    assert plan.verdict is Verdict.NO
    (stage,) = plan.stages
    assert stage.cache.size.low < -14.28 * GIB < stage.cache.size.high < 0
    assert stage.cache.size.likely / GIB == pytest.approx(-14.28, abs=0.5)
    assert stage.parts.graphs.low < 0.53 * GIB < stage.parts.graphs.high


def test_the_tokens_beside_a_video_are_foreseen() -> None:
    """vLLM 0.27.1 took graphs from the cache, as 0.32 does."""
    log = VIDEO_ON_A_4090
    plan = planned(log)
    assert plan.verdict is Verdict.FITS
    assert log.tokens is not None
    assert plan.kv_tokens.low < log.tokens < plan.kv_tokens.high
    assert log.tokens == pytest.approx(plan.kv_tokens.likely, rel=0.15)


def test_a_small_share_of_a_large_card_is_not_said_to_fit() -> None:
    """vllm#18124: 0.3 of 80 GB left no blocks for Qwen2.5-VL-3B with its own length and media."""
    log = replace(VIDEO_ON_AN_A100, model=vl("Qwen2.5-VL-3B-Instruct"), share=0.3)
    assert planned(log).verdict is not Verdict.FITS


def unpadded(name: str, packing: Quantisation) -> Architecture:
    """The 72B as Qwen first quantised it, before the widening: an intermediate size of 29568."""
    return replace(vl(name), quantisation=packing, dtype="float16")


@pytest.mark.parametrize(
    ("source", "model", "tensor", "legal"),
    [
        ("vllm#13640", unpadded("Qwen2.5-VL-72B-Instruct", AWQ), 1, True),
        ("vllm#13640", unpadded("Qwen2.5-VL-72B-Instruct", AWQ), 2, False),
        ("QwenLM/Qwen3-VL#831", unpadded("Qwen2.5-VL-72B-Instruct", AWQ), 4, False),
        ("vllm#13677", unpadded("Qwen2.5-VL-72B-Instruct", AWQ), 8, False),
        ("vllm#13640", vl("Qwen2-VL-72B-Instruct-AWQ"), 2, True),
        ("QwenLM/Qwen3-VL#236", unpadded("Qwen2-VL-72B-Instruct", GPTQ), 1, True),
        ("QwenLM/Qwen3-VL#236", unpadded("Qwen2-VL-72B-Instruct", GPTQ), 2, False),
        ("MIV-XJTU/FSDrive#21", vl("Qwen2-VL-2B-Instruct"), 4, True),
        ("MIV-XJTU/FSDrive#21", vl("Qwen2-VL-2B-Instruct"), 8, False),
    ],
)
def test_splits_that_others_tried(
    source: str, model: Architecture, tensor: int, *, legal: bool
) -> None:
    """What was refused for its split is refused, and what started is not."""
    plan = planned(Log(source, model, tensor, 4096, 141.0))
    refused = any(problem.field == "engine.tensor_parallel_size" for problem in plan.problems)
    assert refused is not legal


@pytest.mark.parametrize("name", ["plan.md", "plan.zh-CN.md"])
def test_the_figures_of_the_documentation(name: str) -> None:
    """The table of boots says what is logged and what is planned, in this order."""
    text = (Path(__file__).parents[1] / "docs" / name).read_text("utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| Qwen[^#]+$", line)]
    logs = (LOGS[0], LOGS[5], LOGS[2], LOGS[6])
    for row, log in zip(rows, logs, strict=False):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert f"{log.weights:.2f}" in cells[1]
        assert cells[2] == f"{planned(log).stages[0].weights_gib:.2f}"
    blocks = memory.tokens_held(7.71 * GIB, bytes_per_token(LOGS[5]), 16) // 16
    assert rows[4].endswith(f"| {blocks} |")
    needed = memory.needed_bytes(262144, bytes_per_token(LOGS[4]), 16) / GIB
    assert rows[5].endswith(f"| {needed:.1f} |")
    assert len(rows) == 6


@pytest.mark.parametrize("name", ["plan.md", "plan.zh-CN.md"])
def test_the_documentation_owns_up_to_every_refusal(name: str) -> None:
    """Each refused boot has a row with its plan's verdict; the one that fits, with its tokens."""
    text = (Path(__file__).parents[1] / "docs" / name).read_text("utf-8")
    found = re.finditer(r"^\| Qwen.*?([\w-]+#\d+).*$", text, re.MULTILINE)
    rows = {row[1]: row[0] for row in found}
    refused = [log for log in LOGS if log.refused]
    assert set(rows) == {log.source.split(",")[0] for log in refused}
    for log in refused:
        plan = planned(log)
        row = rows[log.source.split(",")[0]]
        assert f"| *{plan.verdict}*" in row
        if plan.verdict is Verdict.FITS:
            assert f"{plan.kv_tokens.low:,.0f} – {plan.kv_tokens.high:,.0f}" in row


@pytest.mark.parametrize("name", ["plan.md", "plan.zh-CN.md"])
def test_the_documentation_owns_up_to_activations(name: str) -> None:
    """Every log's activations lie above the planned range, and the page tells both figures."""
    text = (Path(__file__).parents[1] / "docs" / name).read_text("utf-8")
    logs = [log for log in LOGS if log.activations is not None and "," not in log.source]
    most = [planned(log).stages[0].parts.activations.high / GIB for log in logs]
    assert all((log.activations or 0) > high for log, high in zip(logs, most, strict=True))
    assert " / ".join(f"{log.activations:.2f}" for log in logs) in text
    assert " / ".join(f"{high:.2f}" for high in most) in text


@pytest.mark.parametrize("name", ["plan.md", "plan.zh-CN.md"])
def test_the_documentation_tells_what_bears_out_the_activations(name: str) -> None:
    """What boots of V1 had left, and what is planned of it: the least, the most, the likely."""
    text = (Path(__file__).parents[1] / "docs" / name).read_text("utf-8")
    (paragraph,) = re.findall(r"^.*test_plan_golden.*(?:\n.+)*", text, re.MULTILINE)
    size = planned(VIDEO_ON_AN_A100).stages[0].cache.size
    shown = [f"−{-gib / GIB:.1f}" for gib in (size.low, size.high, size.likely)]
    assert re.findall(r"−[\d.]+\d", paragraph) == [f"−{-(VIDEO_ON_AN_A100.cache or 0):.2f}", *shown]
    tokens = planned(VIDEO_ON_A_4090).kv_tokens
    shown = [f"{count:,.0f}" for count in (tokens.low, tokens.high, tokens.likely)]
    assert re.findall(r"\d+,\d{3}", paragraph) == [f"{VIDEO_ON_A_4090.tokens:,}", *shown]
