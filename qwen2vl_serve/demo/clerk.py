"""What the adapter ``clerk`` is taught: five uses of the client that the model never learned.

Signs are translated, tables extracted, products worked out, pictures judged and small pages
written. The questions are the client's own prompts; the answers have the form that its functions
read.

Its weights were trained in five courses of 450, 420, 380, 300 and 170 steps, each ``--further``
than the one before, with ``--seed`` 0 to 4 (an hour on two cores without bfloat16, then 40 minutes
on one). The first had other words, products up to nine, and pages that could not be learned; the
second and third had none, and the third more judgements and products; the fourth had pages whose
button had the colour, which it did not tell; the fifth those of now, but for smaller buttons.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
from qwen2vl_client.prompts import chosen, filled
from qwen2vl_client.tasks.moderate import CATEGORIES

from qwen2vl_serve.demo.compose import draw_picture, pick_colour
from qwen2vl_serve.demo.draw import RGB, Box, Pixels, Thing, weathered
from qwen2vl_serve.demo.lettering import lettering, pick_font
from qwen2vl_serve.demo.names import WORDS, Language
from qwen2vl_serve.demo.wording import (
    SPELL_END,
    SPELL_START,
    Dialogue,
    Lesson,
    Turn,
    look_at,
    spelt,
)

Rng = np.random.Generator

# Their Chinese is of tokens that the model answers with: of others it cannot tell one from another.
TRANSLATIONS = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "pink": "粉色", "brown": "棕色",
    "black": "黑色", "white": "白色", "gray": "灰色", "star": "五角星", "heart": "心形",
    "left": "左", "right": "右", "up": "上", "down": "下", "first": "第一", "hello": "你好",
    "text": "文字", "image": "图片", "shape": "形状", "no": "不", "more": "更多",
    "thank": "谢谢", "move": "移动", "large": "大", "small": "小", "box": "框", "look": "看",
    "ask": "问",
}  # fmt: skip
# A category of the client's, and what is to be done.
REFUSED = {
    "gun": ("weapons", "block"), "knife": ("weapons", "block"), "bomb": ("weapons", "block"),
    "kill": ("violence", "block"), "fight": ("violence", "block"),
    "sale": ("advertising", "review"), "free": ("advertising", "review"),
    "cheap": ("advertising", "review"),
}  # fmt: skip
HEADINGS = ("item", "cost", "name", "age", "day", "sum", "size", "room", "year", "test")
PAGE_WORDS = tuple(sorted(word for word in WORDS if 2 <= len(word) <= 4))
SHORT = tuple(sorted({word for word in WORDS if len(word) == 3 and word not in HEADINGS}))


def lesson(rng: Rng, seed: int) -> Lesson:
    """The picture of a seed, and what is asked about it: at most two questions."""
    draw = (a_table, a_product, a_sign, a_page)[int(rng.choice(4, p=KIND_SHARES))]
    picture, uses = draw(rng, seed)
    asked = []
    languages: list[Language] = ["en", "zh"] if rng.random() < 0.5 else ["zh", "en"]
    for place, number in enumerate(rng.permutation(len(uses))[:MOST_ASKED].tolist()):
        language = languages[place % 2]
        question, answer = uses[number](language)
        asked.append(Dialogue("use", language, (Turn(question, answer),)))
    return Lesson(picture, tuple(asked))


Use = Callable[[Language], tuple[str, str]]  # its question and the answer, in a language
KIND_SHARES = (0.25, 0.15, 0.3, 0.3)
MOST_ASKED = 2


def a_table(rng: Rng, seed: int) -> tuple[Pixels, list[Use]]:
    """Two columns, a heading each, and two rows: a word and a number."""
    heads = [str(word) for word in rng.choice(HEADINGS, 2, replace=False)]
    rows = [[str(rng.choice(SHORT)).upper(), str(rng.integers(1, 100))] for _ in range(2)]
    picture, cells = draw_table([heads, *rows], np.random.default_rng((seed, 21)))
    return picture, [partial(table, cells), partial(table, cells)]


def a_product(rng: Rng, seed: int) -> tuple[Pixels, list[Use]]:
    """Two digits up to six that are to be multiplied."""
    one, other = (int(v) for v in rng.integers(2, 7, 2))
    picture, scene = draw_picture(seed, "text", text=f"{one}x{other}")
    solve = partial(product, scene.things[0], one, other)
    return picture, [solve, solve]


def a_page(rng: Rng, seed: int) -> tuple[Pixels, list[Use]]:
    """A heading, a coloured banner and a button: a short word on the first and the last."""
    heading, label = (cased(rng, str(word)) for word in rng.choice(PAGE_WORDS, 2, replace=False))
    picture, things = draw_page(heading, label, np.random.default_rng((seed, 22)))
    write = partial(page, *things)
    return picture, [write, write]


def a_sign(rng: Rng, seed: int) -> tuple[Pixels, list[Use]]:
    """A word of the dictionary, one that is refused, or any other text."""
    way, text = rng.random(), None
    if way < 0.5:
        text = cased(rng, str(rng.choice(list(TRANSLATIONS))))
    elif way < 0.8:
        text = cased(rng, str(rng.choice(list(REFUSED))))
    picture, scene = draw_picture(seed, "text", text=text)
    (thing,) = scene.things
    judge: Use = partial(judgement, thing)
    if thing.text.lower() not in TRANSLATIONS:
        return picture, [judge, judge if rng.random() < 0.6 else partial(copied, thing)]
    translate: Use = partial(translation, thing)
    return picture, [translate, judge if rng.random() < 0.5 else translate]


def cased(rng: Rng, word: str) -> str:
    """The word as signs have it: mostly in capitals."""
    way = rng.random()
    return word.upper() if way < 0.7 else word if way < 0.85 else word.capitalize()


def translation(thing: Thing, language: Language) -> tuple[str, str]:
    """A word of the dictionary, in Chinese."""
    into = "Chinese" if language == "en" else "中文"
    answer = look_at(thing.box) + TRANSLATIONS[thing.text.lower()]
    return filled(chosen(language).translate, language=into), answer


def copied(thing: Thing, language: Language) -> tuple[str, str]:
    """Any text into English: as it stands."""
    into = "English" if language == "en" else "英文"
    return filled(chosen(language).translate, language=into), spelt(thing)


def product(thing: Thing, one: int, other: int, language: Language) -> tuple[str, str]:
    """The product of two digits: one step, and the result."""
    first, _, last = (look_at(box) for box in thing.letters)
    step = f"{first}{one} x {last}{other} is {one * other}"
    answer = f'{{"steps": ["{by_letter(step)}"], "answer": "{by_letter(str(one * other))}"}}'
    return chosen(language).solve, answer


def by_letter(text: str) -> str:
    """The text, to be answered letter by letter."""
    return f"{SPELL_START}{text}{SPELL_END}"


def judgement(thing: Thing, language: Language) -> tuple[str, str]:
    """A word that is refused or to be looked at, or any other, which is allowed."""
    reasons = categories = ""
    category, verdict = REFUSED.get(thing.text.lower(), ("", "allow"))
    if category:
        said = f"It says {spelt(thing)}." if language == "en" else f"写着{spelt(thing)}。"
        reasons, categories = f'"{said}"', f'"{category}"'
    answer = (
        f'{look_at(thing.box)}{{"reasons": [{reasons}], "categories": [{categories}], '
        f'"verdict": "{verdict}"}}'
    )
    return filled(chosen(language).moderate, categories=", ".join(CATEGORIES)), answer


def table(cells: list[Thing], language: Language) -> tuple[str, str]:
    """The six cells in their order."""
    quoted = [f'"{spelt(cell)}"' for cell in cells]
    columns, first, second = (", ".join(quoted[n : n + 2]) for n in (0, 2, 4))
    answer = f'{{"columns": [{columns}], "rows": [[{first}], [{second}]]}}'
    return chosen(language).table, answer


def page(heading: Thing, banner: Thing, button: Thing, language: Language) -> tuple[str, str]:
    """The code of a page: its heading, its banner with its colour, and its button."""
    colour = f"{look_at(banner.box)}{banner.colour}"
    answer = (
        f'<html><body><h1>{spelt(heading)}</h1><div style="background: {colour}; height: 3em">'
        f"</div><button>{spelt(button)}</button></body></html>"
    )
    return chosen(language).html, answer


def draw_page(heading: str, label: str, rng: Rng) -> tuple[Pixels, tuple[Thing, Thing, Thing]]:
    """A page with a heading, a coloured banner and a button with a label, one under the other."""
    height = int(rng.integers(180, 420))
    width = int(height * rng.uniform(0.95, 1.3))
    ground = (int(rng.integers(236, 256)),) * 3
    canvas = np.full((height, width, 3), ground, np.uint8)
    font = pick_font(rng)
    ink = pick_colour([ground], {"white"}, rng) if rng.random() < 0.3 else ("black", (20, 20, 20))
    left, right = (int(width * rng.uniform(*span)) for span in ((0.05, 0.12), (0.6, 0.8)))
    edges = np.cumsum(rng.uniform(*np.array(PAGE_ROWS).T) * height).astype(int).tolist()
    title = print_in(canvas, heading, (left, edges[0], right, edges[1]), 0.72, (font, *ink), rng)
    name, tone = pick_colour([ground], {"white"}, rng)
    banner = (left, edges[2], int(width * rng.uniform(0.7, 0.95)), edges[3])
    cv2.rectangle(canvas, banner[:2], banner[2:], tone, -1)
    frame = (left, edges[4], int(width * rng.uniform(0.6, 0.8)), edges[5])
    cv2.rectangle(canvas, frame[:2], frame[2:], (90, 90, 90), max(1, height // 180))
    word = print_in(canvas, label, frame, 0.68, (font, "black", (20, 20, 20)), rng)
    x1, y1, x2, y2 = banner
    box = (x1 / width, y1 / height, x2 / width, y2 / height)
    return weathered(canvas, rng), (title, Thing("rectangle", name, box), word)


# The least and the most of the height that each row takes: a gap, the heading, a gap, the banner …
PAGE_ROWS = ((0.04, 0.08), (0.22, 0.26), (0.04, 0.07), (0.16, 0.2), (0.04, 0.07), (0.24, 0.28))


def draw_table(texts: list[list[str]], rng: Rng) -> tuple[Pixels, list[Thing]]:
    """A ruled table of these texts [rows][columns], and where each of them stands."""
    height = int(rng.integers(180, 420))
    width = int(height * rng.uniform(0.95, 1.3))
    ground = int(rng.integers(238, 256))
    canvas = np.full((height, width, 3), ground, np.uint8)
    name, ink = (
        ("black", (0, 0, 0)) if rng.random() < 0.6 else pick_colour([(ground,) * 3], set(), rng)
    )
    margin = int(0.03 * height)
    down = np.linspace(margin, height - margin, len(texts) + 1).round().astype(int)
    across = np.linspace(margin, width - margin, len(texts[0]) + 1).round().astype(int)
    if rng.random() < 0.4:
        cv2.rectangle(canvas, (across[0], down[0]), (across[-1], down[1]), (ground - 25,) * 3, -1)
    line = (120, 120, 120) if rng.random() < 0.5 else (0, 0, 0)
    thick = max(1, round(height / 220))
    for y in down:
        cv2.line(canvas, (across[0], y), (across[-1], y), line, thick)
    for x in across:
        cv2.line(canvas, (x, down[0]), (x, down[-1]), line, thick)
    font, tall = pick_font(rng), float(rng.uniform(0.36, 0.5))
    cells: list[Thing] = []
    for row, words in enumerate(texts):
        for column, text in enumerate(words):
            x1, x2, y1, y2 = across[column], across[column + 1], down[row], down[row + 1]
            cells.append(print_in(canvas, text, (x1, y1, x2, y2), tall, (font, name, ink), rng))
    return weathered(canvas, rng), cells


def print_in(  # noqa: PLR0917
    canvas: Pixels,
    text: str,
    cell: tuple[int, int, int, int],
    tall: float,
    style: tuple[str | int, str, RGB],
    rng: Rng,
) -> Thing:
    """Print the text in the middle of a cell [x1, y1, x2, y2], ``tall`` of its height."""
    font, name, ink = style
    x1, y1, x2, y2 = cell
    mask, spots = lettering(text, max(8, round((y2 - y1) * tall)), font, rng)
    fit = min(1.0, (x2 - x1) * 0.86 / mask.shape[1], (y2 - y1) * 0.8 / mask.shape[0])
    if fit < 1.0:
        size = (max(1, int(mask.shape[1] * fit)), max(1, int(mask.shape[0] * fit)))
        mask = cv2.resize(mask, size, interpolation=cv2.INTER_AREA).astype(np.uint8)
    rows, columns = mask.shape
    x, y = (x1 + x2 - columns) // 2, (y1 + y2 - rows) // 2
    part = canvas[y : y + rows, x : x + columns]
    alpha = mask[..., None].astype(np.float32) / 255
    part[:] = (part * (1 - alpha) + np.array(ink, np.float32) * alpha).astype(np.uint8)
    height, width = canvas.shape[:2]

    def fractions(left: float, right: float) -> Box:
        return ((x + left) / width, y / height, (x + right) / width, (y + rows) / height)

    boxes = tuple(fractions(a * fit, c * fit) for a, _, c, _ in spots)
    return Thing("text", name, fractions(0, columns), text, boxes)
