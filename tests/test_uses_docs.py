"""The page of the uses: its code runs, its counts of lines are counted."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from qwen2vl_serve.profile.sections import DEMO_MODEL_FOLDER
from tests import long_way, transformers_way
from tests import stub_server as stub
from tests.markdown import ROOT, Block, Document
from tests.media.test_video import theirs  # noqa: F401  # a fixture that reads videos

PAGES = [Document("docs/uses.md"), Document("docs/uses.zh-CN.md")]
BLOCKS = PAGES[0].blocks  # test_docs.py holds the two pages' code to be the same
PICTURES = ROOT / "clients" / "examples" / "uses" / "pictures"

RECEIPT = '{"shop": "Tea House", "date": null, "total": 7.5}'
ANSWERS = {
    "fields": RECEIPT,
    "receipt": RECEIPT,
    "table": '{"columns": ["Item", "Qty"], "rows": [["Tea", "2"], ["Cake", "1"]]}',
    "solution": '{"steps": ["2x = 8", "x = 4"], "answer": "x = 4"}',
    "judgement": '{"reasons": [], "categories": [], "verdict": "allow"}',
}
"""By the name of the schema that binds the answer; as Qwen2-VL answers such questions."""
BOX = "<|object_ref_start|>the yellow star<|object_ref_end|>"
BOX += "<|box_start|>(370,551),(738,920)<|box_end|>"
SAID = {
    "ocr": "SALE 50% OFF",
    "translate": "SALE 50% OFF",
    "extract_table": "| Tea | 2 |",
    "extract_fields": "Tea House",
    "solve": "2x = 8\nx = 4",
    "moderate": "allow",
    "ask_product": "SALE 50% OFF",
    "compare": "SALE 50% OFF",
    "describe_video": "SALE 50% OFF",
    "locate": "the yellow star 72 107 144 179",
    "to_html": "",
    "batch": "1.png SALE 50% OFF",
}
"""What the block of each use prints."""


def answer(handler: stub.Handler) -> None:
    body = handler.stub.requests[-1].body
    wanted = body.get("response_format", {}).get("json_schema", {}).get("name")
    asked = str(body["messages"][-1]["content"][-1])
    text = ANSWERS.get(wanted, "SALE 50% OFF")
    if "HTML" in asked:
        text = "```html\n<!DOCTYPE html>\n<html><body>Log in</body></html>\n```"
    if "bounding box" in asked:
        text = BOX
    shown = {"width": 195, "height": 195, "resized_width": 196, "resized_height": 196}
    media = [{"type": "image", "visual_tokens": 49, **shown}]
    stub.completion(text, media=media)(handler)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[stub.Stub]:
    """A stub that answers as Qwen2-VL would, and the page's files in the working folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("sign.png", "table.png", "problem.png", "screenshot.png", "moving.mp4"):
        shutil.copy(PICTURES / name, tmp_path)
    shutil.copy(PICTURES / "shape.png", tmp_path / "photo.png")
    shutil.copy(PICTURES / "table.png", tmp_path / "receipt.png")
    (tmp_path / "scans").mkdir()
    for number in range(3):
        Image.new("RGB", (30, 30)).save(tmp_path / "scans" / f"{number}.png")
    with stub.running(answer) as running:
        monkeypatch.setenv("QWEN2VL_BASE_URL", running.url)
        yield running


def use_of(block: Block) -> str:
    """The use that a block is about: the last one that it imports."""
    found = re.findall(r"from qwen2vl_client\.(?:tasks|batch) import (\w+)", block.text)
    return "batch" if "batch" in found else str(found[-1])


