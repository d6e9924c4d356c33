"""Score the demo model through a running server: ``python -m qwen2vl_serve.demo.evaluate``.

Pictures come from seeds that are never trained on and go through the whole path that a user's
picture takes: data URL, HTTP, the server's media checks, the engine. Every task is asked in English
and in Chinese; the exit status is 1 when a task misses its bar, 2 when nothing could be scored.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import requests
from PIL import Image

from qwen2vl_serve.demo import ask, ask_many
from qwen2vl_serve.demo.compose import draw_picture, draw_video
from qwen2vl_serve.demo.draw import Box, Pixels, Scene
from qwen2vl_serve.demo.foreign import with_cairo, with_matplotlib
from qwen2vl_serve.demo.names import COLOURS, SHAPES, Language
from qwen2vl_serve.demo.talk import talk_question
from qwen2vl_serve.demo.wording import Dialogue, plain, said
from qwen2vl_serve.errors import ProfileError
from qwen2vl_serve.profile.api_keys import API_KEY_VARIABLE, keys_of_environment

FIRST_SEED = 50_000_000  # training draws below one million
BARS: dict[str, float] = {
    "colour": 0.97, "shape": 0.97, "describe": 0.97, "second-picture": 0.97, "follow-up": 0.97,
    "position": 0.95, "count": 0.95, "compare": 0.95, "motion": 0.95, "which-picture": 0.95,
    "reading": 0.90, "box": 0.90, "json": 0.90, "text": 0.95,
}  # fmt: skip
# What an answer is judged by; other tasks are judged by every name they mention.
MATTERS = {
    "colour": frozenset(COLOURS),
    "shape": frozenset(SHAPES),
    "count": frozenset("0123456789"),
}
LANGUAGES: tuple[Language, ...] = ("en", "zh")
BOX = re.compile(r"\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)")
QUOTED = re.compile(r"[\"“](.*)[\"”]")


@dataclass(frozen=True)
class Sample:
    """One dialogue with its pictures (or one video's frames)."""

    dialogue: Dialogue
    pictures: tuple[Pixels, ...]
    video: bool = False


@dataclass(frozen=True)
class Score:
    """How one task went in one language."""

    task: str
    language: Language
    right: int
    asked: int
    bar: float
    wrong: tuple[tuple[str, str, str], ...] = ()  # question, expected, answered (a few)

    @property
    def share(self) -> float:
        """Share of right answers."""
        return self.right / self.asked

    @property
    def passed(self) -> bool:
        """Whether the task reaches its bar."""
        return self.share >= self.bar


def overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    common = width * height
    areas = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (one, other))
    return common / (areas - common)


def is_right(dialogue: Dialogue, answer: str) -> bool:  # noqa: PLR0911
    """Whether the answer to the last turn says what the truth says, in whatever words."""
    expected = plain(dialogue.turns[-1].answer)
    if dialogue.box is not None and BOX.search(expected):
        found = BOX.search(answer)
        if found is None:
            return False
        x1, y1, x2, y2 = (int(v) / 1000 for v in found.groups())
        return overlap((x1, y1, x2, y2), dialogue.box) >= 0.5
    if dialogue.task == "json":
        try:
            return bool(json.loads(answer) == json.loads(expected))
        except ValueError:
            return False
    if dialogue.task == "text":
        return answer.strip() == expected
    if dialogue.task == "reading":
        quoted = QUOTED.search(answer)
        text = quoted.group(1) if quoted else answer
        return text.strip().casefold() == (dialogue.text or "").casefold()
    matters = MATTERS.get(dialogue.task)
    return of_these(said(answer), matters) == of_these(said(expected), matters)


def of_these(found: Counter[str], names: frozenset[str] | None) -> Counter[str]:
    """Only the counts of these names; all of them for None."""
    return found if names is None else Counter({n: c for n, c in found.items() if n in names})


def own_picture(seed: int, count: int, text: bool = False) -> tuple[Pixels, Scene]:
    """A picture by this package's own drawing."""
    return draw_picture(seed, "text" if text else "shapes", count)


Painter = Callable[[int, int, bool], tuple[Pixels, Scene]]
PAINTERS: dict[str, Painter] = {
    "own": own_picture,
    "matplotlib": with_matplotlib,
    "cairo": with_cairo,
}
Sampler = Callable[[int, np.random.Generator, Language, Painter], Sample | None]


def _scene_asker(
    asker: Callable[[np.random.Generator, Scene, Language], Dialogue | None],
    most: int = 5,
    text: bool = False,
) -> Sampler:
    def sample(
        seed: int, rng: np.random.Generator, language: Language, painter: Painter
    ) -> Sample | None:
        picture, scene = painter(seed, 1 + int(rng.integers(most)), text)
        dialogue = asker(rng, scene, language) if scene.things else None
        return Sample(dialogue, (picture,)) if dialogue else None

    return sample


