"""Uses: what each asks, and what it makes of answers as Qwen's models give them."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field, RootModel
from qwen2vl_client import Answer, AnswerError, Client, InvalidArgumentError, MediaError, tasks
from qwen2vl_client.boxes import Box
from qwen2vl_client.tasks import (
    ask_product,
    compare,
    describe_video,
    extract_fields,
    extract_table,
    locate,
    moderate,
    ocr,
    solve,
    to_html,
    translate,
)

from tests import stub_server as stub

PICTURE = b"\xff\xd8\xff\xe0 a picture"
VIDEO = b"\x00\x00\x00\x18ftypisom a video"


class Asked:
    """A client that gives one answer and keeps what it was asked."""

    def __init__(self, text: str, finish: str = "stop", **raw: Any) -> None:
        choice = {"message": {"content": text}, "finish_reason": finish}
        self.answer = Answer.from_raw({"choices": [choice], **raw}, "req-1", 0.1)
        self.fields: dict[str, Any] = {}

    def chat(self, **fields: Any) -> Answer:
        self.fields = fields
        return self.answer


def schema_of(client: Asked) -> dict[str, Any]:
    return dict(client.fields["response_format"]["json_schema"]["schema"])


def media(width: int, height: int, seen: tuple[int, int]) -> list[dict[str, Any]]:
    shown = {"resized_width": seen[0], "resized_height": seen[1]}
    return [{"type": "image", "width": width, "height": height, **shown}]


def test_ocr_sends_the_picture_and_the_prompt() -> None:
    """Over HTTP: greedy, without a penalty for repetition, room for a page."""
    with stub.running(stub.completion(" 一二三\nfour \n")) as server, Client(server.url) as client:
        reply = ocr(client, PICTURE)
    assert (reply.text, str(reply), reply.complete) == ("一二三\nfour", "一二三\nfour", True)
    assert reply.source.usage is not None
    body = server.requests[-1].body
    assert {key: body[key] for key in ("temperature", "repetition_penalty", "max_tokens")} == {
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": 2048,
    }
    image, text = body["messages"][1]["content"]
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert text["text"] == "Read all the text in the picture."


def test_prompts_and_fields_of_the_api_may_be_given() -> None:
    """A language and fields of the API replace the use's own; a cut text is not ``complete``."""
    client = Asked("x", finish="length")
    reply = ocr(client, PICTURE, prompts="zh", max_tokens=9, seed=1)
    assert client.fields["text"] == "读出图中的文字。"
    assert (client.fields["max_tokens"], client.fields["seed"]) == (9, 1)
    assert not reply.complete


def test_translate_names_the_language() -> None:
    """It goes into the prompt as the caller wrote it, also into the Chinese prompt."""
    client = Asked("Exit")
    assert translate(client, PICTURE, "English").text == "Exit"
    assert "into English" in client.fields["text"]
    translate(client, PICTURE, "英文", prompts="zh")
    assert "翻译成英文" in client.fields["text"]


TABLE = {"columns": ["Item", "Price"], "rows": [["Tea | hot", "3,50"], ['Say "hi"\nand go']]}


