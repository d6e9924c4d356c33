"""Seeded prompts of every kind, in a form that both the server and the reference can be asked.

Pictures are drawn here with Pillow and NumPy: shapes, lettering, noise and soft gradients, in
sizes from 30 to 1600 pixels and in the formats that browsers send. EXIF orientation is left out:
the server applies it and ``qwen_vl_utils`` does not.
"""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

KINDS = {"text": 40, "picture": 60, "pictures": 40, "turns": 40, "frames": 20}
"""How many of 200 prompts are of which kind."""

# Sizes that qwen_vl_utils passes unchanged: it rounds the sides of listed frames to 56, not 28.
FRAME_SIZES = ((112, 112), (168, 112), (112, 168))

COLOURS = {
    "red": ("红色", (214, 39, 40)),
    "green": ("绿色", (34, 139, 34)),
    "blue": ("蓝色", (30, 100, 229)),
    "yellow": ("黄色", (255, 221, 0)),
    "purple": ("紫色", (128, 0, 128)),
    "orange": ("橙色", (255, 140, 0)),
    "black": ("黑色", (15, 15, 15)),
}
SHAPES = {"circle": "圆形", "square": "正方形", "triangle": "三角形", "oval": "椭圆形"}
SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


@dataclass(frozen=True)
class Picture:
    """An encoded picture."""

    data: bytes
    mime: str

    @property
    def url(self) -> str:
        return f"data:{self.mime};base64,{base64.b64encode(self.data).decode()}"

    def open(self) -> Image.Image:
        return Image.open(io.BytesIO(self.data))


@dataclass(frozen=True)
class Clip:
    """A video as a list of JPEG frames of one size, ``fps`` of them a second."""

    frames: tuple[Picture, ...]
    fps: float = 2.0

    @property
    def url(self) -> str:
        encoded = (base64.b64encode(frame.data).decode() for frame in self.frames)
        return "data:video/jpeg;base64," + ",".join(encoded)


Part = str | Picture | Clip


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with a user's turn: pairs of a role and its content."""

    kind: str
    turns: tuple[tuple[str, str | tuple[Part, ...]], ...]

    def messages(self, show: Callable[[Part], dict[str, Any]]) -> list[dict[str, Any]]:
        """The conversation as ``messages``, each part of a list as ``show`` writes it."""
        return [
            {
                "role": role,
                "content": content if isinstance(content, str) else [show(p) for p in content],
            }
            for role, content in self.turns
        ]


def prompts(seed: int, kinds: dict[str, int]) -> list[Prompt]:
    """Draw the given number of prompts of every kind; the same seed gives the same prompts."""
    return [
        _WRITERS[kind](random.Random(f"{seed} {kind} {index}"))
        for kind, count in kinds.items()
        for index in range(count)
    ]


def _text(rng: random.Random) -> Prompt:
    question = rng.choice(TEXT_QUESTIONS)
    words = rng.choice((question, f"{question} ({rng.randrange(1000)})", f"{question}\n\n谢谢!"))
    return Prompt("text", (*_system(rng), ("user", words)))


def _picture(rng: random.Random) -> Prompt:
    return Prompt("picture", (*_system(rng), ("user", _asked(rng, [draw(rng)], PICTURE_QUESTIONS))))


def _pictures(rng: random.Random) -> Prompt:
    shown = [draw(rng) for _ in range(rng.randint(2, 4))]
    return Prompt("pictures", (*_system(rng), ("user", _asked(rng, shown, PICTURES_QUESTIONS))))


def _turns(rng: random.Random) -> Prompt:
    turns: list[tuple[str, str | tuple[Part, ...]]] = list(_system(rng))
    shown = 0
    for turn in range(rng.randint(2, 4)):
        if turn:
            turns.append(("assistant", rng.choice(EARLIER_ANSWERS)))
        if shown < 3 and rng.random() < (0.8 if turn == 0 else 0.3):
            shown += 1
            turns.append(("user", _asked(rng, [draw(rng)], PICTURE_QUESTIONS)))
        else:
            turns.append(("user", rng.choice(FOLLOW_UPS if turn else TEXT_QUESTIONS)))
    return Prompt("turns", tuple(turns))


