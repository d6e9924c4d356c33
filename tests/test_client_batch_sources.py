"""What a batch is given: lists, JSONL, CSV and folders; what tells one request from another."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from qwen2vl_client import Client, InvalidArgumentError, StoredFile
from qwen2vl_client.batch import Request, batch, from_csv, from_jsonl
from qwen2vl_client.batch.sources import opened
from qwen2vl_client.tasks import Task, ask_product, ocr
from qwen2vl_client.tasks.task import as_reply

from tests import stub_server as stub
from tests.test_client_batch import Echo, echo


def test_jsonl_of_both_shapes(tmp_path: Path) -> None:
    """Ours, with pictures beside the file, and a line of OpenAI's batch API."""
    Image.new("RGB", (30, 30), "red").save(tmp_path / "a.png")
    own = {"id": "one", "text": "What?", "image": "a.png", "max_tokens": 5}
    message = {"role": "user", "content": "Hi"}
    theirs = {"custom_id": "two", "method": "POST", "url": "/v1/chat/completions"}
    theirs |= {"body": {"model": "m", "messages": [message], "temperature": 0}}
    source = tmp_path / "in.jsonl"
    source.write_text(f"{json.dumps(own)}\n\n{json.dumps(theirs)}\n", "utf-8")
    with stub.running(echo) as server, Client(server.url, model="stub-model") as client:
        report = batch(client, source, concurrency=1)
    assert [(one.id, one.text) for one in report.outcomes] == [
        ("one", "answer to What?"),
        ("two", "answer to Hi"),
    ]
    first, second = (request.body for request in server.requests)
    picture = first["messages"][1]["content"][0]["image_url"]["url"]
    assert base64.b64decode(picture.partition(",")[2]) == (tmp_path / "a.png").read_bytes()
    assert (first["max_tokens"], first["include_media_info"]) == (5, True)
    assert second["messages"] == [message]
    assert (second["model"], second["temperature"]) == ("m", 0)


def test_csv_and_folder(tmp_path: Path) -> None:
    """Rows by their headings, also as Excel in Chinese writes them; pictures by their names."""
    sheet = tmp_path / "in.csv"
    with sheet.open("w", encoding="gb18030", newline="") as file:
        csv.writer(file).writerows(
            [["id", "text", "note"], ["甲", "你好", "x"], ["乙", "再见", ""]]
        )

    report = batch(Echo(), from_csv(sheet, encoding="gb18030"))
    assert [(one.id, one.text) for one in report.outcomes] == [
        ("甲", "answer to 你好"),
        ("乙", "answer to 再见"),
    ]
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n")
    client = Echo()
    report = batch(client, tmp_path, each=ocr.task)
    assert [one.id for one in report.outcomes] == ["a.jpg", "b.PNG"]


def test_rows_of_empty_cells_are_none(tmp_path: Path) -> None:
    """As Excel writes them where something stood once, in the middle and at the end."""
    source = tmp_path / "in.csv"
    source.write_text("id,text\n1,a\n,\n\n,,\n2,b\n,\n,\n", "utf-8")
    requests, count = opened(source)
    assert [one.id for one in requests] == ["1", "2"]
    assert count == 2


@pytest.mark.parametrize("text", ["id;text\n1;a\n", "编号,问题\n1,a\n", "ID,Text\n1,a\n"])
def test_a_csv_without_the_headings_names_those_it_has(tmp_path: Path, text: str) -> None:
    """Parted by semicolons, say, as Excel writes it in much of Europe."""
    source = tmp_path / "in.csv"
    source.write_text(text, "utf-8-sig")
    told = rf"in\.csv has the headings '{text[:2]}.*none of them is text.*parted by commas"
    with pytest.raises(InvalidArgumentError, match=told):
        batch(Echo(), source)


def test_hidden_files_are_no_pictures_of_a_folder(tmp_path: Path) -> None:
    """What macOS leaves beside a picture on a foreign disk would fail in every run."""
    for name in ("a.jpg", "._a.jpg"):
        (tmp_path / name).write_bytes(b"\xff\xd8\xff")
    requests, count = opened(tmp_path, ocr.task)
    assert [one.id for one in requests] == ["a.jpg"]
    assert count == 1


