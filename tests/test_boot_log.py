"""The engine's log as an operator sees it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from qwen2vl_serve.boot_log import BootLog

# The shape of vLLM 0.32's lines; figures are made up.
BOOT = """\
(Worker pid=1) INFO 11-20 [runner.py:68] Starting to load model /m...
Loading safetensors checkpoint shards:   0% Completed | 0/4 [00:00<?, ?it/s]
Loading safetensors checkpoint shards:  25% Completed | 1/4 [00:01<00:03,  1.0it/s]
Loading safetensors checkpoint shards: 100% Completed | 4/4 [00:04<00:00,  1.0it/s]
(Worker pid=1) INFO 11-20 [loader.py:501] Loading weights took 4.06 seconds
(EngineCore pid=2) INFO 11-20 [kv.py:7] GPU KV cache size: 52,304 tokens, \
Maximum concurrency for 8,784 tokens per request: 5.95x
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "serve.log"
    path.write_text("")
    return path


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_each_phase_is_one_line(log: Path) -> None:
    """Seven lines of the log become one line a phase, with the files read and the cache held."""
    lines: list[str] = []
    with BootLog(log, lines.append, verbose=False) as boot:
        boot.enter("import")
        boot.enter("engine")
        append(log, BOOT)
        time.sleep(0.5)
    phases = [line.split()[0] for line in lines]
    assert phases == ["import", "engine", "weights", "weights", "weights", "memory", "warm-up"]
    assert "4/4 files, 100 %" in lines[4]
    assert "52,304 tokens, 5.95 full windows" in lines[6]


def test_a_line_written_in_pieces_is_read_once(log: Path) -> None:
    """Several processes write the file; half a line waits for its end."""
    lines: list[str] = []
    with BootLog(log, lines.append, verbose=True):
        append(log, "Loading weights ")
        time.sleep(0.3)
        append(log, "took 1 seconds\n")
        time.sleep(0.3)
    assert lines.count("Loading weights took 1 seconds") == 1


def test_after_ready_no_phase_is_reported(log: Path) -> None:
    """The log goes on; the operator's lines are the requests' now."""
    lines: list[str] = []
    with BootLog(log, lines.append, verbose=False) as boot:
        boot.ready()
        append(log, BOOT)
        time.sleep(0.4)
    assert lines == []


@pytest.mark.parametrize(
    ("logged", "cause", "advice"),
    [
        (
            "(EngineCore pid=1) ERROR [core.py:9] ValueError: No available memory for the cache",
            "No available memory",
            "engine.max_model_len",
        ),
        (
            "(Worker pid=1) ERROR 11-20 [w.py:9] torch.OutOfMemoryError: CUDA out of memory. Tried",
            "CUDA out of memory",
            "media.max_pixels",
        ),
        ('AssertionError: assert "factor" in rope_scaling', "factor", "rope_type"),
        ("IndexError: list index out of range", "list index", "checkpoint is incomplete"),
    ],
)
def test_a_failed_boot_names_its_cause_and_the_knob(
    log: Path, logged: str, cause: str, advice: str
) -> None:
    """The worker's own words come before those of the processes above it."""
    log.write_text(f"{logged}\nRuntimeError: Engine core initialization failed. See root cause\n")
    boot = BootLog(log, print, verbose=False)
    message = boot.cause(RuntimeError("Engine core initialization failed"))
    assert "\n" not in message
    assert cause in message
    assert advice in message
    assert str(log) in message


def test_a_failure_that_left_no_trace_is_told_by_its_exception(log: Path) -> None:
    """Where the log says nothing, the exception is the cause."""
    assert "OSError: no such file" in BootLog(log, print, verbose=False).cause(
        OSError("no such file")
    )
