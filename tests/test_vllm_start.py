"""What is done around vLLM's start, without an engine."""

from __future__ import annotations

import gc

from qwen2vl_serve.vllm_engine.start import freeze_boot


def test_what_the_boot_left_lets_no_garbage_wait() -> None:
    """Beside a million objects of the boot, 150,000 in cycles are looked at, not kept.

    Python would otherwise wait for a quarter, and a server's memory seem to grow for half an hour.
    """
    boot: list[object] = [[] for _ in range(1_000_000)]
    try:
        freeze_boot()
        assert gc.get_freeze_count() > len(boot)
        before = gc.get_stats()[-1]["collections"]
        for _ in range(150_000):
            cycle: list[object] = []
            cycle.append(cycle)
        assert gc.get_stats()[-1]["collections"] > before
    finally:
        gc.unfreeze()
