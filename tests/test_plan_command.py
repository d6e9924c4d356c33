"""`qwen2vl-serve plan`: what it prints, how it ends, and what it does without."""

from __future__ import annotations

import http.server
import json
import math
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen2vl_serve import cli
from qwen2vl_serve.errors import PreflightError
from qwen2vl_serve.machine import hardware
from qwen2vl_serve.machine.hardware import Card, Host
from qwen2vl_serve.plan import plan_for
from qwen2vl_serve.plan.cards import parse_cards
from qwen2vl_serve.plan.question import own_cards, split_over
from qwen2vl_serve.plan.source import architecture_of
from qwen2vl_serve.profile import load_profile, profile_names
from tests.test_plan_architectures import config_of, known


@pytest.fixture(autouse=True)
def no_cards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A laptop: no card, no cache of a hub."""
    monkeypatch.setattr(hardware, "cards", lambda: ())
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "empty"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def run(*words: str, status: int) -> str:
        assert cli.main(["plan", *words]) == status
        output = capsys.readouterr()
        if status == 2:
            assert output.out == ""
            assert re.fullmatch(r"serve: [^\n]+\n", output.err)
            return output.err
        return output.out

    return run


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_fits_the_cards_it_was_written_for(run, name: str) -> None:
    """Without cards here and none given, a profile is planned on its own."""
    told = json.loads(run("--profile", name, "--json", status=0))
    assert told["verdict"] == "fits"
    assert told["remedies"] == []
    assert len(told["cards"]) == (0 if name == "demo" else load_profile(name).workers)


def test_a_report_reads_well_in_a_pipe(run) -> None:
    """80 columns, no escape sequences, a bar for each card, and every part in it.

    The cards are RTX 2080 of 8 GB, of which CUDA gives 7.6 GiB.
    """
    text = run("--profile", "multi-gpu", status=0)
    assert "\x1b" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    bars = re.findall(r"^GPU (\d) stage (\d)\s+\[(.{50})\] 7\.6 GiB$", text, re.MULTILINE)
    assert [(number, stage) for number, stage, _ in bars] == [
        (str(card), str(card // 4)) for card in range(8)
    ]
    for _, _, bar in bars:
        assert re.fullmatch(r"W+V+A+G+K+·+", bar)
    for words in ("verdict: fits", "KV cache: ", "Visual tokens under", "1280×960", "TP 4 × PP 2"):
        assert words in text


def test_a_bar_is_to_scale(run) -> None:
    """Its cells are the shares of the card's memory that the JSON tells, to a cell."""
    text = run("--profile", "single-3090", status=0)
    (stage,) = json.loads(run("--profile", "single-3090", "--json", status=0))["stages"]
    bar = re.search(r"\[(.{50})\]", text)
    assert bar is not None
    cells = 50 / stage["total_gib"]
    for mark, size in (
        ("W", stage["parts_gib"]["weights"]["likely"]),
        ("V", stage["parts_gib"]["vision"]["likely"]),
        ("K", stage["kv_cache_gib"]["likely"]),
    ):
        assert bar[1].count(mark) == pytest.approx(size * cells, abs=1.01)


def test_what_does_not_fit_ends_with_1_and_says_what_would(run) -> None:
    """The plain 7B on 11 GB: the report goes on with remedies, the AWQ checkpoint among them."""
    text = run("--profile", "single-3090", "--gpus", "1x2080ti-11g", status=1)
    assert "verdict: does not fit: " in text
    assert "What would fit" in text
    assert "Qwen2-VL-7B-Instruct-AWQ" in text


def test_fix_writes_a_profile_that_fits(run, tmp_path: Path) -> None:
    """YAML alone on standard output, and a plan of it that ends with 0."""
    words = ["--gpus", "1x2080ti-11g", "--set", "engine.gpu_memory_utilization=0.85"]
    path = tmp_path / "my.yaml"
    path.write_text(run("--profile", "single-3090", *words, "--fix", status=0), "utf-8")
    fixed = load_profile(str(path))
    assert fixed.hardware.card == "RTX 2080 Ti 11 GB"
    run("--profile", str(path), "--gpus", "1x2080ti-11g", status=0)
    # Its own cards are those that it was written for.
    assert own_cards(fixed) == parse_cards("1x2080ti-11g").cards
    run("--profile", str(path), status=0)


