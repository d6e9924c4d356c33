"""Remedies: each one fits, loads as a profile, and no milder one was passed over."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2vl_serve.machine.hardware import Host
from qwen2vl_serve.plan import Verdict, plan_for
from qwen2vl_serve.plan.answer import as_yaml, fixed
from qwen2vl_serve.plan.assessment import Assessment
from qwen2vl_serve.plan.cards import KINDS, parse_cards
from qwen2vl_serve.plan.remedies import Remedy, changed, find_remedies
from qwen2vl_serve.profile import load_profile, make_profile, profile_names


def plan(name: str, gpus: str, *overrides: str) -> Assessment:
    return plan_for(load_profile(name, overrides), parse_cards(gpus))


def values(remedy: Remedy) -> dict[str, object]:
    return {name: value for change in remedy.changes for name, value in change.values.items()}


def first_values(found: Assessment) -> dict[str, object]:
    return values(find_remedies(found)[0])


cards = st.tuples(
    st.integers(1, 8),
    st.sampled_from([f"{name}-{gb}g" for name, kind in KINDS.items() for gb, _ in kind.sizes]),
).map(lambda pair: f"{pair[0]}x{pair[1]}")


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from([name for name in profile_names() if name != "demo"]),
    cards,
    st.tuples(
        st.sampled_from([0.6, 0.8, 0.92]).map("engine.gpu_memory_utilization={}".format),
        st.sampled_from([4096, 8784, 32768]).map("engine.max_model_len={}".format),
        st.integers(0, 1).map("media.limit_mm_per_prompt.video={}".format),
    ),
)
def test_every_remedy_fits_and_loads(
    tmp_path: Path, name: str, gpus: str, overrides: tuple[str, ...]
) -> None:
    """Whatever profile on whatever cards: its YAML, read from a file and planned anew, fits."""
    found = plan(name, gpus, *overrides)
    remedies = find_remedies(found)
    if found.verdict is Verdict.FITS:
        assert remedies == ()
    for remedy in remedies:
        assert remedy.plan.verdict is Verdict.FITS
        assert remedy.changes
        assert all(change.values and change.cost for change in remedy.changes)
        path = tmp_path / "fixed.yaml"
        path.write_text(as_yaml(fixed(remedy.plan)), "utf-8")
        again = plan_for(load_profile(str(path)), parse_cards(gpus))
        assert again.verdict is Verdict.FITS
        assert again.kv_tokens == remedy.plan.kv_tokens


def test_what_fits_has_no_remedy() -> None:
    """To ``single-3090`` on one 3090 no change is offered."""
    found = plan("single-3090", "1x3090")
    assert found.verdict is Verdict.FITS
    assert find_remedies(found) == ()


def test_video_is_the_first_to_go() -> None:
    """Where a plan fits without videos, no other change is told of before."""
    tried = 0
    for share in range(70, 93):
        settings = f"engine.gpu_memory_utilization={share / 100}", "engine.max_model_len=16384"
        found = plan("single-3090", "1x3090", *settings, "media.limit_mm_per_prompt.video=1")
        without = plan("single-3090", "1x3090", *settings)
        if found.verdict is not Verdict.FITS and without.verdict is Verdict.FITS:
            tried += 1
            assert first_values(found) == {"media.limit_mm_per_prompt.video": 0}
    assert tried


def test_smaller_pictures_come_next() -> None:
    """Without videos the largest picture is what is reserved for."""
    found = plan(
        "single-3090", "1x3090", "media.max_pixels=12845056", "engine.gpu_memory_utilization=0.85"
    )
    assert found.verdict is not Verdict.FITS
    assert list(first_values(found)) == ["media.max_pixels"]


def test_then_a_larger_share_and_a_shorter_context() -> None:
    """A context that is too long alone is cut to the longest that fits, not to a round one."""
    found = plan("single-3090", "1x3090", "engine.max_model_len=32768")
    share, shorter = find_remedies(found)[:2]
    assert list(values(share)) == ["engine.gpu_memory_utilization"]
    assert list(values(shorter)) == ["engine.max_model_len"]
    length = values(shorter)["engine.max_model_len"]
    assert isinstance(length, int)
    longer = plan("single-3090", "1x3090", f"engine.max_model_len={length + 64}")
    assert longer.verdict is not Verdict.FITS


def test_kinds_of_remedies_come_in_the_order_of_harm() -> None:
    """A larger share and fewer requests before 8-bit cache, packed weights and more cards."""
    found = plan("single-3090", "4x3090", "engine.gpu_memory_utilization=0.75")
    order = [next(iter(values(remedy))) for remedy in find_remedies(found)]
    ranks = [
        "media.limit_mm_per_prompt.video", "media.max_pixels", "engine.gpu_memory_utilization",
        "engine.max_model_len", "engine.max_num_seqs", "engine.max_num_batched_tokens",
        "engine.kv_cache_dtype", "model.model", "engine.tensor_parallel_size",
    ]  # fmt: skip
    assert len(order) >= 3
    assert order == sorted(order, key=ranks.index)


@pytest.mark.parametrize(("gpus", "share"), [("1x2080ti-11g", 0.9), ("1x3060-12g", 0.85)])
def test_a_larger_share_goes_before_a_shorter_context(gpus: str, share: float) -> None:
    """Beside packed weights as well: the profile's context stays where the card has the room."""
    first = find_remedies(plan("single-3090", gpus))[0]
    assert {name for name in values(first) if name.startswith("engine.")} == {
        "engine.gpu_memory_utilization"
    }
    assert values(first)["engine.gpu_memory_utilization"] == share
    assert first.plan.deployment.max_model_len == 8784


