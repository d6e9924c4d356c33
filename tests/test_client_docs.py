"""Code of the client's pages that other tests do not run: shell commands, and OpenAI's client."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.profile import load_profile
from tests import stub_server as stub
from tests.markdown import ROOT, Block, Document
from tests.served import served
from tests.test_tools_flow import Agent
from tests.test_uses_docs import PICTURES, answer

ADDRESS = "http://127.0.0.1:8000/v1"
SHELL = [block for block in Document("clients/README.md").blocks if block.language == "bash"]
"""Those of the English page; test_docs.py holds the two pages' code to be the same."""
SAID = [
    ["SALE 50% OFF", "Tea House", "Item,Qty", "the yellow star", "2 answered"],
    ["SALE 50% OFF", "total time"],
]
"""What each block prints, by its place."""


def answered(handler: stub.Handler) -> None:
    """Answer as Qwen2-VL would, in pieces where that is asked for."""
    if handler.stub.requests[-1].body.get("stream"):
        stub.events(stub.whole_stream("SALE 50% OFF"))(handler)
    else:
        answer(handler)


def python_of(page: str) -> str:
    (block,) = (block.text for block in Document(page).blocks if block.language == "python")
    return block


@pytest.mark.parametrize(
    ("block", "said"), [*zip(SHELL, SAID, strict=True)], ids=lambda one: getattr(one, "line", "")
)
def test_the_readmes_commands_run(block: Block, said: list[str], tmp_path: Path) -> None:
    """Each as it stands, but for the server's address, in a folder with the files it names."""
    for name in ("a.jpg", "page1.jpg", "page2.jpg", "receipt.jpg", "street.jpg", "my.jpg"):
        Image.new("RGB", (195, 195), "white").save(tmp_path / name)
    for name in ("a.png", "sheet.png"):
        shutil.copy(PICTURES / "table.png", tmp_path / name)
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": "b", "image": "a.jpg"}\n')
    (tmp_path / "clients").symlink_to(ROOT / "clients")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("QWEN2VL_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with stub.running(answered) as server:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text.replace(ADDRESS, server.url)],
            cwd=tmp_path,
            env={**kept, "PATH": path, "QWEN2VL_BASE_URL": server.url},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    assert [words for words in said if words not in done.stdout] == []


def test_a_batch_of_openais_client_is_made_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's program, with the line of input that the page shows, without its pauses."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "sleep", lambda _, sleep=time.sleep: sleep(0.02))
    page = "docs/batches.md"
    (line,) = (block.text for block in Document(page).blocks if block.language == "json")
    (tmp_path / "requests.jsonl").write_text(line)
    chosen = ["batches.enabled=true", f"batches.folder={tmp_path / 'kept'}"]
    with served(load_profile("demo", chosen), Keys()) as server:
        program = python_of(page).replace(ADDRESS, f"{server.root}/v1")
        exec(compile(program, page, "exec"), {})
    assert capsys.readouterr().out.startswith("page-1 ")


def test_the_tools_of_the_page_are_called() -> None:
    """They are tools as OpenAI's client sends them, and the first is what the model calls."""
    page = "docs/tools.md"
    found: dict[str, object] = {}
    exec(compile(python_of(page), page, "exec"), found)
    engine = Agent()
    engine.arguments = json.dumps({"city": "北京"})
    with served(load_profile("demo", ["server.tools=experimental"]), Keys(), engine) as server:
        messages = [{"role": "user", "content": "What is the weather?"}]
        told = server.chat(messages=messages, tools=found["tools"], tool_choice="auto")
    (call,) = told.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": engine.arguments}
