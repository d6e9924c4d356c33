"""What training computes with, on this CPU and on others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qwen2vl_serve.demo.steps import Together, working_type


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        ({"avx2": True, "amx_bf16": False, "avx512_bf16": False}, torch.float32),
        ({"avx2": True, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"bf16": True}, torch.bfloat16),
        ({}, torch.float32),
    ],
)
def test_bfloat16_is_for_cpus_that_multiply_it(
    told: dict[str, bool], kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one with AVX2 alone a step in bfloat16 took twenty times as long as in float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told)
    assert working_type() is kind


def test_this_cpu_tells_what_it_can() -> None:
    """The names that are looked for are names that torch tells."""
    told = torch.cpu.get_capabilities()
    assert told["architecture"]
    if told["architecture"] == "x86_64":
        assert {"amx_bf16", "avx512_bf16"} <= told.keys()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_work_runs_on_rounded_parameters_and_teaches_the_originals(
    kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients arrive in the parameters' own type, which is not changed by the work."""
    monkeypatch.setattr("qwen2vl_serve.demo.steps.working_type", lambda: kind)
    layer = nn.Linear(3, 2)
    together = Together({"layer": layer})
    seen = together.in_working_type(lambda: layer(torch.ones(1, 3, dtype=kind)))
    assert seen.dtype is kind
    seen.float().sum().backward()
    assert layer.weight.dtype is torch.float32
    assert torch.equal(layer.weight.grad, torch.ones(2, 3))


def test_other_weights_stand_in_for_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work sees those that are given; afterwards the module has its own again."""
    monkeypatch.setattr("qwen2vl_serve.demo.steps.working_type", lambda: torch.float32)
    layer = nn.Linear(3, 2)
    own = layer.weight.detach().clone()
    together = Together({"layer": layer})
    zero = {"layer.weight": torch.zeros(2, 3), "layer.bias": torch.ones(2)}
    seen = together.in_working_type(lambda: layer(torch.ones(1, 3)), zero)
    assert torch.equal(seen, torch.ones(1, 2))
    assert torch.equal(layer.weight, own)