def test_a_larger_share_leaves_what_cuda_takes() -> None:
    """0.94 of 9.62 GiB would leave 0.58, and CUDA's context may take 0.6."""
    told = [values(one) for one in find_remedies(plan("single-3090", "1x3080-10g"))]
    assert 0.92 in [one.get("engine.gpu_memory_utilization") for one in told]
    assert all(one.get("engine.gpu_memory_utilization") != 0.94 for one in told)


def test_an_old_card_is_not_told_of_an_8_bit_cache() -> None:
    """The 2080 Ti has no kernel for it; a 4090 has."""
    for gpus, length, share, allowed in (
        ("1x2080ti-11g", 32768, 0.5, False),
        ("1x4090", 16384, 0.24, True),
    ):
        found = plan(
            "single-gpu-2b", gpus, f"engine.max_model_len={length}",
            f"engine.gpu_memory_utilization={share}",
        )  # fmt: skip
        assert found.verdict is not Verdict.FITS
        told = {name for remedy in find_remedies(found) for name in values(remedy)}
        assert told
        assert ("engine.kv_cache_dtype" in told) is allowed


def test_several_changes_where_none_alone_is_enough() -> None:
    """7B on 10 GB: packed weights are not enough by themselves; nothing is changed in vain."""
    found = plan("single-3090", "1x3080-10g")
    first = find_remedies(found)[0]
    assert len(first.changes) > 1
    for left_out in first.changes:
        content = found.profile
        kept = [change for change in first.changes if change is not left_out]
        for change in kept:
            content = changed(content, change.values)
        assert plan_for(content, parse_cards("1x3080-10g")).verdict is not Verdict.FITS


@pytest.mark.parametrize(
    ("gpus", "overrides", "expected"),
    [
        (
            "8x2080", ("engine.tensor_parallel_size=8", "engine.pipeline_parallel_size=1"),
            {"engine.tensor_parallel_size": 4, "engine.pipeline_parallel_size": 2},
        ),
        ("8x2080", ("model.dtype=bfloat16",), {"model.dtype": "half"}),
        ("8x2080", ("engine.kv_cache_dtype=fp8",), {"engine.kv_cache_dtype": None}),
        ("8x2080", ("engine.max_model_len=99999",), {"engine.max_model_len": 32768}),
        (
            "4x3090", (),
            {"engine.pipeline_parallel_size": 1, "hardware.cards": 4},
        ),
        ("8x2080", ("engine.gpu_memory_utilization=1.0",), {"engine.gpu_memory_utilization": 0.92}),
    ],
)  # fmt: skip
def test_what_is_forbidden_is_mended_first(
    gpus: str, overrides: tuple[str, ...], expected: dict[str, object]
) -> None:
    """One mend each, the same whatever the memory."""
    found = plan("multi-gpu", gpus, *overrides)
    assert found.problems
    assert first_values(found) == expected


