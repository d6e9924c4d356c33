"""What one of several processes does that share a count; it imports no more than that takes."""

from __future__ import annotations

import asyncio
from typing import Any

from qwen2vl_serve.auth import quota, quota_sqlite
from qwen2vl_serve.auth.keys import Caller
from qwen2vl_serve.auth.keys_file import KeyLimits
from qwen2vl_serve.auth.quota import Quotas
from qwen2vl_serve.errors import RateLimited

NOW = 6_000_000.0


def take(address: str, times: int, admitted: Any) -> None:
    """Ask so many times under a limit of a hundred; ``admitted`` counts all that were let in."""
    # Here it is the count that is tried; where a machine stands still the others wait for long.
    quota_sqlite.WAIT_SECONDS = quota.ANSWER_SECONDS = 600.0
    quotas = Quotas(address, lambda: NOW)
    who = Caller("alice", "k", KeyLimits(requests_per_minute=100))

    async def visit() -> None:
        async with quotas.visit(who, {}) as one:
            await one.reserve(0, 0)

    for _ in range(times):
        try:
            asyncio.run(visit())
        except RateLimited:
            continue
        with admitted.get_lock():
            admitted.value += 1
