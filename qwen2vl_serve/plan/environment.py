"""What this machine tells a plan: its cards, and what its environment says of a CPU's KV cache."""

from __future__ import annotations

import os
from collections.abc import Mapping

from qwen2vl_serve.errors import PreflightError
from qwen2vl_serve.machine import hardware
from qwen2vl_serve.plan.cards import KV_CACHE_VARIABLE, Machines


def machines_here() -> Machines:
    """Return this machine's cards, with what the environment says.

    Raises:
        PreflightError: ``VLLM_CPU_KVCACHE_SPACE`` is of no use.
    """
    return Machines(hardware.cards(), cpu_cache_gib=cpu_cache_gib())


def cpu_cache_gib(environ: Mapping[str, str] = os.environ) -> int | None:
    """Return the GiB that the environment gives each CPU worker's KV cache; None where unsaid.

    vLLM takes them whatever the profile says (``check_and_update_config`` in
    ``platforms/cpu.py``), and ``engine_environment`` leaves a variable that is set alone.
    On cards it uses them for nothing, but its engine reads every variable (``enable_envs_cache``
    in ``envs.py``) and dies of one that is no number, an empty one as well.

    Raises:
        PreflightError: no whole number of GiB, or less than one.
    """
    told = environ.get(KV_CACHE_VARIABLE)
    if told is None:
        return None
    try:
        size = int(told)
    except ValueError:
        size = 0
    if size < 1:
        raise PreflightError(
            f"{KV_CACHE_VARIABLE}: is {told[:40]!r}, and vLLM reads whole GiB from 1 on; correct "
            "or unset it"
        )
    return size
