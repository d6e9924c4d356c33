"""The server's greedy answers are those of transformers and qwen_vl_utils."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from qwen2vl_serve.profile import load_profile
from tests.conftest import ServerProcess
from tests.reference import Answer, Reference, Resizer
from tests.reference_prompts import KINDS, Clip, Part, Picture, Prompt, draw_clip, prompts

SEED = 20240829
MAX_TOKENS = 32
AT_ONCE = 4
NEAR_TIE = 1e-3
"""Log-probability between the first two tokens below which rounding may choose either."""


@dataclass(frozen=True)
class Difference:
    """A prompt that the two sides answer differently, and why."""

    prompt: Prompt
    served: str
    expected: Answer
    token: int
    by_resizing: bool

    @property
    def margin(self) -> float:
        return self.expected.margins[self.token]

    @property
    def explained(self) -> bool:
        return self.by_resizing or self.margin < NEAR_TIE

    def __str__(self) -> str:
        cause = "the reference agrees once torchvision resizes for it too" * self.by_resizing
        cause = cause or ("near tie" if self.margin < NEAR_TIE else "UNEXPLAINED")
        return (
            f"{self.prompt.kind}: token {self.token}, margin {self.margin:.2g}, {cause}: "
            f"served {self.served!r}, reference {self.expected.text!r}"
        )


@pytest.fixture(scope="module")
def reference() -> Iterator[Reference]:
    """The demo checkpoint on one thread, which at this size is as fast as two and steadier."""
    torch: Any = importlib.import_module("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    profile = load_profile("demo")
    media = profile.media
    assert media.min_pixels is not None
    assert media.max_pixels is not None
    assert media.videos_kwargs.min_pixels is not None
    assert media.videos_kwargs.max_pixels is not None
    yield Reference(
        Path(profile.model.path),
        pictures=(media.min_pixels, media.max_pixels),
        frames=(media.videos_kwargs.min_pixels, media.videos_kwargs.max_pixels),
    )
    torch.set_num_threads(threads)


def test_200_mixed_prompts_get_the_answers_of_the_reference(
    server: ServerProcess, reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    """At least 99 % of the greedy answers are equal, and each other one has a known cause."""
    asked = prompts(SEED, KINDS)
    assert len(asked) == 200
    differences, expected = compare(server, reference, asked, "qwen_vl_utils")
    answers = len({answer.text for answer in expected})
    kinds = ", ".join(f"{count} {kind}" for kind, count in KINDS.items())
    report = [
        f"{200 - len(differences)} of 200 answers equal ({kinds})",
        f"{answers} different answers, {_margins(expected)}",
        *map(str, differences),
    ]
    with capsys.disabled():
        print(*("\nreference: " + line for line in report), sep="")
    assert answers >= 40, "the prompts must not all lead to the same few answers"
    assert all(difference.explained for difference in differences)
    assert len(differences) <= 2


def test_frames_of_any_size_get_the_answers_of_the_reference(
    server: ServerProcess, reference: Reference
) -> None:
    """Frames of sizes that qwen_vl_utils resizes twice are resized twice here.

    It rounds the sides of listed frames to 56, then to 28 pixels; transformers' video processor
    goes to 28 at once and sees different pixels.
    """
    rng = random.Random(SEED)
    sizes = [(rng.randint(60, 500), rng.randint(60, 500)) for _ in range(8)]
    asked = [
        Prompt("frames", (("user", (draw_clip(rng, size, rng.randint(2, 9)), "What moves?")),))
        for size in sizes
    ]
    differences, _ = compare(server, reference, asked, "qwen_vl_utils")
    assert all(difference.margin < NEAR_TIE for difference in differences), differences


def compare(
    server: ServerProcess, reference: Reference, asked: list[Prompt], resizer: Resizer
) -> tuple[list[Difference], list[Answer]]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        served = list(pool.map(lambda prompt: ask(server, prompt), asked))
    differences, answers = [], []
    for prompt, text in zip(asked, served, strict=True):
        answer = reference.answer(prompt, MAX_TOKENS, resizer)
        answers.append(answer)
        token = answer.agreement(text)
        if token is not None:
            again = reference.answer(prompt, MAX_TOKENS, "processor")
            by_resizing = resizer != "processor" and again.agreement(text) is None
            differences.append(Difference(prompt, text, answer, token, by_resizing))
    return differences, answers


def ask(server: ServerProcess, prompt: Prompt) -> str:
    response = requests.post(
        f"{server.url}/chat/completions",
        json={
            "messages": prompt.messages(part),
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "skip_special_tokens": False,
        },
        timeout=120,
    )
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


def part(shown: Part) -> dict[str, Any]:
    match shown:
        case str():
            return {"type": "text", "text": shown}
        case Picture():
            return {"type": "image_url", "image_url": {"url": shown.url}}
        case Clip():
            # The reference is told of the bounds as well, and sizes listed frames by them first.
            frames = load_profile("demo").media.videos_kwargs
            bounds = {"min_pixels": frames.min_pixels, "max_pixels": frames.max_pixels}
            video = {"type": "video_url", "video_url": {"url": shown.url}, **bounds}
            return video if shown.fps == Clip.fps else video | {"fps": shown.fps}


def _margins(answers: list[Answer]) -> str:
    least = sorted(min(answer.margins) for answer in answers)
    near = sum(margin < NEAR_TIE for margin in least)
    return (
        f"smallest margin {least[0]:.2g}, median of each answer's smallest {least[100]:.2g}, "
        f"{near} below {NEAR_TIE}"
    )
