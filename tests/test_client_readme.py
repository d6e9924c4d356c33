"""The client's README tells of everything public, and its code runs."""

from __future__ import annotations

import inspect
import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import qwen2vl_client
from qwen2vl_client import Answer, Client, Conversation, Event, Explanation, TextStream, Timings
from qwen2vl_client.answer import StoredFile, ToolCall, Usage
from qwen2vl_client.cli import COMMANDS
from qwen2vl_client.files import Files
from qwen2vl_client.media_info import MediaInfo

from tests import stub_server as stub

FOLDER = Path(__file__).parents[1] / "clients"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
CHINESE = (FOLDER / "README.zh-CN.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
CODE = " ".join(re.findall(r"`[^`]+`", PROSE))


def public_names(kind: type) -> list[str]:
    fields = getattr(kind, "__dataclass_fields__", ())
    names = [*fields, *(name for name, _ in inspect.getmembers(kind))]
    hidden = ("client", "from_raw", "type")
    return [name for name in names if not name.startswith("_") and name not in hidden]


KINDS = [Client, Files, Conversation, Event, TextStream]
ANSWERS = [Answer, Usage, Timings, ToolCall, MediaInfo, Explanation, StoredFile]


@pytest.mark.parametrize("kind", [*KINDS, *ANSWERS])
def test_every_public_method_is_named(kind: type) -> None:
    """Fields, methods and properties stand as code in the prose, not only in an example."""
    missing = [name for name in public_names(kind) if not re.search(rf"\b{name}\b", CODE)]
    assert missing == []


def test_every_public_name_of_the_package_is_named_in_both_languages() -> None:
    """Types for annotations and constants of the package aside."""
    aside = {"ChatFields", "Sampling", "DEFAULT_SAMPLING", "SYSTEM_PROMPT", "__version__"}
    for page in (README, CHINESE):
        told = {name for name in qwen2vl_client.__all__ if re.search(rf"\b{name}\b", page)}
        missing = set(qwen2vl_client.__all__) - told - aside
        assert missing <= {"Event", "MediaInfo", "Timings", "ToolCall", "Usage"}, "their fields are"


def test_every_error_is_in_the_tree() -> None:
    """What the package exports for ``except`` is listed from the heading Errors on."""
    errors = [name for name in qwen2vl_client.__all__ if name.endswith("Error")]
    tree = README[README.index("## Errors") :]
    assert [name for name in errors if name not in tree] == []


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("page", [README, CHINESE], ids=["English", "Chinese"])
def test_every_option_is_named(page: str, command: str) -> None:
    """What each command's ``--help`` lists, ``--help`` itself aside, stands as a whole word."""
    parser = import_module(f"qwen2vl_client.cli.{command}").build_parser(command)
    words = r"(?<![\w-])--[a-z]+(?:-[a-z]+)*(?![\w-])"
    options = set(re.findall(words, parser.format_help())) - {"--help"}
    assert len(options) > 4
    assert options - set(re.findall(words, page)) == set()


def test_every_extra_comes_with_the_client_alone() -> None:
    """Those that its modules name, with the ranges of the whole project, and told of."""

    def extras(file: Path) -> dict[str, list[str]]:
        found = tomllib.loads(file.read_text("utf-8"))["project"]["optional-dependencies"]
        assert isinstance(found, dict)
        return found

    sources = (FOLDER / "qwen2vl_client").rglob("*.py")
    named = {name for one in sources for name in re.findall(r"extra ``(\w+)``", one.read_text())}
    whole = extras(FOLDER.parent / "pyproject.toml")
    assert extras(FOLDER / "pyproject.toml") == {name: whole[name] for name in named}
    for page in (README, CHINESE):
        table = page[: page.index("\n## ")]
        assert set(re.findall(r"(?m)^\| `(\w+)` \| \S+ \|", table)) == named


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_its_code_runs(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each Python block asks and prints the answer as it stands, but for the server's address."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff\xe0")

    counts = ("prompt_tokens", "text_tokens", "visual_tokens")
    explained = {**dict.fromkeys(counts, 9), "max_model_len": 2048, "fits": True}

    def either(handler: stub.Handler) -> None:
        if handler.path.endswith("/explain"):
            return stub.answer(200, explained)(handler)
        streamed = handler.stub.requests[-1].body.get("stream")
        whole = stub.completion("A stub's answer.")
        answered = stub.events(stub.whole_stream("A stub's answer.")) if streamed else whole
        return answered(handler)

    with stub.running(either) as server:
        monkeypatch.setenv("QWEN2VL_BASE_URL", server.url)
        block = BLOCKS[number].replace("http://127.0.0.1:8000/v1", server.url)
        exec(compile(block, f"README block {number}", "exec"), {})
    assert "A stub's answer." in capsys.readouterr().out
    assert any(request.body for request in server.requests)