def lines_of_code(source: str) -> int:
    """Lines that are neither blank nor a comment."""
    lines = (line.strip() for line in source.splitlines())
    return sum(1 for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{use_of(block)}, line {block.line}")
def test_a_block_runs_and_prints(
    block: Block, server: stub.Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands there it asks the server, prints the answer and writes the files it names."""
    exec(compile(block.text, f"docs/uses.md, line {block.line}", "exec"), {"__name__": "uses"})
    printed = capsys.readouterr().out
    assert SAID[use_of(block)] in printed
    assert any(request.body for request in server.requests)
    if use_of(block) == "to_html":
        assert Path("page.html").read_text("utf-8").startswith("<!DOCTYPE html>")
    if use_of(block) == "locate":
        assert Image.open("located.png").size == (195, 195)
    if use_of(block) == "batch":
        assert len(Path("texts.jsonl").read_text("utf-8").splitlines()) == 3


def test_every_use_has_a_block() -> None:
    """Each function of ``tasks``, and ``batch``, is shown by the page; it shows no other."""
    from qwen2vl_client import tasks

    assert {name for name in tasks.__all__ if name[0].islower()} | {"batch"} == {*SAID}
    assert {use_of(block) for block in BLOCKS} == {*SAID}


ARGUMENTS = {
    "ocr": ("sign.png",),
    "extract_fields": ("receipt.png",),
    "extract_table": ("table.png",),
    "locate": ("photo.png",),
    "compare": ("sign.png", "photo.png"),
    "describe_video": ("moving.mp4",),
    "batch": ("scans",),
}
"""The rows of the table of lines, in its order."""


def body_lines(module: ModuleType, name: str) -> int:
    """Lines of the function's body, and those of what its module holds for all of them."""
    tree = ast.parse(inspect.getsource(module))
    shared = [node for node in tree.body if isinstance(node, ast.Assign)]
    assert all(node.lineno == node.end_lineno for node in shared)
    source = inspect.getsource(getattr(module, name))
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    body = "\n".join(source.splitlines()[function.body[0].lineno - 1 :])
    return lines_of_code(body) + len(shared)


def with_transformers(name: str) -> str:
    """The lines of a use that the tutorials show with transformers, of others a dash."""
    shown = hasattr(transformers_way, name)
    return str(body_lines(transformers_way, name)) if shown else "–"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_lines_are_counted(page: Document) -> None:
    """Of ours the block on the page; the last where a use has several."""
    blocks = [block for block in page.blocks if "Prompts" not in block.text]
    ours = {use_of(block): lines_of_code(block.text) for block in blocks}
    expected = [
        (with_transformers(name), str(body_lines(long_way, name)), str(ours[name]))
        for name in ARGUMENTS
    ]
    table = page.tables[-1]
    assert [tuple(cell.text for cell in row[1:]) for row in table] == expected
    readme = Document("README.zh-CN.md" if "zh" in page.path.name else "README.md")
    assert table in readme.tables


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_long_way_works_as_well(
    name: str,
    server: stub.Stub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is counted against us does what ours does, on the same answers."""
    monkeypatch.setattr(long_way, "URL", server.url)
    getattr(long_way, name)(*ARGUMENTS[name])
    printed = capsys.readouterr().out
    if name == "extract_table":
        assert "Tea,2" in Path("table.csv").read_text("utf-8-sig")
    else:
        assert SAID[name] in printed


READS = {
    "ocr": '"3450"',
    "locate": "the yellow star ",
    "compare": 'The first picture shows the text "3450".',
    "describe_video": "moves",
    "extract_fields": "Tea House 7.5",
    "batch": '1.png It says "3450"',
}
"""What the demo model answers with transformers about the page's own pictures."""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one core: several wait for each other where another process takes them."""
    torch: Any = importlib.import_module("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("theirs", "one_thread")
@pytest.mark.parametrize("name", READS)
def test_the_tutorials_way_works_as_well(
    name: str,
    server: stub.Stub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the demo model, which knows no receipts: of one the answer is given, not generated."""
    transformers: Any = importlib.import_module("transformers")
    monkeypatch.setattr(transformers_way, "MODEL", str(DEMO_MODEL_FOLDER))
    if name == "extract_fields":
        processor = transformers.Qwen2VLProcessor
        monkeypatch.setattr(processor, "batch_decode", lambda *_, **__: [RECEIPT])
    for number in range(3):
        shutil.copy(PICTURES / "sign.png", f"scans/{number}.png")
    getattr(transformers_way, name)(*ARGUMENTS[name])
    assert READS[name] in capsys.readouterr().out
    assert server.requests == []
    if name == "batch":
        assert len(Path("texts.jsonl").read_text("utf-8").splitlines()) == 3


def test_every_use_of_transformers_is_run() -> None:
    """Each function that the table counts is one that a test runs on the demo model."""
    shown = {name for name, value in vars(transformers_way).items() if callable(value)}
    assert shown == {*READS}


def test_the_fields_that_the_page_names_exist() -> None:
    """Options in code spans are parameters of the function that they are about."""
    from qwen2vl_client.batch import batch

    options = inspect.signature(batch).parameters
    for name in ("each", "output", "retries", "max_failures", "progress", "on_outcome"):
        assert name in options
        assert any(code.startswith(f"{name}=") for code in PAGES[0].codes)
    told = " ".join(PAGES[0].codes)
    for name in ("retries", "max_failures"):
        assert f"{name}={options[name].default}" in told
    assert f"`concurrency` ({options['concurrency'].default})" in PAGES[0].source