def _many_asker(
    asker: Callable[[np.random.Generator, list[Scene], Language], Dialogue | None], most: int = 4
) -> Sampler:
    def sample(
        seed: int, rng: np.random.Generator, language: Language, painter: Painter
    ) -> Sample | None:
        count = int(rng.integers(2, most + 1))
        each = [painter(seed + n, 1 + int(rng.random() < 0.25), False) for n in range(count)]
        if any(not scene.things for _, scene in each):
            return None
        dialogue = asker(rng, [scene for _, scene in each], language)
        return Sample(dialogue, tuple(picture for picture, _ in each)) if dialogue else None

    return sample


_compare_two = _many_asker(ask_many.compare_pictures, most=2)
_compare_within = _scene_asker(ask.compare_question, most=2)


def _compare(
    seed: int, rng: np.random.Generator, language: Language, painter: Painter
) -> Sample | None:
    ask_it = _compare_two if rng.random() < 0.5 else _compare_within
    return ask_it(seed, rng, language, painter)


def _motion(
    seed: int,
    rng: np.random.Generator,
    language: Language,
    painter: Painter,  # noqa: ARG001
) -> Sample | None:
    frames, clip = draw_video(seed)
    asker = ask_many.motion_question if clip.motion else ask_many.order_question
    dialogue = asker(rng, clip, language)
    return Sample(dialogue, tuple(frames), video=True) if dialogue else None


def _text(seed: int, rng: np.random.Generator, language: Language, painter: Painter) -> Sample:  # noqa: ARG001
    return Sample(talk_question(rng, language), ())


SAMPLERS: dict[str, Sampler] = {
    "colour": _scene_asker(ask.colour_question, most=3),
    "shape": _scene_asker(ask.shape_question, most=3),
    "describe": _scene_asker(ask.describe_question, most=3),
    "second-picture": _many_asker(ask_many.nth_question),
    "follow-up": _scene_asker(ask_many.follow_up, most=3),
    "position": _scene_asker(ask.place_question, most=3),
    "count": _scene_asker(ask.count_question),
    "compare": _compare,
    "motion": _motion,
    "which-picture": _many_asker(ask_many.which_question),
    "reading": _scene_asker(ask.read_question, text=True),
    "box": _scene_asker(ask.box_question, most=3),
    "json": _scene_asker(ask.json_question, most=2),
    "text": _text,
}
NEED_NO_PAINTER = frozenset({"motion", "text"})


def samples(
    task: str, language: Language, count: int, seed: int, painter: str = "own"
) -> list[Sample]:
    """``count`` samples of one task in one language, their pictures drawn by ``painter``."""
    index = list(SAMPLERS).index(task) * 2 + LANGUAGES.index(language)
    found: list[Sample] = []
    attempt = 0
    while len(found) < count:
        place = FIRST_SEED + ((seed * 100 + index) * 100_000 + attempt) * 5
        attempt += 1
        rng = np.random.default_rng((place, 7))
        sample = SAMPLERS[task](place, rng, language, PAINTERS[painter])
        if sample is not None and sample.dialogue.task == task:
            found.append(sample)
    return found


def encoded(picture: Pixels, force_jpeg: bool = False) -> tuple[str, str]:
    """MIME type and base64 of the picture: PNG when small, else JPEG."""
    store = io.BytesIO()
    kind = "jpeg" if force_jpeg or picture.size > 300_000 else "png"
    image = Image.fromarray(picture)
    if kind == "jpeg":
        image.save(store, "JPEG", quality=92)
    else:
        image.save(store, "PNG")
    return f"image/{kind}", base64.b64encode(store.getvalue()).decode()


def content_of(sample: Sample) -> list[dict[str, Any]]:
    """The media parts of the first user turn, in the OpenAI chat format."""
    if sample.video:
        frames = ",".join(encoded(frame, force_jpeg=True)[1] for frame in sample.pictures)
        return [{"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{frames}"}}]
    return [
        {"type": "image_url", "image_url": {"url": f"data:{mime};base64,{data}"}}
        for mime, data in map(encoded, sample.pictures)
    ]


def converse(
    url: str, headers: dict[str, str], model: str, sample: Sample, sampling: dict[str, Any]
) -> str:
    """Ask the turns in order, each with the server's own earlier answers; returns the last one.

    Raises requests.RequestException with the server's message when a turn is refused.
    """
    messages: list[dict[str, Any]] = []
    answer = ""
    for number, turn in enumerate(sample.dialogue.turns):
        if number:
            messages.append({"role": "assistant", "content": answer})
        media = content_of(sample) if not number else []
        content = [*media, {"type": "text", "text": turn.question}]
        messages.append({"role": "user", "content": content})
        body = {"model": model, "messages": messages, "max_tokens": 128, **sampling}
        reply = requests.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=120)
        answer = str(picked(reply, "choices", 0, "message", "content"))
    return answer