def test_fix_of_what_fits_is_the_profile_itself(run, tmp_path: Path) -> None:
    """The YAML on standard output loads as equal to the profile that ships, field by field."""
    path = tmp_path / "same.yaml"
    path.write_text(run("--profile", "single-3090", "--fix", status=0), "utf-8")
    assert load_profile(str(path)).model_dump() == load_profile("single-3090").model_dump()


@pytest.mark.parametrize(
    "gpus", ["2x8x2080ti-22g", "16x16GiB@8.6", "16x24GB@7.5", "16x40GiB@12", "16xl40s"]
)
def test_a_fix_is_planned_on_its_own_cards(run, tmp_path: Path, gpus: str) -> None:
    """The file keeps the cards, also of what fits: its plan without --gpus has the same tokens."""
    words = ["--model", "Qwen/Qwen2.5-VL-72B-Instruct", "--gpus", gpus, "--fix"]
    path = tmp_path / "my.yaml"
    path.write_text(run(*words, status=0), "utf-8")
    own = json.loads(run("--profile", str(path), "--json", status=0))
    there = json.loads(run("--profile", str(path), "--gpus", gpus, "--json", status=0))
    assert len(own["cards"]) == 16
    assert own["cards"][0]["capability"] == there["cards"][0]["capability"]
    least, most = own["kv_cache"]["tokens"]["likely"], there["kv_cache"]["tokens"]["likely"]
    # Memory is written in tenths of a GiB, downwards.
    assert 0.97 * most <= least <= most


def test_a_fix_names_all_kinds_of_cards(run, tmp_path: Path) -> None:
    """In its description; its fields are those of the smallest, which each card has to match."""
    path = tmp_path / "my.yaml"
    words = ["--model", "Qwen/Qwen2-VL-72B-Instruct-AWQ", "--gpus", "4x3090+4xl40s", "--fix"]
    path.write_text(run(*words, status=0), "utf-8")
    fixed = load_profile(str(path))
    assert "planned for 4 × RTX 3090 24 GB + 4 × L40S 48 GB" in str(fixed.description)
    assert (fixed.hardware.cards, fixed.hardware.card) == (8, "RTX 3090 24 GB")


def test_a_fix_for_several_machines_starts_workers_by_ray(run, tmp_path: Path) -> None:
    """So each machine looks for cards of its own; also where a profile that ships would do."""
    path = tmp_path / "my.yaml"
    model = ["--model", "Qwen/Qwen2-VL-72B-Instruct", "--gpus", "2x8x3090"]
    for words in (model, ["--profile", "multi-gpu", "--gpus", "2x4x3090"]):
        path.write_text(run(*words, "--fix", status=0), "utf-8")
        fixed = load_profile(str(path))
        assert fixed.engine.distributed_executor_backend == "ray"
        assert "on 2 machines" in str(fixed.description)
        told = json.loads(run("--profile", str(path), *words[2:], "--json", status=0))
        assert told["nodes"] == 2
        assert not any("ray" in finding["text"] for finding in told["findings"])
        own = json.loads(run("--profile", str(path), "--json", status=0))
        assert (len(own["cards"]), own["nodes"]) == (fixed.workers, None)
        text = " ".join(run("--profile", str(path), status=0).split())
        assert "on the machines of a Ray cluster" in text
    words = ["--profile", "multi-gpu", "--gpus", "2x8x3090"]
    path.write_text(run(*words, "--fix", status=0), "utf-8")
    assert load_profile(str(path)).engine.distributed_executor_backend is None


def test_machines_of_several_kinds_are_counted(run) -> None:
    """Their number is kept, and a kind with one number is one machine."""
    both = parse_cards("2x8xh100+2x8xa100-80g")
    assert (len(both.cards), both.nodes, both.cards_each) == (32, 4, 8)
    assert parse_cards("8xa100-80g+2x8xh100").nodes == 3
    assert parse_cards("2x3090+1x3060").nodes == 1
    words = ["--model", "Qwen/Qwen2-VL-7B-Instruct", "--gpus", "2x8xh100+2x8xa100-80g"]
    text = " ".join(run(*words, status=0).split())
    assert "on 4 machines" in text
    assert "32 cards on machines of 8 need ray" in text


def test_cards_out_of_use_decide_nothing(run) -> None:
    """A 2080 Ti beside a 3090 that does all the work leaves it bfloat16 and FlashAttention."""

    def told(gpus: str) -> tuple[object, ...]:
        words = ["--profile", "single-3090", "--gpus", gpus]
        found = json.loads(run(*words, "--json", status=0))
        engine, line = found["engine"], " ".join(run(*words, status=0).split())
        assert f"{engine['attention']}; pictures: {engine['vision_attention']}" in line
        attention = engine["attention"], engine["vision_attention"]
        return *attention, found["model"]["dtype"], found["kv_cache"]["tokens"]

    assert told("1x3090+1x2080ti-11g") == told("1x3090")
    assert told("1x3090")[:3] == ("FLASH_ATTN", "FLASH_ATTN", "bfloat16")


