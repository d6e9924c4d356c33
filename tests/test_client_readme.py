"""The client's README tells of everything public, and its code runs."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import qwen2vl_client
from qwen2vl_client import Client, Conversation, TextStream
from qwen2vl_client.cli.ask import build_parser

from tests import stub_server as stub

README = (Path(__file__).parents[1] / "clients" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
CODE = " ".join(re.findall(r"`[^`]+`", PROSE))


def public_names(kind: type) -> list[str]:
    return [
        name
        for name, _ in inspect.getmembers(kind)
        if not name.startswith("_") and name != "client"
    ]


@pytest.mark.parametrize("kind", [Client, Conversation, TextStream])
def test_every_public_method_is_named(kind: type) -> None:
    missing = [name for name in public_names(kind) if not re.search(rf"\b{name}\b", CODE)]
    assert missing == []


def test_every_error_is_in_the_tree() -> None:
    errors = [name for name in qwen2vl_client.__all__ if name.endswith("Error")]
    tree = README[README.index("## Errors") :]
    assert [name for name in errors if name not in tree] == []


def test_every_option_is_named() -> None:
    options = re.findall(r"--[a-z-]+", build_parser("ask").format_help())
    assert [option for option in set(options) - {"--help"} if option not in README] == []


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_its_code_runs(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff\xe0")

    def either(handler: stub.Handler) -> None:
        streamed = handler.stub.requests[-1].body.get("stream")
        whole = stub.completion("A stub's answer.")
        (stub.events(stub.whole_stream("A stub's answer.")) if streamed else whole)(handler)

    with stub.running(either) as server:
        monkeypatch.setenv("QWEN2VL_BASE_URL", server.url)
        block = BLOCKS[number].replace("http://127.0.0.1:8000/v1", server.url)
        exec(compile(block, f"README block {number}", "exec"), {})
    assert "A stub's answer." in capsys.readouterr().out
    assert any(request.body for request in server.requests)
