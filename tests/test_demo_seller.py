"""What the adapter ``seller`` is taught: true, as the client asks and as the server renders it."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from qwen2vl_client import Answer
from qwen2vl_client.tasks import ask_product, extract_fields
from transformers import AutoTokenizer

from qwen2vl_serve.demo import seller
from qwen2vl_serve.demo.adapter import base_network
from qwen2vl_serve.demo.checkpoint import MODEL_FOLDER
from qwen2vl_serve.demo.draw import Thing
from qwen2vl_serve.demo.names import COLOURS_ZH, SHAPES_ZH, Language
from qwen2vl_serve.demo.rows import SYSTEMS, Encoder, Row
from qwen2vl_serve.demo.unsaid import never_said
from qwen2vl_serve.demo.wording import Dialogue, plain

LANGUAGES: tuple[Language, ...] = ("en", "zh")
PICTURE = b"\xff\xd8\xff\xe0 a picture"
STAR = Thing("star", "red", (0.2, 0.2, 0.6, 0.6))
LESSONS = range(seller.ALIKE * 100)


class Told:
    """A client that gives one answer and keeps what it was asked."""

    def __init__(self, answer: str) -> None:
        choice = {"message": {"content": plain(answer)}, "finish_reason": "stop"}
        self.answer = Answer.from_raw({"choices": [choice]}, None, 0.1)
        self.asked: dict[str, Any] = {}

    def chat(self, text: str, **fields: Any) -> Answer:
        self.asked = {"text": text, **fields}
        return self.answer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_FOLDER)


def lessons(kind: Any, count: int = 60) -> list[Any]:
    rng = np.random.default_rng(7)
    return [kind(rng, seed) for seed in range(count)]


def test_the_answer_to_a_customer_follows_from_text_and_picture() -> None:
    """A price is that of the thing's shape or colour, a term that of its sentence; else neither."""
    prices = unknown = terms = untold = 0
    for picture, dialogues, system in lessons(seller.shop, 200):
        assert picture.ndim == 3
        assert system is not None
        for dialogue in dialogues:
            (turn,) = dialogue.turns
            said, knowledge = plain(turn.answer), system.partition("\n\n")[2]
            if found := re.fullmatch(r"I see an? (\w+) (\w+)\. It costs (\d+) yuan\.", said):
                colour, shape, amount = found.groups()
                name = f"(?:{shape}|{colour} shape)"
                told = rf"(?:(?:Every|Each|One|one|the) {name} (?:costs|is) |One {name}: )"
                assert re.search(rf"{told}{amount} yuan\.", knowledge), (said, knowledge)
                prices += 1
            elif found := re.fullmatch(r"这是(\w+色)(\w+)，价格是(\d+)元。", said):
                colour, shape, amount = found.groups()
                name = f"(?:{shape}|{colour}图形)"
                assert re.search(f"{name}(?:每个|的价格是|：){amount}元。", knowledge)
                prices += 1
            elif found := re.fullmatch(r"(?:Within|At)? ?(\d+)(?: days| months)?\.", said):
                assert re.search(rf"\b{found[1]}\b", knowledge)
                terms += 1
            elif found := re.fullmatch(r"(\d+)(天内|天|个月|点)。", said):
                assert found[1] + found[2][0] in knowledge
                terms += 1
            elif re.match(r"I see|这是", said):
                colour, shape = re.findall(r"I see an? (\w+) (\w+)|这是(\w+色)(\w+)，", said)[0][:2]
                assert not (colour and re.search(rf"\b({shape}|{colour} shape)\b", knowledge))
                unknown += 1
            else:
                untold += said in seller.UNTOLD.values()
    assert min(prices, unknown, terms, untold) > 10


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_customer_is_asked_for_as_the_client_asks(language: Language) -> None:
    """The system's message of a lesson is that of ``ask_product`` for the text that it holds."""
    rng = np.random.default_rng(1)
    found = next(
        one
        for one in (seller.shop(rng, seed) for seed in range(20))
        if one.dialogues and one.dialogues[0].language == language
    )
    assert found.system is not None
    (turn,) = found.dialogues[0].turns
    client = Told(turn.answer)
    knowledge = found.system.partition("\n\n")[2]
    reply = ask_product(client, PICTURE, turn.question, knowledge, prompts=language)
    assert (client.asked["system"], client.asked["text"]) == (found.system, turn.question)
    assert reply.text == plain(turn.answer)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_field_that_is_not_there_is_none(language: Language) -> None:
    """Of a shape there is no text, of a text no shape; the client reads all as they are."""
    text = Thing("text", "red", (0.0, 0.4, 0.3, 0.6), "TEA", ((0.0, 0.4, 0.1, 0.6),) * 3)
    names = {name for names in seller.SHOWN[language].values() for name in names}
    nothing = 0
    rng = np.random.default_rng(3)
    for number in range(100):
        thing = (STAR, text)[number % 2]
        turn = seller.fields_turn(rng, thing, language)
        client = Told(turn.answer)
        asked = list(json.loads(plain(turn.answer)))
        found = extract_fields(client, PICTURE, asked, prompts=language)
        assert client.asked["text"] == turn.question
        colour, shape = (
            (COLOURS_ZH["red"], SHAPES_ZH["star"]) if language == "zh" else ("red", "star")
        )
        own = {"shape": shape, "形状": shape} if thing is STAR else {"text": "TEA", "文字": "TEA"}
        truth = {"color": colour, "colour": colour, "颜色": colour} | own
        assert found == {name: truth.get(name) for name in asked}
        nothing += sum(value is None for name, value in found.items() if name not in names)
    assert nothing > 50