NVML = [
    (Card(0, "NVIDIA A100-SXM4-80GB", 79.25, 79.2, (8, 0)), ""),
    (Card(0, "NVIDIA A100 80GB PCIe", 79.22, 79.2, (8, 0)), ""),
    (Card(0, "NVIDIA H100 80GB HBM3", 79.11, 79.1, (9, 0)), ""),
    (Card(0, "Tesla T4", 14.58, 14.5, (7, 5)), ""),
    (Card(0, "NVIDIA RTX 6000 Ada Generation", 47.99, 47.9, (8, 9)), ""),
    (Card(0, "NVIDIA RTX PRO 6000 Blackwell Server Edition", 95.6, 95.5, (12, 0)), ""),
    (Card(0, "NVIDIA GeForce RTX 3090", 23.58, 23.5, (8, 6)), ""),
    (Card(0, "NVIDIA GeForce RTX 2080 Ti", 10.75, 10.7, (7, 5)), ""),
    (Card(0, "NVIDIA GeForce RTX 3080 Ti Laptop GPU", 15.99, 15.9, (8, 6)), ""),
    (Card(0, "NVIDIA RTX A6000", 47.54, 47.5, (8, 6)), "@8.6"),
    (Card(0, "NVIDIA L40", 44.99, 44.9, (8, 9)), "@8.9"),
    (Card(0, "NVIDIA GB200", 185.0, 184.9, (10, 0)), "@10.0"),
]


@pytest.mark.parametrize(("card", "added"), NVML, ids=lambda value: getattr(value, "name", ""))
def test_cards_by_the_names_of_their_driver(
    run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, card: Card, added: str
) -> None:
    """A profile fixed on this machine's cards is planned on them elsewhere, to a tenth of a GiB."""
    monkeypatch.setattr(hardware, "cards", lambda: (card,))
    path = tmp_path / "my.yaml"
    words = ["--model", "Qwen/Qwen2-VL-2B-Instruct", "--set", "engine.max_model_len=4096"]
    path.write_text(run(*words, "--fix", status=0), "utf-8")
    monkeypatch.setattr(hardware, "cards", lambda: ())
    (own,) = own_cards(load_profile(str(path)))
    assert (own.capability, own.name) == (card.capability, card.name + added)
    assert card.memory_gib - 0.1 <= own.memory_gib <= card.memory_gib + 0.03
    run("--profile", str(path), status=0)


def test_a_profile_for_cards_is_not_planned_on_the_cpu(run, tmp_path: Path) -> None:
    """Where neither machine, option nor profile names a card, one line says what to name."""
    path = tmp_path / "mine.yaml"
    path.write_text("model: {model: demo}\nhardware: {device: cuda}\n", "utf-8")
    told = run("--profile", str(path), status=2)
    assert "hardware.device: cuda, and this machine has no NVIDIA card" in told
    assert "--gpus 1x3090" in told
    run("--profile", str(path), "--gpus", "1x3090", status=0)
    path.write_text("model: {model: demo}\nhardware: {device: cuda, card: GTX 1080}\n", "utf-8")
    told = run("--profile", str(path), status=2)
    assert told.startswith("serve: hardware.card: GTX 1080: no such card; ")
    path.write_text("model: {model: demo}\nhardware: {device: cuda, card: A100}\n", "utf-8")
    assert "hardware.card: A100: say which A100 by hardware.card_memory_gib" in run(
        "--profile", str(path), status=2
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("words", [[], ["--fix"], ["--json"]])
def test_an_output_without_some_characters_does_not_end_it(
    tmp_path: Path, encoding: str, words: list[str]
) -> None:
    """The report has a question mark there; YAML and JSON keep what they say, a path in Chinese."""
    folder = tmp_path / "模型"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(known("Qwen2-VL-2B-Instruct"))))
    model = ["--model", str(folder), "--gpus", "1x2080", "--set", "engine.max_model_len=9000"]
    done = subprocess.run(
        [sys.executable, "-m", "qwen2vl_serve.cli", "plan", *model, *words],
        env={"PATH": "", "HOME": str(tmp_path), "PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"},
        capture_output=True,
    )
    assert done.stderr == b""
    assert done.returncode in ((0,) if words == ["--fix"] else (0, 1))
    text = done.stdout.decode("ascii" if words else encoding)
    if words == ["--fix"]:
        (tmp_path / "my.yaml").write_text(text)
        assert load_profile(str(tmp_path / "my.yaml")).model.model == str(folder)
    elif words:
        assert json.loads(text)["model"]["name"] == str(folder)
    else:
        assert "verdict: " in text


