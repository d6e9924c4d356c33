"""Foresight: whether a profile fits given cards, known before a byte of weights is read.

``plan_for(profile, cards)`` is the whole of it for other modules; nothing here needs torch, vLLM,
a card or the network.
"""

from qwen2vl_serve.plan.planning import Assessment, StagePlan, Verdict, plan_for

__all__ = ["Assessment", "StagePlan", "Verdict", "plan_for"]
