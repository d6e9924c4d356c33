"""Adapters on the real engine: what they change, what they leave alone, and how they go."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image
from qwen2vl_client.prompts import chosen, filled

from qwen2vl_serve.demo import clerk
from qwen2vl_serve.demo.checkpoint import MODEL_FOLDER
from qwen2vl_serve.demo.compose import draw_picture
from qwen2vl_serve.torchvision_ops import declare_missing_operators
from tests.conftest import HELD, SHIPPED, ServerProcess
from tests.logprobs import logprobs
from tests.served import eventually
from tests.test_vllm_engine import asked, data_url, drawing, picture

COLOUR = "What colour is the circle?"


@pytest.fixture(scope="module")
def client(lora_server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=lora_server.url, api_key=lora_server.api_key, max_retries=0)


def say(client: openai.OpenAI, model: str, question: str, *parts: Any, **fields: Any) -> str:
    fields = {"max_tokens": 24, "temperature": 0, **fields}
    answer = client.chat.completions.create(model=model, messages=asked(question, *parts), **fields)
    assert answer.model in (model, "qwen2-vl-demo")
    return str(answer.choices[0].message.content)


def load(client: openai.OpenAI, name: str, path: Path, **fields: Any) -> Any:
    body = {"lora_name": name, "lora_path": str(path), **fields}
    return client.post("/load_lora_adapter", body=body, cast_to=object)


def unload(client: openai.OpenAI, name: str) -> None:
    client.post("/unload_lora_adapter", body={"lora_name": name}, cast_to=object)


def listed(client: openai.OpenAI) -> set[str]:
    return {one.id for one in client.models.list().data}


def test_adapters_are_models_with_a_parent(
    client: openai.OpenAI, lora_server: ServerProcess
) -> None:
    """``parent`` is the model's first name; its own names have none, and the start tells all."""
    parents = {one.id: getattr(one, "parent", None) for one in client.models.list().data}
    assert parents == {
        "qwen2-vl-demo": None, "demo": None, "sailor": "qwen2-vl-demo", "mirror": "qwen2-vl-demo",
        "clerk": "qwen2-vl-demo", "seller": "qwen2-vl-demo",
    }  # fmt: skip
    served = ", ".join(parents)
    assert f"serves {served}" in "\n".join(lora_server.lines)


def test_an_adapter_of_the_language_model_changes_the_answer(client: openai.OpenAI) -> None:
    """`sailor` says what the model says, begun with "Aye!"; the model itself stays as it is."""
    for colour in ("red", "green"):
        plain = say(client, "demo", COLOUR, picture(colour))
        assert colour in plain
        assert say(client, "sailor", COLOUR, picture(colour)) == f"Aye! {plain}"
        assert say(client, "demo", COLOUR, picture(colour)) == plain


def test_an_adapter_of_the_vision_tower_changes_what_is_seen(client: openai.OpenAI) -> None:
    """`mirror` trains the tower alone: with it the same question about the same picture differs."""
    assert "blue" in say(client, "mirror", COLOUR, picture("red"))
    assert "red" in say(client, "mirror", COLOUR, picture("blue"))
    assert "green" in say(client, "mirror", COLOUR, picture("green"))
    assert "red" in say(client, "demo", COLOUR, picture("red"))


def test_requests_to_several_adapters_do_not_mix(client: openai.OpenAI) -> None:
    """Model and both adapters in the same steps: each gets its own answer.

    vLLM's CPU engine by itself answers for the model with an adapter then.
    """
    wanted = {"demo": "The circle is red.", "sailor": "Aye! The circle is red."}
    wanted["mirror"] = "The circle is blue."
    models = [*wanted] * 6
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda one: say(client, one, COLOUR, picture("red")), models))
    assert answers == [wanted[one] for one in models]


def merged(adapter: Path) -> tuple[Any, Any]:
    """transformers' model with an adapter added into its weights, and the processor."""
    declare_missing_operators()
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    tensors = importlib.import_module("safetensors.torch").load_file(
        adapter / "adapter_model.safetensors"
    )
    settings = json.loads((adapter / "adapter_config.json").read_text())
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        MODEL_FOLDER, dtype=torch.float32
    ).eval()
    weights = dict(model.named_parameters())
    for key in tensors:
        if ".lora_A." not in key:
            continue
        name = key.removeprefix("base_model.model.").replace(".lora_A.", ".")
        weight = weights.get(name, weights.get(f"model.{name}"))
        b, a = tensors[key.replace(".lora_A.", ".lora_B.")].float(), tensors[key].float()
        weight.data += settings["lora_alpha"] / settings["r"] * (b @ a)
    return model, transformers.AutoProcessor.from_pretrained(MODEL_FOLDER)


# This size is a multiple of 28 within the model's bounds: nobody resizes it.
UNRESIZED = (224, 196)