def test_fix_of_what_nothing_mends_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """A 72B on one card of 8 GB: status 1, the reason on standard error, no YAML to redirect."""
    words = ["plan", "--profile", "multi-gpu-72b-awq", "--gpus", "1x2080", "--fix"]
    assert cli.main(words) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "no change of this profile" in output.err


@pytest.mark.parametrize(
    ("written", "capability"),
    [("8.6", (8, 6)), ("86", (8, 6)), ("8", (8, 0)), ("10", (10, 0)), ("120", (12, 0))],
)
def test_a_capability_may_leave_out_its_minor_number(
    written: str, capability: tuple[int, int]
) -> None:
    """8 is 8.0 and 10 is 10.0; numbers from 20 on are those of the compiler, as sm_86."""
    (card,) = parse_cards(f"1x24GiB@{written}").cards
    assert card.capability == capability
    assert card.name == "24GiB@{}.{}".format(*capability)


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("8 x 2080ti-11g", "8x2080ti-11g"),
        ("2 × 8 × RTX 3090", "2x8x3090"),
        ("4x 24GiB@8.6 + 1 x 3060", "4x24GiB@8.6+1x3060"),
    ],
)
def test_cards_may_be_written_with_spaces(written: str, plain: str) -> None:
    """As people write them."""
    assert parse_cards(written) == parse_cards(plain)


def test_a_model_by_itself_is_split_over_all_cards(run) -> None:
    """28 heads over eight cards: tensor 4 in two stages; 64 heads: tensor 8."""
    told = json.loads(
        run("--model", "Qwen/Qwen2-VL-7B-Instruct", "--gpus", "8x2080ti-11g", "--json", status=0)
    )["engine"]
    assert (told["tensor_parallel_size"], told["pipeline_parallel_size"]) == (4, 2)
    assert (told["attention"], told["vision_attention"]) == ("TRITON_ATTN", "TORCH_SDPA")
    # 29 are no stages of 28 layers, and 1024 more than there are heads and layers for.
    assert split_over(known("Qwen2-VL-7B-Instruct"), parse_cards("29x3090")) == (4, 7)
    assert split_over(known("Qwen2-VL-7B-Instruct"), parse_cards("1024x3090")) == (4, 28)
    assert split_over(known("Qwen2-VL-72B-Instruct"), parse_cards("8xh100")) == (8, 1)
    assert split_over(known("Qwen2-VL-72B-Instruct"), parse_cards("2x8xh100")) == (8, 2)


def test_replicas_share_the_cards_of_the_split(run) -> None:
    """Two replicas on eight cards leave four to each: what is set is planned for, not beside it."""
    words = ["--model", "Qwen/Qwen2-VL-7B-Instruct", "--gpus", "8x3090", "--json"]
    told = json.loads(run(*words, "--set", "engine.data_parallel_size=2", status=0))["engine"]
    assert (told["tensor_parallel_size"], told["pipeline_parallel_size"]) == (4, 1)
    assert told["data_parallel_size"] == 2
    assert split_over(known("Qwen2-VL-7B-Instruct"), parse_cards("8x3090"), replicas=8) == (1, 1)


def test_set_goes_before_the_split(run) -> None:
    """A tensor size that is set is not widened to all cards; that two of eight are used is told."""
    told = json.loads(
        run(
            "--model", "Qwen/Qwen2-VL-7B-Instruct", "--gpus", "8x3090", "--json",
            "--set", "engine.tensor_parallel_size=2", "--set", "engine.max_model_len=4096",
            status=0,
        )
    )  # fmt: skip
    assert told["engine"]["tensor_parallel_size"] == 2
    assert told["engine"]["max_model_len"] == 4096
    assert any("uses 2 of 8 cards" in finding["text"] for finding in told["findings"])


