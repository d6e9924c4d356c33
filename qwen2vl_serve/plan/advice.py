"""What the plan advises on the cards that are here, in a line for other messages."""

from __future__ import annotations

from qwen2vl_serve.errors import PreflightError
from qwen2vl_serve.machine import hardware
from qwen2vl_serve.plan.environment import machines_here
from qwen2vl_serve.plan.planning import plan_for
from qwen2vl_serve.plan.remedies import find_remedies
from qwen2vl_serve.profile import Profile


def advice(profile: Profile) -> str | None:
    """Say what to change so that ``profile`` fits here; None where it fits or nothing helps.

    The network is not asked: a model that nothing here knows gets no advice.
    """
    host = hardware.host()
    try:
        plan = plan_for(profile, machines_here(), host=host, ask_hub=False)
    except PreflightError:
        return None
    remedies = find_remedies(plan, host)
    if not remedies:
        return None
    return "the plan advises " + ", ".join(map(str, remedies[0].changes))
