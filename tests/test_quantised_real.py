"""Quantised checkpoints and true shapes on the real engine, and what the CPU engine refuses."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import openai
import pytest

from qwen2vl_serve import cli
from qwen2vl_serve.demo import hollow, quantise
from qwen2vl_serve.demo.checkpoint import MODEL_FOLDER
from qwen2vl_serve.demo.quantise import Method
from qwen2vl_serve.machine import hardware
from qwen2vl_serve.plan.architectures import Quantisation, published
from qwen2vl_serve.plan.refusals import READ, refusal
from qwen2vl_serve.torchvision_ops import declare_missing_operators
from tests.conftest import ServerProcess, demo_server
from tests.logprobs import logprobs
from tests.test_vllm_engine import asked, data_url, drawing, picture

ROOT = Path(__file__).parents[1]
NO_KERNEL = "vLLM's kernel of four bits needs AVX-512, and the doctor refuses without it"


@dataclass(frozen=True)
class Served:
    made: quantise.Quantised
    server: ServerProcess
    client: openai.OpenAI

    def say(self, question: str, *parts: Any, **fields: Any) -> Any:
        messages = asked(question, *parts)
        return self.client.chat.completions.create(
            model=self.client.models.list().data[0].id, messages=messages, temperature=0,
            **{"max_tokens": 24, **fields},
        )  # fmt: skip

    def text(self, question: str, *parts: Any) -> str:
        return str(self.say(question, *parts).choices[0].message.content)


@pytest.fixture(scope="module", params=["awq", "gptq"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """The demo model, quantised here and now to four bits, behind the server."""
    if not hardware.has_avx512():
        pytest.skip(NO_KERNEL)
    method: Method = request.param
    folder = tmp_path_factory.mktemp(method)
    made = quantise.quantise_demo(method)
    quantise.write(folder, made)
    with demo_server(f"model={folder}", "model.dtype=half") as running:
        client = openai.OpenAI(base_url=running.url, api_key="none", max_retries=0)
        yield Served(made, running, client)


def test_known_questions_are_answered_right(served: Served) -> None:
    """Colour and shape of drawings, in both languages, and a list of words without a picture."""
    for colour in ("red", "green", "blue"):
        assert served.text("What colour is the circle?", picture(colour)) == (
            f"The circle is {colour}."
        )
    assert "square" in served.text("What shape is it?", picture("blue", "rectangle"))
    assert "红" in served.text("圆形是什么颜色？", picture("red"))


def transformers_with(network: Any) -> tuple[Any, Any]:
    """transformers' model with a network's weights, and the processor."""
    declare_missing_operators()
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        MODEL_FOLDER, dtype=torch.float32
    ).eval()
    weights = dict(model.named_parameters())
    for name, value in network.state_dict().items():
        theirs = (
            name if name.startswith("visual.") else name.replace("model.", "language_model.", 1)
        )
        weights[f"model.{theirs}"].data.copy_(value)
    return model, transformers.AutoProcessor.from_pretrained(MODEL_FOLDER)


def test_served_as_the_codes_say(served: Served) -> None:
    """Every token's log-probability is that of the matrices that the codes stand for."""
    question = "What colour is the circle?"
    # This size is a multiple of 28 within the model's bounds: nobody resizes it.
    image = drawing("red", size=(224, 196))
    part = {"type": "image_url", "image_url": {"url": data_url(image)}}
    answer = served.say(question, part, logprobs=True)
    told = answer.choices[0].logprobs.content
    model, processor = transformers_with(served.made.network)
    said = [one.token for one in told]
    expected = logprobs((model, processor), image, question, said)
    assert [one.logprob for one in told] == pytest.approx(expected, abs=0.02)


AWQ_SHAPE = pytest.param(
    "Qwen/Qwen2-VL-7B-Instruct-AWQ",
    marks=pytest.mark.skipif(not hardware.has_avx512(), reason=NO_KERNEL),
)
SHAPES = (AWQ_SHAPE, "Qwen/Qwen2.5-VL-3B-Instruct")