def test_a_typical_request_is_counted(run) -> None:
    """1232 tokens for each 1280 × 960, and 500 of text; at once are as many as the cache holds."""
    words = ["--typical", "2 images 1280x960, 300 in, 200 out"]
    told = json.loads(run("--profile", "single-3090", *words, "--json", status=0))
    typical = told["requests"]["typical"]
    assert typical["visual_tokens"] == 2 * 1232
    assert typical["tokens"] == 2 * 1232 + 500
    assert typical["at_once"] == int(typical["by_cache"])
    text = run("--profile", "single-3090", *words, status=0)
    assert "2 pictures 1280 × 960" in " ".join(text.split())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpus", "3x9090"], "no such card"),
        (["--gpus", "2xa100"], "a100-40g or a100-80g"),
        (["--gpus", "0x3090"], "0 cards"),
        (["--gpus", "1x0GiB@8.6"], "a card of 0 GiB"),
        (["--gpus", "1x3090-0g"], "a card of 0 GiB"),
        (["--gpus", "1x99999999999999999999GiB@8.6"], "cards of up to 1024 GiB"),
        (["--gpus", "1x24GiB@999"], "compute capability 99.9; there are cards of"),
        (["--gpus", "1x24GiB@19.9"], "capability 19.9; there are cards of up to 1024 GiB, and of"),
        (["--gpus", "1x24GiB@6.1"], "of 7.0 to 12.1"),
        (["--gpus", "2x8xh100+4xa100-80g"], "machines of 4 and of 8 cards; name machines that"),
        (["--gpus", "2x8xh100+2x4xa100-80g"], "machines of 4 and of 8 cards"),
        (["--gpus", "1x3090", "--profile", "demo", "--set", "hardware.device=cpu"], "uses no card"),
        (["--profile", ""], "no profile is named ''"),
        (["--profile", "", "--model", "demo", "--gpus", "1x3090"], "no profile is named ''"),
        (["--gpus", ""], "no such card"),
        (["--profile", "nope"], "there are demo"),
        (["--model", "Qwen/Qwen2-VL-7B-Instruct"], "no NVIDIA card"),
        (["--model", "/nowhere", "--gpus", "1x3090"], "no folder /nowhere"),
        (["--gpus", "1x3090", "--typical", "2 dogs"], "--typical"),
        (["--gpus", "1x3090", "--set", "engine.max_model_len=no"], "engine.max_model_len"),
        (["--gpus", "1x3090", "--bogus"], "--bogus"),
        (["--gpus", "1x3090", "--fix", "--json"], "--fix"),
    ],
)
def test_bad_input_is_one_line(run, words: list[str], told: str) -> None:
    """Status 2, nothing on standard output, and one line that names the word or the field."""
    assert told in run(*words, status=2)


@pytest.mark.parametrize("size", ["tensor", "pipeline", "data"])
@pytest.mark.parametrize(
    "words",
    [
        ["--profile", "demo"],
        ["--profile", "single-3090", "--set", "hardware.cards=null"],
        ["--profile", "single-3090", "--set", "hardware.cards=null", "--gpus", "4x3090"],
        ["--model", "Qwen/Qwen2-VL-7B-Instruct", "--gpus", "4x3090"],
    ],
)
def test_workers_beyond_count_are_not_counted(run, words: list[str], size: str) -> None:
    """A number that was mistyped is named, not computed with until memory or patience ends."""
    told = run(*words, "--set", f"engine.{size}_parallel_size=1000000000", status=2)
    assert f"{size}_parallel_size 1000000000" in told
    assert "1000000000 workers; plan counts at most 1024" in told


def test_a_picture_beyond_any_is_planned_in_time(run) -> None:
    """The size that vLLM profiles is looked for once, not anew for each remedy."""
    begun = time.process_time()
    run("--profile", "single-3090", "--set", "media.max_pixels=9999999999999999", status=1)
    assert time.process_time() - begun < 10


@pytest.mark.parametrize(
    ("words", "longest"),
    [
        (["--profile", "single-3090"], "8,784"),
        (["--profile", "single-3090", "--set", "engine.max_model_len=2448"], "2,448"),
        (["--profile", "demo"], "4,096"),
    ],
)
def test_the_longest_request_is_told_of_what_fits(run, words: list[str], longest: str) -> None:
    """No longer than max_model_len, whatever the cache holds beside it; also as JSON."""
    assert f"Longest request: {longest} tokens" in run(*words, status=0)
    told = json.loads(run(*words, "--json", status=0))["kv_cache"]["longest_request"]
    assert set(told.values()) == {int(longest.replace(",", ""))}


