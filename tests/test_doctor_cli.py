"""The command `qwen2vl-serve doctor`: what it prints and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from qwen2vl_serve import cli, doctor
from qwen2vl_serve.doctor import CHECKS, Finding, report
from qwen2vl_serve.machine import installed
from tests.worlds import Lab


@pytest.fixture
def lab(monkeypatch, tmp_path) -> Lab:
    monkeypatch.setattr(installed, "vllm_build", lambda: "cpu")
    return Lab(monkeypatch, tmp_path)


def run(lab: Lab, *words: str) -> int:
    profile = ["--profile", "demo", "--port", "0", "--model", str(lab.model)]
    return cli.main(["doctor", *profile, *words])


def test_a_healthy_machine_is_told_line_by_line(lab, capfd):
    """One line a check, the verdict last; exit status 0."""
    assert run(lab) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("ok ")]) == len(CHECKS)
    assert lines[-1] == f"Profile demo can start; all {len(CHECKS)} checks are passed."


def test_a_warning_lets_it_start(lab, capfd):
    """Exit status 0, and the verdict counts it."""
    lab.monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    assert run(lab) == 0
    out = capfd.readouterr().out
    assert "\nwarning  proxy " in out
    assert f"Profile demo can start; 1 of {len(CHECKS)} checks warn." in out
    assert "\x1b" not in out


def test_a_fatal_finding_ends_with_1(lab, capfd):
    """What, why and the remedy; the checks after it are made as well."""
    (lab.model / "model.safetensors").unlink()
    assert run(lab) == 1
    out = capfd.readouterr().out
    assert "\nfatal    weights " in out
    assert "\n         why:  vLLM finds out" in out
    assert "\n         mend: download the checkpoint again" in out
    assert f"1 of {len(CHECKS)} checks stop profile demo." in out


def test_json_holds_every_check(lab, capfd):
    """For programs: the same findings, the same exit status, nothing else on standard output."""
    (lab.model / "model.safetensors").unlink()
    assert run(lab, "--json") == 1
    told = json.loads(capfd.readouterr().out)
    assert (told["profile"], told["fatal"], told["warnings"], told["mended"]) == (
        "demo", 1, 0, None,
    )  # fmt: skip
    assert [one["check"] for one in told["checks"]] == [check.__name__ for check in CHECKS]
    (weights,) = [one for one in told["checks"] if one["level"] == "fatal"]
    assert weights.keys() == {"check", "level", "found", "why", "mend"}


def test_json_without_a_profile_is_json_alone(lab, capfd):
    """The choice of a profile is told on standard error."""
    cli.main(["doctor", "--json", "--port", "0"])
    out, err = capfd.readouterr()
    assert json.loads(out)["profile"] in err


def test_fix_says_where_the_copy_is(lab, capfd):
    """The printed command serves it; a second run on the copy has nothing to mend."""
    lab.text_config(rope_parameters={"rope_type": "su", "mrope_section": [8, 4, 4]})
    assert run(lab, "--fix") == 1
    command = capfd.readouterr().out.splitlines()[-1]
    assert command.startswith("Serve it with: serve --profile demo --model ")
    copy = command.rpartition(" ")[2]
    assert cli.serve_main(["--profile", "demo", "--port", "0", "--model", copy, "--check"]) == 0
    capfd.readouterr()
    assert cli.main(["doctor", "--profile", "demo", "--port", "0", "--model", copy, "--fix"]) == 0
    assert "Nothing to mend" in capfd.readouterr().out


@pytest.mark.parametrize("broken", ["{", '{"model_type": "qwen2_vl", "rope_scaling": 1}'])
def test_what_cannot_be_mended_is_told_beside_the_findings(lab, capfd, broken):
    """Of a config.json that is none, and of one whose sections nobody knows: status 1, JSON whole.

    Nor is ``--fix`` advised there.
    """
    (lab.model / "config.json").write_text(broken)
    assert run(lab, "--fix", "--json") == 1
    told = json.loads(capfd.readouterr().out)
    assert told["mended"] is None
    assert "config.json" in told["unmended"]
    assert [one["check"] for one in told["checks"]] == [check.__name__ for check in CHECKS]
    (config,) = [one for one in told["checks"] if one["check"] == "config"]
    assert config["level"] == "fatal"
    assert "--fix" not in config["mend"]
    assert run(lab, "--fix") == 1
    assert capfd.readouterr().out.splitlines()[-1] == f"Not mended: {told['unmended']}"


@pytest.mark.parametrize(
    "words",
    [
        ["--set", "engine.max_model_length=1"],
        ["--profile", "none"],
        ["--fix", "--model", "owner/name"],
        ["--no-such-option"],
    ],
)
def test_bad_input_is_one_line_and_status_2(lab, capfd, words):
    """A profile that cannot be read is no patient."""
    assert run(lab, *words) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1


def test_an_adapter_is_looked_at(lab, capfd):
    """`--adapter` names the folder that PEFT or ms-swift wrote."""
    folder = lab.adapter(use_dora=True)
    assert run(lab, "--adapter", str(folder)) == 1
    assert "fatal    adapter" in capfd.readouterr().out


def test_lines_keep_within_80_columns_and_commands_whole():
    """Words wrap; a path and a command in backticks can be copied from one line."""
    command = "`docker run --ipc=host --shm-size=8g --ulimit memlock=-1`"
    path = "/models/" + "x" * 90
    finding = Finding("fatal", f"{'word ' * 30}{path}", "why " * 40, f"{'do ' * 20}{command}", "a")
    lines = list(report.lines([finding], 80))
    assert [line for line in lines if len(line) > 80] == [" " * 24 + path]
    assert any(command in line for line in lines)


def test_serve_tells_warnings_and_starts(lab, capfd):
    """One line on standard error names the checks and the command that explains them."""
    lab.monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    assert cli.serve_main(["--profile", "demo", "--port", "0", "--check"]) == 0
    out, err = capfd.readouterr()
    assert out == "profile demo can start on this machine\n"
    assert err == "serve: warnings: proxy; qwen2vl-serve doctor --profile demo explains\n"


def test_the_base_installation_is_enough(tmp_path):
    """Without torch, vLLM, transformers and numpy every check is made, within a second or so."""
    program = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'transformers', 'vllm', 'numpy'):\n"
        "    sys.modules[name] = None\n"
        "from qwen2vl_serve import cli\n"
        "sys.exit(cli.main(['doctor', '--profile', 'multi-gpu', '--port', '0', '--json']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path)},
    )
    assert done.stderr == ""
    assert len(json.loads(done.stdout)["checks"]) == len(doctor.CHECKS)