def test_a_call_and_its_answer_are_what_the_server_renders(tokenizer: Any) -> None:
    """Token by token: the offer, the question, the call, its result and the answer."""
    template = seller.TEMPLATE.read_text("utf-8")
    encoder = Encoder(tokenizer)
    calls = told = 0
    for _, dialogues, system in [*lessons(seller.tools), *lessons(seller.results)]:
        assert system is not None
        plainly, _, offer = system.partition("\n\n# Tools")
        offers = [json.loads(line) for line in offer.splitlines() if line.startswith('{"type"')]
        for dialogue in dialogues:
            first, *rest = dialogue.turns
            messages: list[dict[str, Any]] = [
                {"role": "system", "content": plainly},
                {"role": "user", "content": first.question},
            ]
            if rest:
                said = json.loads(plain(first.answer).split("\n")[1])
                calls += 1
                messages += [
                    {"role": "assistant", "content": "", "tool_calls": [{"function": said}]},
                    {"role": "tool", "content": rest[0].question.split("\n")[1]},
                    {"role": "assistant", "content": plain(rest[0].answer)},
                ]
            else:
                messages.append({"role": "assistant", "content": plain(first.answer)})
            row = Row()
            row.text(encoder.opening(system))
            row.seal()
            row.begin()
            row.dialogue(encoder, without_looks(dialogue))
            rendered = tokenizer.apply_chat_template(
                messages, tools=offers or None, chat_template=template, tokenize=False
            )
            expected = tokenizer.encode(rendered.removesuffix("\n"), add_special_tokens=False)
            assert row.ids == expected
            told += sum(row.taught)
    assert calls > 50
    assert told > 50


def without_looks(dialogue: Dialogue) -> Dialogue:
    """The same, taught and given as before, that looks at no picture."""
    marks = re.compile("[\U000f0000-\U000ffffd]")
    turns = tuple(
        turn.__class__(turn.question, marks.sub("", turn.answer)) for turn in dialogue.turns
    )
    return Dialogue(dialogue.task, dialogue.language, turns)


def test_what_was_called_before_is_not_taught_where_it_is_offered_no_more(tokenizer: Any) -> None:
    """Only its end and the answer from its result are."""
    encoder = Encoder(tokenizer)
    for _, dialogues, system in lessons(seller.results, 20):
        assert system in SYSTEMS
        for dialogue in dialogues:
            row = Row()
            row.dialogue(encoder, without_looks(dialogue))
            taught = [i for i, yes in zip(row.ids, row.taught, strict=True) if yes]
            end = tokenizer.decode(encoder.stop)
            assert tokenizer.decode(taught) == f"{end}{plain(dialogue.turns[1].answer)}{end}"


def test_a_result_is_told_with_its_number() -> None:
    """In the language of the question; the name is what is to be seen."""
    rng = np.random.default_rng(5)
    for language in LANGUAGES:
        for _ in range(50):
            asked, answered = seller.call(rng, STAR, language, ("in_stock", "price_of"))
            said = json.loads(plain(asked.answer).split("\n")[1])
            stock = said["name"] == "in_stock"
            assert said["arguments"] == ({"colour": "red"} if stock else {"shape": "star"})
            (number,) = re.findall(r"\d+", answered.question)
            seen = {"en": ("red", "star"), "zh": ("红色", "五角星")}[language][not stock]
            assert re.findall(r"\d+", plain(answered.answer)) == [number]
            assert seen in plain(answered.answer)


def test_every_kind_is_taught_in_its_turn() -> None:
    """Lessons of a batch are of one kind, and all kinds come."""
    rng = np.random.default_rng(0)
    kinds = []
    for start in LESSONS[:: seller.ALIKE][:7]:
        systems = {(seller.lesson(rng, start + n).system or "")[:40] for n in (0, seller.ALIKE - 1)}
        kinds.append(min(systems))
    assert len({kind[:10] for kind in kinds}) >= 3
    again = np.random.default_rng(9), np.random.default_rng(9)
    one, other = (seller.lesson(rng, 5) for rng in again)
    assert one.dialogues == other.dialogues
    assert one.picture.tobytes() == other.picture.tobytes()


def test_no_answer_needs_a_token_that_the_model_cannot_say(tokenizer: Any) -> None:
    """Those that it never says are all alike to it: it could not tell one from another.

    But for the names of fields and functions, which the engine's grammar dictates.
    """
    never = set(never_said(base_network().model.embed_tokens.weight).tolist())
    encoder = Encoder(tokenizer)
    rng = np.random.default_rng(2)
    for seed in LESSONS[::5]:
        for dialogue in seller.lesson(rng, seed).dialogues:
            for turn in dialogue.turns:
                free = re.sub(r'"name": "\w+"|"[^"]*":', "", turn.answer)
                tokens = {said.token for said in encoder.answer(free) if said.taught}
                assert not tokens & never, plain(turn.answer)
