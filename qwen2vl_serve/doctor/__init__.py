"""Says what would go wrong with a profile on this machine, before it does."""

from qwen2vl_serve.doctor.checks import CHECKS, examine
from qwen2vl_serve.doctor.finding import Finding, Level
from qwen2vl_serve.doctor.world import Advice, World

__all__ = [
    "CHECKS",
    "Advice",
    "Finding",
    "Level",
    "World",
    "examine",
]
