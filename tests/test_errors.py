"""The error tree: what clients and operators may rely on."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from qwen2vl_serve import errors
from qwen2vl_serve.errors import (
    APIError,
    EngineUnavailable,
    RateLimited,
    RequestError,
    ServeError,
)
from qwen2vl_serve.http.envelope import error_response

PACKAGE = Path(errors.__file__).parent


def below(kind: type[ServeError]) -> Iterator[type[ServeError]]:
    """Every class under ``kind``, itself not included."""
    for child in kind.__subclasses__():
        yield child
        yield from below(child)


CLASSES: list[type[ServeError]] = list(below(ServeError))
ANSWERS = [kind for kind in CLASSES if issubclass(kind, APIError) and kind.code is not None]
LEAVES = [kind for kind in CLASSES if not kind.__subclasses__()]


def drawn() -> Iterator[tuple[str, str | None, list[str]]]:
    """Yield name, parent and remark of each line of the tree in the module's docstring."""
    lines = inspect.cleandoc(errors.__doc__ or "").partition("::\n\n")[2].splitlines()
    parents: list[str] = []
    for line in lines:
        found = re.fullmatch(r" {4}([│├└─ ]*)(\w+) *(.*)", line)
        assert found, f"not a line of the tree: {line!r}"
        depth = len(found[1]) // 4
        del parents[depth:]
        yield found[2], parents[-1] if parents else None, found[3].split()
        parents.append(found[2])


def test_the_drawn_tree_is_the_tree_of_classes() -> None:
    """Each class stands in the docstring once, under its own parent, and nothing else does."""
    in_docstring = [(name, parent) for name, parent, _ in drawn()]
    in_code = [("ServeError", None), *((kind.__name__, kind.__base__.__name__) for kind in CLASSES)]
    assert sorted(in_docstring, key=str) == sorted(in_code, key=str)


def test_the_drawn_statuses_and_codes_are_those_of_the_classes() -> None:
    """A line of the tree that names a status or a code names the class's own."""
    remarks = {name: remark for name, _, remark in drawn()}
    for kind in ANSWERS:
        assert issubclass(kind, APIError)
        assert remarks[kind.__name__][:2] == [str(kind.status), kind.code]
    assert remarks["RequestError"][0] == str(RequestError.status)


def test_no_two_errors_share_a_code() -> None:
    """A client that switches on ``code`` tells every error from every other."""
    codes = [kind.code for kind in ANSWERS if issubclass(kind, APIError)]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z][a-z_]+", code or "") for code in codes)


@pytest.mark.parametrize("kind", [k for k in LEAVES if issubclass(k, APIError)])
def test_every_leaf_is_an_answer_of_its_own(kind: type[APIError]) -> None:
    """Status, type and code belong together; the message and the field are the caller's."""
    assert kind.code
    assert kind.type == ("server_error" if kind.status >= 500 else "invalid_request_error")
    assert 400 <= kind.status < 600
    error = kind("n is 9; at most 8 is served.", param="n")
    assert str(error) == error.message
    answer = error_response(error)
    assert answer.status_code == kind.status
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(bytes(answer.body)) == {
        "error": {
            "message": "n is 9; at most 8 is served.",
            "type": kind.type,
            "param": "n",
            "code": kind.code,
        }
    }
    assert kind("x").body()["error"]["param"] is None


@pytest.mark.parametrize("kind", [k for k in CLASSES if issubclass(k, APIError)])
def test_headers_tell_when_to_come_back_and_how_to_sign_in(kind: type[APIError]) -> None:
    """503 and 429 carry whole seconds in Retry-After, 401 names the scheme, others say nothing."""
    headers = error_response(kind("x")).headers
    assert ("retry-after" in headers) == issubclass(kind, EngineUnavailable | RateLimited)
    assert int(headers.get("retry-after", "1")) >= 1
    assert ("www-authenticate" in headers) == (kind.status == 401)


def test_one_answer_cannot_change_the_next() -> None:
    """The headers of an answer are its own copy, not the class's."""
    answer = error_response(EngineUnavailable("x"))
    answer.headers["retry-after"] = "999"
    assert error_response(EngineUnavailable("x")).headers["retry-after"] != "999"


@cache
def called() -> frozenset[str]:
    """Names of what is called anywhere in the package, errors among them."""
    trees = (
        ast.parse(path.read_text("utf-8"))
        for path in PACKAGE.rglob("*.py")
        if path.name != "errors.py"
    )
    return frozenset(
        node.func.id
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    )


@pytest.mark.parametrize("kind", LEAVES)
def test_no_leaf_is_without_use(kind: type[ServeError]) -> None:
    """An error that nothing raises is a promise in the documentation that nobody keeps."""
    assert kind.__name__ in called()
