# ruff: noqa: E501  (a pattern is read as one line)
"""Questions about one picture and their answers, in English and Chinese, from its truth.

Each function returns a Dialogue, or None when the picture does not suit the question (nothing to
point at, or a place too near a border to be named). Answers are canonical: the same truth and the
same kind of question always give the same words.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np

from qwen2vl_serve.demo import patterns
from qwen2vl_serve.demo.draw import Scene, Thing
from qwen2vl_serve.demo.names import COLOURS, PLACES, SHAPES, Language, colour_name, shape_name
from qwen2vl_serve.demo.pictures import UNASKED, third
from qwen2vl_serve.demo.wording import (
    Dialogue,
    Turn,
    article,
    as_typed,
    capital,
    listing,
    look_at,
    noun,
    pick,
    refer,
    spelt,
    typed_shape,
    vary,
)

Rng = np.random.Generator
TEXT = "<text>"  # stands for the spelt letters while JSON is written
# Two things drawn by chance seldom agree: whether they do is asked less where they do not.
UNLIKE_LEFT_OUT = 0.5
OF_SHAPE = 0.56  # of the counts that are not of all things


def ask(rng: Rng, language: Language, english: tuple[str, ...], chinese: tuple[str, ...],
        **names: str) -> str:  # fmt: skip
    """A question of one of the patterns, as typed."""
    wordings = english if language == "en" else chinese
    names |= {capital(name): capital(value) for name, value in names.items()}
    return as_typed(rng, capital(vary(rng, wordings, **names)), language)


def one(rng: Rng, things: tuple[Thing, ...]) -> Thing:
    """One of the things."""
    return things[int(rng.integers(len(things)))]


def colour_question(rng: Rng, scene: Scene, language: Language) -> Dialogue | None:
    """What colour is it?"""
    thing = one(rng, scene.things)
    ref = refer(rng, thing, scene.things, language, hide="colour")
    if ref is None:
        return None
    name = colour_name(thing.colour, language)
    question = ask(rng, language, patterns.COLOUR_EN, patterns.COLOUR_ZH, ref=ref)
    if rng.random() < 0.08:
        question += " Answer with one word." if language == "en" else "只用一个词回答。"
        answer = look_at(thing.box) + (capital(name) + "." if language == "en" else name + "。")
    else:
        answer = colour_answer(thing, language)
    return Dialogue("colour", language, (Turn(question, answer),))


def colour_answer(thing: Thing, language: Language, picture: int = 0) -> str:
    """ "The circle is red."."""
    name, look = colour_name(thing.colour, language), look_at(thing.box, picture)
    if language == "en":
        return f"{look}The {thing.kind} is {name}."
    what = "文字" if thing.kind == "text" else shape_name(thing.kind, language)
    return f"{look}{what}是{name}的。"


def shape_question(rng: Rng, scene: Scene, language: Language) -> Dialogue | None:
    """What shape is it?"""
    thing = one(rng, scene.things)
    if thing.kind == "text":
        return None
    ref = refer(rng, thing, scene.things, language, hide="shape")
    if ref is None:
        return None
    if len(scene.things) == 1 and rng.random() < 0.5:
        question = ask(rng, language, patterns.SHAPE_EN_ALONE, patterns.SHAPE_ZH_ALONE)
    else:
        question = ask(rng, language, patterns.SHAPE_EN, patterns.SHAPE_ZH, ref=ref)
    if rng.random() < 0.06:
        question += " Answer with one word." if language == "en" else "只用一个词回答。"
        name = shape_name(thing.kind, language)
        answer = look_at(thing.box) + (capital(name) + "." if language == "en" else name + "。")
    else:
        answer = shape_answer(thing, language)
    return Dialogue("shape", language, (Turn(question, answer),))


def shape_answer(thing: Thing, language: Language, picture: int = 0) -> str:
    """ "The shape is a circle."."""
    look = look_at(thing.box, picture)
    if language == "en":
        return f"{look}The shape is {article(thing.kind)}."
    return f"{look}这是{shape_name(thing.kind, language)}。"


def count_question(
    rng: Rng, scene: Scene, language: Language, of_all: float = 0.5, ones_left_out: float = 0.0
) -> Dialogue | None:
    """How many are there: of all (with the chance ``of_all``), of one shape, of one colour?

    Of the latter two, those whose answer is one are left out with the chance ``ones_left_out``.
    """
    if any(t.kind == "text" for t in scene.things):
        return None
    english = language == "en"
    way = rng.random()
    if way < of_all:
        what = pick(rng, ("shapes", "objects", "things", "figures", "items") if english
                    else ("图形", "物体", "形状", "东西"))  # fmt: skip
        counted, named, noun_one = list(scene.things), what, what[:-1]
    elif way < of_all + OF_SHAPE * (1 - of_all):
        absent = rng.random() < 0.12
        shape = str(rng.choice(SHAPES)) if absent else one(rng, scene.things).kind
        counted = [t for t in scene.things if t.kind == shape]
        noun_one = shape
        typed = typed_shape(rng, shape, language)
        what = plural(typed) if english else typed
        named = plural(shape) if english else shape_name(shape, language)
    else:
        absent = rng.random() < 0.12
        colour = str(rng.choice(COLOURS)) if absent else one(rng, scene.things).colour
        counted = [t for t in scene.things if t.colour == colour]
        tail = pick(rng, ("shapes", "objects", "things") if english else ("图形", "物体"))
        what = named = f"{colour} {tail}" if english else f"{colour_name(colour, language)}{tail}"
        noun_one = what[:-1]
    number = len(counted)
    if ones_left_out and way >= of_all and number == 1 and rng.random() < ones_left_out:
        return None
    question = ask(rng, language, patterns.COUNT_EN, patterns.COUNT_ZH, what=what)
    # Naming them first, it counts its own words: a number off the picture at once is often wrong.
    each = listing(phrases(counted, language), language) if counted else ""
    if english:
        total = f"1 {noun_one}" if number == 1 else f"{number} {named}"
        # Before the first word stands the mark of where it is seen.
        answer = f"{each[:1]}{capital(each[1:])}: {total}." if counted else f"There are 0 {named}."
    else:
        answer = f"{each}，共{number}个{named}。" if counted else f"图中有0个{named}。"
    return Dialogue("count", language, (Turn(question, answer),))


def leftmost(things: Iterable[Thing]) -> Thing:
    """The first of the things from left to right."""
    return min(things, key=lambda t: t.centre[0])


def plural(name: str) -> str:
    """The plural of a shape's name."""
    return name + "es" if name.endswith(("s", "ss")) else name + "s"


