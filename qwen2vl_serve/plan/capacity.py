"""How many requests a KV cache holds."""

from __future__ import annotations

from dataclasses import dataclass

from qwen2vl_serve.plan.assessment import Assessment
from qwen2vl_serve.plan.request import Cost


@dataclass(frozen=True, slots=True)
class Capacity:
    """Requests of one length at the same time: by the KV cache alone, and under max_num_seqs."""

    tokens: int
    by_cache: float
    together: int


def capacity(plan: Assessment, tokens: int) -> Capacity:
    """Return how many requests of ``tokens`` tokens the likely cache holds, over all replicas.

    Requests take whole blocks. Source: ``get_max_concurrency_for_kv_cache_config`` in
    ``v1/core/kv_cache_utils.py``.
    """
    block = plan.deployment.block
    blocks = max(1, -(-tokens // block))
    by_cache = plan.kv_tokens.likely / block / blocks * plan.deployment.replicas
    most = plan.deployment.max_num_seqs * plan.deployment.replicas
    fits = tokens <= plan.deployment.max_model_len
    return Capacity(tokens, by_cache, min(int(by_cache), most) if fits else 0)


def of_request(plan: Assessment, cost: Cost) -> Capacity:
    """Return how many requests of a typical kind are computed at the same time."""
    return capacity(plan, cost.total)