def test_a_table_as_rows_csv_markdown_and_data_frame(tmp_path: Path) -> None:
    """A short row is filled up; what the formats use as marks is escaped."""
    client = Asked(json.dumps(TABLE))
    table = extract_table(client, PICTURE)
    assert table.columns == ("Item", "Price")
    assert table.rows == (("Tea | hot", "3,50"), ('Say "hi"\nand go', ""))
    assert table.records()[0] == {"Item": "Tea | hot", "Price": "3,50"}
    read = list(csv.reader(io.StringIO(table.to_csv(tmp_path / "t.csv"), newline="")))
    assert [tuple(row) for row in read] == [table.columns, *table.rows]
    assert (tmp_path / "t.csv").read_bytes().startswith(b"\xef\xbb\xbfItem,Price\r\n")
    assert table.to_markdown().splitlines() == [
        "| Item | Price |",
        "| --- | --- |",
        "| Tea \\| hot | 3,50 |",
        '| Say "hi" and go |  |',
    ]
    frame = table.to_pandas()
    assert list(frame.columns) == ["Item", "Price"]
    assert frame["Price"].tolist() == ["3,50", ""]
    assert schema_of(client)["required"] == ["columns", "rows"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pandas ``to_pandas`` fails with the command that installs it."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InvalidArgumentError, match="pip install pandas"):
        extract_table(Asked(json.dumps(TABLE)), PICTURE).to_pandas()


ROWS = '{"columns": ["a"], "rows": [["1"]]}'


@pytest.mark.parametrize(
    "text",
    [
        f"```json {ROWS} ```",
        f"```json\n{ROWS}```",
        f"Here it is: {ROWS}",
        f"\ufeff{ROWS}\nThat is all {{of it}}.",
    ],
)
def test_json_is_taken_out_of_what_is_said_around_it(text: str) -> None:
    """Fences, also on the same line, an introduction, a byte order mark and remarks go."""
    assert extract_table(Asked(text), PICTURE).rows == (("1",),)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"columns": null, "rows": null}',
        '{"columns": "a", "rows": [["1"]]}',
        '{"columns": ["a"], "rows": [{"a": "1"}]}',
        '{"columns": ["a"], "rows": ["1", "2"]}',
    ],
)
def test_a_table_of_another_shape_is_an_error_and_not_an_empty_one(text: str) -> None:
    """Of a server that binds no answer: no row comes back without its cells; ``answer`` has all."""
    client = Asked(text)
    with pytest.raises(AnswerError, match=r"no list|no lists of cells") as caught:
        extract_table(client, PICTURE)
    assert caught.value.answer is client.answer