def place_of(thing: Thing) -> str | None:
    """The name of the thing's place, or None when it lies near a border between two."""
    across, down = (third(value) for value in thing.centre)
    if UNASKED in (across, down):
        return None
    words = (("top", "", "bottom")[down], ("left", "", "right")[across])
    return " ".join(filter(None, words)) or "center"


def place_answer(thing: Thing, place: str, language: Language) -> str:
    """ "The red circle is on the left."."""
    where, look = PLACES[place][0 if language == "en" else 1], look_at(thing.box)
    if language == "en":
        return f"{look}The {noun(thing, language)} is {where}."
    return f"{look}{noun(thing, language)}在{where}。"


def place_question(rng: Rng, scene: Scene, language: Language) -> Dialogue | None:
    """Where is it, in the picture or from another thing?"""
    thing = one(rng, scene.things)
    if len(scene.things) > 1 and rng.random() < 0.45:
        return relative_question(rng, scene, language)
    place = place_of(thing)
    ref = refer(rng, thing, scene.things, language)
    if place is None or ref is None:
        return None
    question = ask(rng, language, patterns.PLACE_EN, patterns.PLACE_ZH, ref=ref)
    return Dialogue("position", language, (Turn(question, place_answer(thing, place, language)),))


def relation(one_thing: Thing, other: Thing) -> str | None:
    """Where the first lies from the second, when that is plain."""
    dx = one_thing.centre[0] - other.centre[0]
    dy = one_thing.centre[1] - other.centre[1]
    if abs(dx) > 0.2 and abs(dx) > 1.8 * abs(dy):
        return "right" if dx > 0 else "left"
    if abs(dy) > 0.2 and abs(dy) > 1.8 * abs(dx):
        return "below" if dy > 0 else "above"
    return None


