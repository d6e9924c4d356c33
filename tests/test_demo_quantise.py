"""Quantised demo checkpoints: the grid, both layouts against vLLM's own, and what GPTQ is for."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl_serve.checkpoints import checkpoint
from qwen2vl_serve.demo import packing, quantise
from qwen2vl_serve.demo.adapter import base_network
from qwen2vl_serve.demo.network import Network
from qwen2vl_serve.demo.quantise import Method
from qwen2vl_serve.machine import hardware
from qwen2vl_serve.plan.configuration import read_architecture
from qwen2vl_serve.plan.source import architecture_of
from qwen2vl_serve.plan.weights import stage_weights
from qwen2vl_serve.profile import load_profile

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
BITS = pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (8, True), (4, False)])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of many, on cores that others need as well, each waits for the others at every small step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def made(method: Method, bits: int, *, plain: bool = False) -> quantise.Quantised:
    return quantise.quantise_demo(method, bits, plain=plain)


@cache
def others() -> tuple[quantise.Examples, torch.Tensor]:
    """Conversations that nothing was quantised on, and what the model itself says in them."""
    examples = quantise.demo_examples(1)
    return examples, said(examples, base_network())


@torch.inference_mode()
def said(examples: quantise.Examples, network: Network) -> torch.Tensor:
    return examples.logits(network)


def likeness(of: quantise.Quantised) -> quantise.Likeness:
    examples, expected = others()
    return quantise.likeness(expected, said(examples, of.network))


@BITS
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from((1e-6, 0.02, 1.0, 100.0)),
    shift=st.sampled_from((-3.0, 0.0, 3.0)),
)
def test_a_weight_is_at_most_half_a_step_away(
    bits: int, symmetric: bool, seed: int, size: float, shift: float
) -> None:
    """Whatever the weights, all of one sign too; and what scales lose as half floats."""
    torch.manual_seed(seed)
    weight = (torch.randn(96, 8) + shift) * size
    found = packing.rounded(weight, bits, 32, symmetric=symmetric)
    error = (found.matrix() - weight).abs().view(3, 32, 8)
    # A scale rounded down by a part in 2048 leaves the outermost weight that much outside.
    allowed = found.scales[:, None] * (0.5 + 2**bits / 2048)
    assert bool((error <= allowed).all())
    assert int(found.codes.min()) >= 0
    assert int(found.codes.max()) < 2**bits


@pytest.mark.parametrize("seed", range(8))
def test_what_few_directions_make_up_is_rounded_all_the_same(seed: int) -> None:
    """One direction a million times as strong as all others, which float32 hardly inverts."""
    torch.manual_seed(seed)
    strong = torch.randn(768)
    read = torch.randn(40, 1) * strong * 1e3 + torch.randn(40, 768) * 1e-3
    weight = torch.randn(768, 8)
    found = quantise.fed_back(weight, read.T @ read / 40, 4, 32, symmetric=True)
    plain = packing.rounded(weight, 4, 32, symmetric=True)
    nearer, rounded = (((one.matrix() - weight).T @ strong).norm() for one in (found, plain))
    assert nearer < rounded / 2


def random_codes(bits: int) -> packing.Codes:
    torch.manual_seed(bits)
    top = 2**bits
    return packing.Codes(
        torch.randint(0, top, (128, 64)).float(), torch.rand(2, 64),
        torch.randint(1, top, (2, 64)).float(), bits,
    )  # fmt: skip


@needs_vllm
@pytest.mark.parametrize("bits", [4, 8])
def test_gptqs_layout_is_vllms(bits: int) -> None:
    """Codes packed as vLLM packs them, zeros stored less one, ``g_idx`` the group of each input."""
    from vllm.model_executor.layers.quantization.utils import quant_utils

    codes = random_codes(bits)
    tensors = packing.gptq_tensors(codes)
    theirs = quant_utils.gptq_pack(codes.codes.int(), bits, 128, 64)
    assert torch.equal(tensors["qweight"], theirs)
    zeros = quant_utils.unpack_cols(tensors["qzeros"], bits, 2, 64)
    assert torch.equal(zeros + 1, codes.zeros.int())
    assert tensors["g_idx"].tolist() == [0] * 64 + [1] * 64


@needs_vllm
def test_awqs_layout_is_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed alike, and turned by vLLM into GPTQ's layout it is what we write there."""
    from vllm.model_executor import parameter
    from vllm.model_executor.layers.quantization import auto_awq
    from vllm.model_executor.layers.quantization.utils import quant_utils

    codes = random_codes(4)
    tensors = packing.awq_tensors(codes)
    assert torch.equal(tensors["qweight"], quant_utils.awq_pack(codes.codes.int(), 4, 128, 64))
    assert torch.equal(tensors["qzeros"], quant_utils.awq_pack(codes.zeros.int(), 4, 2, 64))
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)
    layer = torch.nn.Module()
    for name in ("qweight", "qzeros"):
        layer.register_parameter(name, torch.nn.Parameter(tensors[name], requires_grad=False))
    auto_awq._convert_awq_to_standard_format(layer, "qweight", "qzeros", 4)
    assert torch.equal(layer.qweight.data, packing.gptq_tensors(codes)["qweight"])


