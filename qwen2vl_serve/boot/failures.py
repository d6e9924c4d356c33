"""Why an engine did not start: what vLLM and torch say of it, and what to change.

vLLM raises plain ``ValueError`` and ``RuntimeError``, mostly in another process: the text in its
log is all there is to know a failure by. The table below is the one place that does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

NODE_MEMORY = "hardware.cpu_kvcache_gib or engine.kv_cache_memory_bytes"


@dataclass(frozen=True, slots=True)
class Failure:
    """A text of vLLM 0.32 or its libraries, and the remedy.

    ``source`` is the file that the text stands in, below site-packages; ``torch`` for texts of
    compiled libraries, ``older`` for those that other versions raise. ``memory`` says that a
    plan of the profile's memory knows more.
    """

    sign: re.Pattern[str]
    source: str
    advice: str
    memory: bool = False


def _row(sign: str, source: str, advice: str, *, memory: bool = False) -> Failure:
    return Failure(re.compile(sign), source, advice, memory)


FAILURES = (
    _row(
        r"No available memory for the cache",
        "vllm/v1/core/kv_cache_utils.py",
        "set media.limit_mm_per_prompt.video=0, lower media.max_pixels or engine.max_model_len, "
        "or raise engine.gpu_memory_utilization",
        memory=True,
    ),
    _row(
        r"KV cache is needed, which is larger than the available",
        "vllm/v1/core/kv_cache_utils.py",
        "lower engine.max_model_len, or raise engine.gpu_memory_utilization (or "
        "engine.kv_cache_memory_bytes, where that is set)",
        memory=True,
    ),
    _row(
        r"less than desired GPU memory utilization",
        "vllm/v1/worker/utils.py",
        "stop what holds the card (qwen2vl-serve doctor names it) or lower "
        "engine.gpu_memory_utilization",
        memory=True,
    ),
    _row(
        r"less than desired CPU memory utilization",
        "vllm/v1/worker/cpu_worker.py",
        "set hardware.cpu_kvcache_gib, or lower engine.gpu_memory_utilization",
        memory=True,
    ),
    _row(
        r"allocation is less than requested memory for kv",
        "vllm/v1/worker/cpu_worker.py",
        f"lower {NODE_MEMORY}, or stop other programs",
        memory=True,
    ),
    _row(
        r"out of memory occurred when warming up",
        "vllm/v1/worker/gpu_model_runner.py",
        "lower engine.max_num_seqs or engine.gpu_memory_utilization",
        memory=True,
    ),
    _row(
        r"OutOfMemoryError|CUDA out of memory|CUDA error: out of memory",
        "torch",
        "set media.limit_mm_per_prompt.video=0, lower media.max_pixels, engine.max_model_len, "
        "engine.max_num_seqs or engine.max_num_batched_tokens, take a quantised checkpoint, or "
        "raise engine.tensor_parallel_size",
        memory=True,
    ),
    _row(
        r"DefaultCPUAllocator: can't allocate memory",
        "torch",
        f"lower {NODE_MEMORY}, or stop other programs",
        memory=True,
    ),
    _row(
        r"Bfloat16 is only supported on GPUs",
        "vllm/platforms/cuda.py",
        "set model.dtype=half",
    ),
    _row(
        r"is not supported for quantization method",
        "vllm/config/vllm.py",
        "set model.dtype=half",
    ),
    _row(
        r"is not supported for the current GPU\. Minimum capability",
        "vllm/config/vllm.py",
        "set model.model to a checkpoint that these cards have kernels for (AWQ and GPTQ from "
        "compute capability 7.5)",
    ),
    _row(
        r"Quantization method specified in the model config",
        "vllm/config/model.py",
        "leave model.quantization out: the checkpoint says what it is",
    ),
    _row(
        r"Unknown quantization method",
        "vllm/config/model.py",
        "set model.quantization to one of these, or model.model to another checkpoint",
    ),
    _row(
        r"quantization is currently not supported in",
        "vllm/platforms/interface.py",
        "set model.model to a checkpoint that this device can run, or leave out model.quantization",
    ),
    _row(
        r"Cannot find any model weights with",
        "vllm/model_executor/model_loader/default_loader.py",
        "download model.model again, or correct model.load_format",
    ),
    _row(
        r"Weight files referenced in index but missing",
        "vllm/model_executor/model_loader/weight_utils.py",
        "download the missing files of model.model again",
    ),
    _row(
        r"weights were not initialized from checkpoint",
        "vllm/model_executor/model_loader/default_loader.py",
        "model.model is incomplete or of another family: download it again",
    ),
    _row(
        r"Error while deserializing header",
        "torch",
        "a file of model.model is damaged: qwen2vl-serve doctor names it; download it again",
    ),
    _row(
        r"Invalid repository ID or local directory specified",
        "vllm/transformers_utils/config.py",
        "correct model.model: a folder, or owner/name on the hub",
    ),
    _row(
        r"is not a local folder and is not a valid model identifier",
        "transformers/utils/hub.py",
        "correct model.model: a folder, or owner/name on the hub (HF_TOKEN for closed ones)",
    ),
    _row(
        r"is larger than the number of available GPUs",
        "vllm/config/parallel.py",
        "lower engine.tensor_parallel_size or engine.pipeline_parallel_size, or show more cards "
        "(CUDA_VISIBLE_DEVICES)",
    ),
    _row(
        r"must be divisible by tensor parallel size",
        "vllm/config/model.py",
        "set engine.tensor_parallel_size to a number that divides the heads, and use "
        "engine.pipeline_parallel_size for more cards",
    ),
    _row(
        r"not a whole number of quant groups",
        "vllm/distributed/utils.py",
        "lower engine.tensor_parallel_size and raise engine.pipeline_parallel_size",
    ),
    _row(
        r"NCCL error",
        "vllm/distributed/device_communicators/pynccl_wrapper.py",
        "set NCCL_P2P_DISABLE=1 and engine.disable_custom_all_reduce=true; NCCL_DEBUG=INFO tells "
        "more in the log",
    ),
    _row(
        r"RPC call to \S+ timed out",
        "vllm/v1/executor/multiproc_executor.py",
        "a worker hangs: qwen2vl-serve doctor looks at P2P and /dev/shm; "
        "engine.enforce_eager=true rules compilation out",
    ),
    _row(
        r"User-specified max_model_len",
        "vllm/config/model.py",
        "lower engine.max_model_len",
    ),
    _row(
        r"Found conflicts between 'rope_type=",
        "vllm/transformers_utils/config.py",
        "qwen2vl-serve doctor --fix writes a copy with a config.json that every version reads; "
        "set model.model to it",
    ),
    _row(
        r"rope_scaling|rope_type|mrope",
        "older",
        "config.json was written for another transformers; set its rope_type to default, or set "
        "model.model to the copy that qwen2vl-serve doctor --fix writes",
    ),
    _row(
        r"list index out of range",
        "older",
        "the checkpoint is incomplete or of another family; compare the files of model.model with "
        "the hub's",
    ),
    _row(
        r"operator torchvision::nms does not exist",
        "torch",
        "torchvision is built for CUDA: qwen2vl-serve doctor says how to mend it",
    ),
    _row(
        r"Failed core proc\(s\): \{[^}]*: -9\b",
        "vllm/v1/engine/utils.py",
        f"the system killed the engine, mostly for want of memory (dmesg): lower {NODE_MEMORY}, or "
        "stop other programs",
        memory=True,
    ),
    _row(
        r"Failed core proc\(s\): \{[^}]*: -7\b",
        "vllm/v1/engine/utils.py",
        "a bus error: /dev/shm is too small (docker run --ipc=host)",
    ),
    _row(
        r"Failed core proc\(s\): \{[^}]*: -4\b",
        "vllm/v1/engine/utils.py",
        "an instruction that this processor lacks: vLLM's CPU build needs AVX2",
    ),
    _row(
        r"died unexpectedly \(exit code: -9\)",
        "vllm/v1/executor/multiproc_executor.py",
        f"the system killed a worker, mostly for want of memory (dmesg): lower {NODE_MEMORY}, or "
        "stop other programs",
        memory=True,
    ),
    _row(
        r"died unexpectedly \(exit code: -7\)",
        "vllm/v1/executor/multiproc_executor.py",
        "a bus error: /dev/shm is too small (docker run --ipc=host)",
    ),
)

# vLLM's log prefix: process, level, date, place.
_PREFIX = re.compile(r"^(?:\([^)]*\) )?(?:[A-Z]+ [\d: -]*\[[^\]]*\] ?)?")
_EXCEPTION = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception|Interrupt)): (.+)$")
# How pydantic tells what a validator raised, under a line that only counts.
_VALIDATOR = re.compile(r"^\s*(?:Value error|Assertion failed), (.+?)(?: \[type=.*)?$")
# How it tells of a value of the wrong kind, under the line that names the field.
_FIELD = re.compile(r"^  (.+) \[type=\w+, input_value=(.*), input_type=\w+\]$")
# Said by every process above the one that failed.
_ECHO = re.compile(
    r"Engine core initialization failed|See root cause above|WorkerProc initialization|"
    r"Worker failed with error|Executor failed|validation errors? for "
)
_DEATH = re.compile(r"Failed core proc\(s\)|died unexpectedly")
_FRAME = re.compile(r"^(?:Traceback |\s|\^|During handling|The above exception|For further)")
# Sentences with vLLM's own option names, in whose place ours stand.
_HINT = re.compile(r"(?<=[.)]) (?:Try|See|Decrease|You can|To |If |Consider|This happens|Process )")


def explain(log: str, error: Exception) -> tuple[str, Failure | None]:
    """Return the cause in one line of at most 400 characters, and its row where it is known.

    ``log`` is the engine's whole log, ``error`` what reached this process. The failing process
    logs first, and those above it repeat it in their own words; an unknown failure is told by
    its first exception, or by the last line that says anything.
    """
    lines = [_PREFIX.sub("", line) for line in log.splitlines()]
    raised = f"{type(error).__name__}: {error}".splitlines() or [type(error).__name__]
    causes = list(_causes([*lines, *raised]))
    deaths = [line for line in [*lines, *raised] if _DEATH.search(line)]
    for text in [*causes, *deaths]:
        for failure in FAILURES:
            if failure.sign.search(text):
                return _short(text), failure
    said = [line for line in lines if line and not _FRAME.match(line) and not _ECHO.search(line)]
    return _short((causes or said[-1:] or raised)[0]), None


def _causes(lines: list[str]) -> Iterator[str]:
    """Yield every exception that is told, in order, without those that repeat another."""
    for before, line in pairwise(["", *lines]):
        if _ECHO.search(line):
            continue
        if found := _EXCEPTION.match(line):
            yield f"{found[1]}: {found[2]}"
        elif found := _VALIDATOR.match(line):
            yield f"ValueError: {found[1]}"
        elif found := _FIELD.match(line):
            yield f"{before}: {found[1]}, is {found[2]}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    hint = _HINT.search(text)
    return (text[: hint.start()] if hint else text)[:400].rstrip(" .")
