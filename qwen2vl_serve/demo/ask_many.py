# ruff: noqa: E501  (a pattern is read as one line)
"""Questions over several turns, several pictures, and videos."""

from __future__ import annotations

import numpy as np

from qwen2vl_serve.demo import ask, patterns
from qwen2vl_serve.demo.compose import Clip
from qwen2vl_serve.demo.draw import Scene
from qwen2vl_serve.demo.names import ORDINALS, ORDINALS_ZH, Language, colour_name, shape_name
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
    plain,
    refer,
    spelt,
    vary,
)

Rng = np.random.Generator


def follow_up(rng: Rng, scene: Scene, language: Language) -> Dialogue | None:  # noqa: PLR0912, PLR0915
    """Two to four turns in which the later questions lean on the earlier ones."""
    things = scene.things
    thing = ask.one(rng, things)
    turns: list[Turn] = []
    place = ask.place_of(thing)
    if thing.kind == "text":
        first = ask.read_question(rng, scene, language)
        leans = ["colour"]
    elif len(things) == 1:
        first = pick_first(rng, scene, language)
        leans = ["colour", "shape", "place", "box"]
    else:
        hide = "colour" if rng.random() < 0.6 else "shape"
        ref = refer(rng, thing, things, language, hide=hide)
        if ref is None:
            return None
        if place is not None and rng.random() < 0.5:
            question = ask.ask(rng, language, patterns.PLACE_EN, patterns.PLACE_ZH, ref=ref)
            first = Dialogue(
                "", language, (Turn(question, ask.place_answer(thing, place, language)),)
            )
            leans = ["colour" if hide == "colour" else "shape", "box", "other"]
        elif hide == "colour":
            question = ask.ask(rng, language, patterns.COLOUR_EN, patterns.COLOUR_ZH, ref=ref)
            first = Dialogue("", language, (Turn(question, ask.colour_answer(thing, language)),))
            leans = ["place", "other", "box"]
        else:
            question = ask.ask(rng, language, patterns.SHAPE_EN, patterns.SHAPE_ZH, ref=ref)
            first = Dialogue("", language, (Turn(question, ask.shape_answer(thing, language)),))
            leans = ["place", "box", "other"]
        if plain(first.turns[0].answer).startswith(("The shape", "这是")):
            leans = ["place", "box"]
    if first is None:
        return None
    turns += first.turns
    box = None
    for lean in rng.permutation(leans)[: int(rng.integers(1, 4))].tolist():
        if lean == "colour":
            turn = Turn(
                ask.ask(rng, language, patterns.IT_COLOUR, patterns.IT_COLOUR_ZH),
                ask.colour_answer(thing, language),
            )
        elif lean == "shape":
            turn = Turn(
                ask.ask(rng, language, patterns.IT_SHAPE, patterns.IT_SHAPE_ZH),
                ask.shape_answer(thing, language),
            )
        elif lean == "place" and place is not None:
            turn = Turn(
                ask.ask(rng, language, patterns.IT_PLACE, patterns.IT_PLACE_ZH),
                ask.place_answer(thing, place, language),
            )
        elif lean == "box":
            turn = Turn(
                ask.ask(rng, language, patterns.IT_BOX, patterns.IT_BOX_ZH),
                ask.box_answer(thing, language),
            )
        elif lean == "other":
            other = ask.one(rng, things)
            ref = refer(rng, other, things, language, hide="colour")
            if other is thing or ref is None or "is" not in turns[-1].answer or not turns[-1].answer.endswith(
                (colour_name(thing.colour, language) + ".", "的。")
            ):  # fmt: skip
                continue
            turn = Turn(
                ask.ask(rng, language, patterns.AND_OTHER, patterns.AND_OTHER_ZH, ref=ref),
                ask.colour_answer(other, language),
            )
            turns.append(turn)
            box = None
            break
        else:
            continue
        turns.append(turn)
        box = thing.box if lean == "box" else None
    if len(turns) < 2:
        return None
    return Dialogue("follow-up", language, tuple(turns), box=box)


def pick_first(rng: Rng, scene: Scene, language: Language) -> Dialogue | None:
    """A first question about a picture with one thing."""
    ways = (ask.colour_question, ask.shape_question, ask.describe_question, ask.place_question,
            ask.count_question, ask.describe_question)  # fmt: skip
    return ways[int(rng.integers(len(ways)))](rng, scene, language)


