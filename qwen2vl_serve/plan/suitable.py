"""Which of the profiles that ship suits the cards of a machine."""

from __future__ import annotations

from collections.abc import Sequence

from qwen2vl_serve.machine.hardware import Card
from qwen2vl_serve.machine.installed import Build
from qwen2vl_serve.profile import DEMO_PROFILE, load_profile

# The driver keeps some of what a card is sold with: CUDA gives 7.6 of an RTX 2080's 8 GiB.
CARD_TOLERANCE = 0.93


def suitable_profile(found: Sequence[Card], build: Build | None) -> str:
    """Name the profile that ships for these cards, ``demo`` when none or the build has none.

    One large card is preferred to many small ones, and the larger model to the smaller.
    """
    if build == "cpu":
        return DEMO_PROFILE
    for name in ("single-3090", "multi-gpu", "single-gpu-awq", "single-gpu-2b"):
        profile = load_profile(name)
        used = found[: profile.workers]
        needed = (profile.hardware.card_memory_gib or 0) * CARD_TOLERANCE
        if len(used) == profile.workers and all(card.memory_gib >= needed for card in used):
            return name
    return DEMO_PROFILE