def test_each_makes_a_task_of_a_line_too(tmp_path: Path) -> None:
    """As of an item of a list; ids stay those of the lines."""
    source = tmp_path / "in.jsonl"
    source.write_text('{"id": "x", "town": "Aa"}\n\n{"town": "Bb"}\n')
    report = batch(Echo(), source, each=lambda line: Task(f"Where is {line['town']}?", as_reply))
    assert [(one.id, one.text) for one in report.outcomes] == [
        ("x", "answer to Where is Aa?"),
        ("1", "answer to Where is Bb?"),
    ]


@pytest.mark.parametrize("name", ["in.jsonl", "in.csv"])
def test_a_file_in_another_encoding_is_told_and_read_by_its_name(tmp_path: Path, name: str) -> None:
    """The error names the file and advises ``gb18030``, with which both kinds are read."""
    source = tmp_path / name
    text = '{"text": "你好"}\n' if name == "in.jsonl" else "id,text\n1,你好\n"
    source.write_text(text, encoding="gb18030")
    with pytest.raises(InvalidArgumentError, match=r"in\..* cannot be read as utf-8.*gb18030"):
        batch(Echo(), source)
    (outcome,) = batch(Echo(), source, encoding="gb18030").outcomes
    assert outcome.text == "answer to 你好"
    with pytest.raises(InvalidArgumentError, match="unknown encoding: none"):
        batch(Echo(), source, encoding="none")


def test_a_mark_at_the_beginning_and_one_that_is_missing(tmp_path: Path) -> None:
    """UTF-8 is read with it or without, however it is spelt; UTF-16 without it is told."""
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a"}\n', encoding="utf-8-sig")
    for encoding in ("utf-8", "UTF8"):
        assert batch(Echo(), source, encoding=encoding).outcomes[0].text == "answer to a"
    source.write_bytes('{"text": "a"}\n'.encode("utf-16-le"))
    for encoding in ("utf-16", "undefined", "a\0"):
        with pytest.raises(InvalidArgumentError, match=r"in\.jsonl cannot be read as"):
            batch(Echo(), source, encoding=encoding)


def test_a_field_too_large_for_csv_is_told(tmp_path: Path) -> None:
    """File, line, limit and what to do: a quote left open takes in all that follows."""
    source = tmp_path / "in.csv"
    source.write_text(f'text\na\n"{"a" * 200_000}"\n')
    told = r"in\.csv, line 3: field larger than field limit \(131072\); .*quote.*\.jsonl"
    with pytest.raises(InvalidArgumentError, match=told):
        batch(Echo(), source)


def test_fields_hold_where_a_request_does_not_say_otherwise(tmp_path: Path) -> None:
    """They are part of what is asked: with others the outcomes are not taken for answered."""
    out = tmp_path / "out.jsonl"
    requests = [{"text": "a", "max_tokens": 5}, {"text": "b"}]
    with stub.running(echo) as server, Client(server.url, "", "m") as client:
        batch(client, requests, fields={"max_tokens": 7}, concurrency=1, output=out)
        assert [request.body["max_tokens"] for request in server.requests] == [5, 7]
        with pytest.raises(InvalidArgumentError, match="another request under the id '1'"):
            batch(client, requests, fields={"max_tokens": 8}, output=out)


def test_fields_go_before_the_defaults_of_a_use() -> None:
    """But not before what a task was given itself, be it the same as the default."""
    tasks = [ocr.task(b"\xff\xd8\xff"), ocr.task(b"\xff\xd8\xff", temperature=0.0, max_tokens=9)]
    fields = {"max_tokens": 4096, "temperature": 0.5, "seed": 3}
    with stub.running(echo) as server, Client(server.url, "", "m") as client:
        batch(client, tasks, fields=fields, concurrency=1)
    sent = [request.body for request in server.requests]
    assert [(one["max_tokens"], one["temperature"], one["seed"]) for one in sent] == [
        (4096, 0.5, 3),
        (9, 0.0, 3),
    ]
    assert [one["repetition_penalty"] for one in sent] == [1.0, 1.0]


