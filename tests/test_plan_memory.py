"""The arithmetic of a card's memory: each part follows the setting that it depends on."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl_serve.errors import PreflightError
from qwen2vl_serve.machine.hardware import GIB, Card, Host
from qwen2vl_serve.plan import Verdict, find_remedies, plan_for
from qwen2vl_serve.plan.architectures import Architecture, Text, Vision
from qwen2vl_serve.plan.assessment import Assessment, StagePlan
from qwen2vl_serve.plan.cards import Machines, parse_cards
from qwen2vl_serve.plan.deployment import batch_defaults, capture_sizes, largest_picture
from qwen2vl_serve.plan.environment import cpu_cache_gib
from qwen2vl_serve.plan.memory import needed_bytes, tokens_held
from qwen2vl_serve.plan.weights import MIB, allocation
from qwen2vl_serve.profile import load_profile, make_profile

MODEL = "Qwen/Qwen2-VL-7B-Instruct"


def plan(gpus: str = "1x3090", media: Any = None, model: str = MODEL, **engine: Any) -> Assessment:
    values: dict[str, Any] = {
        "model": {"model": model},
        "hardware": {"device": "cuda"},
        "engine": {"max_model_len": 8192, **engine},
        "media": {"limit_mm_per_prompt": {"image": 4}} if media is None else media,
    }
    return plan_for(make_profile(values), parse_cards(gpus))


def stage(*words: Any, **engine: Any) -> StagePlan:
    return plan(*words, **engine).stages[0]


@pytest.mark.parametrize(
    ("mib", "taken"),
    [(0.1, 0.1), (9.9, 9.9), (10.5, 10.5), (11.5, 12), (18.5, 18.5), (20.5, 22), (64.75, 66)],
)
def test_what_the_allocator_takes(mib: float, taken: float) -> None:
    """Segments of 2 MiB from 10 MiB on; leftovers are shared up to 1 MiB short, never from 20."""
    load = allocation(mib * MIB)
    assert load.exact == mib * MIB
    assert load.allocated == pytest.approx(taken * MIB)


@pytest.mark.parametrize(
    ("memory", "name", "expected"),
    [
        (23.58, "RTX 3090", (2048, 256)),
        (79.22, "A100 80 GB", (2048, 256)),
        (80.0, "H100", (8192, 1024)),
        (180.0, "B200", (16384, 1024)),
    ],
)
def test_batch_defaults(memory: float, name: str, expected: tuple[int, int]) -> None:
    """vLLM's defaults follow the card's memory, but not on any A100."""
    card = Card(0, name, memory, memory, (8, 0))
    assert batch_defaults([card], workers=1, on_cards=True) == expected


@pytest.mark.parametrize("name", ["a10g", "A10G-24G", "nvidia a10g", "a10g 24gb"])
def test_a_card_by_the_name_that_a_cloud_gives_it(name: str) -> None:
    """An A10G is planned as an A10, in capitals, with its maker's name or with its 24 GB."""
    assert parse_cards(f"2x{name}") == parse_cards("2xa10")


def test_batch_defaults_on_cpus() -> None:
    """2048 tokens and 128 requests for each worker: 4096 and 256 of two."""
    assert batch_defaults([], workers=2, on_cards=False) == (4096, 256)


def test_capture_sizes() -> None:
    """1, 2, 4, then in eights to 256 and in sixteens to 512: 51 of them."""
    assert len(capture_sizes(512)) == 51
    assert capture_sizes(16) == [1, 2, 4, 8, 16]


@given(st.integers(1, 10**6), st.integers(1, 65536), st.sampled_from([16, 32]))
def test_a_cache_of_what_is_needed_holds_the_request(each: int, length: int, block: int) -> None:
    """Blocks and their inverse agree, and not a block less is enough."""
    needed = needed_bytes(length, each, block)
    assert tokens_held(needed, each, block) - block >= length
    assert tokens_held(needed - 1, each, block) - block < length


@settings(max_examples=60, deadline=None)
@given(st.integers(30, 94), st.integers(1, 4), st.sampled_from([256, 1280, 16384]))
def test_ranges_are_ordered(share: int, images: int, tokens: int) -> None:
    """Least, likely and most stand in that order in every part, and opposite in what is left."""
    found = plan(
        "1xl40s",
        {"limit_mm_per_prompt": {"image": images}, "max_pixels": tokens * 784},
        gpu_memory_utilization=share / 100,
    )
    (only,) = found.stages
    for part in (only.parts.total, only.cache.size, only.cache.tokens, found.kv_tokens):
        assert part.low <= part.likely <= part.high
    assert only.parts.total.likely + only.cache.size.likely == pytest.approx(only.share)