def _frames(rng: random.Random) -> Prompt:
    clip = draw_clip(rng, rng.choice(FRAME_SIZES), rng.randint(4, 9))
    return Prompt("frames", (*_system(rng), ("user", (clip, rng.choice(CLIP_QUESTIONS)))))


_WRITERS = {
    "text": _text,
    "picture": _picture,
    "pictures": _pictures,
    "turns": _turns,
    "frames": _frames,
}


def _system(rng: random.Random) -> tuple[tuple[str, str], ...]:
    return (("system", SYSTEM),) if rng.random() < 0.3 else ()


def _asked(
    rng: random.Random, shown: list[Picture], questions: tuple[str, ...]
) -> tuple[Part, ...]:
    """Put the question after the pictures, before them or between the first and the others."""
    parts: list[Part] = [*shown]
    parts.insert(rng.choice((len(shown), len(shown), 0, 1)), rng.choice(questions))
    return tuple(parts)


def draw(rng: random.Random) -> Picture:
    """Draw a picture of any kind, size and format."""
    if rng.random() < 0.8:
        width = rng.randint(84, 900)
        height = min(900, max(84, round(width * 3 ** rng.uniform(-1, 1))))
    else:
        width, height = rng.choice(((28, 30), (224, 224), (1600, 250), (64, 500), (1200, 1100)))
    image = rng.choice((_shapes, _shapes, _shapes, _lettering, _noise, _gradient))(
        rng, width, height
    )
    return encode(image, rng)


def encode(image: Image.Image, rng: random.Random) -> Picture:
    """Encode in one of the formats that browsers send, in one of its colour modes."""
    data = io.BytesIO()
    match rng.randrange(8):
        case 0 | 1 | 2:
            image.save(data, "JPEG", quality=rng.randint(60, 95), subsampling=rng.choice((0, 2)))
            mime = "image/jpeg"
        case 3:
            image.convert("L").save(data, "JPEG", quality=85)
            mime = "image/jpeg"
        case 4:
            image.save(data, "PNG", compress_level=1)
            mime = "image/png"
        case 5:
            veil = Image.linear_gradient("L").resize(image.size)
            image.putalpha(veil)
            image.save(data, "PNG", compress_level=1)
            mime = "image/png"
        case 6:
            image.quantize(64).save(data, rng.choice(("PNG", "GIF")))
            mime = "image/png"
        case _:
            image.save(data, "WEBP", quality=80, method=0)
            mime = "image/webp"
    return Picture(data.getvalue(), mime)


def draw_clip(rng: random.Random, size: tuple[int, int], count: int) -> Clip:
    """Draw ``count`` frames in which a shape crosses a plain ground."""
    width, height = size
    shape, (_, colour) = rng.choice(list(SHAPES)), rng.choice(list(COLOURS.values()))
    side = min(size) // 3
    start, end = ((rng.randint(0, width - side), rng.randint(0, height - side)) for _ in range(2))
    frames = []
    for step in range(count):
        along = step / (count - 1)
        x, y = (round(a + (b - a) * along) for a, b in zip(start, end, strict=True))
        frame = Image.new("RGB", size, (235, 235, 230))
        _put(ImageDraw.Draw(frame), shape, (x, y, x + side, y + side), colour)
        data = io.BytesIO()
        frame.save(data, "JPEG", quality=90)
        frames.append(Picture(data.getvalue(), "image/jpeg"))
    return Clip(tuple(frames))


