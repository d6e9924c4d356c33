"""`docs/models.md` and its Chinese twin: checkpoints, cards, options and variables as they are."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from qwen2vl_serve import cli
from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.checkpoints.checkpoint import check_config
from qwen2vl_serve.demo.checkpoint import MODEL_FOLDER
from qwen2vl_serve.errors import PreflightError
from qwen2vl_serve.plan import plan_for
from qwen2vl_serve.plan.architectures import published_names
from qwen2vl_serve.plan.assessment import Verdict
from qwen2vl_serve.plan.cards import parse_cards
from qwen2vl_serve.plan.models_page import CONSUMER, DATACENTRE, HEADS, OVERRIDES, Row, rows, table
from qwen2vl_serve.profile import load_profile
from tests.adapter_files import write_adapter
from tests.blocks import assert_marks_are_listed, lines, printed, shell_blocks, unmarked
from tests.loopback_hub import loopback_hub
from tests.markdown import ROOT, Document
from tests.served import served

PAGES = pytest.mark.parametrize("page", HEADS)
MARKS = {"boot", "gpu", "server"}
ROWS = list(rows())


@PAGES
def test_the_table_is_the_planners(page: str) -> None:
    """Run `python -m qwen2vl_serve.plan.models_page docs` where this fails."""
    assert table(page) in (ROOT / "docs" / page).read_text("utf-8")


def test_every_published_checkpoint_has_cards() -> None:
    """Each fits data centre cards; only the 72B ones in 16 bit fit none of the consumer cards."""
    assert [row.name for row in ROWS] == list(published_names())
    assert all(row.datacentre for row in ROWS)
    assert {row.name for row in ROWS if row.consumer is None} == {
        "Qwen/Qwen2-VL-72B-Instruct", "Qwen/Qwen2.5-VL-72B-Instruct",
    }  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_profile_that_is_written_fits(row: Row, tmp_path: Path, capsys) -> None:
    """What `plan --fix` prints for the cards of a row is a profile, and fits them."""
    for ladder, plan in ((CONSUMER, row.consumer), (DATACENTRE, row.datacentre)):
        if plan is None:
            continue
        cards = next(c for c in ladder if parse_cards(c).cards == plan.machines.cards)
        options = [word for override in OVERRIDES for word in ("--set", override)]
        assert cli.main(["plan", "--model", row.name, "--gpus", cards, *options, "--fix"]) == 0
        path = tmp_path / "mine.yaml"
        path.write_text(capsys.readouterr().out)
        again = plan_for(load_profile(str(path)), parse_cards(cards))
        assert again.verdict is Verdict.FITS
        assert load_profile(str(path)).model.model == row.name


@PAGES
def test_every_block_is_run_or_is_listed_with_what_it_needs(page: str) -> None:
    """No mark is without its row in the last table, and no row without a mark.

    The blocks without one are a plan, downloads, both below, and questions to the adapter
    ``clerk``, which ``test_uses_real.py`` asks.
    """
    document = Document(f"docs/{page}")
    assert {block.language for block in document.blocks} == {"bash", "yaml"}
    assert_marks_are_listed(document, MARKS)
    begin = [" ".join(block.text.split()[:2]) for block in unmarked(document)]
    assert begin == ["qwen2vl-serve plan", "qwen2vl-serve download", "cd clients/examples/uses"]


def run_plan(page: str, folder: Path) -> str:
    """Run the plan of the page in a folder; return the cards that it is for."""
    block = unmarked(Document(f"docs/{page}"))[0]
    assert printed(block.text, folder) == ""
    return re.findall(r"--gpus (\S+)", block.text)[0]  # type: ignore[no-any-return]


@PAGES
def test_the_plan_of_the_page_runs_as_it_stands(page: str, tmp_path: Path) -> None:
    """The file that it writes is a profile, which fits the cards that it names."""
    cards = run_plan(page, tmp_path)
    plan = plan_for(load_profile(str(tmp_path / "mine.yaml")), parse_cards(cards))
    assert plan.verdict is Verdict.FITS


@PAGES
def test_the_downloads_of_the_page_run_as_they_stand(page: str, tmp_path: Path) -> None:
    """Against a hub on loopback that has the demo model under that name: each prints the folder
    that it has filled."""
    text = unmarked(Document(f"docs/{page}"))[1].text.replace("/data/", f"{tmp_path}/data/")
    (name,) = set(re.findall(r"download (\S+)", text))
    with loopback_hub(MODEL_FOLDER, name=name) as hub:
        env = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
            "MODELSCOPE_ENDPOINT": hub.url,
            "MODELSCOPE_HOME": str(tmp_path / "modelscope"),
            **dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"), ""),
        }
        said = printed(text, tmp_path, env).splitlines()
        assert hub.fetched().count("model.safetensors") == 2
    for folder in said:
        assert tmp_path in Path(folder).parents
        assert (Path(folder) / "model.safetensors").stat().st_size > 0
    assert said[1] == f"{tmp_path}/data/{name.partition('/')[2]}"


@PAGES
def test_what_starts_on_cards_is_rehearsed(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options and profile are accepted, and its topology; of model and adapter there is no file."""
    run_plan(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    blocks = [b for b in shell_blocks(Document(f"docs/{page}")) if b.tags == {"gpu"}]
    assert len(blocks) == 3
    for block in blocks:
        command, *words = shlex.split(block.text)
        assert command == "serve"
        status = cli.serve_main([*words, "--rehearse", "--check", "--port", "0"])
        assert status == 0, capsys.readouterr().err
        assert "can start" in capsys.readouterr().out


@PAGES
def test_the_routes_of_adapters_answer_as_they_are_called(page: str, tmp_path: Path) -> None:
    """The page's calls, as they stand but for the address and the folder: the adapter comes and
    goes."""
    if shutil.which("curl") is None:
        pytest.skip("this machine has no curl")
    (block,) = (b for b in shell_blocks(Document(f"docs/{page}")) if b.tags == {"server"})
    write_adapter(tmp_path / "data" / "adapters" / "ocr")
    fields = [f"adapters.allowed_paths=[{tmp_path}/data/adapters]", "server.api_keys=[sk-1]"]
    profile = load_profile("demo", fields)
    with served(profile, Keys(profile.api_keys())) as server:
        load, unload = (
            line.replace("http://127.0.0.1:8000", server.root)
            .replace("/data/", f"{tmp_path}/data/")
            .replace("curl ", "curl -sS ")
            for line in lines(block)
        )
        assert json.loads(printed(load, env={"KEY": "sk-1"}))["id"] == "ocr"
        assert "ocr" in server.request("GET", "/v1/models", "sk-1").text
        assert json.loads(printed(unload, env={"KEY": "sk-1"}))["deleted"] is True


@PAGES
def test_options_and_variables_of_a_download(page: str, capsys) -> None:
    """Every option of the command, and every variable that its code or its libraries read."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    with pytest.raises(SystemExit):
        cli.main(["download", "--help"])
    told = capsys.readouterr().out
    options = set(re.findall(r"--[a-z]+", told)) - {"--help"}
    variables = set(re.findall(r"[A-Z][A-Z_]{6,}", told)) - {"MODEL"}
    package = ROOT / "qwen2vl_serve"
    named = r"\"((?:HF|VLLM|TRANSFORMERS|MODELSCOPE)_[A-Z_]+)\""
    for name in (package / "checkpoints" / "hubs.py", *(package / "download").glob("*.py")):
        variables |= set(re.findall(named, name.read_text()))
    assert options == {"--source", "--to", "--revision"}
    assert len(variables) >= 9
    for word in options | variables:
        assert f"`{word}" in text, word


@PAGES
def test_the_profiles_of_the_page_load(page: str, tmp_path: Path) -> None:
    """Its two YAML examples are whole profiles, both of an engine with adapters."""
    examples = re.findall(
        r"```yaml\n(.*?)```", (ROOT / "docs" / page).read_text("utf-8"), re.DOTALL
    )
    assert len(examples) == 2
    for example in examples:
        path = tmp_path / "one.yaml"
        path.write_text(example, "utf-8")
        assert load_profile(str(path)).adapters.wanted


@PAGES
def test_the_demos_adapter_can_start(page: str, capsys) -> None:
    """The last command of the page, as far as `--check` goes."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    (line,) = re.findall(r"```bash boot\nserve (.+)\n```", text)
    assert cli.serve_main([*shlex.split(line), "--port", "0", "--check"]) == 0
    assert "can start" in capsys.readouterr().out


@PAGES
def test_what_is_made_without_weights_can_start(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """What writes a folder is run, and what serves it as far as `--check` goes."""
    text = (ROOT / "docs" / page).read_text("utf-8").replace("/tmp/", f"{tmp_path}/")
    blocks = re.findall(r"```bash boot\npython -m (\S+) (.+)\nserve (.+)\n```", text)
    assert [module.rpartition(".")[2] for module, _, _ in blocks] == ["quantise", "hollow"]
    monkeypatch.setattr("qwen2vl_serve.demo.quantise.EXAMPLES", 2)
    avx512 = "qwen2vl_serve.machine.hardware.has_avx512"
    monkeypatch.setattr(avx512, lambda: True)  # or it is refused
    for module, make, serve in blocks:
        assert importlib.import_module(module).main(shlex.split(make)) == 0
        assert cli.serve_main([*shlex.split(serve), "--port", "0", "--check"]) == 0
        assert "can start" in capsys.readouterr().out


def test_the_first_generation_is_refused_with_the_reason() -> None:
    """A ``qwen`` checkpoint would need ``trust_remote_code``, which the error says."""
    with pytest.raises(PreflightError, match=r"first generation.*trust_remote_code"):
        check_config({"model_type": "qwen"}, Path("config.json"))