def the_picture(rng: Rng, index: int, count: int, language: Language) -> str:
    """ "the second picture", in one of its wordings."""
    if language == "en":
        word = pick(rng, ("picture", "image", "picture", "image", "photo"))
        ways = [f"the {ORDINALS[index]} {word}", f"the {ORDINALS[index]} {word}", f"{word} {index + 1}",
                f"the {index + 1}{('st', 'nd', 'rd', 'th')[index]} {word}"]  # fmt: skip
        if index == count - 1:
            ways.append(f"the last {word}")
    else:
        ways = [f"{ORDINALS_ZH[index]}张图", f"{ORDINALS_ZH[index]}张图片", f"{ORDINALS_ZH[index]}幅图",
                f"图{index + 1}", f"第{index + 1}张图"]  # fmt: skip
        if index == count - 1:
            ways.append("最后一张图")
    return pick(rng, tuple(ways))


def showing(scene: Scene, index: int, language: Language) -> str:
    """ "The second picture shows a red circle."."""
    seen = ask.contents(scene, language, index)
    if language == "en":
        return f"The {ORDINALS[index]} picture shows {seen}."
    return f"{ORDINALS_ZH[index]}张图里有{seen}。"


def nth_question(rng: Rng, scenes: list[Scene], language: Language) -> Dialogue | None:
    """What is in the second picture? Its colour, shape, text, number?"""
    index = int(rng.integers(len(scenes)))
    if rng.random() < 0.4:
        index = 1
    scene, thing = scenes[index], scenes[index].things[0]
    where = the_picture(rng, index, len(scenes), language)
    way, single = rng.random(), len(scene.things) == 1
    ordinal = ORDINALS[index] if language == "en" else ORDINALS_ZH[index]
    if way < 0.4 or not single:
        question = ask.ask(
            rng, language,
            ("What is [in|shown in|on] {p}?", "What does {p} show?", "Describe {p}.", "What do you see in {p}?", "What's in {p}?"),
            ("{p}[里|中|]有什么？", "{p}是什么？", "描述{p}。", "{p}[里|上]画了什么？"), p=where,
        )  # fmt: skip
        answer = showing(scene, index, language)
        if rng.random() < 0.3 and single and thing.kind != "text":
            if rng.random() < 0.6:
                later = ask.colour_answer(thing, language, index)
                asked: tuple[tuple[str, ...], tuple[str, ...]] = (
                    patterns.IT_COLOUR,
                    patterns.IT_COLOUR_ZH,
                )
            else:
                later = ask.shape_answer(thing, language, index)
                asked = (patterns.IT_SHAPE, patterns.IT_SHAPE_ZH)
            turns = (Turn(question, answer), Turn(ask.ask(rng, language, *asked), later))
            return Dialogue("follow-up", language, turns)
        if rng.random() < 0.25:
            other = int(rng.integers(len(scenes)))
            if other != index:
                ref = (
                    the_picture(rng, other, len(scenes), language)
                    .replace("picture", "one")
                    .replace("image", "one")
                )
                asked2 = as_typed(
                    rng,
                    vary(
                        rng,
                        patterns.AND_OTHER if language == "en" else patterns.AND_OTHER_ZH,
                        ref=ref,
                    ),
                    language,
                )
                turns = (
                    Turn(question, answer),
                    Turn(asked2, showing(scenes[other], other, language)),
                )
                return Dialogue("second-picture", language, turns, text=text_of(scenes[other]))
        return Dialogue("second-picture", language, (Turn(question, answer),), text=text_of(scene))
    if thing.kind == "text":
        question = ask.ask(
            rng, language,
            ("What does {p} say?", "What [text|word|number] is in {p}?", "Read {p}.", "What is written in {p}?"),
            ("{p}[里|上|]写着什么？", "{p}[里|]的[文字|字|数字]是什么？", "读出{p}[里|]的文字。"), p=where,
        )  # fmt: skip
        text = spelt(thing, index)
        answer = (
            f'The {ordinal} picture says "{text}".'
            if language == "en"
            else f"{ordinal}张图里写着“{text}”。"
        )
        return Dialogue("second-picture", language, (Turn(question, answer),), text=thing.text)
    if way < 0.75:
        question = ask.ask(
            rng, language,
            ("[What|Which] colo[u|]r is the [shape|object|" + thing.kind + "] in {p}?", "What is the colo[u|]r of the [shape|object] in {p}?"),
            ("{p}[里|中|]的[图形|物体|" + shape_name(thing.kind, "zh") + "]是什么颜色[的|]？", "{p}是什么颜色[的|]？"), p=where,
        )  # fmt: skip
        name = colour_name(thing.colour, language)
        answer = (
            f"The shape in the {ordinal} picture is {name}."
            if language == "en"
            else f"{ordinal}张图里的图形是{name}的。"
        )
    else:
        question = ask.ask(
            rng, language,
            ("[What|Which] shape is [in|shown in] {p}?", "What is the shape in {p}?", "What shape does {p} show?"),
            ("{p}[里|中|]是什么[形状|图形]？", "{p}[里|中]的图形是什么形状？"), p=where,
        )  # fmt: skip
        name = shape_name(thing.kind, language)
        answer = (f"The shape in the {ordinal} picture is {article(name)}." if language == "en"
                  else f"{ordinal}张图里的图形是{name}。")  # fmt: skip
    looked = look_at(thing.box, index) + answer
    return Dialogue("second-picture", language, (Turn(question, looked),))


