"""The commands ``ocr``, ``extract``, ``locate`` and ``batch``: what they print and write."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image
from qwen2vl_client.cli import COMMANDS, main

from tests import stub_server as stub
from tests.conftest import ServerProcess


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "a.png"
    Image.new("RGB", (640, 480), "white").save(path)
    return str(path)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_tells_what_it_does(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``--help`` shows the command, its description and ``--url``, with 0 and without a server."""
    described = import_module(f"qwen2vl_client.cli.{name}").build_parser(name).description
    assert described
    assert main([name, "--help"]) == 0
    told = capsys.readouterr().out
    assert "".join(described.split()) in "".join(told.split())
    assert f"qwen2vl-serve {name}" in told
    assert "--url" in told


def test_ocr_prints_the_text_of_each_picture(
    picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In their order; what was cut is said on standard error."""
    message = {"role": "assistant", "content": "第二页"}
    cut = stub.completion(choices=[{"index": 0, "message": message, "finish_reason": "length"}])
    with stub.running(stub.completion("Page one\n"), cut) as server:
        assert main(["ocr", "--url", server.url, "--model", "m", picture, picture]) == 0
    out, err = capsys.readouterr()
    assert out == "Page one\n第二页\n"
    assert err == (
        f"{picture}: the answer was cut at its limit of tokens; --set max_tokens=4096 raises it\n"
    )


def test_extract_prints_the_fields_as_json(
    picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engine is bound to them; what is not shown is null; Chinese stays readable."""
    with stub.running(stub.completion('{"name": "小明", "total": null}')) as server:
        words = ["--url", server.url, "--model", "m", picture, "name", "total=the sum to pay"]
        assert main(["extract", *words]) == 0
    out = capsys.readouterr().out
    assert json.loads(out) == {"name": "小明", "total": None}
    assert "小明" in out
    body = server.requests[-1].body
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["name", "total"]
    assert "the sum to pay" in json.dumps(body["messages"], ensure_ascii=False)


@pytest.mark.parametrize(("form", "told"), [("csv", "a,b\r\n1,2"), ("markdown", "| a | b |")])
def test_extract_prints_a_table(
    form: str, told: str, picture: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """With ``--table``, in place of fields, headings and rows go out as CSV or Markdown."""
    with stub.running(stub.completion('{"columns": ["a", "b"], "rows": [["1", "2"]]}')) as server:
        words = ["--url", server.url, "--model", "m", picture, "--table", form]
        assert main(["extract", *words]) == 0
    assert told.replace("\r", "") in capfd.readouterr().out.replace("\r", "")


@pytest.mark.parametrize("words", [[], ["name", "--table", "csv"]])
def test_extract_wants_fields_or_a_table(
    words: list[str], picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither or both end with 2 and a line that says what to name."""
    assert main(["extract", picture, *words]) == 2
    assert "name the fields" in capsys.readouterr().err


LOCATED = (
    "<|object_ref_start|>the red circle<|object_ref_end|>"
    "<|box_start|>(250,500),(500,1000)<|box_end|>"
)


def test_locate_prints_and_draws_boxes_in_the_pictures_own_pixels(
    picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line is left, top, right, bottom, label; ``--json`` has the same, the drawing its size."""
    drawn = tmp_path / "out.png"
    media = [{"type": "image", "width": 640, "height": 480}]
    answer = stub.completion(LOCATED, media=media)
    with stub.running(answer) as server:
        words = ["--url", server.url, "--model", "m", picture, "the red circle"]
        assert main(["locate", *words, "--draw", str(drawn)]) == 0
        assert capsys.readouterr().out == "160 240 320 480  the red circle\n"
        assert main(["locate", *words, "--json"]) == 0
        (box,) = json.loads(capsys.readouterr().out)
    assert (box["left"], box["bottom"], box["label"]) == (160, 480, "the red circle")
    with Image.open(drawn) as image:
        assert image.size == (640, 480)
        assert image.convert("RGB").getpixel((160, 300)) != (255, 255, 255)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("out", "as out.png"),
        ("out.xyz", "as out.png"),
        ("out.xbm", "as out.png"),
        ("nodir/out.png", "no folder"),
    ],
)
def test_a_drawing_that_cannot_be_written_is_told_before_the_model_is_asked(
    name: str, told: str, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No format, an unknown one, one without colours, or no such folder: status 2, no request."""
    with stub.running(stub.completion(LOCATED)) as server:
        words = ["--url", server.url, "--model", "m", picture, "a cat"]
        assert main(["locate", *words, "--draw", str(tmp_path / name)]) == 2
        assert server.requests == []
    assert told in capsys.readouterr().err


def test_a_drawing_that_the_disk_refuses_is_one_line(
    picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names the path, and the status is 2, although the model has answered by then."""
    (tmp_path / "taken.png").mkdir()
    media = [{"type": "image", "width": 640, "height": 480}]
    with stub.running(stub.completion(LOCATED, media=media)) as server:
        words = ["--url", server.url, "--model", "m", picture, "a cat"]
        assert main(["locate", *words, "--draw", str(tmp_path / "taken.png")]) == 2
    told = capsys.readouterr().err
    assert "taken.png" in told
    assert told.count("\n") == 1


def test_any_field_of_the_api_may_be_set(picture: str, tmp_path: Path) -> None:
    """For small print and long pages; JSON where it is some, else the words themselves."""
    folder, outcomes = str(Path(picture).parent), str(tmp_path / "o.jsonl")
    table = '{"columns": ["a"], "rows": []}'
    media = [{"type": "image", "width": 640, "height": 480}]
    for words, text in (
        (["ocr", picture], "A."),
        (["extract", picture, "name"], '{"name": null}'),
        (["extract", picture, "--table", "csv"], table),
        (["locate", picture, "a cat"], LOCATED),
        (["batch", folder, outcomes, "--question", "What?"], "A."),
    ):
        fields = ["--set", "max_tokens=4096", "--set", "detail=high", "--set", "system=简短"]
        with stub.running(stub.completion(text, media=media)) as server:
            assert main([*words, "--url", server.url, "--model", "m", *fields]) == 0
        body = server.requests[-1].body
        assert (body["max_tokens"], body["detail"]) == (4096, "high")
        assert body["messages"][0] == {"role": "system", "content": "简短"}


@pytest.mark.parametrize("word", ["max_tokens", "=5", "images=a.png", "messages=[]", "self=1"])
def test_what_is_no_field_is_not_set(
    word: str, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends with 2 for a word without name or ``=``, and for what the command asks itself."""
    assert main(["ocr", picture, "--set", word]) == 2
    assert "FIELD=VALUE" in capsys.readouterr().err


def test_locate_ends_with_1_where_nothing_is(
    picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Standard output stays empty, so a script can go by the status alone."""
    media = [{"type": "image", "width": 640, "height": 480}]
    with stub.running(stub.completion("There is none.", media=media)) as server:
        assert main(["locate", "--url", server.url, "--model", "m", picture, "a cat"]) == 1
    assert capsys.readouterr().out == ""


def test_a_picture_from_the_net_is_not_drawn_upon(capsys: pytest.CaptureFixture[str]) -> None:
    """An address with ``--draw`` ends with 2: its pixels are not on this machine."""
    assert main(["locate", "https://example.org/a.png", "a cat", "--draw", "b.png"]) == 2
    assert "--draw" in capsys.readouterr().err


def test_batch_writes_each_outcome_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second run asks only what the first could not."""
    requests, outcomes = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text('{"id": "a", "text": "1"}\n{"id": "b", "text": "2"}\n', "utf-8")
    words = ["batch", str(requests), str(outcomes), "--model", "m", "--concurrency", "1"]
    with stub.running(stub.completion("one"), stub.failure(400)) as server:
        assert main([*words, "--url", server.url]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("1 answered, 1 failed in ")
    assert err.startswith("b: ")
    with stub.running(stub.completion("two")) as server:
        assert main([*words, "--url", server.url]) == 0
        assert len(server.requests) == 1
    assert capsys.readouterr().out.startswith("1 answered, 1 kept from before, 0 failed in ")
    lines = [json.loads(line) for line in outcomes.read_text("utf-8").splitlines()]
    assert {line["id"]: line["text"] for line in lines} == {"a": "one", "b": "two"}


def test_batch_asks_a_question_of_every_picture(
    picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """IN is a folder: an outcome has its picture's name as its id; other files are not sent."""
    outcomes = tmp_path / "answers" / "out.jsonl"
    outcomes.parent.mkdir()
    folder = Path(picture).parent
    Image.new("RGB", (64, 48), "red").save(folder / "b.jpg")
    (folder / "notes.txt").write_text("no picture")
    with stub.running(stub.completion("white")) as server:
        words = ["--url", server.url, "--model", "m", "--question", "What colour?"]
        assert main(["batch", str(folder), str(outcomes), *words]) == 0
    lines = [json.loads(line) for line in outcomes.read_text("utf-8").splitlines()]
    told = {line["id"]: line["text"] for line in lines}
    assert told == {"a.png": "white", "b.jpg": "white"}
    sent = [request.body["messages"][-1]["content"] for request in server.requests]
    assert [text for _, text in sent] == [{"type": "text", "text": "What colour?"}] * 2
    kinds = {part["image_url"]["url"].partition(";")[0] for part, _ in sent}
    assert kinds == {"data:image/png", "data:image/jpeg"}


@pytest.mark.parametrize("name", ["in.jsonl", "in.csv"])
def test_batch_has_one_question_or_those_of_the_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A question that would not be heard is refused."""
    requests = tmp_path / name
    requests.write_text("text\nWhat?\n" if name == "in.csv" else '{"text": "What?"}\n', "utf-8")
    assert main(["batch", str(requests), str(tmp_path / "o"), "--question", "Q"]) == 2
    assert "has its own questions" in capsys.readouterr().err


def test_batch_of_a_folder_wants_a_question(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The option is named, not the argument of Python's ``batch``."""
    assert main(["batch", str(tmp_path), str(tmp_path / "o")]) == 2
    assert "is a folder: say with --question" in capsys.readouterr().err


def test_batch_reads_what_excel_in_chinese_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not UTF-8 ends with 2 and names gb18030; with that as ``--encoding`` the file is read."""
    requests, outcomes = tmp_path / "in.csv", tmp_path / "o.jsonl"
    requests.write_text("id,text\n甲,你好\n", "gb18030")
    with stub.running(stub.completion("好")) as server:
        words = ["batch", str(requests), str(outcomes), "--url", server.url, "--model", "m"]
        assert main(words) == 2
        assert "gb18030" in capsys.readouterr().err
        assert main([*words, "--encoding", "gb18030"]) == 0
    assert json.loads(outcomes.read_text("utf-8"))["id"] == "甲"


def test_batch_shows_no_bar_where_rich_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal too: nobody asked for one."""
    monkeypatch.setitem(sys.modules, "rich", None)
    requests = tmp_path / "in.jsonl"
    requests.write_text('{"text": "What?"}\n', "utf-8")
    with stub.running(stub.completion("A.")) as server:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        words = ["batch", str(requests), str(tmp_path / "o"), "--url", server.url, "--model", "m"]
        assert main(words) == 0
    assert capsys.readouterr().out.startswith("1 answered")


def test_commands_ask_the_real_model(
    server: ServerProcess, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each once; the colour is one that the demo model knows."""
    circle = str(pictures / "red_circle.jpg")
    asked = ["--url", server.url]
    assert main(["extract", circle, "colour", *asked]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"colour"}
    assert main(["ocr", circle, *asked]) == 0
    capsys.readouterr()
    assert main(["locate", circle, "the red circle", "--json", *asked]) in (0, 1)
    assert isinstance(json.loads(capsys.readouterr().out), list)
    requests, outcomes = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    line = {"id": "a", "text": "What colour is the circle?", "image": circle, "temperature": 0}
    requests.write_text(json.dumps(line) + "\n", "utf-8")
    assert main(["batch", str(requests), str(outcomes), *asked]) == 0
    assert "red" in json.loads(outcomes.read_text("utf-8"))["text"].lower()