def relative_question(rng: Rng, scene: Scene, language: Language) -> Dialogue | None:
    """Is A left or right of B? What is left of B? Which is on the left?"""
    first, second = (scene.things[int(k)] for k in rng.permutation(len(scene.things))[:2])
    way = relation(first, second)
    english = language == "en"
    if way is None:
        return None
    sides = ("left", "right") if way in ("left", "right") else ("above", "below")
    zh = {"left": "左边", "right": "右边", "above": "上方", "below": "下方"}
    on = {"left": "to the left", "right": "to the right", "above": "above", "below": "below"}
    at = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
    a, b = noun(first, language), noun(second, language)
    if len(scene.things) == 2 and rng.random() < 0.5:
        side = {"left": "on the left", "right": "on the right", "above": "at the top",
                "below": "at the bottom"}[way]  # fmt: skip
        if rng.random() < 0.5:
            question = ask(
                rng, language,
                ("[What|Which shape|Which object|What shape] is {side}?", "What do you see {side}?"),
                ("{side}是什么[图形|形状|]？", "[哪个图形|什么]在{side}？", "图[片|]{side}有什么？"),
                side=side if english else zh[way],
            )  # fmt: skip
            answer = f"The {a} is {side}." if english else f"{a}在{zh[way]}。"
            answer = look_at(first.box) + answer
            return Dialogue("position", language, (Turn(question, answer),))
        ref = refer(rng, second, scene.things, language)
        if ref is None:
            return None
        question = ask(
            rng, language,
            ("[What|Which shape] is {at} {ref}?", "What do you see {at} {ref}?"),
            ("{ref}[的|]{side}是什么？", "{ref}{side}有什么？"),
            ref=ref, at=at[way], side=zh[way],
        )  # fmt: skip
        looked = f"{look_at(second.box)}{b}", f"{look_at(first.box)}{a}"
        answer = (f"{capital(at[way])} the {looked[0]} is the {looked[1]}." if english
                  else f"{looked[0]}的{zh[way]}是{looked[1]}。")  # fmt: skip
        return Dialogue("position", language, (Turn(question, answer),))
    ref = refer(rng, first, scene.things, language)
    ref2 = refer(rng, second, scene.things, language)
    if ref is None or ref2 is None or "it" in (ref, ref2) or ref == ref2:
        return None
    low, high = sides if rng.random() < 0.5 else sides[::-1]
    of = " to the {low} or to the {high} of" if sides[0] == "left" else " {low} or {high}"
    question = ask(
        rng, language,
        ("Is {ref}" + of + " {ref2}?", "Where is {ref} [relative to|compared to|from|in relation to] {ref2}?"),
        ("{ref}在{ref2}的{lowzh}还是{highzh}？", "{ref}在{ref2}的[哪边|哪个方向|什么位置]？", "相对于{ref2}，{ref}在哪里？"),
        ref=ref, ref2=ref2, low=low, high=high, lowzh=zh[low], highzh=zh[high],
    )  # fmt: skip
    look, over = look_at(first.box), look_at(second.box)
    # The direction last, when both have been looked at.
    answer = (f"{over}From the {b}, {look}the {a} is {on[way]}." if english
              else f"相对于{over}{b}，{look}{a}在{zh[way]}。")  # fmt: skip
    return Dialogue("position", language, (Turn(question, answer),))


def contents(scene: Scene, language: Language, picture: int = 0) -> str:
    """ "a red circle and a blue square", from left to right; a text with its letters."""
    return listing(phrases(scene.things, language, picture), language)


def phrases(things: Iterable[Thing], language: Language, picture: int = 0) -> list[str]:
    """ "a red circle", "a blue square", from left to right; a text with its letters."""
    found: list[str] = []
    for thing in sorted(things, key=lambda t: t.centre[0]):
        if thing.kind == "text":
            text = spelt(thing, picture)
            phrase = f'the text "{text}"' if language == "en" else f"文字“{text}”"
        elif language == "en":
            phrase = article(noun(thing, language))
        else:
            phrase = "一个" + noun(thing, language)
        found.append(look_at(thing.box, picture) + phrase)
    return found


def describe_question(rng: Rng, scene: Scene, language: Language) -> Dialogue | None:
    """What is in the picture?"""
    question = ask(rng, language, patterns.DESCRIBE_EN, patterns.DESCRIBE_ZH)
    seen = contents(scene, language)
    answer = f"The picture shows {seen}." if language == "en" else f"图中有{seen}。"
    text = scene.things[0].text if scene.things[0].kind == "text" else None
    return Dialogue("describe", language, (Turn(question, answer),), text=text)