def test_the_longest_request_of_what_does_not_fit_is_a_range(run) -> None:
    """What each bound of the cache holds, up to max_model_len."""
    words = ["--profile", "single-3090", "--set", "engine.max_model_len=32768"]
    longest = json.loads(run(*words, "--json", status=1))["kv_cache"]["longest_request"]
    assert longest["low"] < longest["likely"] == longest["high"] == 32768
    text = run(*words, status=1)
    assert f"Longest request: {longest['low']:,} – 32,768 – 32,768 tokens" in text


def test_a_lack_that_is_known_is_one_number(run) -> None:
    """The size of the cache is set, so that no range is told but 0.02 GiB, and the status is 1."""
    text = run("--profile", "demo", "--set", "engine.kv_cache_memory_bytes=1", status=1)
    assert "0.02 GiB a worker are lacking for one request" in " ".join(text.split())


def test_cards_too_small_for_cuda_have_nothing_free(run) -> None:
    """Not less than nothing."""
    text = run("--profile", "single-3090", "--gpus", "1x0.1GiB@8.6", status=1)
    assert "0.00 are free" in " ".join(text.split())


def test_a_typical_request_beyond_the_context_is_said_to_be_refused(run) -> None:
    """Its tokens and the limit are told; the profile fits all the same, and the status stays 0."""
    words = ["--typical", "1 image 1280x960, 300 in, 20000 out"]
    text = " ".join(run("--profile", "single-3090", *words, status=0).split())
    assert "typical request is refused: 21,532 tokens are beyond engine.max_model_len 8784" in text


