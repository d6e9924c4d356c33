"""The first lesson's losses say what they should."""

from __future__ import annotations

import pytest
import torch

from qwen2vl_serve.demo.pictures import STEPS
from qwen2vl_serve.demo.see import SIDES, steps_loss


def sure_of(*steps: float) -> torch.Tensor:
    """Logits of somebody who knows each side's step."""
    logits = torch.zeros(1, SIDES, STEPS + 1)
    for side, step in enumerate(steps):
        logits[0, side, round(step)] = 50.0
    return logits


def test_a_side_on_a_step_costs_nothing_when_it_is_named():
    """All four right: no loss; one of them a step off: all of its share."""
    truth = torch.tensor([[0.0, 7.0, 20.0, float(STEPS)]])
    assert float(steps_loss(sure_of(0, 7, 20, STEPS), truth)) == pytest.approx(0, abs=1e-6)
    assert float(steps_loss(sure_of(0, 8, 20, STEPS), truth)) == pytest.approx(50 / SIDES)


def test_a_side_between_two_steps_belongs_to_both():
    """A quarter of the way up, the loss is least where the lower has three quarters."""
    truth = torch.full((1, SIDES), 3.25)
    logits = torch.zeros(1, SIDES, STEPS + 1, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(300):
        optimizer.zero_grad()
        steps_loss(logits, truth).backward()
        optimizer.step()
    shares = logits.detach().softmax(-1)[0, 0]
    assert float(shares[3]) == pytest.approx(0.75, abs=0.02)
    assert float(shares[4]) == pytest.approx(0.25, abs=0.02)
