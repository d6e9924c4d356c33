"""The files of a batch: every fault by its line, every outcome as OpenAI writes it."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl_serve.batches import lines
from qwen2vl_serve.errors import InvalidValue

BODY = {"messages": [{"role": "user", "content": "Hello"}]}


def line(custom_id: str = "a", **fields: Any) -> dict[str, Any]:
    whole = {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": BODY,
    }
    return whole | fields


def written(path: Path, *given: dict[str, Any] | bytes) -> Path:
    path.write_bytes(
        b"\n".join(one if isinstance(one, bytes) else json.dumps(one).encode() for one in given)
    )
    return path


def test_requests_are_found_where_they_stand(tmp_path: Path) -> None:
    """Blank lines, CRLF and a last line without an end are all the same."""
    body = BODY | {"user": "é" * 50}
    path = written(
        tmp_path / "in", b"", json.dumps(line("a")).encode() + b"\r", b"  ", line("b", body=body)
    )
    found, faults = lines.read(path, 10, 10_000)
    assert faults == []
    assert [one.custom_id for one in found] == ["a", "b"]
    assert [json.loads(one.body(path)) for one in found] == [BODY, body]


def test_a_mark_of_utf_8_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    """As editors on Windows write it; the request behind it is found."""
    path = written(tmp_path / "in", codecs.BOM_UTF8 + json.dumps(line("a")).encode(), line("b"))
    found, faults = lines.read(path, 10, 10_000)
    assert faults == []
    assert [json.loads(one.body(path)) for one in found] == [BODY, BODY]
    path.write_bytes(codecs.BOM_UTF8)
    assert [fault.code for fault in lines.read(path, 10, 1000)[1]] == ["empty_file"]


@pytest.mark.parametrize(
    ("faulty", "told"),
    [
        (
            b'{"a": 1',
            "The line is not valid JSON in UTF-8: EOF while parsing an object at column 7.",
        ),
        (line(method="post"), "method must be 'POST', not 'post'."),
        (line(method=None), "method must be 'POST', not null."),
        (line(url="/v1/embeddings"), "url must be '/v1/chat/completions', not '/v1/embeddings'."),
        (line(custom_id=7), "custom_id must be a string of 1 to 512 characters, not 7."),  # type: ignore[arg-type]  # the fault
        (line(n=1), "'n' is not known here; a line has custom_id, method, url and body."),
    ],
)
def test_a_fault_tells_what_is_wrong_and_what_is_right(
    tmp_path: Path, faulty: dict[str, Any] | bytes, told: str
) -> None:
    """With the value that was given; a place is a column of the line that ``line`` names."""
    _, (fault,) = lines.read(written(tmp_path / "in", line("first"), faulty), 10, 1000)
    assert (fault.message, fault.line) == (told, 2)


@pytest.mark.parametrize(
    ("faulty", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"[]", "invalid_json_line", None),
        (b'{"custom_id": "\\ud800"}', "invalid_json_line", None),
        (line(custom_id=""), "invalid_value", "custom_id"),
        (line(custom_id=7), "invalid_value", "custom_id"),  # type: ignore[arg-type]  # the fault
        (line(custom_id="x" * 513), "invalid_value", "custom_id"),
        (line(method="GET"), "invalid_value", "method"),
        (line(url="/v1/embeddings"), "invalid_url", "url"),
        (line(body="x"), "invalid_type", "body"),
        (line(body=BODY | {"stream": True}), "unsupported_parameter", "body.stream"),
        (line(other=1), "unsupported_parameter", "other"),
        (line("first"), "duplicate_custom_id", "custom_id"),
        (line(body={"x": "y" * 2000}), "request_too_large", None),
    ],
)
def test_a_fault_is_told_with_its_line(
    tmp_path: Path, faulty: dict[str, Any] | bytes, code: str, param: str | None
) -> None:
    """Counted from 1, blank lines included, as an editor shows them."""
    path = written(tmp_path / "in", line("first"), b"", faulty, line("last"))
    found, (fault,) = lines.read(path, 10, 1000)
    assert (fault.code, fault.param, fault.line) == (code, param, 3)
    assert [one.custom_id for one in found] == ["first", "last"]


def test_a_line_of_too_many_values_is_not_read(tmp_path: Path) -> None:
    """As a request's body is not: each value takes a hundred times its bytes in memory."""
    crowd = line("crowd", body=BODY | {"ignored": [0] * 500_000})
    found, (fault,) = lines.read(written(tmp_path / "in", line("first"), crowd), 10, 2**21)
    assert (fault.code, fault.line, [one.custom_id for one in found]) == (
        "invalid_json_line",
        2,
        ["first"],
    )


def test_a_file_has_at_most_so_many_requests(tmp_path: Path) -> None:
    """And none at all is a fault as well."""
    many = written(tmp_path / "in", *(line(str(number)) for number in range(4)))
    found, (fault,) = lines.read(many, 3, 1000)
    assert (len(found), fault.code, fault.line) == (3, "too_many_items", 4)
    _, (fault,) = lines.read(written(tmp_path / "none", b" \n"), 3, 1000)
    assert (fault.code, fault.line) == ("empty_file", None)


def test_faults_are_told_up_to_a_hundred(tmp_path: Path) -> None:
    """A picture sent for a list of requests is no reason for a million faults."""
    _, faults = lines.read(written(tmp_path / "in", *[b"x"] * 500), 1000, 1000)
    assert len(faults) == lines.MOST_ERRORS


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_faulty(tmp_path_factory: Any, data: bytes) -> None:
    """Nothing is raised, whatever was uploaded."""
    path = tmp_path_factory.mktemp("any") / "in"
    path.write_bytes(data)
    found, faults = lines.read(path, 10, 100)
    assert not found
    assert faults


def test_outcomes_are_openais() -> None:
    """An answer, an error that it got, and a request that nobody asked."""
    answer = lines.answered("batch_req_1", 'a"é', "r1", 200, b'{"choices":[]}')
    assert json.loads(answer) == {
        "id": "batch_req_1",
        "custom_id": 'a"é',
        "response": {"status_code": 200, "request_id": "r1", "body": {"choices": []}},
        "error": None,
    }
    error = InvalidValue("n is 9.", param="n")
    refused = lines.refused("batch_req_2", "b", "r2", error)
    told = json.loads(refused)
    assert told["response"] == {"status_code": 400, "request_id": "r2", "body": error.body()}
    unanswered = lines.unanswered("batch_req_3", "c", "batch_expired", "Too late.")
    left = json.loads(unanswered)
    assert left["response"] is None
    assert left["error"] == {"code": "batch_expired", "message": "Too late."}
    for one in (answer, refused, unanswered):
        assert one.endswith(b"\n")
        assert one.count(b"\n") == 1