def test_a_system_message_among_the_fields_is_for_requests_without_one() -> None:
    """A text, messages or a task keep their own, also ``None``, by which none is sent."""
    own = {"role": "system", "content": "own"}
    question = {"role": "user", "content": "q"}
    picture = b"\xff\xd8\xff"
    requests = [
        ({"text": "a"}, "FIELDS"),
        ({"text": "b", "system": "own"}, "own"),
        ({"text": "c", "system": None}, None),
        ({"messages": [own, question]}, "own"),
        ({"messages": [{**own, "role": "developer"}, question]}, "own"),
        ({"messages": [question]}, "FIELDS"),
        ({"messages": [question], "system": "own"}, "own"),
        (ocr.task(picture), "FIELDS"),
        (ocr.task(picture, system="own"), "own"),
        (ask_product.task(picture, "What is it?", "own"), "own"),
    ]
    with stub.running(echo) as server, Client(server.url, "", "m") as client:
        given = [request for request, _ in requests]
        report = batch(client, given, fields={"system": "FIELDS"}, concurrency=1)
    assert not report.failed
    first = [request.body["messages"][0] for request in server.requests]
    told = [one["content"].split()[-1] if one["role"] != "user" else None for one in first]
    assert told == [system for _, system in requests]


def test_a_buffer_counts_by_its_content(tmp_path: Path) -> None:
    """A changed picture is another request when the batch is started again."""
    out = tmp_path / "out.jsonl"

    def run(content: bytes) -> None:
        with stub.running(echo) as server, Client(server.url, "", "m") as client:
            batch(client, [ocr.task(io.BytesIO(b"\xff\xd8\xff" + content))], output=out)

    run(b"one")
    run(b"one")
    with pytest.raises(InvalidArgumentError, match="another request"):
        run(b"two")


def test_requests_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    """By place, id or line; a folder without ``each``, a bare question and bad numbers as well."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\nnot json\n')
    for requests, words in (
        ([7], "request 0 is a int"),
        ([{"id": "x"}], "request x asks nothing"),
        ([{"id": "x", "text": "a"}, {"id": "x", "text": "b"}], "two requests have the id 'x'"),
        (bad, "line 2 is no JSON: Expecting value at column 1"),
        (tmp_path, "say what to ask"),
        ("What is this?", "no file or folder"),
    ):
        with pytest.raises(InvalidArgumentError, match=words):
            batch(Echo(), requests)
    for arguments in ({"concurrency": 0}, {"retries": -1}):
        with pytest.raises(InvalidArgumentError, match="must be"):
            batch(Echo(), [], **arguments)  # type: ignore[arg-type]


def test_a_jsonl_file_is_read_line_by_line(tmp_path: Path) -> None:
    """The requests before a broken line are there; the error comes when its turn does."""
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a"}\n{"text": "b"}\nbroken\n')
    requests = from_jsonl(source)
    first = next(requests)
    assert isinstance(first, Request)
    assert (first.id, next(requests).id) == ("0", "1")
    with pytest.raises(InvalidArgumentError):
        next(requests)


BROKEN = [
    {"messages": "hi"},
    {"messages": ["hi"]},
    {"messages": 7},
    {"text": 7},
    {"text": "x", "image": {"a": 1}},
    {"text": "x", "picture": "a.jpg"},
    {"text": "x", "timeout": "soon"},
    {"text": "x\ud800"},
]


@pytest.mark.parametrize("fields", [{}, {"system": "S"}])
def test_a_request_that_cannot_be_sent_fails_alone(tmp_path: Path, fields: dict[str, str]) -> None:
    """Whatever a line holds it is one failed outcome, and the others are answered."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"text": "a"}, *BROKEN, {"text": "x", "self": 1}, {"text": "b"}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with stub.running(echo) as server, Client(server.url, "", "m") as client:
        report = batch(client, source, fields=fields, output=out)
    assert (report.answered, len(report.failed)) == (3, len(BROKEN))
    assert [one.id for one in report.failed] == [str(1 + n) for n in range(len(BROKEN))]
    assert len(out.read_text("utf-8").splitlines()) == len(lines)


