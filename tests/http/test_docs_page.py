"""``/docs``: all of the OpenAPI document as a page that needs nothing from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest
import requests

from qwen2vl_serve.app import build_app
from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.http.docs_page import page
from qwen2vl_serve.launch.resources import media_loader
from qwen2vl_serve.profile import load_profile
from qwen2vl_serve.protocol.chat import ChatRequest
from tests.fake_engine import FakeEngine
from tests.served import Served, served


class Reader(HTMLParser):
    """Gathers tags, attributes, ids and the text of ``code``."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.codes: list[str] = []
        self._code = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._code = tag == "code"

    def handle_data(self, data: str) -> None:
        if self._code:
            self.codes.append(data)
            self._code = False

    def values(self, name: str) -> set[str]:
        return {value for key, value in self.attributes if key == name}


@pytest.fixture(scope="module")
def api() -> Iterator[Served]:
    with served(load_profile("demo"), Keys(())) as one:
        yield one


def test_the_page_needs_nothing_from_elsewhere(api: Served) -> None:
    """No script, frame, picture or address but its own; the browser is told to allow none."""
    answer = api.request("GET", "/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; ")
    assert "script-src" not in answer.headers["content-security-policy"]
    found = Reader(answer.text)
    assert not found.tags & {"script", "link", "img", "iframe", "object", "form", "base"}
    assert not found.values("src")
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    inner = {f"#{name}" for name in found.values("id")}
    assert found.values("href") - inner == {"/openapi.json"}
    assert "//" not in answer.text.replace(" // ", "")


def test_every_operation_and_every_field_is_on_it(api: Served) -> None:
    """Each route by its method with its statuses, each object where links lead with its fields."""
    document = api.request("GET", "/openapi.json").json()
    text = api.request("GET", "/docs").text
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            shown = part(text, f"<summary><code>{method.upper()} {path}</code>")
            assert re.findall(r"<h4>(\d+)</h4>", shown) == list(operation["responses"])
    schemas = document["components"]["schemas"]
    assert set(ChatRequest.model_fields) <= set(schemas["ChatRequest"]["properties"])
    for name, schema in schemas.items():
        fields = re.findall(r"<tr><td><code>(.+?)</code>", part(text, f'<details id="{name}">'))
        assert fields == list(schema.get("properties", ()))


def part(text: str, beginning: str) -> str:
    """What the page tells from here to the end of the route or object."""
    assert text.count(beginning) == 1
    return text.partition(beginning)[2].partition("</details>")[0]


@pytest.mark.parametrize("path", ["/redoc", "/docs/oauth2-redirect", "/docs/"])
def test_the_pages_with_scripts_are_gone(api: Served, path: str) -> None:
    """FastAPI's own paths, and ``/docs/``, are a 404 in the API's form of error."""
    answer = api.request("GET", path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_what_stands_in_the_document_is_text() -> None:
    """Names and descriptions cannot become markup."""
    profile = load_profile("demo")
    app = build_app(FakeEngine(), media_loader(profile), profile, Keys(()))
    document = app.openapi()
    evil = "<script>alert(1)</script>\"'&"
    schemas = {**document["components"]["schemas"], evil: {"type": evil, "description": evil}}
    paths = {f"/{evil}": {"get": {"summary": evil, "responses": {evil: {"description": evil}}}}}
    shown = page({"info": document["info"], "components": {"schemas": schemas}, "paths": paths})
    assert "script" not in Reader(shown).tags


def test_with_a_key_the_page_is_closed_as_the_rest() -> None:
    """Without the key it is a 401; with it as ``Bearer`` the page comes."""
    with served(load_profile("demo"), Keys(("sk-one",))) as api:
        assert api.request("GET", "/docs").status_code == 401
        answer = requests.get(
            api.root + "/docs", headers={"Authorization": "Bearer sk-one"}, timeout=60
        )
        assert answer.status_code == 200