@needs_vllm
@pytest.mark.skipif(not hardware.has_avx512(), reason="vLLM's kernel needs AVX-512")
@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_vllms_cpu_kernel_multiplies_by_what_the_codes_stand_for(
    method: Method, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer as vLLM builds it from quantization_config, filled with the tensors of the file."""
    from vllm.model_executor import parameter
    from vllm.model_executor.layers.quantization import auto_awq, auto_gptq

    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)
    settings = quantise.quantisation_config(method, 4, 64)
    linear: Any = (
        auto_awq.AutoAWQMarlinLinearMethod(auto_awq.AutoAWQConfig.from_config(settings))
        if method == "awq"
        else auto_gptq.AutoGPTQLinearMethod(auto_gptq.AutoGPTQConfig.from_config(settings))
    )
    torch.manual_seed(0)
    codes = packing.rounded(torch.randn(704, 256), 4, 64, symmetric=method == "gptq")
    tensors = (packing.awq_tensors if method == "awq" else packing.gptq_tensors)(codes)
    layer = torch.nn.Module()
    layer.bias = None
    linear.create_weights(layer, 704, [256], 704, 256, dtype, weight_loader=None)
    for name, held in layer.named_parameters():
        assert held.shape == tensors[name].shape
        held.data.copy_(tensors[name])
    linear.process_weights_after_loading(layer)
    read = torch.randn(5, 704).to(dtype)
    found, expected = linear.apply(layer, read).float(), read.float() @ codes.matrix()
    error = (found - expected).norm() / expected.norm()
    assert float(error) < 0.01


@pytest.mark.parametrize(("method", "bits"), [("awq", 4), ("gptq", 4)])
def test_the_method_is_better_than_rounding(method: Method, bits: int) -> None:
    """On pictures that it did not look at: otherwise it would not be worth its lines."""
    best, plain = likeness(made(method, bits)), likeness(made(method, bits, plain=True))
    assert best.divergence < 0.8 * plain.divergence
    assert best.logit_error < 0.95 * plain.logit_error
    assert best.same > 0.97


@pytest.mark.parametrize(("method", "bits"), [("awq", 4), ("gptq", 4), ("gptq", 8)])
def test_the_folder_is_a_checkpoint_as_qwens(method: Method, bits: int, tmp_path: Path) -> None:
    """Read, checked and planned as any; the tower and the embeddings are not packed."""
    quantise.write(tmp_path, made(method, bits))
    checkpoint.check_processor(tmp_path)
    assert checkpoint.check_weights(tmp_path) == 1
    config = checkpoint.read_config(tmp_path, {})
    model = read_architecture("demo", config)
    assert model is not None
    assert model.quantisation is not None
    assert (model.quantisation.method, model.quantisation.bits) == (method, bits)
    shapes = checkpoint.tensor_shapes(tmp_path / "model.safetensors")
    packed = {name.rpartition(".")[0] for name in shapes if name.endswith("qweight")}
    assert len(packed) == 4 * 7
    assert all(name.startswith("model.layers.") for name in packed)
    assert shapes["visual.blocks.0.attn.qkv.weight"] == (576, 192)
    each = {"awq": (256, 256 // 8), "gptq": (256 * bits // 32, 256)}[method]
    assert shapes["model.layers.0.self_attn.q_proj.qweight"] == each
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"


def test_the_planner_counts_what_the_file_holds(tmp_path: Path) -> None:
    """Weights and scales of the packed layers, within a hundredth."""
    quantise.write(tmp_path, made("awq", 4))
    profile = load_profile("demo", [f"model={tmp_path}", "model.dtype=half"])
    model = architecture_of(profile)
    (stage,) = stage_weights(model, tensor_parallel=1, stages=1, dtype_bytes=2)
    rotary = model.text.rotary_values * 2 + (model.vision.rotary_values * 2 if model.vision else 0)
    held = (tmp_path / "model.safetensors").stat().st_size
    assert stage.total.exact - rotary == pytest.approx(held, rel=0.01)


def test_eight_bits_of_awq_are_refused(capsys: Any) -> None:
    """The layout holds four; the command ends with an error that names ``--bits``."""
    with pytest.raises(SystemExit):
        quantise.main(["--method", "awq", "--bits", "8", "--out", "none"])
    assert "--bits: AWQ's layout has 4" in capsys.readouterr().err