def picked(reply: requests.Response, *path: str | int) -> Any:
    """What stands at ``path`` in the server's answer.

    Raises requests.RequestException with the server's words for a refusal, and for what is no
    answer of the API.
    """
    if not reply.ok:
        advice = f"; give its key with --api-key or {API_KEY_VARIABLE}"
        raise requests.HTTPError(
            f"{reply.url} answers {reply.status_code}: {_reason(reply)}"
            + (advice if reply.status_code == 401 else "")
        )
    try:
        found = reply.json()
        for key in path:
            found = found[key]
    except (ValueError, LookupError, TypeError) as error:
        raise requests.RequestException(
            f"{reply.url} answers {_reason(reply)!r}, with no {path[0]!r} as the API has it; "
            "is --url the server's?"
        ) from error
    return found


def _reason(reply: requests.Response) -> str:
    """The message of the API's error, or how the body of anything else begins."""
    try:
        said = str(reply.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        said = reply.text[:300]
    return " ".join(said.split())


def evaluate(
    url: str,
    per_task: int = 200,
    seed: int = 0,
    *,
    tasks: tuple[str, ...] = tuple(BARS),
    api_key: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    concurrency: int = 8,
    painter: str = "own",
) -> list[Score]:
    """Score every task through the server at ``url``, half of ``per_task`` in each language."""
    url = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    listed = requests.get(f"{url}/v1/models", headers=headers, timeout=30)
    model = str(picked(listed, "data", 0, "id"))
    sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
    scores: list[Score] = []
    each = max(1, per_task // 2)
    with ThreadPoolExecutor(concurrency) as pool:
        for task in tasks:
            for language in LANGUAGES:
                asked = samples(task, language, each, seed, painter)
                answers = list(
                    pool.map(lambda s: converse(url, headers, model, s, sampling), asked)
                )
                wrong = [
                    (s.dialogue.turns[-1].question, plain(s.dialogue.turns[-1].answer), a)
                    for s, a in zip(asked, answers, strict=True)
                    if not is_right(s.dialogue, a)
                ]
                right = each - len(wrong)
                scores.append(Score(task, language, right, each, BARS[task], tuple(wrong[:20])))
    return scores


def table(scores: list[Score]) -> str:
    """The scores as a Markdown table."""
    lines = ["| task | en | zh | bar | |", "|---|---|---|---|---|"]
    for task in dict.fromkeys(s.task for s in scores):
        pair = {s.language: s for s in scores if s.task == task}
        verdict = "pass" if all(s.passed for s in pair.values()) else "MISSED"
        cells = " | ".join(f"{pair[q].share:.3f}" for q in LANGUAGES)
        lines.append(f"| {task} | {cells} | {BARS[task]:.2f} | {verdict} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 1 when a task misses its bar, 2 when nothing could be scored."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.n < 1 or options.seed < 0:
        parser.error(f"--n {options.n} must be 1 or more, --seed {options.seed} 0 or more")
    foreign = options.painter != "own"
    for task in NEED_NO_PAINTER.intersection(options.task or ()) if foreign else ():
        parser.error(
            f"--painter {options.painter} has no pictures for --task {task}: leave one of them out"
        )
    tasks = options.task or [task for task in BARS if not foreign or task not in NEED_NO_PAINTER]
    try:
        scores = evaluate(
            options.url, options.n, options.seed, tasks=tuple(tasks), api_key=_key(options.api_key),
            temperature=options.temperature, top_p=options.top_p, painter=options.painter,
        )  # fmt: skip
        sys.stdout.write(table(scores) + "\n")
        if options.json:
            _write(scores, options.json)
    except (ProfileError, ImportError, OSError) as error:  # requests' own are OSErrors
        sys.stderr.write(f"error: {_told(error, options.url)}\n")
        return 2
    return 0 if all(s.passed for s in scores) else 1


def _key(given: str | None) -> str | None:
    """The key given, or the first of those that the environment holds for a server."""
    return given or next(iter(keys_of_environment(os.environ)), None)


def _told(error: Exception, url: str) -> str:
    if isinstance(error, requests.exceptions.SSLError):  # a ConnectionError, of one that listens
        return f"{error}; name a certificate of your own with REQUESTS_CA_BUNDLE=FILE"
    if isinstance(error, requests.ConnectionError):
        return f"no server answers at {url}: start one (serve --profile demo) or name it with --url"
    if isinstance(error, requests.exceptions.InvalidURL | requests.exceptions.MissingSchema):
        return f"--url {url} is no address like http://127.0.0.1:8000"
    return str(error)


def _write(scores: list[Score], path: Path) -> None:
    figures = [asdict(s) | {"share": s.share, "passed": s.passed} for s in scores]
    path.write_text(json.dumps(figures, ensure_ascii=False, indent=1), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qwen2vl_serve.demo.evaluate",
        description=__doc__.splitlines()[0] if __doc__ else "",
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument(
        "--n", type=int, default=200, help="questions a task, half in each language"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--task", action="append", choices=list(BARS), help="only this task")
    parser.add_argument("--api-key", help=f"(default: the first in {API_KEY_VARIABLE})")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--painter", choices=list(PAINTERS), default="own", help="who draws")
    parser.add_argument("--json", type=Path, help="write every figure and some wrong answers here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
