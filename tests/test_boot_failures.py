"""Failures at start: each known by vLLM's own text, each told in one line with a remedy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qwen2vl_serve.boot.failures import FAILURES, Failure, explain
from qwen2vl_serve.boot.log import BootLog
from qwen2vl_serve.boot.phases import PHASES, WAITING
from qwen2vl_serve.profile import section_of
from tests.vllm_texts import site_packages, texts

ECHO = RuntimeError(
    "Engine core initialization failed. See root cause above. Failed core proc(s): {}"
)
KNOWN = [failure for failure in FAILURES if "/" in failure.source]
installed = pytest.mark.skipif(site_packages() is None, reason="reads vLLM's sources")


def name(failure: Failure) -> str:
    return failure.sign.pattern[:40]


def died(failure: Failure) -> bool:
    """Whether the row is about a process that ended without a word."""
    return "-" in failure.sign.pattern and "proc" in failure.source + failure.sign.pattern


def told(message: str) -> str:
    """A log in which the engine's process fails with this message."""
    lines = [f"ValueError: {message}"] if message else []
    frames = ["Traceback (most recent call last):", '  File "core.py", line 9, in run']
    return "".join(
        f"(EngineCore pid=1) ERROR 11-20 10:00:00 [core.py:9] {line}\n"
        for text in [*frames, *lines]
        for line in text.splitlines()
    )


@installed
@pytest.mark.parametrize("failure", [f for f in KNOWN if not died(f)], ids=name)
def test_a_row_is_the_text_that_its_source_says(failure):
    """An upgrade that words a failure differently is found here, not by a user."""
    said = [text for text in texts(failure.source) if failure.sign.search(text)]
    assert said, failure.source
    for text in said:
        reason, found = explain(told(text), ECHO)
        assert found is failure
        assert "\n" not in reason
        assert len(reason) <= 400


@installed
@pytest.mark.parametrize("failure", [f for f in KNOWN if died(f)], ids=name)
def test_a_death_is_told_as_its_source_says_it(failure):
    """A process that was killed says nothing itself; its parent's words have the signal."""
    signal = re.search(r"-\d+", failure.sign.pattern)
    assert signal is not None
    if "unexpectedly" in failure.sign.pattern:
        (text,) = [t for t in texts(failure.source) if "died unexpectedly" in t]
        log = f"ERROR 11-20 [x.py:1] {text.replace('code: 7', f'code: {signal[0]}')}\n"
        assert explain(log, ECHO)[1] is failure
        return
    assert any("Failed core proc(s): " in text for text in texts(failure.source))
    error = RuntimeError(
        "Engine core initialization failed. See root cause above. "
        f"Failed core proc(s): {{'EngineCore': {signal[0]}}}"
    )
    assert explain("", error)[1] is failure


@installed
@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
def test_a_phase_begins_with_the_line_that_its_source_writes(phase):
    """The log's lines are texts of vLLM as well."""
    for source, sign in phase.signs:
        assert any(sign.search(text.replace("7 tokens", "7,7 tokens")) for text in texts(source)), (
            source,
            sign.pattern,
        )


@installed
def test_the_line_about_a_silent_worker_is_vllms():
    """It is found by vLLM's own words, so that an upgrade that changes them shows here."""
    source, sign = WAITING
    assert any(sign.search(text) for text in texts(source))


@pytest.mark.parametrize("failure", FAILURES, ids=name)
def test_every_field_that_is_advised_exists(failure):
    """``section.field`` in an advice is a field of the profile, in that section."""
    for section, field in re.findall(
        r"\b(model|hardware|engine|media|server|limits)\.(\w+)", failure.advice
    ):
        assert section_of(field) == section, failure.advice


@installed
def test_torchs_own_texts_are_known():
    """What compiled libraries say is made them say."""
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors")
    assert explain(told(""), torch.OutOfMemoryError("CUDA out of memory. Tried"))[1] is not None
    with pytest.raises(RuntimeError) as large:
        torch.empty(2**52)
    known = explain("", large.value)[1]
    assert known is not None
    assert "hardware.cpu_kvcache_gib" in known.advice
    with pytest.raises(safetensors.SafetensorError) as damaged:
        safetensors.safe_open(Path(__file__), "pt")
    known = explain("", damaged.value)[1]
    assert known is not None
    assert "damaged" in known.advice