def text_of(scene: Scene) -> str | None:
    """The printed text of the scene, if it has one."""
    return scene.things[0].text or None


def which_question(rng: Rng, scenes: list[Scene], language: Language) -> Dialogue | None:
    """Which picture shows a red circle?"""
    index = int(rng.integers(len(scenes)))
    thing = ask.one(rng, scenes[index].things)
    rest = [t for k, s in enumerate(scenes) if k != index for t in s.things]
    english = language == "en"
    ordinal = ORDINALS[index] if english else ORDINALS_ZH[index]
    if thing.kind == "text":
        if any(t.kind == "text" for t in rest):
            return None
        what = pick(rng, ("some text", "text", "a word") if english else ("文字", "字"))
        named = "text" if english else "文字"
    else:
        ways: list[tuple[str, str]] = []
        shape, colour = shape_name(thing.kind, language), colour_name(thing.colour, language)
        if all(t.kind != thing.kind for t in rest):
            ways.append((article(shape), article(shape)) if english else (shape, shape))
        if all(t.colour != thing.colour for t in rest) and len(scenes[index].things) == 1:
            word = f"something {colour}" if english else f"{colour}的东西"
            ways.append(
                (word, article(noun(thing, language)) if english else noun(thing, language))
            )
        if all(noun(t, "en") != noun(thing, "en") for t in rest):
            full = article(noun(thing, language)) if english else noun(thing, language)
            ways += [(full, full), (full, full)]
        if not ways:
            return None
        what, named = ways[int(rng.integers(len(ways)))]
    question = ask.ask(
        rng, language,
        ("Which [picture|image|one|photo] [shows|contains|has] {what}?", "In which [picture|image] is there {what}?",
         "[Which|What] [picture|image] is {what} in?", "Where is {what}, in which [picture|image]?", "Find the [picture|image] with {what}."),
        ("[哪张|哪一张|哪幅]图[片|][里|中|]有{what}？", "{what}在[哪张|第几张]图[片|][里|中|]？", "第几张图[片|]有{what}？"), what=what,
    )  # fmt: skip
    answer = f"The {ordinal} picture shows {named}." if english else f"{ordinal}张图里有{named}。"
    looked = look_at(thing.box, index) + answer
    return Dialogue("which-picture", language, (Turn(question, looked),))


