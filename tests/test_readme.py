"""The commands and programs of the README do what the README says, on the real server."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from qwen2vl_serve import cli
from tests.conftest import ServerProcess
from tests.launch.test_serve import self_signed
from tests.markdown import ROOT, Block, Document

README = Document("README.md")
ADDRESS = "http://127.0.0.1:8000"
NOT_RUN = {
    "gpu": "needs NVIDIA cards and the weights of Qwen2-VL",
    "boot": "installs, or starts a server of its own; other tests start those",
}
"""Tags of blocks that are not run as they stand, and why; their commands are checked below."""

RUN = [block for block in README.blocks if not block.tags]
CHECKED = [block for block in README.blocks if block.tags]
BIN = Path(sys.executable).parent


def lines_of(blocks: list[Block], command: str) -> list[str]:
    """The lines that call ``command``, with or without variables before it."""
    pattern = re.compile(rf"^(?:[A-Z_0-9]+=\S+ )*{command}(?: |$)")
    return [line for block in blocks for line in block.text.splitlines() if pattern.match(line)]


def number(block: Block) -> str:
    return f"line {block.line}"


def run(block: Block, server: ServerProcess) -> str:
    """Run a block from the root of the repository; return what it printed."""
    assert server.root != ADDRESS
    text = block.text.replace(ADDRESS, server.root).replace(".venv/bin/activate", f"{BIN}/activate")
    words = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
    done = subprocess.run(
        [*words[block.language], text],
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "QWEN2VL_BASE_URL": server.url,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_block_is_run_or_says_why_not() -> None:
    """A block is shell or Python; one that is not run carries a tag that has a reason."""
    for block in README.blocks:
        assert block.language in ("bash", "python"), number(block)
        assert block.tags <= NOT_RUN.keys(), number(block)
    assert len(RUN) >= 6
    assert {block.language for block in RUN} == {"bash", "python"}


@pytest.mark.parametrize("block", RUN, ids=number)
def test_a_block_answers(block: Block, server: ServerProcess) -> None:
    """Run as it stands but for the port, it ends well and prints an answer."""
    if "curl" in block.text and shutil.which("curl") is None:
        pytest.skip("this machine has no curl")
    printed = run(block, server).strip()
    assert printed
    if "curl -sN" in block.text:
        events = [line.removeprefix("data: ") for line in printed.splitlines() if line]
        assert events[-1] == "[DONE]"
        assert all("choices" in json.loads(event) for event in events[:-1])
    elif "/explain" in block.text:
        assert json.loads(printed)["fits"] is True
    elif "curl" in block.text:
        assert json.loads(printed)["choices"][0]["message"]["content"]
    elif "ask" in block.text:
        questions = lines_of([block], "qwen2vl-serve ask") + re.findall(r"\.ask\(", block.text)
        assert len([line for line in printed.splitlines() if line.strip()]) >= len(questions)


@pytest.mark.parametrize("line", lines_of(CHECKED, "serve"))
def test_a_line_that_starts_a_server_would_start_one(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options, profile and files are accepted; the model and the cards are rehearsed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys.txt").write_text("sk-one\n")
    self_signed(tmp_path)
    words = shlex.split(line)
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    status = cli.serve_main([*words[1:], "--rehearse", "--check", "--port", "0"])
    assert status == 0, capsys.readouterr().err


@pytest.mark.parametrize("line", lines_of(CHECKED, "make"))
def test_a_line_of_make_names_a_target(line: str) -> None:
    """``make`` knows what to do for it."""
    if shutil.which("make") is None:
        pytest.skip("this machine has no make")
    words = shlex.split(line)
    variables = [words.pop(0) for _ in list(words) if "=" in words[0]]
    done = subprocess.run(
        [*words, "-n", *variables], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_the_metrics_of_vllm_that_the_documents_name_exist(server: ServerProcess) -> None:
    """vLLM's own names, as the running engine exports them."""
    text = requests.get(f"{server.root}/metrics", timeout=60).text
    exported = set(re.findall(r"^# TYPE (vllm:\S+)", text, re.MULTILINE))
    documents = (Document("docs/http-api.md"), Document("docs/http-api.zh-CN.md"))
    for document in documents:
        named = {code for code in document.codes if code.startswith("vllm:")}
        assert len(named) > 5
        assert named <= exported
