"""What training computes with, on this CPU and on others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qwen2vl_serve.demo.steps import (
    Float32Muon,
    Optimizers,
    Together,
    orthogonal,
    working_type,
)


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


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_muon_takes_the_steps_of_torchs_in_float32(shape: tuple[int, int]) -> None:
    """But for what bfloat16 rounds away; nothing of it is rounded here."""
    torch.manual_seed(0)
    begun = torch.randn(shape)
    gradients = [torch.randn(shape) for _ in range(3)]
    ends = []
    for kind in (Float32Muon, torch.optim.Muon):
        parameter = nn.Parameter(begun.clone())
        muon = kind(
            [parameter], lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
        )
        for gradient in gradients:
            parameter.grad = gradient.clone()
            muon.step()
        ends.append(parameter.detach() - begun)
    ours, theirs = ends
    assert torch.allclose(ours, theirs, atol=0.02 * float(theirs.abs().max()))
    assert not torch.equal(ours, theirs)


def test_what_muon_steps_along_is_orthogonal() -> None:
    """All singular values come near to 1, the smallest as well as the largest."""
    torch.manual_seed(0)
    steep = torch.randn(32, 48) * torch.logspace(0, -1, 48)
    values = torch.linalg.svdvals(orthogonal(steep, (3.4445, -4.775, 2.0315)))
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_every_machine_trains_by_muon(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With half of AdamW's steps; hidden matrices by it, all else by AdamW."""
    monkeypatch.setattr("qwen2vl_serve.demo.steps.working_type", lambda: kind)
    module = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(3, 2)])})})
    adamw, muon = Optimizers(module, 1e-3).parts
    assert isinstance(muon, Float32Muon) == (kind is torch.float32)
    assert [p.shape for group in muon.param_groups for p in group["params"]] == [(2, 3)]
    assert [p.shape for group in adamw.param_groups for p in group["params"]] == [(2,)]
