"""The engine's log as an operator sees it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from qwen2vl_serve.boot import log as boot_log
from qwen2vl_serve.boot.log import BootLog
from qwen2vl_serve.boot.phases import PHASES
from tests.served import eventually

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

# What begins each phase on cards, by vLLM 0.32's Model Runner V2, its default there.
ON_CARDS = {
    "connect": "vLLM is using nccl==2.27.5",
    "weights": "Loading model from scratch...",
    "memory": "Model loading took 15.63 GiB memory and 9.412345 seconds",
    "compile": "Using cache directory: /c/torch_compile_cache/a/rank_0_0 for vLLM's torch.compile",
    "warm-up": "GPU KV cache size: 52,304 tokens, "
    "Maximum concurrency for 8,784 tokens per request: 5.95x",
}


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
        eventually(lambda: any(line.startswith("warm-up") for line in lines))
    phases = [line.split()[0] for line in lines]
    assert phases == ["import", "engine", "weights", "weights", "weights", "memory", "warm-up"]
    assert "4/4 files, 100 %" in lines[4]
    assert "52,304 tokens, 5.95 full windows" in lines[6]


def test_the_engines_own_figures_are_kept(log: Path) -> None:
    """Weights of the fullest worker and the cache's tokens, for the plan to be held to."""
    with BootLog(log, lambda line: None, verbose=False) as boot:
        append(log, BOOT)
        for gib in ("3.9", "4.07", "4.01"):
            append(log, f"INFO [runner.py:5] Model loading took {gib} GiB memory and 3.2 seconds\n")
        append(log, BOOT.replace("52,304", "52,305"))
        eventually(lambda: boot.kv_tokens == 52_305)
    assert boot.weights_gib == 4.07


def test_a_line_written_in_pieces_is_read_once(log: Path) -> None:
    """Several processes write the file; half a line waits for its end."""
    lines: list[str] = []
    with BootLog(log, lines.append, verbose=True):
        append(log, "Loading weights ")
        time.sleep(0.3)
        append(log, "took 1 seconds\nthe end\n")
        eventually(lambda: "the end" in lines)
    assert lines.count("Loading weights took 1 seconds") == 1


def test_a_line_without_an_end_is_read_in_parts(log: Path) -> None:
    """It must not be gathered until no memory is left."""
    lines: list[str] = []
    with BootLog(log, lines.append, verbose=True):
        append(log, "x" * 200_000)
        eventually(lambda: len(lines) >= 3)
    assert max(map(len, lines)) < 140_000


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


def test_the_plans_advice_is_told_where_memory_is_short(log: Path) -> None:
    """Who can compute knows better than a table; where it does not, the table is asked."""
    boot = BootLog(log, print, verbose=False)
    short = ValueError("No available memory for the cache blocks")
    assert "; set media.max_pixels=1. Log" in boot.cause(short, lambda: "set media.max_pixels=1")
    assert "engine.max_model_len" in boot.cause(short, lambda: None)
    other = ValueError("NCCL error: unhandled cuda error")
    assert "media.max_pixels" not in boot.cause(other, lambda: "set media.max_pixels=1")


class Clock:
    """Stands in for the module's ``time``; moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    one = Clock()
    monkeypatch.setattr(boot_log, "time", one)
    return one


def stalls(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("stall")]


def test_a_silent_boot_is_told_with_its_phase_and_the_usual_reason(log: Path, clock: Clock) -> None:
    """Twice, the second after twice the time; a worker that vLLM waits for is named."""
    lines: list[str] = []
    nccl = "INFO 11-20 [pynccl.py:148] vLLM is using nccl==2.27.5"
    waiting = "INFO 11-20 [shm.py:1] No available shared memory broadcast block found in"
    with BootLog(log, lines.append, verbose=True, stall_seconds=60) as boot:
        boot.enter("engine")
        append(log, f"{nccl}\n")
        eventually(lambda: any(line.startswith("connect") for line in lines))
        clock.now += 60
        eventually(lambda: len(stalls(lines)) == 1)
        append(log, f"{waiting}\n")
        eventually(lambda: waiting in lines)
        clock.now += 60
        eventually(lambda: len(stalls(lines)) == 2)
    first, second = stalls(lines)
    assert first.startswith("stall   connect: nothing happened for 60 s while connecting")
    assert "NCCL_P2P_DISABLE=1" in first
    assert "does not answer" not in first
    assert second.startswith("stall   connect: nothing happened for 120 s")
    assert "vLLM says that a worker does not answer" in second


def test_a_stall_on_cards_is_told_with_the_phase_that_it_is_in(log: Path, clock: Clock) -> None:
    """Each phase begins with its line of vLLM's newer model runner, and has a reason of its own."""
    lines: list[str] = []
    with BootLog(log, lines.append, verbose=False, stall_seconds=60) as boot:
        for done, phase in enumerate(PHASES):
            if phase.signs:
                append(log, f"(Worker pid=1) INFO 11-20 [x.py:1] {ON_CARDS[phase.name]}\n")
            else:
                boot.enter(phase.name)
            eventually(lambda name=phase.name: lines[-1].startswith(name))  # type: ignore[misc]
            clock.now += 60
            eventually(lambda count=done + 1: len(stalls(lines)) == count)  # type: ignore[misc]
    assert stalls(lines) == [
        f"stall   {phase.name}: nothing happened for 60 s while {phase.does}. "
        f"Usually {phase.usually}"
        for phase in PHASES
    ]


def test_a_line_in_the_log_is_a_sign_of_life(log: Path, clock: Clock) -> None:
    """After it the time begins anew: longer than that in all, and no stall before a silence."""
    lines: list[str] = []
    with BootLog(log, lines.append, verbose=True, stall_seconds=60) as boot:
        boot.enter("weights")
        for step in range(5):
            clock.now += 50
            append(log, f"step {step}\n")
            eventually(lambda step=step: f"step {step}" in lines)  # type: ignore[misc]
        assert stalls(lines) == []
        append(log, "the last\n")
        eventually(lambda: "the last" in lines and boot._alive_at == clock.now)
        clock.now += 61
        eventually(lambda: len(stalls(lines)) == 1)


def test_a_server_that_is_ready_does_not_stall(log: Path) -> None:
    """Nobody asks it anything: that is not a fault."""
    lines: list[str] = []
    with BootLog(log, lines.append, verbose=True, stall_seconds=0.05) as boot:
        boot.enter("engine")
        boot.ready()
        told = len(lines)
        time.sleep(0.4)
    assert len(lines) <= told + 1


def test_a_phase_does_not_begin_again(log: Path) -> None:
    """One of eight workers is later than the others."""
    lines: list[str] = []
    with BootLog(log, lines.append, verbose=False) as boot:
        append(log, BOOT + BOOT.replace("52,304", "52,305"))
        eventually(lambda: boot.kv_tokens == 52_305)
    phases = [line.split()[0] for line in lines if "files" not in line]
    assert phases == ["weights", "memory", "warm-up"]
