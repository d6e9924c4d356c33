"""Qwen2.5-VL: the server's greedy answers are those of transformers and qwen_vl_utils.

Of a small checkpoint with random weights, whose answers mean nothing and depend on everything.
"""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import requests

from qwen2vl_serve.demo import hollow
from qwen2vl_serve.plan.architectures import published
from qwen2vl_serve.profile import load_profile
from qwen2vl_serve.torchvision_ops import declare_missing_operators
from tests.conftest import ServerProcess, demo_server
from tests.reference import Reference
from tests.reference_prompts import Clip, Prompt, draw_clip, prompts
from tests.test_reference import MAX_TOKENS, SEED, ask, compare, part

# Every eighth block of the tower looks at the whole picture, the others at windows.
LAYERS, BLOCKS = 2, 8
KINDS = {"text": 4, "picture": 12, "pictures": 6, "turns": 6}
# Of nine frames, which make five layers. At lower rates these would span more positions than they
# have rows and columns, beyond which transformers 5 counts otherwise than the releases that the
# model came with, and vLLM: what follows a video is put right after its longest side.
RATES = (4.0, 5.0, 8.0, 12.0, 20.0)


@dataclass(frozen=True)
class Later:
    """The checkpoint behind the server, and on transformers."""

    server: ServerProcess
    reference: Reference


def write_random(folder: Path) -> None:
    """Write a Qwen2.5-VL of few and narrow layers, with weights that let all of them count."""
    declare_missing_operators()
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    model = published("Qwen/Qwen2.5-VL-3B-Instruct")
    assert model is not None
    assert model.vision is not None
    tokenizer = transformers.AutoTokenizer.from_pretrained(hollow.MODEL_FOLDER)
    vocabulary = len(tokenizer)
    text = replace(
        model.text, hidden=256, intermediate=512, layers=LAYERS, heads=2, kv_heads=1,
        vocabulary=vocabulary, positions=8192,
    )  # fmt: skip
    vision = replace(
        model.vision, depth=BLOCKS, embed=64, heads=2, intermediate=128, out=text.hidden
    )
    hollow.write(folder, replace(model, text=text, vision=vision))
    config = json.loads((folder / "config.json").read_text("utf-8")) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    torch.manual_seed(SEED)
    made = transformers.AutoModelForImageTextToText.from_config(
        transformers.AutoConfig.from_pretrained(folder), dtype=torch.float32
    )
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.12)
    # Parts of a character are said by nobody, for a text does not tell which they were.
    parts = [n for n in range(vocabulary) if "\ufffd" in tokenizer.decode([n])]
    made.get_input_embeddings().weight.data[parts] = 0
    made.save_pretrained(folder / "weights")
    (folder / "weights" / "model.safetensors").rename(folder / "model.safetensors")


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Later]:
    """The checkpoint under the demo profile's settings."""
    folder = tmp_path_factory.mktemp("later")
    write_random(folder)
    media = load_profile("demo").media
    bounds = [
        (low or 0, high or 0)
        for low, high in (
            (media.min_pixels, media.max_pixels),
            (media.videos_kwargs.min_pixels, media.videos_kwargs.max_pixels),
        )
    ]
    with demo_server(f"model={folder}", "engine.max_model_len=4096") as running:
        yield Later(running, Reference(folder, pictures=bounds[0], frames=bounds[1]))


def films() -> list[Prompt]:
    """The same questions about the same frames, taken at several rates."""
    asked = []
    for number, fps in enumerate(RATES * 2):
        rng = random.Random(f"{SEED} {number // len(RATES)}")
        clip = replace(draw_clip(rng, (112, 168), 9), fps=fps)
        asked.append(Prompt("frames", (("user", (clip, "What moves?")),)))
    return asked


def test_answers_are_those_of_the_reference(later: Later) -> None:
    """Texts, pictures and turns, in windows and beyond them."""
    asked = prompts(SEED, KINDS)
    differences, expected = compare(later.server, later.reference, asked, "qwen_vl_utils")
    assert len({answer.text for answer in expected}) > len(asked) // 2
    assert all(difference.explained for difference in differences), list(map(str, differences))
    assert len(differences) <= 2


def test_videos_are_answered_at_their_rate(later: Later) -> None:
    """Frames that were taken more seldom lie farther apart, and the answer differs by that."""
    asked = films()
    differences, expected = compare(later.server, later.reference, asked, "qwen_vl_utils")
    assert all(difference.explained for difference in differences), list(map(str, differences))
    assert len({answer.text for answer in expected[: len(RATES)]}) > len(RATES) // 2


def test_explain_counts_as_the_engine(later: Later) -> None:
    """The prompt of every kind of request, videos at any rate among them."""
    for prompt in (*prompts(SEED, KINDS), *films()):
        body = {"messages": prompt.messages(part), "max_tokens": 1}
        url = f"{later.server.url}/chat/completions"
        explained = requests.post(f"{url}/explain", json=body, timeout=60).json()
        counted = requests.post(url, json=body, timeout=60).json()["usage"]
        assert explained["prompt_tokens"] == counted["prompt_tokens"]


def test_another_rate_is_no_hit_in_a_cache(later: Later) -> None:
    """What was kept of the same frames, taken at another rate, is not shown in their place."""
    first, second = [film for film in films() if rate(film) in {4.0, 12.0}][:2]
    said = [ask(later.server, film) for film in (first, second, first)]
    expected = [later.reference.answer(film, MAX_TOKENS).text for film in (first, second)]
    assert said == [*expected, expected[0]]
    assert expected[0] != expected[1]


def test_frames_hours_apart_are_refused(later: Later) -> None:
    """Beyond the positions that vLLM's table has, a request would end the engine."""
    answer, longest = (told(later, length) for length in (16, 4))
    assert answer["code"] == "video_too_large"
    assert "at most 14336 " in answer["message"]
    assert longest == {}


def told(later: Later, frames: int) -> dict[str, Any]:
    """The error for a clip of so many frames, one in a thousand seconds; empty if answered."""
    clip = replace(draw_clip(random.Random(SEED), (112, 112), frames), fps=0.001)
    messages = Prompt("frames", (("user", (clip, "What moves?")),)).messages(part)
    body = {"messages": messages, "max_tokens": 4}
    answer = requests.post(f"{later.server.url}/chat/completions", json=body, timeout=60).json()
    error: dict[str, Any] = answer.get("error", {})
    return error


def rate(film: Prompt) -> float:
    """The rate of a prompt's clip."""
    (clip,) = (part for part in film.turns[0][1] if isinstance(part, Clip))
    return clip.fps