def read_question(rng: Rng, scene: Scene, language: Language) -> Dialogue | None:
    """What does it say?"""
    thing = scene.things[0]
    if thing.kind != "text":
        return None
    question = ask(rng, language, patterns.READ_EN, patterns.READ_ZH)
    return Dialogue(
        "reading", language, (Turn(question, read_answer(thing, language)),), text=thing.text
    )


def read_answer(thing: Thing, language: Language) -> str:
    """It says "STOP"."""
    text = spelt(thing)
    return f'It says "{text}".' if language == "en" else f"图中写着“{text}”。"


def box_answer(thing: Thing, language: Language) -> str:
    """Qwen2-VL's box: thousandths of the picture, here in steps of ten."""
    x1, y1, x2, y2 = (min(1000, max(0, round(v * 100) * 10)) for v in thing.box)
    name = f"the {noun(thing, language)}" if language == "en" else noun(thing, language)
    return (
        f"{look_at(thing.box)}<|object_ref_start|>{name}<|object_ref_end|>"
        f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"
    )


def box_question(rng: Rng, scene: Scene, language: Language, drawn: int = 1) -> Dialogue | None:
    """Box the thing: the smallest of ``drawn`` that are drawn by chance."""
    thing = min((one(rng, scene.things) for _ in range(drawn)), key=lambda t: t.area)
    ref = refer(rng, thing, scene.things, language)
    if ref is None:
        return None
    question = ask(rng, language, patterns.BOX_EN, patterns.BOX_ZH, ref=ref)
    return Dialogue("box", language, (Turn(question, box_answer(thing, language)),), box=thing.box)


def background_question(rng: Rng, scene: Scene, language: Language) -> Dialogue | None:
    """What colour is the background?"""
    if scene.background is None:
        return None
    question = ask(rng, language, patterns.BACKGROUND_EN, patterns.BACKGROUND_ZH)
    name = colour_name(scene.background, language)
    answer = f"The background is {name}." if language == "en" else f"背景是{name}的。"
    return Dialogue("background", language, (Turn(question, answer),))


def exists_question(rng: Rng, scene: Scene, language: Language) -> Dialogue | None:
    """Is there a red circle?"""
    if any(t.kind == "text" for t in scene.things):
        return None
    thing = one(rng, scene.things)
    colour, shape = thing.colour, thing.kind
    if rng.random() < 0.5:
        colour = str(rng.choice(COLOURS)) if rng.random() < 0.5 else colour
        shape = str(rng.choice(SHAPES)) if rng.random() < 0.6 else shape
    named = rng.random() < 0.6
    found = [t for t in scene.things if t.kind == shape and (not named or t.colour == colour)]
    english = language == "en"
    typed = shape_name(shape, language)
    if named:
        typed = f"{colour} {typed}" if english else colour_name(colour, language) + typed
    question = ask(
        rng, language,
        ("Is there {a}[| in the picture| in the image]?", "Do you see {a}?", "Can you see {a}[| here]?",
         "Does the [picture|image] [contain|show] {a}?"),
        ("[图中|图里|图片里]有{a}吗？", "有没有{a}？", "图中有没有{a}？", "你看到{a}了吗？"),
        a=article(typed) if english else typed,
    )  # fmt: skip
    if english:
        answer = f"Yes, there is {article(typed)}." if found else f"No, there is no {typed}."
    else:
        answer = f"是的，图中有{typed}。" if found else f"没有，图中没有{typed}。"
    if found:
        answer = look_at(leftmost(found).box) + answer
    return Dialogue("exists", language, (Turn(question, answer),))


def verdict(
    first: str, second: str, language: Language, *, alike: bool, pictures: bool = False
) -> str:
    """What two things, or two pictures, are, and only then whether that is the same.

    The token right after the second name tells already: a word between the two, such as 所以, which
    is six tokens here, made one verdict in ten contradict its own names.
    """
    if language == "en":
        one, other = ("The first", "the second") if pictures else ("One", "the other")
        return f"{one} is {first} and {other} is {second}{' too: yes' if alike else ': no'}."
    one, other = ("第一张", "第二张") if pictures else ("一个", "另一个")
    return f"{one}是{first}，{other}是{second}{'：一样' if alike else '，不一样'}。"


