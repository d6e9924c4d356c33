"""The phases of a boot: the lines of vLLM 0.32 that begin them, and why one may take long."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Phase:
    """``does`` is told when it begins, ``usually`` when it stalls.

    ``signs`` are pairs of a file below site-packages and a line of the log that it writes. On cards
    vLLM takes its Model Runner V2 (``v1/worker/gpu``) unless it is told or forced to take the older
    one (``VllmConfig.use_v2_model_runner``); each words its loading in its own way.
    """

    name: str
    does: str
    usually: str
    signs: tuple[tuple[str, re.Pattern[str]], ...] = ()


def _sign(source: str, pattern: str) -> tuple[str, re.Pattern[str]]:
    return source, re.compile(pattern)


PHASES = (
    Phase(
        "import",
        "importing vLLM",
        "the disk of the Python environment is slow, or a network's",
    ),
    Phase(
        "engine",
        "starting the engine's processes",
        "the disk of the Python environment is slow, or cards take long to wake "
        "(nvidia-smi -pm 1 keeps them awake)",
    ),
    Phase(
        "connect",
        "connecting the workers",
        "NCCL hangs among cards that do not reach each other: set NCCL_P2P_DISABLE=1 and "
        "engine.disable_custom_all_reduce=true, and see that /dev/shm is large enough",
        (_sign("vllm/distributed/device_communicators/pynccl.py", r"vLLM is using nccl=="),),
    ),
    Phase(
        "weights",
        "loading the weights",
        "their disk is slow, or they are being downloaded (qwen2vl-serve download does that "
        "beforehand, and shows how far it is)",
        (
            _sign("vllm/v1/worker/gpu/model_runner.py", r"Loading model from scratch"),
            _sign("vllm/v1/worker/gpu_model_runner.py", r"Starting to load model"),
            _sign("vllm/v1/worker/cpu_model_runner.py", r"Starting to load model"),
        ),
    ),
    Phase(
        "memory",
        "measuring memory",
        "the largest picture or video is being computed: lower media.max_pixels or set "
        "media.limit_mm_per_prompt.video=0",
        (
            _sign("vllm/model_executor/model_loader/default_loader.py", r"Loading weights took"),
            _sign("vllm/v1/worker/gpu/model_runner.py", r"Model loading took"),
            _sign("vllm/v1/worker/gpu_model_runner.py", r"Model loading took"),
        ),
    ),
    Phase(
        "compile",
        "compiling the model",
        "a first compilation takes minutes and is kept for the next start; "
        "engine.enforce_eager=true skips it",
        (_sign("vllm/compilation/backends.py", r"Using cache directory: .*torch\.compile"),),
    ),
    Phase(
        "warm-up",
        "warming up",
        "the model is compiled, or CUDA graphs are captured for many batch sizes; "
        "engine.enforce_eager=true skips both",
        (
            _sign(
                "vllm/v1/core/kv_cache_utils.py",
                r"KV cache size: ([\d,]+) tokens, Maximum concurrency .*?: ([\d.]+)x",
            ),
        ),
    ),
)
"""In the order of a boot."""

WAITING = _sign(
    "vllm/distributed/device_communicators/shm_broadcast.py",
    r"No available shared memory broadcast block found",
)
"""vLLM's own line about a worker that does not answer; it is not a sign of life."""