def with_deep_mergers(image: int = 1, **engine: Any) -> StagePlan:
    """A Qwen3-VL of one small layer: what its deep mergers keep is most of it."""
    text = Text(4096, 64, 1, 32, 8, 128, 64, True, 4096, qkv_bias=False, qk_norm=True)
    vision = Vision(1, 64, 1, 64, 4096, False, 16, positions=64, deep_mergers=3)
    profile = make_profile(
        {
            "model": {"model": "Qwen3-VL"},
            "hardware": {"device": "cuda"},
            "engine": {"max_model_len": 4096, **engine},
            "media": {"limit_mm_per_prompt": {"image": image}},
        }
    )
    model = Architecture("Qwen3-VL", text, vision, kind="qwen3_vl")
    return plan_for(profile, parse_cards("1x3090"), architecture=model).stages[0]


def test_deep_mergers_keep_a_step_for_each() -> None:
    """Three buffers of a whole step, made with the model, where media are on."""
    few = with_deep_mergers(max_num_batched_tokens=2048)
    more = with_deep_mergers(max_num_batched_tokens=8192)
    step = 6144 * 4096 * 2
    assert (more.weights_gib - few.weights_gib) * GIB == pytest.approx(3 * step)
    without = with_deep_mergers(image=0, max_num_batched_tokens=2048)
    off = with_deep_mergers(image=0, max_num_batched_tokens=8192)
    assert off.weights_gib == without.weights_gib


def test_deep_mergers_widen_what_the_encoder_gives() -> None:
    """A token of an encoder with three of them is as wide as four of another's."""
    large = with_deep_mergers(max_num_batched_tokens=64, max_num_seqs=1)
    tokens = 1_003_520 // 32**2
    assert large.parts.activations.low >= 4 * tokens * 4096 * 2


@pytest.mark.parametrize(
    ("model", "compiled", "kernels"),
    [
        # Qwen2-VL's MLP is four times as wide as the encoder. Beside it: input, sum, norm.
        ("Qwen/Qwen2-VL-7B-Instruct", 3 + 3 * 4, 3 + 2 * 4),
        # Qwen2.5-VL's is 3420 of 1280. Beside it: input, attention, sum, norm and result; vLLM's
        # kernel writes the norm and the sum over the first two.
        ("Qwen/Qwen2.5-VL-7B-Instruct", 5 + 3 * 3420 / 1280, 3 + 3 * 3420 / 1280),
    ],
)
def test_the_encoder_takes_more_beside_compiled_layers(
    model: str, compiled: float, kernels: float
) -> None:
    """It is not compiled, and there vLLM's own kernels for norms and activations are off."""
    media = {"limit_mm_per_prompt": {"image": 1}, "max_pixels": 12_845_056}
    for eager, width in ((False, compiled), (True, kernels)):
        found = plan("1xa100-80g", media, model, enforce_eager=eager)
        picture = found.deployment.picture
        assert picture is not None
        values = 4 * picture.tokens * (1176 + width * 1280)
        assert found.stages[0].parts.activations.likely == pytest.approx(2 * values, rel=1e-6)


def test_a_larger_share_goes_to_the_cache() -> None:
    """A tenth more of ``gpu_memory_utilization`` gives it a tenth of the card, and nothing less."""
    more, less = stage(gpu_memory_utilization=0.9), stage(gpu_memory_utilization=0.8)
    grown = more.cache.size.likely - less.cache.size.likely
    (card,) = parse_cards("1x3090").cards
    assert grown == pytest.approx(0.1 * card.memory_gib * GIB, rel=1e-6)