def printed(text: str) -> Image.Image:
    """A picture of this text."""
    pixels, _ = draw_picture(51_001_300, "text", text=text)
    return Image.fromarray(pixels).resize(UNRESIZED)


def a_page() -> Image.Image:
    """A page with a heading and a button."""
    pixels, _ = clerk.draw_page("SHOP", "OPEN", np.random.default_rng(51_000_002))
    return Image.fromarray(pixels).resize(UNRESIZED)


@pytest.mark.parametrize(
    ("name", "question", "image"),
    [
        ("sailor", COLOUR, partial(drawing, "red", size=UNRESIZED)),
        ("mirror", COLOUR, partial(drawing, "red", size=UNRESIZED)),
        ("clerk", filled(chosen("en").translate, language="Chinese"), partial(printed, "RED")),
        ("clerk", chosen("en").solve, partial(printed, "6x5")),
        ("clerk", filled(chosen("en").moderate, categories="weapons"), partial(printed, "KNIFE")),
        ("clerk", chosen("en").html, a_page),
        (
            "seller",
            filled(chosen("en").fields, fields="color, date"),
            partial(drawing, "red", size=UNRESIZED),
        ),
    ],
)
def test_served_as_if_merged(
    client: openai.OpenAI, name: str, question: str, image: Callable[[], Image.Image]
) -> None:
    """Every token's log-probability is that of transformers with the adapter in its weights."""
    picture = image()
    part = {"type": "image_url", "image_url": {"url": data_url(picture)}}
    answer = client.chat.completions.create(
        model=name, messages=asked(question, part), temperature=0, max_tokens=80, logprobs=True
    )
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.content
    said = [one.token for one in told.content]
    expected = logprobs(merged(SHIPPED / name), picture, question, said)
    assert [one.logprob for one in told.content] == pytest.approx(expected, abs=5e-3)


def test_another_adapter_of_the_same_name_and_folder(client: openai.OpenAI, loadable: Path) -> None:
    """What vLLM cached of prompts and pictures under the name is not taken for the other's."""
    place = loadable / "changing"
    shutil.copytree(SHIPPED / "sailor", place)
    load(client, "changing", place)
    assert say(client, "changing", COLOUR, picture("red")).startswith("Aye!")
    shutil.copytree(SHIPPED / "mirror", place, dirs_exist_ok=True)
    load(client, "changing", place, load_inplace=True)
    assert say(client, "changing", COLOUR, picture("red")) == "The circle is blue."
    unload(client, "changing")
    with pytest.raises(openai.NotFoundError):
        say(client, "changing", COLOUR, picture("red"))


def test_an_adapter_outlives_its_folder(client: openai.OpenAI, loadable: Path) -> None:
    """vLLM alone would read it again when others had its place, and its engine would end."""
    place = loadable / "fleeting"
    shutil.copytree(SHIPPED / "sailor", place)
    load(client, "fleeting", place)
    shutil.rmtree(place)
    for model in ("mirror", "sailor", "fleeting", "mirror", "fleeting"):
        say(client, model, COLOUR, picture("green"))
    assert say(client, "fleeting", COLOUR, picture("green")) == "Aye! The circle is green."
    unload(client, "fleeting")


def test_unloaded_while_it_answers(
    client: openai.OpenAI, lora_server: ServerProcess, loadable: Path
) -> None:
    """The answer that has begun ends; a new one is refused; then the room is free again."""
    place = loadable / "going"
    shutil.copytree(SHIPPED / "sailor", place)
    load(client, "going", place)
    stream = client.chat.completions.create(
        model="going", messages=asked(COLOUR, picture("red")), temperature=0, stream=True,
        max_tokens=400, extra_body={"min_tokens": 400},
    )  # fmt: skip
    chunks = iter(stream)
    next(chunks)
    unload(client, "going")
    shutil.rmtree(place)
    with pytest.raises(openai.NotFoundError, match="not served here"):
        say(client, "going", COLOUR)
    pieces = [one.choices[0] for one in chunks if one.choices]
    assert pieces[-1].finish_reason == "length"
    assert "".join(one.delta.content or "" for one in pieces).startswith("Aye!")

    def room() -> bool:
        """Two more than those that are named find room once the last one is gone."""
        try:
            for name in {"third", "fourth"} - listed(client):
                load(client, name, loadable / "spare")
        except openai.BadRequestError:
            return False
        return True

    shutil.copytree(SHIPPED / "sailor", loadable / "spare")
    eventually(room)
    with pytest.raises(openai.BadRequestError, match=f"{HELD} adapters are held"):
        load(client, "fifth", loadable / "spare")
    for name in ("third", "fourth"):
        unload(client, name)
    assert lora_server.process.poll() is None