def test_a_cache_that_holds_no_request_is_made_larger() -> None:
    """A size in the profile is raised to one full request, and not where that is not free."""
    cache = "engine.kv_cache_memory_bytes"
    found = plan("single-3090", "1x3090", f"{cache}=100000000")
    assert found.verdict is Verdict.NO
    assert list(first_values(found)) == [cache]
    size = first_values(found)[cache]
    assert isinstance(size, int)
    assert plan("single-3090", "1x3090", f"{cache}={size - 1}").verdict is Verdict.NO
    found = plan("single-3090", "1x2080ti-11g", f"{cache}=100000000")
    assert find_remedies(found)
    assert all([*values(one)] != [cache] for one in find_remedies(found))


def test_a_cpus_cache_is_raised_in_its_own_field() -> None:
    """Whole GiB there, as vLLM's variable takes them."""
    profile = make_profile(
        {
            "model": {"model": "Qwen/Qwen2-VL-7B-Instruct"},
            "hardware": {"device": "cpu", "cpu_kvcache_gib": 1},
            "engine": {"max_model_len": 32768},
        }
    )
    host = Host((0,), memory_gib=64, available_gib=60)
    remedies = find_remedies(plan_for(profile, (), host=host), host)
    assert {"hardware.cpu_kvcache_gib": 2} in [values(remedy) for remedy in remedies]


def test_a_cache_that_is_not_free_is_made_smaller() -> None:
    """Halves, until the server's processes have room beside it; never less than one request."""
    for free, expected in ((2.5, None), (2.0, 2**29), (1.6, 2**28), (1.3, 2**25)):
        host = Host((0,), memory_gib=4.0, available_gib=free)
        remedies = find_remedies(plan_for(load_profile("demo"), (), host=host), host)
        told = [values(remedy) for remedy in remedies]
        assert told == ([{"engine.kv_cache_memory_bytes": expected}] if expected else [])
    host = Host((0,), memory_gib=4.0, available_gib=1.2)
    assert find_remedies(plan_for(load_profile("demo"), (), host=host), host) == ()


def test_a_field_is_changed_once() -> None:
    """A context beyond the model's, cut to that and further, is one change from what was asked."""
    asked = plan("single-3090", "1x3090", "engine.max_model_len=128000")
    remedies = find_remedies(asked)
    shorter = next(one for one in remedies if len(one.changes) == 1)
    assert shorter.changes[0].before == {"engine.max_model_len": 128000}
    for remedy in remedies:
        names = [name for change in remedy.changes for name in change.values]
        assert len(names) == len(set(names))
        content = asked.profile
        for change in remedy.changes:
            content = changed(content, change.values)
        assert content == remedy.plan.profile


def test_a_fix_writes_nothing_that_is_default() -> None:
    """Nor a proxy that is none."""
    assert "null" not in as_yaml(fixed(plan("single-3090", "1x4090")))


def test_nothing_helps_a_card_without_kernels() -> None:
    """vLLM is not built for it, whatever the profile says."""
    assert find_remedies(plan("single-gpu-2b", "1xv100-32g")) == ()


def test_names_stay_when_the_model_is_exchanged() -> None:
    """Clients go on asking for the name that they know."""
    profile = make_profile(
        {
            "model": {"model": "Qwen/Qwen2-VL-7B-Instruct"},
            "hardware": {"device": "cuda"},
            "engine": {"max_model_len": 4096},
        }
    )
    found = plan_for(profile, parse_cards("1x3060"))
    first = find_remedies(found)[0]
    assert first.plan.profile.model.model == "Qwen/Qwen2-VL-7B-Instruct-AWQ"
    assert first.plan.profile.model.served_names == ("Qwen2-VL-7B-Instruct",)


def test_somebody_elses_checkpoint_is_not_exchanged() -> None:
    """A fine-tuned model of the same name has no published quantised twin."""
    profile = make_profile(
        {
            "model": {"model": "someone/Qwen2-VL-7B-Instruct"},
            "hardware": {"device": "cuda"},
            "engine": {"max_model_len": 4096},
        }
    )
    found = plan_for(profile, parse_cards("1x3060"))
    assert all("model.model" not in values(remedy) for remedy in find_remedies(found))


def test_keys_are_not_written(tmp_path: Path) -> None:
    """A fixed profile is printed: keys stay where they were."""
    found = plan("single-gpu-2b", "1x2080", "server.api_keys=[sesame-open]")
    text = as_yaml(found.profile)
    assert "sesame" not in text
    assert "*****" not in text
    assert "server.api_keys are not written" in text
    path = tmp_path / "again.yaml"
    path.write_text(text, "utf-8")
    assert load_profile(str(path)).engine == found.profile.engine