def test_eager_mode_has_no_graphs() -> None:
    """Nor has mode ``NONE``; fewer requests or sizes cost less, what is no size is left aside."""
    assert stage(enforce_eager=True).parts.graphs.high == 0
    assert stage(compilation_config={"cudagraph_mode": "NONE"}).parts.graphs.high == 0
    assert stage(max_num_seqs=8).parts.graphs.likely < stage().parts.graphs.likely
    fewer = stage(compilation_config={"max_cudagraph_capture_size": 16})
    assert fewer.parts.graphs == stage(max_num_seqs=8).parts.graphs
    told = stage(compilation_config={"cudagraph_capture_sizes": [16, 1, 2, 8, 4, 4, 10**6]})
    assert told.parts.graphs == fewer.parts.graphs, "once each, none beyond the longest step"
    unread = stage(compilation_config={"cudagraph_capture_sizes": ["many"]})
    assert unread.parts.graphs == stage().parts.graphs


def test_pictures_reserve_by_their_size() -> None:
    """The default bound of the checkpoint, 16384 tokens, costs GiB; 1280 tokens do not."""
    large = stage("1x3090", {"limit_mm_per_prompt": {"image": 1}, "max_pixels": 12_845_056})
    small = stage("1x3090", {"limit_mm_per_prompt": {"image": 1}, "max_pixels": 1_003_520})
    assert large.parts.activations.likely > 1.5 * GIB
    assert small.parts.activations.likely < 0.5 * GIB


@pytest.mark.parametrize(
    ("model", "widths"), [(MODEL, 15.06), ("Qwen/Qwen2.5-VL-7B-Instruct", 14.75)]
)
def test_the_encoder_takes_what_was_measured(model: str, widths: float) -> None:
    """Peak of vLLM's own modules on a CPU, in widths of 1280 numbers a patch beside its pixels.

    Of cards, those without FlashAttention run the same steps.
    """
    media = {"limit_mm_per_prompt": {"image": 1}, "max_pixels": 12_845_056}
    activations = stage("1x2080ti-22g", media, model).parts.activations
    measured = 65536 * (widths * 1280 + 1176) * 2
    assert activations.low < measured < activations.high
    assert activations.likely == pytest.approx(measured, rel=0.15)


def test_what_requests_may_ask_for_is_reserved() -> None:
    """`client_max_pixels` is what vLLM profiles, not the default below it."""
    asked = {"limit_mm_per_prompt": {"image": 1}, "client_max_pixels": 12_845_056}
    found = plan("1x3090", asked)
    assert found.deployment.picture is not None
    assert found.deployment.picture.tokens == 16384


def test_a_video_is_at_most_fourteen_frames() -> None:
    """Seven layers of the largest frame where the context holds them, fewer where not."""
    media = {"limit_mm_per_prompt": {"image": 1, "video": 1}}
    long = plan("1x3090", media, max_model_len=32768).deployment.picture
    short = plan("1x3090", media, max_model_len=2048).deployment.picture
    assert long is not None
    assert short is not None
    assert (long.kind, long.tokens) == ("video", 7 * 720)
    assert (short.kind, short.tokens) == ("video", 2 * 720)


def test_without_media_the_encoder_is_not_loaded() -> None:
    """Its part is 0, and the card's weights are more than 1.2 GiB lighter."""
    found = stage("1x3090", {"limit_mm_per_prompt": {}})
    assert found.parts.vision.high == 0
    assert found.weights_gib < stage().weights_gib - 1.2


def test_pictures_run_on_the_first_stage_and_sampling_on_the_last() -> None:
    """The first's activations are over 4 times the middle's; every stage holds the encoder."""
    media = {"limit_mm_per_prompt": {"image": 1}, "max_pixels": 12_845_056}
    first, middle, last = plan("3x3090", media, pipeline_parallel_size=3).stages
    assert first.parts.activations.likely > 4 * middle.parts.activations.likely
    assert last.parts.buffers.likely > middle.parts.buffers.likely
    assert first.parts.vision == middle.parts.vision == last.parts.vision
    assert middle.parts.weights.likely < first.parts.weights.likely


def test_an_encoder_that_is_not_split_is_whole_everywhere() -> None:
    """`data` gives every rank the whole encoder and the pictures one at a time."""
    media = {"limit_mm_per_prompt": {"image": 1}, "max_pixels": 12_845_056}
    split = stage("4x3090", media, tensor_parallel_size=4)
    whole = stage("4x3090", media, tensor_parallel_size=4, mm_encoder_tp_mode="data")
    assert whole.parts.vision.low == pytest.approx(4 * split.parts.vision.low, rel=0.02)
    assert whole.parts.activations.likely > split.parts.activations.likely


