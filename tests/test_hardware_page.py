"""`docs/hardware.md` and its Chinese twin are what the planner says."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from qwen2vl_serve.machine.hardware import Host
from qwen2vl_serve.plan import Verdict, plan_for
from qwen2vl_serve.plan.cards import parse_cards, table
from qwen2vl_serve.plan.hardware_page import COMMAND, PAGES, write
from qwen2vl_serve.profile import load_profile, profile_names

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Both pages as the planner writes them now."""
    folder = tmp_path_factory.mktemp("pages")
    write(folder)
    return {name: (folder / name).read_text("utf-8") for name in PAGES}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_what_the_planner_writes(name: str, made: dict[str, str]) -> None:
    """Where this fails, the command that the page names writes it anew."""
    assert (DOCS / name).read_text("utf-8") == made[name], COMMAND


@pytest.mark.parametrize("name", PAGES)
def test_every_profile_and_card_is_there(name: str, made: dict[str, str]) -> None:
    """A section for each profile, a row for each card in all but the one that needs no card."""
    text = made[name]
    for profile in profile_names():
        assert f"\n## {profile}\n" in text
    for card in table():
        assert text.count(f"\n| {card.name} |") == len(profile_names()) - 1


@pytest.mark.parametrize("name", PAGES)
def test_the_profile_without_cards_says_what_memory_it_takes(
    name: str, made: dict[str, str]
) -> None:
    """Each row is the planner's: the first that fits is just above what is said to be taken."""
    text = made[name].partition("\n## demo\n")[2].partition("\n## ")[0]
    taken = float(re.findall(r"[\d.]+(?= GiB of memory| GiB 内存)", text)[0])
    rows = re.findall(r"^\| (\d+) GiB \| ([^|]+) \| ([\d,]*) ?\|", text, re.MULTILINE)
    fits = {PAGES[name].verdicts[Verdict.FITS]}
    assert next(int(free) for free, verdict, _ in rows if verdict in fits) == math.ceil(taken)
    assert [int(free) for free, _, tokens in rows if not tokens] == [1]
    readme = (DOCS.parent / name.replace("hardware", "README")).read_text("utf-8")
    assert re.findall(r"\d+(?= GiB of free memory| GiB 空闲内存)", readme) == [
        f"{math.ceil(taken)}"
    ]
    least = load_profile("demo", ["engine.kv_cache_memory_bytes=268435456"])
    for free, told in ((1.6, Verdict.FITS), (1.4, Verdict.NO)):
        assert plan_for(least, (), host=Host((0,), free, free)).verdict is told
    lacking = [card.name for card in table() if card.capability < (7, 5)]
    assert " / ".join(lacking) in text.splitlines()[-1]


def test_the_names_of_cards_are_those_of_the_option(made: dict[str, str]) -> None:
    """What the table calls `--gpus` can be typed."""
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", made["hardware.md"], re.MULTILINE)[1:]
    assert len(rows) == len(table())
    for option, name in rows:
        assert parse_cards(f"1x{option}").cards[0].name == name.strip()