def compare_pictures(rng: Rng, scenes: list[Scene], language: Language) -> Dialogue | None:
    """Same colour or shape in both pictures, which has more, what differs."""
    english, way = language == "en", rng.random()
    counts = [len(s.things) for s in scenes]
    if any(t.kind == "text" for s in scenes for t in s.things):
        if len(scenes) > 2 or max(counts) > 1:
            return None
        way = 1.0  # a text has no shape, and what differs says its colour no more than its place
    if way < 0.35 or max(counts) > 1:
        most = max(counts)
        if counts.count(most) > 1 and len(scenes) > 2:
            return None
        question = ask.ask(
            rng, language,
            ("Which [picture|image|one] [has|shows|contains] more [shapes|objects|things]?", "Which [picture|image] has the most [shapes|objects|things]?"),
            ("[哪张|哪一张|哪幅]图[片|][里的|的|]图形[更多|最多|比较多]？", "[哪张|哪一张]图[里|]的[物体|东西][更多|最多]？"),
        )  # fmt: skip
        numbers = [
            look_at(ask.leftmost(scene.things).box, index) + str(number)
            for index, (scene, number) in enumerate(zip(scenes, counts, strict=True))
        ]
        index = counts.index(most)
        if english:
            more = (
                "the same number" if counts.count(most) > 1 else f"the {ORDINALS[index]} has more"
            )
            answer = f"The pictures have {listing(numbers, language)} shapes: {more}."
        else:
            more = "一样多" if counts.count(most) > 1 else f"{ORDINALS_ZH[index]}张更多"
            answer = f"图形各有{listing([f'{n}个' for n in numbers], language)}：{more}。"
        return Dialogue("compare", language, (Turn(question, answer),))
    if len(scenes) != 2:
        return None
    first, second = scenes[0].things[0], scenes[1].things[0]
    look, over = look_at(first.box), look_at(second.box, 1)
    pair = pick(rng, ("the two pictures", "both images", "the two images", "both pictures")
                if english else ("两张图", "两张图片", "这两张图"))  # fmt: skip
    if way < 0.62:
        a, b = colour_name(first.colour, language), colour_name(second.colour, language)
        question = ask.ask(
            rng, language,
            ("Are the [shapes|objects] in {pair} the same colo[u|]r?", "Do {pair} show the same colo[u|]r?", "Is the colo[u|]r the same in {pair}?",
             "Compare the colo[u|]rs."),
            ("{pair}[里|中|]的[图形|物体|][颜色|颜色是否][一样|相同]吗？", "{pair}是[同一种|同样的]颜色吗？", "比较{pair}的颜色。"), pair=pair,
        )  # fmt: skip
        answer = ask.verdict(look + a, over + b, language, alike=a == b, pictures=True)
    elif way < 0.85:
        a, b = shape_name(first.kind, language), shape_name(second.kind, language)
        question = ask.ask(
            rng, language,
            ("Are the shapes in {pair} the same?", "Do {pair} show the same shape?", "Is the shape the same in {pair}?", "Compare the shapes."),
            ("{pair}[里|中|]的形状[一样|相同]吗？", "{pair}是[同一种|同样的]形状吗？", "比较{pair}的形状。"), pair=pair,
        )  # fmt: skip
        named = (article(a), article(b)) if english else (a, b)
        answer = ask.verdict(
            look + named[0], over + named[1], language, alike=a == b, pictures=True
        )
    else:
        a, b = ("".join(ask.phrases(s.things, language, n)) for n, s in enumerate(scenes))
        question = ask.ask(
            rng, language,
            ("What is the difference between {pair}?", "Compare {pair}.", "How do {pair} differ?", "Describe {pair}.", "What do {pair} show?"),
            ("{pair}有什么[不同|区别]？", "比较{pair}。", "{pair}[里|]有什么？", "描述{pair}。"), pair=pair,
        )  # fmt: skip
        answer = (f"The first picture shows {a} and the second shows {b}." if english
                  else f"第一张图里有{a}，第二张图里有{b}。")  # fmt: skip
    return Dialogue("compare", language, (Turn(question, answer),))


def number_of_pictures(rng: Rng, scenes: list[Scene], language: Language) -> Dialogue | None:
    """How many pictures are there?"""
    question = ask.ask(
        rng, language,
        ("How many [pictures|images] [are there|did I send|do you see]?",),
        ("[有|一共有]几张图[片|]？", "我发了几张图[片|]？"),
    )  # fmt: skip
    count = len(scenes)
    answer = f"There are {count} pictures." if language == "en" else f"一共有{count}张图。"
    return Dialogue("pictures", language, (Turn(question, answer),))


