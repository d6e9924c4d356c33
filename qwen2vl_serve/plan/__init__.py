"""Foresight: whether a profile fits given cards, known before a byte of weights is read.

``plan_for(profile, cards)`` tells what fits, ``find_remedies(plan)`` what would; nothing here needs
torch, vLLM, a card or the network.
"""

from qwen2vl_serve.plan.planning import Assessment, StagePlan, Verdict, plan_for
from qwen2vl_serve.plan.remedies import Remedy, find_remedies

__all__ = ["Assessment", "Remedy", "StagePlan", "Verdict", "find_remedies", "plan_for"]