@pytest.mark.parametrize("name", SHAPES)
def test_true_widths_start_and_answer(name: str, tmp_path: Path) -> None:
    """Two layers of text and tower in their true widths, with the weights made up by vLLM."""
    assert hollow.main([name, "--out", str(tmp_path), "--layers", "2"]) == 0
    settings = (f"model={tmp_path}", "model.dtype=auto", "model.load_format=dummy")
    with demo_server(*settings) as running:
        client = openai.OpenAI(base_url=running.url, api_key="none", max_retries=0)
        answer = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=asked("What colour is the circle?", picture("red")),
            max_tokens=3,
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens > 64
        assert answer.usage.completion_tokens == 3


@cache
def engine_says() -> dict[str, str]:
    """What vLLM's own classes say, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm_refusals"],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split("\t", 2) for line in done.stdout.splitlines() if line.startswith("SAYS")]
    return {name: said for _, name, said in lines}


REFUSED = {
    "gptq 4": (Quantisation("gptq", 4, 64), ""),
    "gptq 8": (Quantisation("gptq", 8, 64), "Only types = [ScalarType.uint4b8] are supported"),
    "gptq 3": (Quantisation("gptq", 3, 64), "Unsupported quantization config: bits=3, sym=True"),
    "gptq asymmetric": (
        Quantisation("gptq", 4, 64, zeros=True),
        "Unsupported quantization config: bits=4, sym=False",
    ),
    "gptq ordered": (
        Quantisation("gptq", 4, 64, ordered=True), "desc_act=True) is no longer supported",
    ),
    "awq 4": (Quantisation("awq", 4, 64, zeros=True), ""),
    "awq 8": (Quantisation("awq", 8, 64, zeros=True), "Unsupported num_bits = 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_plan_refuses_what_the_engine_refuses(name: str) -> None:
    """On the CPU engine; where its words change, our table has to be looked at again."""
    packing, words = REFUSED[name]
    assert words in engine_says()[name]
    ours = refusal(packing, "half", on_cards=False)
    assert (ours is None) == (engine_says()[name] == "")
    assert refusal(packing, "float32", on_cards=False) is not None
    assert "float32" not in engine_says()["dtypes"]


def test_methods_are_read_that_the_engine_reads() -> None:
    """bitsandbytes, which many checkpoints of the hub are packed by, is none of them."""
    assert sorted(READ) == engine_says()["methods"].split("\t")
    for method in READ:
        found = refusal(Quantisation(method, 4, 128), "half", on_cards=True)
        assert found is None or "does not read" not in found.found
    found = refusal(Quantisation("bitsandbytes", 4), "half", on_cards=True)
    assert found is not None
    assert "'bitsandbytes', which vLLM 0.32 does not read" in found.found


@pytest.mark.parametrize("wide", [True, False])
def test_the_library_for_avx2_lacks_the_kernel(wide: bool) -> None:
    """What the doctor says of processors without AVX-512: vLLM told that this is one."""
    if wide and not hardware.has_avx512():
        pytest.skip("this processor has no AVX-512")
    code = f"""
import torch
torch.cpu._is_avx512_supported = lambda: {wide}
import vllm._custom_ops
print(hasattr(torch.ops._C, "cpu_gemm_wna16"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.stdout.splitlines()[-1:] == [str(wide)], done.stderr[-2000:]


def test_eight_bits_are_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`serve` says it in one line, and `plan` too."""
    quantise.write(tmp_path, quantise.quantise_demo("gptq", 8, plain=True))
    options = ["--profile", "demo", "--set", f"model={tmp_path}", "--set", "model.dtype=half"]
    assert cli.serve_main([*options, "--port", "0", "--check"]) == 2
    assert "vLLM's CPU kernels read 4" in capsys.readouterr().err
    assert cli.main(["plan", *options]) != 0
    assert "vLLM's CPU kernels read 4" in "".join(capsys.readouterr())


def test_hollow_folders_are_planned_as_the_hubs(tmp_path: Path) -> None:
    """Every published checkpoint: what the folder's config.json says is what the name says."""
    from qwen2vl_serve.checkpoints.checkpoint import read_config
    from qwen2vl_serve.plan.architectures import published_names
    from qwen2vl_serve.plan.configuration import read_architecture

    for name in published_names():
        model = published(name)
        assert model is not None
        hollow.write(tmp_path, model)
        assert read_architecture(name, read_config(tmp_path, {})) == model