def test_cards_of_this_machine_are_planned_for(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What NVML reports counts, also what others hold of it."""
    card = Card(0, "NVIDIA GeForce RTX 3090", 23.58, 23.2, (8, 6))
    monkeypatch.setattr(hardware, "cards", lambda: (card,))
    assert "(found here)" in " ".join(run("--profile", "single-3090", status=0).split())
    monkeypatch.setattr(hardware, "cards", lambda: (Card(0, card.name, 23.58, 9.0, (8, 6)),))
    assert "are free on NVIDIA GeForce RTX 3090" in " ".join(
        run("--profile", "single-3090", status=1).split()
    )


def test_a_folder_is_read(run, tmp_path: Path) -> None:
    """Its config.json and the headers of its weight files, even where its name says nothing."""
    folder = tmp_path / "mine"
    folder.mkdir()
    model = known("Qwen2-VL-2B-Instruct")
    (folder / "config.json").write_text(json.dumps(config_of(model)), "utf-8")
    told = json.loads(run("--model", str(folder), "--gpus", "1x3090", "--json", status=0))
    assert told["model"]["parameters"] == model.parameters
    header = b'{"x":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}'
    data = len(header).to_bytes(8, "little") + header + bytes(9)
    (folder / "model.safetensors").write_bytes(data)
    text = run("--model", str(folder), "--gpus", "1x3090", status=0)
    assert "the download may not be whole" in " ".join(text.split())


def safetensors(size: int) -> bytes:
    header = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


def test_files_that_are_not_whole_are_told(run, tmp_path: Path) -> None:
    """Missing shards and files that are none, by the doctor's own look; too few bytes by theirs.

    None of it forbids to plan: the download may go on.
    """

    def told() -> str:
        answer = json.loads(run("--model", str(tmp_path), "--gpus", "1x3090", "--json", status=0))
        return str([finding["text"] for finding in answer["findings"]])

    config = config_of(known("Qwen2-VL-2B-Instruct-AWQ"))
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    first, second = (tmp_path / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    index = {"weight_map": {"x": first.name, "y": second.name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    first.write_bytes(safetensors(9))
    assert f"{second.name}: is missing" in told()
    second.write_bytes(b"garbage, and more of it")
    assert "is not a whole safetensors file" in told()
    (tmp_path / "model.safetensors.index.json").unlink()
    second.unlink()
    first.rename(tmp_path / "model.safetensors")
    assert "the download may not be whole" in told()


def test_a_folder_of_another_machine_goes_by_its_name(run) -> None:
    """A profile for a server can be planned on a laptop, and it is told by what."""
    words = ["--model", "/srv/models/Qwen2-VL-7B-Instruct", "--gpus", "1xl40s"]
    text = " ".join(run(*words, status=0).split())
    assert "there is no folder /srv/models/Qwen2-VL-7B-Instruct here" in text
    told = json.loads(run(*words, "--json", status=0))
    assert told["model"]["parameters"] == known("Qwen2-VL-7B").parameters


def test_many_cards_have_one_bar_a_stage(run) -> None:
    """24 cards in three stages are three lines, each with the number of its cards, not 24."""
    words = ["--model", "Qwen/Qwen2-VL-72B-Instruct", "--gpus", "3x8xh100"]
    bars = re.findall(r"^8 GPUs stage (\d) ", run(*words, status=0), re.MULTILINE)
    assert bars == ["0", "1", "2"]


def test_a_model_that_is_not_served_can_be_planned(run, tmp_path: Path) -> None:
    """A Qwen2 without vision ends with 0, and the report says that it would not be served."""
    text_only = {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "vocab_size": 152064, "max_position_embeddings": 32768,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(text_only), "utf-8")
    text = run("--model", str(tmp_path), "--gpus", "1xl40s", status=0)
    assert "can be planned but not served" in " ".join(text.split())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": -5}, "num_hidden_layers is -5"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_attention_heads": None}, "num_attention_heads is missing"),
        ({"num_key_value_heads": -1}, "num_key_value_heads is -1"),
        ({"hidden_size": math.inf}, "hidden_size is inf"),
        ({"hidden_size": 5}, "head_dim is missing"),
        ({"intermediate_size": math.nan}, "intermediate_size is nan"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"vocab_size": "152064"}, "vocab_size is '152064'"),
        ({"max_position_embeddings": -3}, "max_position_embeddings is -3"),
        ({"rope_scaling": {"type": "yarn", "factor": 1e400}}, "factor is inf"),
        ({"rope_scaling": {"type": "yarn", "factor": -2}}, "factor is -2"),
        ({"vision_config": {"embed_dim": 0}}, "embed_dim is 0"),
        ({"vision_config": {"depth": -3}}, "depth is -3"),
        ({"vision_config": {"mlp_ratio": []}}, "mlp_ratio is []"),
        ({"vision_config": {"spatial_merge_size": 10**6}}, "spatial_merge_size is 1000000"),
        ({"quantization_config": {"quant_method": "awq", "bits": "four"}}, "bits is 'four'"),
        ({"quantization_config": {"quant_method": "fp8", "ignore": 5}}, "ignore is 5"),
        ({"quantization_config": {"quant_method": "awq", "bits": math.inf}}, "bits is inf"),
    ],
)
def test_a_size_that_is_none_is_named(run, tmp_path: Path, changes: object, told: str) -> None:
    """File, key and value in one line, whatever stands there."""
    config = {**config_of(known("Qwen2-VL-2B-Instruct")), **changes}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    line = run("--model", str(tmp_path), "--gpus", "1x3090", status=2)
    assert f"{tmp_path / 'config.json'}: {told}; download it again" in line


def test_packing_of_an_unknown_form_is_no_fault(run, tmp_path: Path) -> None:
    """vLLM says what it thinks of it."""
    packing = {"quant_method": "compressed-tensors", "config_groups": {"group_0": 3}}
    config = {**config_of(known("Qwen2-VL-2B-Instruct")), "quantization_config": packing}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    run("--model", str(tmp_path), "--gpus", "1x3090", status=0)


@pytest.mark.parametrize("content", ["{}", '{"model_type": "llama"}', "no json"])
def test_a_folder_that_says_nothing(run, tmp_path: Path, content: str) -> None:
    """No sizes, another family or no JSON: status 2 and one line that names the file."""
    (tmp_path / "config.json").write_text(content, "utf-8")
    assert "config.json" in run("--model", str(tmp_path), "--gpus", "1x3090", status=2)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """A hub of our own: files by their path, everything else is not found."""
    files: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = files.get(self.path)
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write(found or b"")

        def log_message(self, *_: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    yield files
    server.shutdown()
    server.server_close()


def test_the_hub_is_asked_for_what_nothing_else_knows(run, hub: dict[str, bytes]) -> None:
    """Its config.json has the sizes; stored GiB are told where it knows them; a 404 is one line."""
    model = known("Qwen2.5-VL-3B-Instruct")
    hub["/me/cats/resolve/main/config.json"] = json.dumps(config_of(model)).encode()
    told = json.loads(run("--model", "me/cats", "--gpus", "1x4090", "--json", status=0))
    assert told["model"]["parameters"] == model.parameters
    assert told["model"]["stored_gib"] is None
    weights = {"safetensors": {"parameters": {"BF16": model.parameters}}}
    hub["/api/models/me/cats"] = json.dumps(weights).encode()
    again = json.loads(run("--model", "me/cats", "--gpus", "1x4090", "--json", status=0))
    assert again["model"]["stored_gib"] == pytest.approx(model.parameters * 2 / 2**30, abs=1e-3)
    assert "answers 404" in run("--model", "me/dogs", "--gpus", "1x4090", status=2)
    hub["/me/birds/resolve/main/config.json"] = b"<html>Please log in</html>"
    told = run("--model", "me/birds", "--gpus", "1x4090", status=2)
    assert "answers with what is no config.json" in told


def test_without_a_hub_one_line_says_what_to_give(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """No half a minute of retries, no traceback."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        f"http://127.0.0.1:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    told = run("--model", "me/dogs", "--gpus", "1x4090", status=2)
    assert "hub is not reached" in told
    assert "path of its folder" in told


def test_an_offline_machine_does_not_ask(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """``HF_HUB_OFFLINE`` is named in one line; without ``ask_hub`` an unknown model is refused."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in run("--model", "me/dogs", "--gpus", "1x4090", status=2)
    with pytest.raises(PreflightError, match="nothing on this machine"):
        architecture_of(load_profile("single-3090", ["model=me/dogs"]), ask_hub=False)


@pytest.mark.parametrize(
    "place",
    ["models--me--dogs/snapshots/main", "models/me--dogs/snapshots/master", "hub/models/me/dogs"],
)
def test_a_model_that_a_hub_gave_is_looked_at(tmp_path: Path, place: str) -> None:
    """In the folder that the profile names, by either hub's layout, and nobody is asked."""
    folder = tmp_path / place
    folder.parent.mkdir(parents=True)
    folder.symlink_to(load_profile("demo").model.path)
    told = ["model=me/dogs", f"model.download_dir={tmp_path}"]
    found = architecture_of(load_profile("single-3090", told), ask_hub=False)
    assert found.text == architecture_of(load_profile("demo")).text


def test_overrides_of_the_context_count_for_built_in_models() -> None:
    """YaRN by hf_overrides lengthens what the planner lets through."""
    rope = "{rope_type: yarn, factor: 2.0, original_max_position_embeddings: 32768}"
    longer = load_profile(
        "single-3090",
        [f"model.hf_overrides={{rope_scaling: {rope}}}", "engine.max_model_len=65536"],
    )
    assert architecture_of(longer).text.positions == 65536
    assert plan_for(longer, parse_cards("1xh200")).problems == ()


def test_it_needs_nothing_but_the_base_install() -> None:
    """No torch, vLLM, transformers, numpy, Pillow, PyAV or OpenCV, and no network."""
    program = (
        "import socket, sys\n"
        "for name in ('torch', 'torchvision', 'transformers', 'vllm', 'numpy', 'PIL', 'av',\n"
        "             'cv2', 'aiohttp', 'huggingface_hub'):\n"
        "    sys.modules[name] = None\n"
        "def no(*a, **k): raise AssertionError('network')\n"
        "socket.create_connection = socket.getaddrinfo = no\n"
        "from qwen2vl_serve import cli\n"
        "sys.exit(cli.main(['plan', '--profile', 'multi-gpu', '--gpus', '8x2080ti-11g',\n"
        "                   '--typical', '2 images 1280x960, 300 in, 200 out']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "verdict: fits" in done.stdout


def test_what_a_server_started_here_would_get_is_told(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable's KV cache and where it comes from; nothing of it for cards that are meant."""
    monkeypatch.setattr(hardware, "host", lambda: Host((0,), 16.0, 12.0))
    own = json.loads(run("--profile", "demo", "--json", status=0))
    assert own["kv_cache"]["sized_by"] == "engine.kv_cache_memory_bytes"
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    told = json.loads(run("--profile", "demo", "--json", status=0))
    assert told["kv_cache"]["sized_by"] == "VLLM_CPU_KVCACHE_SPACE"
    assert told["kv_cache"]["tokens"]["likely"] == 4 * own["kv_cache"]["tokens"]["likely"]
    assert told["host_gib"] == pytest.approx(own["host_gib"] + 3, abs=1e-3)
    text = " ".join(run("--profile", "demo", status=0).split())
    assert "its size is that of VLLM_CPU_KVCACHE_SPACE" in text
    assert "GiB a worker to spare" in text
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "much")
    assert "VLLM_CPU_KVCACHE_SPACE: is 'much'" in run("--profile", "demo", status=2)
    run("--profile", "single-3090", status=0)
    run("--profile", "demo", "--gpus", "1x3090", status=0)