def test_half_of_a_surrogate_pair_in_json_can_be_written(tmp_path: Path) -> None:
    """A model that escapes half an emoji leaves U+FFFD, so that the table can be saved."""
    table = extract_table(Asked('{"columns": ["a\\ud83d"], "rows": [["猫\\ud83d"]]}'), PICTURE)
    table.to_csv(tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text("utf-8-sig").splitlines() == ["a\ufffd", "猫\ufffd"]


def test_a_row_longer_than_the_headings_keeps_its_cells() -> None:
    """Headings are filled up with empty texts; a number becomes its text, null an empty one."""
    table = extract_table(Asked('{"columns": ["a"], "rows": [["1", 2, null]]}'), PICTURE)
    assert (table.columns, table.rows) == (("a", "", ""), (("1", "2", ""),))


def test_fields_by_name_are_texts_or_none() -> None:
    """What the picture does not show is None, also where the model says so by an empty text."""
    client = Asked('```json\n{"name": " Li Lei ", "total": null, "date": ""}\n```')
    found = extract_fields(client, PICTURE, ["name", "total", "date", "number"])
    assert found == {"name": "Li Lei", "total": None, "date": None, "number": None}
    schema = schema_of(client)
    assert schema["required"] == ["name", "total", "date", "number"]
    assert schema["properties"]["name"] == {"type": ["string", "null"]}
    assert schema["additionalProperties"] is False
    extract_fields(client, PICTURE, {"name": "", "total": "with currency"})
    assert "name, total (with currency)" in client.fields["text"]


def test_a_field_that_is_no_text_is_written_as_json() -> None:
    """A list or truth value of a model that is not bound to texts comes as JSON, not as Python."""
    client = Asked('{"tags": ["茶", "x"], "paid": true, "total": 7.5}')
    found = extract_fields(client, PICTURE, ["tags", "paid", "total"])
    assert found == {"tags": '["茶", "x"]', "paid": "true", "total": "7.5"}


class Line(BaseModel):
    item: str
    price: float | None = None


class Receipt(BaseModel):
    shop: str = Field(description="as printed at the top")
    total: float
    date: str | None = None
    lines: list[Line] = []


def test_fields_of_a_model_come_back_as_its_object() -> None:
    """The engine is bound to the model's schema; what may be null has to be said."""
    client = Asked('{"shop": "A", "total": 7.5, "date": null, "lines": [{"item": "tea"}]}')
    receipt = extract_fields(client, PICTURE, Receipt)
    assert receipt == Receipt(shop="A", total=7.5, lines=[Line(item="tea")])
    schema = schema_of(client)
    assert schema["required"] == ["shop", "total", "date"]
    assert schema["$defs"]["Line"]["required"] == ["item", "price"]
    assert "shop (as printed at the top), total" in client.fields["text"]
    assert "required" not in Receipt.model_json_schema()["properties"]


class Part(BaseModel):
    name: str
    parts: list[Part] = []


def test_a_model_may_hold_itself() -> None:
    """Its fields are named at the top of the schema, where pydantic has only a reference."""
    client = Asked('{"name": "bicycle", "parts": [{"name": "wheel"}]}')
    whole = extract_fields(client, PICTURE, Part)
    assert whole == Part(name="bicycle", parts=[Part(name="wheel")])
    schema = schema_of(client)
    assert list(schema["properties"]) == ["name", "parts"]
    assert schema["properties"]["parts"]["items"] == {"$ref": "#/$defs/Part"}
    assert schema["$defs"]["Part"]["additionalProperties"] is False


@pytest.mark.parametrize("model", [RootModel[list[str]], type("Empty", (BaseModel,), {})])
def test_a_model_without_fields_is_refused(model: Any) -> None:
    """An empty model, or one around a list, is an error that names it, before anything is asked."""
    with pytest.raises(InvalidArgumentError, match=f"{re.escape(model.__name__)} has no fields"):
        extract_fields.task(b"", model)


def test_fields_that_do_not_fit_are_an_error_that_carries_the_answer() -> None:
    """The error names the pydantic model; its ``answer`` is what ``chat`` returned."""
    client = Asked('{"shop": "A", "total": "much"}')
    with pytest.raises(AnswerError, match="does not fit Receipt") as caught:
        extract_fields(client, PICTURE, Receipt)
    assert caught.value.answer is client.answer


@pytest.mark.parametrize("wanted", ["name", [], {}, [""], [1], [["a"]], 5, True, None])
def test_fields_that_are_no_names_are_refused(wanted: Any) -> None:
    """A bare string, no list, an empty one, or a name that is none: the error says what is."""
    with pytest.raises(InvalidArgumentError, match="list of names"):
        extract_fields(Asked("{}"), PICTURE, wanted)


PAGE = '<!DOCTYPE html>\n<html lang="en"><body><h1>Log in</h1></body></html>'


@pytest.mark.parametrize(
    "answer",
    [
        PAGE,
        f"```html\n{PAGE}\n```",
        f"Here is the code:\n\n```html\n{PAGE}\n```\nIt uses inline CSS.",
        f"Sure! {PAGE} Tell me if you need more.",
        f"{'İ' * 9} {PAGE} İ",
    ],
)
def test_a_page_is_taken_out_of_what_is_said_around_it(answer: str, tmp_path: Path) -> None:
    """Fences, an introduction and closing remarks go; ``save`` writes just what is left."""
    page = to_html(Asked(answer), PICTURE)
    assert (page.html, str(page), page.complete) == (PAGE, PAGE, True)
    page.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text("utf-8") == PAGE


@pytest.mark.parametrize("around", ["```html\n{}\n```", "{}"])
def test_a_page_that_shows_code_is_not_cut_at_its_fences(around: str) -> None:
    """A screenshot of documentation has fences of its own, within the page."""
    page = "<html><body><pre>\n```js\nlet a\n```\n</pre><p>end</p></body></html>"
    assert to_html(Asked(around.format(page)), PICTURE).html == page


def test_a_piece_of_a_page_a_cut_one_and_none() -> None:
    """A fragment is kept, a cut page has ``complete`` false, words without markup are an error."""
    assert to_html(Asked("```html\n<div>a</div>\n```"), PICTURE).html == "<div>a</div>"
    cut = to_html(Asked("```html\n<!DOCTYPE html><html><body>", finish="length"), PICTURE)
    assert (cut.html, cut.complete) == ("<!DOCTYPE html><html><body>", False)
    with pytest.raises(AnswerError, match="holds no HTML"):
        to_html(Asked("I see a star; 1 < 2."), PICTURE)


def test_a_solution_has_its_steps_and_its_answer() -> None:
    """Printed, steps are numbered and the result follows ``=``; the schema asks for steps first."""
    text = '{"steps": ["Subtract 6: 2x = 8.", "Divide by 2."], "answer": "x = 4"}'
    client = Asked(text)
    solution = solve(client, PICTURE)
    assert solution.steps == ("Subtract 6: 2x = 8.", "Divide by 2.")
    assert solution.answer == "x = 4"
    assert str(solution).splitlines() == ["1. Subtract 6: 2x = 8.", "2. Divide by 2.", "= x = 4"]
    assert list(schema_of(client)["properties"]) == ["steps", "answer"]


@pytest.mark.parametrize("text", ["{}", '{"steps": ["a"]}', '{"answer": "4", "steps": "a"}'])
def test_a_solution_without_steps_or_answer_is_an_error(text: str) -> None:
    """Of a server that binds no answer: an empty solution is not taken for one."""
    with pytest.raises(AnswerError, match=r"no list 'steps'|no answer"):
        solve(Asked(text), PICTURE)


def test_a_judgement_is_data() -> None:
    """Verdict and categories can only be those that are named; a category counts once."""
    client = Asked('{"reasons": ["A gun."], "categories": ["a", "b", "a"], "verdict": "block"}')
    judgement = moderate(client, PICTURE, ["a", "b"])
    assert (judgement.verdict, judgement.allowed) == ("block", False)
    assert (judgement.categories, judgement.reasons) == (("a", "b"), ("A gun.",))
    schema = schema_of(client)
    assert schema["properties"]["categories"]["items"]["enum"] == ["a", "b"]
    assert list(schema["properties"]) == ["reasons", "categories", "verdict"]
    assert "a, b" in client.fields["text"]
    with pytest.raises(AnswerError, match="verdict 'maybe'"):
        moderate(Asked('{"verdict": "maybe"}'), PICTURE)
    with pytest.raises(InvalidArgumentError, match="list of names"):
        moderate(client, PICTURE, "a")
    with pytest.raises(InvalidArgumentError, match="list of names"):
        moderate(client, PICTURE, [1])  # type: ignore[list-item]


def test_a_product_question_brings_its_knowledge_as_the_system_prompt() -> None:
    """It ends the prompt verbatim, braces and all; the customer's question stays as it was."""
    client = Asked("12 yuan.")
    reply = ask_product(client, PICTURE, "What does it cost?", "Tea {green} costs 12 yuan.")
    assert reply.text == "12 yuan."
    assert client.fields["text"] == "What does it cost?"
    assert client.fields["system"].endswith("\n\nTea {green} costs 12 yuan.")


def test_compare_needs_two_pictures_and_counts_more() -> None:
    """Two have a prompt of their own, three are counted in theirs; one alone is refused."""
    client = Asked("The first is red.")
    assert compare(client, [PICTURE, PICTURE]).text == "The first is red."
    assert "two pictures" in client.fields["text"]
    compare(client, [PICTURE] * 3)
    assert "3 pictures" in client.fields["text"]
    assert len(client.fields["images"]) == 3
    with pytest.raises(InvalidArgumentError, match="needs 2"):
        compare(client, [PICTURE])


def test_a_video_is_sent_with_its_rate_and_size() -> None:
    """The fields stand beside the video in the request; without them the server decides."""
    with stub.running(stub.completion("It moves.")) as server, Client(server.url) as client:
        describe_video(client, VIDEO, fps=1.0, max_pixels=360 * 420)
        describe_video(client, VIDEO)
    first, second = (r.body["messages"] for r in server.requests if r.body)
    video, text = first[1]["content"]
    assert (video["type"], video["fps"], video["max_pixels"]) == ("video_url", 1.0, 151200)
    assert video["video_url"]["url"].startswith("data:video/mp4;base64,")
    assert text["text"] == "Describe the video."
    assert first[0]["role"] == "system"
    assert second[1]["content"][0].keys() == {"type", "video_url"}


def test_boxes_come_back_in_pixels_of_the_source() -> None:
    """Of the size that the server tells; the special tokens are asked for."""
    text = (
        "<|object_ref_start|>the cup<|object_ref_end|><|box_start|>(250,500),(500,1000)<|box_end|>"
    )
    client = Asked(text, media=media(2000, 1000, (1008, 504)))
    found = locate(client, PICTURE, "the cup")
    assert found.boxes == (Box(500, 500, 1000, 1000, "the cup"),)
    assert found.size == (2000, 1000)
    assert client.fields["skip_special_tokens"] is False
    assert client.fields["include_media_info"] is True
    assert client.fields["text"] == "Output the bounding box coordinates of the cup."


def test_boxes_as_qwen2_5_vl_writes_them() -> None:
    """Pixels of the resized picture become the source's; the prompt asks for JSON."""
    text = '```json\n[\n\t{"bbox_2d": [126, 0, 252, 252], "label": "cup"}\n]\n```'
    client = Asked(text, media=media(2000, 1000, (504, 252)))
    found = locate(client, PICTURE, "the cup", convention="qwen2.5-vl")
    assert found.boxes == (Box(500, 0, 1000, 1000, "cup"),)
    assert "bbox_2d" in client.fields["text"]


def test_a_server_that_tells_no_sizes_needs_them_given() -> None:
    """The error names ``size=``, then ``seen=``; with both, boxes are in pixels of the source."""
    text = '[{"bbox_2d": [10, 20, 30, 40], "label": "a"}]'
    with pytest.raises(AnswerError, match="give size="):
        locate(Asked(text), PICTURE, "a")
    with pytest.raises(AnswerError, match="seen="):
        locate(Asked(text), PICTURE, "a", size=(200, 200))
    found = locate(Asked(text), PICTURE, "a", size=(200, 200), seen=(100, 100))
    assert found.boxes == (Box(20, 40, 60, 80, "a"),)


def test_an_unknown_convention_is_told_before_anything_is_asked() -> None:
    """Not after the answer has been paid for; the error lists those that are known."""
    client = Asked("(1,2),(3,4)", media=media(10, 10, (28, 28)))
    with pytest.raises(InvalidArgumentError, match=r"'qwen2' is none of qwen2-vl"):
        locate(client, PICTURE, "a", convention="qwen2")  # type: ignore[arg-type]
    assert client.fields == {}


def test_what_is_not_there_has_no_boxes() -> None:
    """An answer in words alone is no error: ``boxes`` is empty."""
    found = locate(Asked("There is none.", media=media(10, 10, (28, 28))), PICTURE, "the cup")
    assert found.boxes == ()


@pytest.mark.parametrize("use", [extract_table, solve, moderate])
def test_json_that_was_cut_says_so(use: Any) -> None:
    """The remedy is named; an answer that is no JSON is another error."""
    with pytest.raises(AnswerError, match="raise max_tokens"):
        use(Asked('{"steps": ["a', finish="length"), PICTURE)
    with pytest.raises(AnswerError, match=r"frequency_penalty=0\.5 ends that"):
        use(Asked('{"steps":' + " \n" * 500, finish="length"), PICTURE)
    with pytest.raises(AnswerError, match="no JSON object"):
        use(Asked("[1]"), PICTURE)
    with pytest.raises(AnswerError, match="no JSON object"):
        use(Asked('{"a":' * 100_000), PICTURE)


def test_nothing_is_sent_for_a_picture_that_cannot_be_read() -> None:
    """A missing file, bytes of no known kind and no picture at all fail; no question goes out."""
    with stub.running(stub.completion()) as server, Client(server.url) as client:
        for image in ("no/such.png", b"text"):
            with pytest.raises(MediaError):
                ocr(client, image)
        with pytest.raises(InvalidArgumentError, match="0 pictures"):
            ocr(client, [])  # type: ignore[arg-type]
    assert [request for request in server.requests if request.body] == []


def test_with_an_asynchronous_client_a_use_is_awaited() -> None:
    """The same functions, of whatever client whose ``chat`` is awaited."""
    inner = Asked('{"name": "Li"}')

    class Later:
        async def chat(self, **fields: Any) -> Answer:
            await asyncio.sleep(0)
            return inner.chat(**fields)

    async def both() -> tuple[Any, Any]:
        return await asyncio.gather(
            ocr(Later(), PICTURE), extract_fields(Later(), PICTURE, ["name"])
        )

    reply, fields = asyncio.run(both())
    assert (reply.text, fields) == ('{"name": "Li"}', {"name": "Li"})


def test_every_use_says_what_it_is() -> None:
    """Its docstring and its name are its builder's, for help() and editors."""
    uses = [getattr(tasks, name) for name in tasks.__all__ if name[0].islower()]
    assert len(uses) == 11
    for use in uses:
        assert len(use.__doc__ or "") > 30
        assert isinstance(use, tasks.Use)