def test_weights_on_the_host_leave_the_card() -> None:
    """With ``cpu_offload_gb`` 4 the card holds 4 GiB of weights less, to 0.05."""
    assert stage(cpu_offload_gb=4).weights_gib == pytest.approx(stage().weights_gib - 4, abs=0.05)


def test_an_8_bit_cache_holds_twice_the_tokens() -> None:
    """With ``fp8`` a token takes half the bytes; the same room holds double, to two blocks."""
    half, whole = plan("1x4090", kv_cache_dtype="fp8"), plan("1x4090")
    assert half.deployment.kv_bytes_per_token() * 2 == whole.deployment.kv_bytes_per_token()
    assert half.kv_tokens.likely == pytest.approx(2 * whole.kv_tokens.likely, abs=32)


def test_a_cache_that_is_given_in_bytes_is_taken() -> None:
    """Then the share does not count, only what the card has."""
    given_bytes = plan(kv_cache_memory_bytes=2 * GIB)
    assert given_bytes.kv_tokens.low == given_bytes.kv_tokens.high == 37440
    assert given_bytes.verdict is Verdict.FITS
    too_much = plan(kv_cache_memory_bytes=8 * GIB)
    assert too_much.problems[0].field == "engine.kv_cache_memory_bytes"


def test_the_cache_is_counted_in_the_profiles_blocks() -> None:
    """Whole blocks only: 37,440 tokens of 16 are 37,376 of 128, and a request takes whole ones."""
    given_bytes = {"kv_cache_memory_bytes": 2 * GIB}
    assert plan(block_size=16, **given_bytes).kv_tokens.likely == 37440
    large = plan(block_size=128, **given_bytes)
    assert (large.deployment.block, large.kv_tokens.likely) == (128, 37376)


def test_weights_packed_at_load_are_halved() -> None:
    """`quantization: fp8` packs a bfloat16 checkpoint, vision encoder included."""
    values = {
        "model": {"model": MODEL, "quantization": "fp8"},
        "hardware": {"device": "cuda"},
        "media": {"limit_mm_per_prompt": {"image": 1}},
    }
    packed = plan_for(make_profile(values), parse_cards("1x4090")).stages[0]
    tables = 2 * 152064 * 3584 * 2 / GIB
    assert packed.weights_gib == pytest.approx((stage().weights_gib - tables) / 2 + tables, abs=0.1)


@given(st.integers(1, 16384))
def test_the_largest_picture_has_a_shape(tokens: int) -> None:
    """Tokens of a rectangle of at most 1 : 200, no more than asked for, and next to it."""
    rows, columns = largest_picture(tokens * 784, 28)
    assert tokens - 40 < rows * columns <= tokens
    assert rows <= columns <= 200 * rows


def test_on_the_cpu_the_cache_is_what_was_asked_for() -> None:
    """The demo's gigabyte at 4 KiB a token, and a host that lacks it is told."""
    profile = load_profile("demo")
    found = plan_for(profile, (), host=Host((0, 1), 16.0, 12.0))
    assert found.verdict is Verdict.FITS
    assert found.kv_tokens.likely == 2**30 // 4096
    poor = plan_for(profile, (), host=Host((0,), 1.0, 0.5))
    assert poor.verdict is Verdict.NO
    assert "memory are free" in str(poor.problems[0])


def on_cpu(host: Host, **engine: Any) -> Assessment:
    values = {
        "model": {"model": "demo"},
        "hardware": {"device": "cpu"},
        "engine": engine,
        "media": {"limit_mm_per_prompt": {"image": 1}},
    }
    return plan_for(make_profile(values), (), host=host)


def test_on_the_cpu_a_share_has_to_be_free() -> None:
    """vLLM refuses a start where less than its share of the memory is free; a smaller one mends."""
    half_used = Host((0, 1), 16.0, 7.0)
    refused = on_cpu(half_used, gpu_memory_utilization=0.5)
    assert refused.verdict is Verdict.NO
    assert refused.problems[0].field == "engine.gpu_memory_utilization"
    told = "8.0 GiB are a share of 0.5 of the memory, 9.2 with the server's processes, and 7.0 GiB"
    assert told in str(refused.problems[0])
    assert find_remedies(refused, half_used)[0].plan.profile.engine.gpu_memory_utilization == 0.3
    # The share would be free, but for the processes that are started before it is looked for.
    assert on_cpu(half_used, gpu_memory_utilization=0.4).verdict is Verdict.NO
    assert on_cpu(half_used, gpu_memory_utilization=0.3).verdict is Verdict.FITS


