"""What was foreseen of a start, beside what came of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2vl_serve.boot.forecast import Start, StartTimes, comparison, expose, foresee
from qwen2vl_serve.http.envelope import Metrics
from qwen2vl_serve.machine.hardware import GIB
from qwen2vl_serve.profile import Profile, load_profile


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    return load_profile("demo", [f"server.log_file={tmp_path}/serve.log"])


def test_the_plan_is_what_is_foreseen(profile: Profile) -> None:
    """Weights and cache of the demo come from the plan; its first start has no time yet."""
    start = foresee(profile)
    assert start.weights_gib is not None
    assert 0 < start.weights_gib < 0.1
    assert start.kv_tokens == 262_144
    assert start.seconds is None


def test_what_the_environment_says_of_the_cache_is_foreseen(
    profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM takes it before the profile's."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert foresee(profile).kv_tokens == 524_288


def test_a_model_that_nothing_here_knows_is_not_foreseen(profile: Profile) -> None:
    """No network is asked while a server starts."""
    unknown = profile.model.model_copy(update={"model": "someone/unheard-of"})
    assert foresee(profile.model_copy(update={"model": unknown})) == Start()


def test_the_last_five_starts_foresee_the_next(profile: Profile) -> None:
    """The median forgets one slow start, and starts of long ago."""
    times = StartTimes(profile)
    for seconds in (500.0, 18.0, 19.0, 300.0, 17.0, 20.0):
        times.add(seconds)
    assert StartTimes(profile).usual() == 19.0
    assert foresee(profile).seconds == 19.0


def test_another_split_has_times_of_its_own(profile: Profile) -> None:
    """Eight workers do not start as one does."""
    StartTimes(profile).add(10.0)
    engine = profile.engine.model_copy(update={"tensor_parallel_size": 2})
    assert StartTimes(profile.model_copy(update={"engine": engine})).usual() is None


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 1}', '{"a": ["x"]}', "\0"])
def test_a_damaged_file_is_written_anew(profile: Profile, content: str) -> None:
    """Nobody's start fails for the sake of its record."""
    path = profile.log_path.parent / "starts.json"
    path.write_text(content)
    assert StartTimes(profile).usual() is None
    StartTimes(profile).add(3.0)
    assert list(json.loads(path.read_text()).values()) == [[3.0]]


def test_a_folder_that_cannot_be_written_keeps_nothing(profile: Profile) -> None:
    """A read-only system starts as well."""
    server = profile.server.model_copy(update={"log_file": "/proc/none/serve.log"})
    StartTimes(profile.model_copy(update={"server": server})).add(3.0)


def test_both_stand_in_one_line() -> None:
    """What agrees is said once; what does not is shown beside; what nobody knows is named."""
    line = comparison(Start(15.57, 42_032, None), Start(15.6, 30_000, 21.4))
    assert line == (
        "weights 15.60 GiB a card as foreseen; "
        "KV cache 30,000 tokens, 42,032 tokens foreseen; start 21.4 s"
    )
    assert comparison(Start(0.01), Start()).startswith("weights 0.01 GiB a card foreseen; KV cache")


def test_both_stand_in_the_metrics() -> None:
    """An alert can compare them; what is not known is not shown as 0."""
    metrics = Metrics()
    expose(Start(2.0, 100, None), Start(None, 90, 7.5), metrics)
    value = metrics.registry.get_sample_value
    assert value("qwen2vl_start_weights_bytes", {"kind": "foreseen"}) == 2 * GIB
    assert value("qwen2vl_start_weights_bytes", {"kind": "actual"}) is None
    assert value("qwen2vl_start_kv_tokens", {"kind": "actual"}) == 90
    assert value("qwen2vl_start_seconds", {"kind": "actual"}) == 7.5
    assert value("qwen2vl_start_seconds", {"kind": "foreseen"}) is None
