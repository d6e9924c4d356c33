"""The way in: a profile and cards go in, a plan with its remedies comes out."""

from __future__ import annotations

from collections.abc import Sequence

from qwen2vl_serve.machine.hardware import Card, Host
from qwen2vl_serve.plan.architectures import Architecture
from qwen2vl_serve.plan.assessment import Assessment, StagePlan, Verdict, assess
from qwen2vl_serve.plan.cards import Machines
from qwen2vl_serve.plan.source import architecture_of
from qwen2vl_serve.profile import Profile

__all__ = ["Assessment", "Machines", "StagePlan", "Verdict", "plan_for"]


def plan_for(
    profile: Profile,
    cards: Sequence[Card] | Machines,
    *,
    host: Host | None = None,
    architecture: Architecture | None = None,
    ask_hub: bool = True,
) -> Assessment:
    """Plan ``profile`` on ``cards``; with none of them, on the CPU of ``host``.

    The model's sizes are looked up unless ``architecture`` gives them; ``ask_hub`` allows that to
    reach for the network where nothing here knows the model.

    The result has the verdict, each stage's memory by part, ``kv_tokens`` as a range, and
    ``weights_gib`` of a card by stage, in the terms of vLLM's own boot log.

    Raises:
        PreflightError: the model's sizes cannot be found out.
    """
    machines = cards if isinstance(cards, Machines) else Machines(tuple(cards))
    return assess(
        profile, architecture or architecture_of(profile, ask_hub=ask_hub), machines, host
    )