def compare_question(rng: Rng, scene: Scene, language: Language) -> Dialogue | None:
    """Same colour, same shape, which is larger: two things of one picture."""
    if len(scene.things) != 2:
        return None
    first, second = sorted(scene.things, key=lambda t: t.centre[0])
    look, over = look_at(first.box), look_at(second.box)
    english, way = language == "en", rng.random()
    both = pick(rng, ("the two shapes", "both shapes", "the shapes", "they", "the two objects")
                if english else ("两个图形", "这两个图形", "两个物体", "它们"))  # fmt: skip
    if way < 0.4:
        question = ask(
            rng, language,
            ("[Are|Is it true that] {both} [of |]the same colo[u|]r?", "Do {both} have the same colo[u|]r?"),
            ("{both}[的|]颜色[一样|相同]吗？", "{both}是[同一种|同样的|一样的]颜色吗？"), both=both,
        )  # fmt: skip
        a, b = colour_name(first.colour, language), colour_name(second.colour, language)
        if a != b and rng.random() < UNLIKE_LEFT_OUT:
            return None
        answer = verdict(f"{look}{a}", f"{over}{b}", language, alike=a == b)
    elif way < 0.7:
        question = ask(
            rng, language,
            ("Are {both} [of |]the same shape?", "Do {both} have the same shape?"),
            ("{both}[的|]形状[一样|相同]吗？", "{both}是[同一种|同样的|一样的]形状吗？"), both=both,
        )  # fmt: skip
        a, b = shape_name(first.kind, language), shape_name(second.kind, language)
        if a != b and rng.random() < UNLIKE_LEFT_OUT:
            return None
        named = (article(a), article(b)) if english else (a, b)
        answer = verdict(f"{look}{named[0]}", f"{over}{named[1]}", language, alike=a == b)
    else:
        larger, smaller = sorted((first, second), key=lambda t: -t.area)
        if larger.area < 1.6 * smaller.area or noun(larger, "en") == noun(smaller, "en"):
            return None
        small = rng.random() < 0.35
        wanted, word = (smaller, "smaller") if small else (larger, "larger")
        question = ask(
            rng, language,
            ("Which [shape|one|object|] is [" + ("smaller|the smaller one" if small else "larger|bigger|the larger one") + "]?",),
            ("[哪个|哪一个]" + ("图形[|更]小？" if small else "图形[|更]大？"), "哪个" + ("比较小？" if small else "比较大？")),
        )  # fmt: skip
        a = noun(wanted, language)
        answer = f"The {a} is {word}." if english else f"{a}更{'小' if small else '大'}。"
        answer = look_at(wanted.box) + answer
    return Dialogue("compare", language, (Turn(question, answer),))


def json_question(rng: Rng, scene: Scene, language: Language) -> Dialogue | None:
    """The fields as JSON."""
    english = language == "en"
    things = sorted(scene.things, key=lambda t: t.centre[0])
    thing = things[0]
    if thing.kind == "text":
        values: dict[str, object] = {"text": TEXT, "color": colour_name(thing.colour, language)}
    else:
        alike = {noun(t, "en") for t in things}
        if len(alike) > 1:
            return None
        values = {"color": colour_name(thing.colour, language),
                  "shape": shape_name(thing.kind, language), "count": len(things)}  # fmt: skip
    keys = [k for k in values if rng.random() < 0.75] or list(values)
    if rng.random() < 0.3:
        keys = keys[::-1]
    spelling = {"color": "colour" if english and rng.random() < 0.3 else "color"}
    if not english and rng.random() < 0.6:
        spelling = {"color": "颜色", "shape": "形状", "count": "数量", "text": "文字"}
    names = [spelling.get(k, k) for k in keys]
    question = ask(
        rng, language,
        ("[Return|Give|Output|Answer with] [JSON|a JSON object] with [the fields |the keys |]{keys}.", "[Describe|Answer in|Extract from] the picture as JSON with {keys}.",
         "Extract {keys} as JSON.", "[Give|Return] the fields {keys} [as|in] JSON."),
        ("[以|用]JSON[格式|][返回|输出|给出]{keys}。", "提取{keys}，[以|用]JSON[格式|]返回。", "返回包含{keys}[的|字段的]JSON。"),
        keys=listing(names, language) if rng.random() < 0.6 else ", ".join(names),
    )  # fmt: skip
    content = {name: values[key] for name, key in zip(names, keys, strict=True)}
    answer = json.dumps(content, ensure_ascii=False).replace(TEXT, spelt(thing))
    return Dialogue("json", language, (Turn(question, look_at(thing.box) + answer),))
