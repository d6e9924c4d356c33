"""The model card tells the truth: its figures hold on the running server; what fails is told."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from qwen2vl_serve.demo.checkpoint import MODEL_FOLDER
from qwen2vl_serve.demo.evaluate import BARS, evaluate, main
from tests import stub_server as stub
from tests.conftest import ServerProcess
from tests.ports import quiet_port

PER_TASK = 40
ROOT = Path(__file__).parents[1]
_ROW = re.compile(
    r"^\| ([a-z-]+) \| ([\d.]+) \| ([\d.]+) / ([\d.]+) \| (reached|\*\*missed\*\*) \|",
    re.MULTILINE,
)


def card():
    """Of each task: its bar, its shares in English and Chinese, whether it is called reached."""
    text = (MODEL_FOLDER / "README.md").read_text(encoding="utf-8")
    return {
        name: (float(bar), (float(en), float(zh)), verdict == "reached")
        for name, bar, en, zh, verdict in _ROW.findall(text)
    }


def test_the_card_names_every_task_and_its_verdict():
    """No task is left out, bars are the program's, and a verdict follows from its figures."""
    told = card()
    assert {name: bar for name, (bar, _, _) in told.items()} == BARS
    for name, (bar, shares, reached) in told.items():
        assert reached == all(share >= bar for share in shares), name


NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS_ZH = "零一二三四五六七八九十"


def test_the_readme_tells_how_many_are_missed():
    """In words, in both languages, as the card does."""
    missed = sum(not reached for _, _, reached in card().values())
    assert len(BARS) == 14
    english, chinese = (
        (ROOT / name).read_text("utf-8") for name in ("README.md", "README.zh-CN.md")
    )
    assert f"{NUMBERS[missed]} of fourteen tasks" in english
    assert f"十四项任务中还有{NUMBERS_ZH[missed]}项" in chinese


@pytest.mark.parametrize("task", BARS)
def test_the_cards_figures_hold(server: ServerProcess, task):
    """Asked again through the server, other questions: no worse than chance allows.

    Three standard deviations of the card's share below it, and one answer.
    """
    for score, share in zip(
        evaluate(server.url, PER_TASK, seed=1, tasks=(task,)), card()[task][1], strict=True
    ):
        spread = math.sqrt(score.asked * share * (1 - share))
        least = score.asked * share - 3 * spread - 1
        assert score.right >= least, (score.share, share, score.wrong[:3])


@pytest.mark.parametrize(
    ("models", "chat", "told"),
    [
        (stub.failure(401, "invalid_api_key"), stub.completion(), ["401: it failed", "--api-key"]),
        (None, stub.failure(400), ["400: it failed"]),
        (None, stub.answer(502, b"<html>\n<p>no</p>"), ["502: <html> <p>no</p>"]),
        (None, stub.answer(200, b"hello"), ["hello", "--url"]),
        (stub.answer(200, {"data": []}), stub.completion(), ["data", "--url"]),
    ],
)
def test_what_the_server_refuses_is_one_line(
    models: stub.Step | None,
    chat: stub.Step,
    told: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the server's words and status 2, since nothing was scored; there is no traceback."""
    with stub.running(chat) as server:
        if models is not None:
            monkeypatch.setattr(stub.Handler, "do_GET", models)
        assert main(["--url", server.url, "--task", "colour", "--n", "2"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert all(words in err for words in told), err


@pytest.mark.parametrize("url", ["foo", "http://[", "http://127.0.0.1:{closed}"])
def test_without_a_server_the_address_is_named(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names it and ``--url``, and status 2."""
    address = url.format(closed=quiet_port())
    assert main(["--url", address, "--n", "2"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert address in err
    assert "--url" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--painter", "matplotlib", "--task", "motion"], "--task motion"),
        (["--painter", "cairo", "--task", "text", "--task", "colour"], "--task text"),
        (["--n", "0"], "--n"),
        (["--seed", "-2"], "--seed"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the server is asked: an empty table would pass for a good one."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sent"), [([], "Bearer sk-one"), (["--api-key", "sk-own"], "Bearer sk-own")]
)
def test_the_key_comes_from_the_environment(
    words: list[str], sent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of ``QWEN2VL_API_KEY``, unless ``--api-key`` gives another."""
    monkeypatch.setenv("QWEN2VL_API_KEY", "sk-one,sk-two")
    with stub.running(stub.completion("?")) as server:
        assert main(["--url", server.url, "--task", "text", "--n", "2", *words]) == 1
    assert {request.headers["authorization"] for request in server.requests} == {sent}


def test_figures_that_cannot_be_written_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table is printed all the same."""
    nowhere = str(tmp_path / "no" / "figures.json")
    with stub.running(stub.completion("?")) as server:
        assert main(["--url", server.url, "--task", "text", "--n", "2", "--json", nowhere]) == 2
    out, err = capsys.readouterr()
    assert "| text |" in out
    assert nowhere in err