def test_a_name_that_is_not_utf_8_is_an_id_like_any_other(tmp_path: Path) -> None:
    """One line each, and started again nothing is asked twice; so with half a surrogate pair."""
    folder, out = tmp_path / "in", tmp_path / "out.jsonl"
    folder.mkdir()
    names = [os.fsdecode("照片".encode("gbk") + b".jpg"), "ok.jpg"]
    for name in names:
        (folder / name).write_bytes(b"\xff\xd8\xff")
    answered = []
    for _ in range(2):
        with stub.running(echo) as server, Client(server.url, "", "m") as client:
            report = batch(client, folder, each=ocr.task, output=out)
            answered.append((report.answered, report.resumed))
            assert sorted(one.id for one in report.outcomes) == sorted(names)
    assert answered == [(2, 0), (0, 2)]
    assert len(out.read_text("utf-8").splitlines()) == 2

    source, out = tmp_path / "in.jsonl", tmp_path / "out2.jsonl"
    source.write_text('{"id": "\\ud800", "text": "a"}\n{"id": "?", "text": "b"}\n')
    for kept in (0, 2):
        assert batch(Echo(), source, output=out).resumed == kept
    assert [json.loads(line)["id"] for line in out.read_text("utf-8").splitlines()] == [
        "\ud800",
        "?",
    ]


def test_the_id_of_an_uploaded_file_stays_one(tmp_path: Path) -> None:
    """From whatever folder the requests are read; a file of that name beside them goes first."""
    uploaded, local, long = "file-" + "a" * 24, "file-" + "b" * 24, "file-" + "c" * 400
    (tmp_path / local).write_bytes(b"\xff\xd8\xff")
    ids = [uploaded, local, long]
    lines = [json.dumps({"text": "x", "image": one}) + "\n" for one in ids]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    rows = "".join(f"x,{one}\n" for one in ids)
    (tmp_path / "in.csv").write_text(f"text,image\n{rows}")
    for name in ("in.jsonl", "in.csv"):
        with stub.running(echo) as server, Client(server.url, "", "m") as client:
            assert batch(client, tmp_path / name, concurrency=1).answered == 3
        shown = [one.body["messages"][1]["content"][0]["image_url"] for one in server.requests]
        assert shown[0] == {"file_id": uploaded}
        assert shown[1]["url"].startswith("data:image/jpeg")
        assert shown[2] == {"file_id": long}


def test_a_csv_is_counted_by_its_rows(tmp_path: Path) -> None:
    """A line break within quotes makes no second row of one."""
    source = tmp_path / "in.csv"
    source.write_text('text\n"a\nb"\nc\n\n')
    requests, total = opened(source)
    assert total == len(list(requests)) == 2


def stored(file_id: str) -> StoredFile:
    return StoredFile(file_id, "a.jpg", "vision", 1, 0, None, {})


def spooled(content: bytes) -> Any:
    file = tempfile.SpooledTemporaryFile()  # noqa: SIM115  (closed when it is forgotten)
    file.write(content)
    return file


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (stored("file-" + "a" * 24), stored("file-" + "b" * 24)),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((2, 8, 3), np.uint8)),
        (spooled(b"\xff\xd8\xffone"), spooled(b"\xff\xd8\xfftwo")),
    ],
    ids=["uploaded", "array", "temporary"],
)
def test_another_picture_is_another_request(tmp_path: Path, before: Any, after: Any) -> None:
    """An uploaded file by its id, an array with its shape, a file without a name by content."""
    out = tmp_path / "out.jsonl"

    def run(picture: Any) -> int:
        return batch(Echo(), [Task("x", as_reply, (picture,))], output=out).resumed

    assert (run(before), run(before)) == (0, 1)
    with pytest.raises(InvalidArgumentError, match="the requests have changed"):
        run(after)
