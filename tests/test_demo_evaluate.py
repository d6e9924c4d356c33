"""The model card tells the truth: its figures hold on the running server."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from qwen2vl_serve.demo.checkpoint import MODEL_FOLDER
from qwen2vl_serve.demo.evaluate import BARS, evaluate
from tests.conftest import ServerProcess

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