def _put(
    pen: ImageDraw.ImageDraw, shape: str, box: tuple[int, int, int, int], fill: tuple[int, int, int]
) -> None:
    left, top, right, bottom = box
    match shape:
        case "circle":
            pen.ellipse(box, fill=fill)
        case "oval":
            pen.ellipse((left, top, right, (top + bottom) // 2), fill=fill)
        case "square":
            pen.rectangle(box, fill=fill)
        case _:
            pen.polygon(((left, bottom), (right, bottom), ((left + right) // 2, top)), fill=fill)


def _shapes(rng: random.Random, width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), tuple(rng.randint(200, 255) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.choice((1, 1, 2, 3))):
        side = max(4, round(min(width, height) * rng.uniform(0.25, 0.6)))
        left, top = rng.randint(0, max(0, width - side)), rng.randint(0, max(0, height - side))
        _, colour = rng.choice(list(COLOURS.values()))
        _put(pen, rng.choice(list(SHAPES)), (left, top, left + side, top + side), colour)
    return image


def _lettering(rng: random.Random, width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    text = "".join(rng.choices("ABCDEFGHJKLMNPRSTUVXYZ0123456789", k=rng.randint(1, 5)))
    font = ImageFont.load_default(max(8, min(height // 2, width // len(text))))
    _, colour = rng.choice(list(COLOURS.values()))
    ImageDraw.Draw(image).text((width / 2, height / 2), text, fill=colour, font=font, anchor="mm")
    return image


def _noise(rng: random.Random, width: int, height: int) -> Image.Image:
    grain = np.random.default_rng(rng.getrandbits(32))
    coarse = grain.integers(0, 256, (max(2, height // 9), max(2, width // 9), 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def _gradient(rng: random.Random, width: int, height: int) -> Image.Image:
    """Draw a soft landscape: colours that run into one another, and waves across them."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    planes = [
        128 + 90 * np.sin(rng.uniform(1, 7) * x + rng.uniform(1, 7) * y + rng.uniform(0, 6))
        for _ in range(3)
    ]
    return Image.fromarray(np.stack(planes, axis=-1).clip(0, 255).astype(np.uint8))


TEXT_QUESTIONS = (
    "Hello, who are you?",
    "What can you do?",
    "什么是大语言模型?",
    "你好,请介绍一下你自己。",
    "Can you see pictures?",
    "你能看图片吗?",
    "Thank you!",
    "What is a neural network?",
    "谢谢你的帮助",
    "How big are you?",
    "Write a poem about the sea.",
    "1 + 1 = ?",
    "Which languages do you speak? 你会说中文吗?",
    "Tell me a joke, please 🙂",
)
PICTURE_QUESTIONS = (
    "What colour is it?",
    "What shape is in the picture?",
    "Describe the picture.",
    "How many objects are there?",
    "Where is the circle?",
    "What does it say?",
    "Read the text.",
    "Give the box of the triangle.",
    "图里是什么颜色?",
    "这是什么形状?",
    "描述一下这张图片。",
    "图中有几个物体?",
    "图里写了什么?",
    'Answer as JSON with the fields "colour" and "shape".',
)
PICTURES_QUESTIONS = (
    "Which picture shows a circle?",
    "What is in the second picture?",
    "Are the two pictures the same?",
    "Describe each picture.",
    "第二张图片里是什么?",
    "哪张图片里有正方形?",
    "What colour is the shape in the first picture?",
)
FOLLOW_UPS = (
    "What colour was it?",
    "And what shape?",
    "Are you sure?",
    "它是什么颜色?",
    "Please say that in Chinese.",
    "Where is it?",
)
EARLIER_ANSWERS = (
    "It is a red circle.",
    "The picture shows a blue square on the left.",
    "一个绿色的三角形。",
    "I am a small demonstration model.",
    "There are two objects.",
)
CLIP_QUESTIONS = (
    "What moves in the video?",
    "Where does the shape move?",
    "Describe the video.",
    "视频里有什么在动?",
    "Which direction does it move?",
)