def test_on_the_cpu_every_worker_takes_a_share() -> None:
    """Two workers of 0.5 need all the memory, whatever vLLM checks of each."""
    host = Host((0, 1), 16.0, 12.0)
    assert on_cpu(host, gpu_memory_utilization=0.5).problems == ()
    two = on_cpu(host, gpu_memory_utilization=0.5, tensor_parallel_size=2)
    assert "2 × 8.0 GiB" in str(two.problems[0])
    assert on_cpu(host, gpu_memory_utilization=0.3, tensor_parallel_size=2).problems == ()


def test_on_the_cpu_the_cache_is_else_a_share_of_the_memory() -> None:
    """Half of 16 GiB, less weights and the worker's own: between 5 and 8 GiB."""
    profile = make_profile(
        {
            "model": {"model": "demo"},
            "hardware": {"device": "cpu"},
            "engine": {"gpu_memory_utilization": 0.5},
            "media": {"limit_mm_per_prompt": {"image": 1}},
        }
    )
    found = plan_for(profile, (), host=Host((0, 1), 16.0, 12.0))
    assert 5 * GIB < found.stages[0].cache.size.likely < 8 * GIB


def test_on_the_cpu_the_environment_goes_before_the_profile() -> None:
    """vLLM puts the variable in the argument's place, and no change of the profile undoes that."""
    host = Host((0, 1), 16.0, 12.0)
    for words in ([], ["engine.kv_cache_memory_bytes=null", "hardware.cpu_kvcache_gib=2"]):
        profile = load_profile("demo", words)
        found = plan_for(profile, Machines((), cpu_cache_gib=4), host=host)
        assert found.kv_tokens.likely == 4 * 2**30 // 4096
        assert found.deployment.kv_cache_field == "VLLM_CPU_KVCACHE_SPACE"
        assert any("4 GiB" in str(one) and not one.fatal for one in found.findings)
        much = plan_for(profile, Machines((), cpu_cache_gib=40), host=host)
        assert much.verdict is Verdict.NO
        assert "lower it or unset it" in str(much.problems[0])
        assert find_remedies(much, host) == ()


def test_a_longest_request_beyond_the_environments_cache_is_made_shorter() -> None:
    """What is offered instead was planned with the variable as it is."""
    profile = load_profile(
        "demo", ["model=Qwen/Qwen2-VL-7B-Instruct", "engine.max_model_len=32768"]
    )
    host = Host((0, 1), 64.0, 60.0)
    found = plan_for(profile, Machines((), cpu_cache_gib=1), host=host)
    assert found.verdict is Verdict.NO
    remedies = find_remedies(found, host)
    assert remedies
    for remedy in remedies:
        assert remedy.plan.deployment.kv_cache_field == "VLLM_CPU_KVCACHE_SPACE"
        assert "engine.kv_cache_memory_bytes" not in str(remedy.changes)


def test_cards_do_not_hear_what_is_said_to_cpus() -> None:
    """Neither the variable nor its field counts there; vLLM's argument does."""
    (card,) = parse_cards("1x3090").cards
    plain = plan_for(load_profile("single-3090"), [card])
    told = load_profile("single-3090", ["hardware.cpu_kvcache_gib=1"])
    found = plan_for(told, Machines((card,), cpu_cache_gib=2))
    assert found.kv_tokens == plain.kv_tokens
    assert found.deployment.kv_cache_field == "engine.gpu_memory_utilization"


@pytest.mark.parametrize(
    ("value", "gib"), [(None, None), ("4", 4), (" 3 ", 3), ("0", 0), ("-1", 0), ("", 0), ("2.5", 0)]
)
def test_the_variable_is_read_as_vllm_reads_it(value: str | None, gib: int | None) -> None:
    """Python's int; what that refuses, and no room at all, end a start."""
    environ = {} if value is None else {"VLLM_CPU_KVCACHE_SPACE": value}
    if gib == 0:
        with pytest.raises(PreflightError, match="whole GiB from 1 on; correct or unset it"):
            cpu_cache_gib(environ)
    else:
        assert cpu_cache_gib(environ) == gib
