"""Which CPUs the workers of a profile are bound to."""

from __future__ import annotations

import os


def one_cpu_each(workers: int) -> str:
    """Bind each worker to one of the CPUs that this process may use, in turn: ``0|1|0|1``."""
    cpus = _cpus()
    return "|".join(str(cpus[worker % len(cpus)]) for worker in range(workers))


def equal_shares(workers: int) -> str:
    """Bind each worker to as many CPUs as the others: ``0,1|2,3``; one in turn if they are few."""
    cpus = _cpus()
    each = len(cpus) // workers
    if each == 0:
        return one_cpu_each(workers)
    shares = [cpus[worker * each : (worker + 1) * each] for worker in range(workers)]
    return "|".join(",".join(map(str, share)) for share in shares)


def _cpus() -> list[int]:
    """The CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