def test_a_value_of_the_wrong_kind_is_told_with_its_field() -> None:
    """As pydantic says it of vLLM's own settings, without its link."""
    from vllm.config import CompilationConfig

    with pytest.raises(ValueError, match="2 validation errors") as caught:
        CompilationConfig(max_cudagraph_capture_size="x", nonsense=1)
    told, failure = explain("", caught.value)
    assert failure is None
    assert told.startswith("max_cudagraph_capture_size: Input should be a valid integer")
    assert told.endswith("is 'x'")


def test_a_validators_words_are_the_cause_not_pydantics_count():
    """``1 validation error for ModelConfig`` says nothing; the next line does."""
    error = ValueError(
        "1 validation error for ModelConfig\n"
        "  Value error, Unknown quantization method: x. Must be one of ['awq']. "
        "[type=value_error, input_value=ArgsKwargs((), {'model': 'm'}), input_type=ArgsKwargs]\n"
        "    For further information visit https://errors.pydantic.dev"
    )
    reason, failure = explain("", error)
    assert reason == "ValueError: Unknown quantization method: x. Must be one of ['awq']"
    assert failure is not None
    assert "model.quantization" in failure.advice


def test_figures_stay_and_vllms_option_names_go():
    """What was needed and what there is; not ``--gpu-memory-utilization``."""
    log = told(
        "To serve at least one request with the model's max seq len (8784), (0.47 GiB KV cache is "
        "needed, which is larger than the available KV cache memory (0.13 GiB). Based on the "
        "available memory, the estimated maximum model length is 2400. Try increasing "
        "`gpu_memory_utilization` or decreasing `max_model_len`. See https://docs.vllm.ai"
    )
    reason, _ = explain(log, ECHO)
    assert reason.endswith("the estimated maximum model length is 2400")
    log = told(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.58 GiB "
        "of which 1.20 GiB is free. Process 1 has 3 GiB memory in use. If reserved but"
    ).replace("ValueError", "torch.OutOfMemoryError")
    reason, _ = explain(log, ECHO)
    assert reason.endswith("of which 1.20 GiB is free")


@pytest.mark.parametrize("document", ["doctor.md", "doctor.zh-CN.md"])
def test_the_shown_failure_is_what_is_printed(document, tmp_path):
    """As vLLM raises it where the profile's window is longer than the model's."""
    error = ValueError(
        "User-specified max_model_len (32768) is greater than the derived max_model_len "
        "(max_position_embeddings=8192.0 or model_max_length=None in model's config.json). To "
        "allow overriding this maximum, set the env var VLLM_ALLOW_LONG_MAX_MODEL_LEN=1."
    )
    log = tmp_path / "serve.log"
    log.write_text("")
    cause = BootLog(log, print, verbose=False).cause(error)
    cause = cause.replace(str(log), "/var/log/qwen2vl/serve.log")
    text = (Path(__file__).parents[1] / "docs" / document).read_text("utf-8")
    assert f"serve: {cause}" in " ".join(text.split())


def test_a_known_failure_is_found_behind_an_unknown_one():
    """Libraries log tracebacks of what they go on without."""
    log = "ImportError: no module named triton_kernels\n" + told(
        "Bfloat16 is only supported on GPUs"
    )
    assert explain(log, ECHO)[0] == "ValueError: Bfloat16 is only supported on GPUs"


def test_an_unknown_failure_keeps_its_first_exception():
    """The failing process speaks first."""
    log = told("the flux is out of range") + told("gone").replace("ValueError", "EOFError")
    assert explain(log, ECHO) == ("ValueError: the flux is out of range", None)


def test_without_an_exception_the_last_line_that_says_anything_is_kept():
    """A crash of compiled code leaves its own words, if any."""
    log = "INFO 11-20 [a.py:1] all well\nterminate called after throwing an instance of 'c10'\n\n"
    assert explain(log, ECHO)[0] == "terminate called after throwing an instance of 'c10'"
    reason, failure = explain("", OSError("no such file"))
    assert (reason, failure) == ("OSError: no such file", None)