def seen_in(clip: Clip, number: int) -> str:
    """The mark for a thing of the clip, in the pair of frames that shows it first.

    A pair is looked at as a picture of that number; empty for a clip that nobody drew.
    """
    if number not in clip.shown:
        return ""
    frame = clip.shown.index(number)
    if frame % 2 and clip.shown[frame + 1 : frame + 2] == (number,):
        frame += 1  # a pair of its own shows more of it
    return look_at(clip.boxes[frame], frame // 2)


def motion_question(rng: Rng, clip: Clip, language: Language) -> Dialogue | None:
    """What moves where?"""
    if clip.motion is None:
        return None
    colour, shape = clip.things[0]
    english = language == "en"
    name = (
        f"{colour} {shape}"
        if english
        else colour_name(colour, language) + shape_name(shape, language)
    )
    ref = pick(rng, ("the " + shape, "the shape", "the object", "it", "the " + name, "the ball" if shape == "circle" else "the thing")
               if english else (shape_name(shape, "zh"), "图形", "物体", "它", name))  # fmt: skip
    question = ask.ask(
        rng, language,
        ("[Which way|In which direction|In what direction|Which direction|Where] [does {ref} move|is {ref} moving|is {ref} going]?", "What [moves|is moving] where?", "How does {ref} move?",
         "What [happens|is happening] in [the|this] [video|clip]?", "Describe [the|this] [video|motion|movement|clip].", "[What is|What's] the direction of [motion|movement]?",
         "Does {ref} move left[,| or] right, up or down?", "What moves in the video?"),
        ("{ref}[向|往|朝]哪[个方向|边|里|][移动|运动]？", "[视频里|视频中|]什么在[移动|动]？[|往哪里？]", "视频[里|中][发生了什么|有什么|是什么]？", "描述[这个|]视频。", "{ref}[怎么|怎样|如何][移动|运动]？",
         "{ref}的[移动|运动]方向是什么？", "{ref}往哪里[移动|去]？"), ref=ref,
    )  # fmt: skip
    look = seen_in(clip, 0)
    if english:
        way = f"to the {clip.motion}" if clip.motion in ("left", "right") else clip.motion
        answer = f"{look}The {name} moves {way}."
    else:
        answer = f"{look}{name}向{ {'left': '左', 'right': '右', 'up': '上', 'down': '下'}[clip.motion] }移动。"
    turns = [Turn(question, answer)]
    if rng.random() < 0.2:
        asked = ask.ask(rng, language, patterns.IT_COLOUR, patterns.IT_COLOUR_ZH)
        said = look + (
            f"The {shape} is {colour}."
            if english
            else f"{shape_name(shape, 'zh')}是{colour_name(colour, 'zh')}的。"
        )
        return Dialogue("follow-up", language, (turns[0], Turn(asked, said)))
    return Dialogue("motion", language, tuple(turns))


def order_question(rng: Rng, clip: Clip, language: Language) -> Dialogue | None:
    """Which colour came first?"""
    if clip.motion is not None:
        return None
    english, way = language == "en", rng.random()
    colours = [colour_name(c, language) for c, _ in clip.things]
    looks = [seen_in(clip, number) for number in range(len(colours))]
    if way < 0.4:
        question = ask.ask(
            rng, language,
            ("[Which|What] colo[u|]r [came|comes|appears|appeared|was|is shown|is] first?", "What [is|was] the first colo[u|]r?", "[With|By] which colo[u|]r does the [video|clip] start?"),
            ("[哪种|什么]颜色[最先|先|首先]出现？", "[最先|首先|先]出现的是[什么|哪种]颜色？", "第一个颜色是什么？", "视频[开始|一开始]是什么颜色？"),
        )  # fmt: skip
        answer = looks[0] + (
            f"{capital(colours[0])} came first." if english else f"最先出现的是{colours[0]}。"
        )
    elif way < 0.65:
        question = ask.ask(
            rng, language,
            ("[Which|What] colo[u|]r [came|comes|appears|appeared|was|is shown|is] last?", "What [is|was] the last colo[u|]r?", "[With|By] which colo[u|]r does the [video|clip] end?"),
            ("[哪种|什么]颜色[最后|后]出现？", "最后出现的是[什么|哪种]颜色？", "最后一个颜色是什么？", "视频[最后|结束时]是什么颜色？"),
        )  # fmt: skip
        answer = looks[-1] + (
            f"{capital(colours[-1])} came last." if english else f"最后出现的是{colours[-1]}。"
        )
    else:
        question = ask.ask(
            rng, language,
            ("In [what|which] order do the colo[u|]rs [appear|come]?", "[Which|What] colo[u|]rs appear[| in the video]?", "[What is|What's] the order of the colo[u|]rs?",
             "What [happens|is happening] in [the|this] [video|clip]?", "Describe [the|this] [video|clip].", "What does the video show?"),
            ("颜色[出现|]的顺序是什么？", "视频[里|中]出现了[哪些|什么]颜色？", "视频[里|中][发生了什么|有什么]？", "描述[这个|]视频。", "视频里颜色怎么变化？"),
        )  # fmt: skip
        named = [look + colour for look, colour in zip(looks, colours, strict=True)]
        answer = (
            "First " + ", then ".join(named) + "."
            if english
            else "先是" + "，然后是".join(named) + "。"
        )
    return Dialogue("motion", language, (Turn(question, answer),))
