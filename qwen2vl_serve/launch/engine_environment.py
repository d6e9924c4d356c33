"""The environment that vLLM and its processes start in."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qwen2vl_serve.machine import installed
from qwen2vl_serve.profile import Profile


def engine_environment(profile: Profile, *, replica: bool = False) -> dict[str, str]:
    """Return what vLLM's processes must find in their environment before vLLM is imported.

    A ``replica`` has engines like its own beside it on its machine, which it does not know.
    """
    chosen = {
        "VLLM_MEDIA_CONNECTOR": "qwen2vl_serve",
        "VLLM_NO_USAGE_STATS": "1",
        # As `vllm serve` sets it: a fork would copy the locks that other threads hold.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        **profile.environment(),
    }
    on_cpu = installed.vllm_build() == "cpu"
    if on_cpu:
        # oneDNN keeps the code of every shape of a product that it has met, 1,024 of them: with
        # prompts and pictures of all sizes the worker grew by 450 MiB, which looks like a leak.
        chosen["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "128"
    if on_cpu and replica and profile.hardware.cpu_threads_bind is None:
        # By vLLM's choice, and by ours for several workers, all replicas of a machine would be
        # bound to the same CPUs. How many threads each has, Ray says by OMP_NUM_THREADS.
        chosen["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if profile.engine.enforce_eager and on_cpu:
        # The ranks of log probabilities would be compiled all the same at their first use: half a
        # minute in which nobody is answered, or the engine's end where there is no C++ compiler.
        chosen["TORCH_COMPILE_DISABLE"] = "1"
    # An operator's own setting wins over the profile's.
    told = {name: value for name, value in chosen.items() if name not in os.environ}
    model = profile.model
    if all(Path(name).is_dir() for name in (model.path, model.tokenizer or model.path)):
        # Nothing is left to fetch, and vLLM would want ModelScope's package, of which our
        # downloads need a small part only.
        told["VLLM_USE_MODELSCOPE"] = "False"
    return told


@contextlib.contextmanager
def engine_sockets() -> Iterator[None]:
    """Let vLLM's processes meet in a folder that only their user enters, gone at the end.

    In the folder for temporary files each start would leave three sockets behind.
    """
    if _SOCKETS in os.environ:  # an operator's own place
        yield
        return
    with tempfile.TemporaryDirectory(prefix="vllm-", ignore_cleanup_errors=True) as folder:
        if len(os.fsencode(folder)) > _LONGEST_FOLDER:
            yield
            return
        os.environ[_SOCKETS] = folder
        try:
            yield
        finally:
            del os.environ[_SOCKETS]


_SOCKETS = "VLLM_RPC_BASE_PATH"
_LONGEST_FOLDER = 107 - len("/00000000-0000-0000-0000-000000000000")
"""Bytes; of a socket's path Linux takes 107, of which vLLM's name is the rest."""
