"""Adapters are read without torch, and refused for what vLLM would get wrong without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl_serve.adapters.lora import another_model, read_adapter
from qwen2vl_serve.adapters.named import (
    RANKS,
    check_room,
    model_config,
    named_adapters,
    rank_for,
    with_adapters,
)
from qwen2vl_serve.adapters.parts import sizes_of
from qwen2vl_serve.checkpoints.checkpoint import read_config
from qwen2vl_serve.demo.checkpoint import MODEL_FOLDER
from qwen2vl_serve.errors import PreflightError, ProfileError
from qwen2vl_serve.plan.architectures import published
from qwen2vl_serve.profile import Profile, load_profile
from qwen2vl_serve.profile.rehearsal import rehearsal
from tests.adapter_files import DEMO_SIZES, Q_PROJ, VISION, write_adapter, write_tensors

CONFIG = read_config(MODEL_FOLDER, {})
SHIPPED = Path(__file__).parents[1] / "qwen2vl_serve" / "demo" / "adapters"


def profile(*overrides: str) -> Profile:
    return load_profile("demo", overrides)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.3.mlp.down_proj",
        "base_model.model.model.language_model.layers.0.mlp.gate_proj",
        "base_model.model.visual.blocks.3.mlp.fc1",
        "base_model.model.model.visual.blocks.0.attn.proj",
        "base_model.model.visual.merger.mlp.2",
    ],
)
def test_names_of_both_times_of_transformers_are_known(name: str, tmp_path: Path) -> None:
    """transformers 4.52 renamed the parts; ms-swift's adapters are of either time."""
    size = sizes_of(CONFIG).of(name.removeprefix("base_model.model."))
    assert size is not None
    found = read_adapter(write_adapter(tmp_path, {name: size}), CONFIG)
    assert (found.rank, found.parts) == (2, 1)
    assert found.vision_parts == ("visual" in name)


def test_the_models_sizes_are_read_where_modelscope_put_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from Hugging Face's cache; a model that is in neither is not known."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    place = tmp_path / "models" / "owner--name" / "snapshots" / "master"
    place.parent.mkdir(parents=True)
    place.symlink_to(MODEL_FOLDER)
    assert model_config(profile("model=owner/name")) == CONFIG
    assert model_config(profile("model=owner/other")) is None


def test_what_ms_swift_writes_beside_is_left_alone(tmp_path: Path) -> None:
    """A regular expression for target_modules, args.json, additional_config.json, a README."""
    folder = write_adapter(
        tmp_path,
        target_modules=r"^(model\.language_model(?=\.).*\.(q_proj|v_proj))$",
        lora_dropout=0.05, modules_to_save=[], rank_pattern={}, alpha_pattern={},
        megatron_config=None, runtime_config={"ephemeral_gpu_offload": False}, inference_mode=True,
    )  # fmt: skip
    (folder / "additional_config.json").write_text('{"lora_dtype": null, "lorap_lr_ratio": null}')
    (folder / "args.json").write_text("{}")
    (folder / "README.md").write_text("---\nbase_model: demo\n---\n")
    assert read_adapter(folder, CONFIG).parts == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "IA3"}, "is a IA3, not a plain LoRA"),
        ({"use_dora": True}, "is a DoRA"),
        ({"lora_bias": True}, "biases"),
        ({"bias": "lora_only"}, "trains biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"r": 3}, "belong to two adapters"),
        ({"r": "2"}, "r is 2, not a number"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"rank_pattern": {"q_proj": 7}}, "has rank 2 in adapter_model.safetensors and 7"),
        ({"rank_pattern": {"(": 7}}, "not numbers above 0 by"),
        ({"rank_pattern": ["q_proj"]}, "not numbers above 0 by"),
        ({"rank_pattern": {"v_proj": "8"}}, "not numbers above 0 by"),
        ({"rank_pattern": {"v_proj": 0}}, "not numbers above 0 by"),
        ({"alpha_pattern": {"q_proj": "4"}}, "not numbers above 0 by"),
        ({"alpha_pattern": {"(": 4}}, "not numbers above 0 by"),
    ],
)
def test_what_vllm_would_not_apply_is_refused(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """One line says what it is and what to do about it."""
    folder = write_adapter(tmp_path)
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**values, **settings}))
    with pytest.raises(PreflightError, match=words.replace("(", r"\(")) as refusal:
        read_adapter(folder, CONFIG)
    assert "\n" not in str(refusal.value)
    assert ";" in str(refusal.value)


def test_settings_without_target_modules(tmp_path: Path) -> None:
    """vLLM alone finds that out, after the model is loaded."""
    folder = write_adapter(tmp_path)
    values = json.loads((folder / "adapter_config.json").read_text())
    del values["target_modules"]
    (folder / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(PreflightError, match="has no target_modules"):
        read_adapter(folder, CONFIG)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 64, "rank_pattern": {"q_proj": 2}},
        {"rank_pattern": {"v_proj": 64}},
        {"r": 64, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 0.5}},
    ],
)
def test_the_rank_is_the_one_that_vllm_counts(settings: dict[str, Any], tmp_path: Path) -> None:
    """A rank that the settings name and no part has takes ``max_lora_rank`` as well."""
    assert read_adapter(write_adapter(tmp_path, **settings), CONFIG).rank == 64


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"base_model.model.lm_head": (256, 1024)}, "vLLM does not adapt"),
        ({"base_model.model.model.layers.4.mlp.up_proj": (256, 704)}, "this model has not"),
        ({"base_model.model.visual.patch_embed.proj": (1176, 192)}, "vLLM does not adapt"),
        ({Q_PROJ: (3584, 3584)}, "has 3584 inputs and 3584 outputs, here 256 and 256"),
        ({Q_PROJ: (128, 256)}, "for another model"),
    ],
)
def test_parts_that_this_model_has_not(parts: Any, words: str, tmp_path: Path) -> None:
    """vLLM copies a smaller matrix into the corner of its room, and drops unknown parts."""
    with pytest.raises(PreflightError, match=words):
        read_adapter(write_adapter(tmp_path, parts), CONFIG)


def test_halves_that_do_not_belong_together(tmp_path: Path) -> None:
    """A without B, a tensor of no LoRA or no tensor at all: such a file is refused as a whole."""
    folder = write_adapter(tmp_path)
    weights = folder / "adapter_model.safetensors"
    write_tensors(weights, {f"{Q_PROJ}.lora_A.weight": (2, 256)})
    with pytest.raises(PreflightError, match="both halves"):
        read_adapter(folder, CONFIG)
    write_tensors(weights, {f"{Q_PROJ}.lora_A.weight": (2, 256), f"{Q_PROJ}.weight": (2, 2)})
    with pytest.raises(PreflightError, match="no matrix of a LoRA"):
        read_adapter(folder, CONFIG)
    write_tensors(weights, {})
    with pytest.raises(PreflightError, match="holds no weights"):
        read_adapter(folder, CONFIG)


@given(cut=st.integers(0, 3000))
def test_a_cut_file_is_never_taken(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Cut after any number of bytes up to 3000, it is named in the refusal."""
    folder = write_adapter(tmp_path_factory.mktemp("adapter"))
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    with pytest.raises(PreflightError, match="is not a whole safetensors file"):
        read_adapter(folder, CONFIG)


def test_the_folder_above_the_checkpoints(tmp_path: Path) -> None:
    """ms-swift writes `checkpoint-N` below the folder that its log names last."""
    write_adapter(tmp_path / "checkpoint-100")
    with pytest.raises(PreflightError, match="within: checkpoint-100"):
        read_adapter(tmp_path, CONFIG)


def test_the_sizes_are_those_of_the_planner() -> None:
    """Against the planner's layers, which are checked on parameter counts of the hub."""
    for name in ("Qwen2-VL-7B", "Qwen2.5-VL-3B"):
        known = published(name)
        assert known is not None
        assert known.vision is not None
        text, vision = known.text, known.vision
        config = {
            "model_type": known.kind,
            "hidden_size": text.hidden, "intermediate_size": text.intermediate,
            "num_hidden_layers": text.layers, "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "vision_config": {
                "depth": 32, "intermediate_size": vision.intermediate, "mlp_ratio": 4,
                "hidden_size": 1280 if vision.gated else text.hidden, "embed_dim": 1280,
            },
        }  # fmt: skip
        sizes = sizes_of(config)
        assert sizes is not None
        planned = {t.name: (t.inputs, t.outputs) for t in text.layer_tensors(1)}
        joined = sum(sizes.text[f"{letter}_proj"][1] for letter in "qkv")
        assert planned["qkv_proj"] == (text.hidden, joined)
        assert planned["o_proj"] == sizes.text["o_proj"]
        assert planned["down_proj"] == sizes.text["down_proj"]
        towers = {t.name: (t.inputs, t.outputs) for t in vision.tensors()}
        assert towers["qkv"] == sizes.vision["attn.qkv"]
        assert towers["mlp_down"] == sizes.vision["mlp.down_proj" if vision.gated else "mlp.fc2"]
        assert towers["merger_down"] == sizes.merger["mlp.2"]


def test_another_family_of_the_same_sizes_is_told_by_its_name(tmp_path: Path) -> None:
    """Qwen2-VL-7B and Qwen2.5-VL-7B have the same text layers."""
    folder = write_adapter(tmp_path, base_model_name_or_path="/m/Qwen/Qwen2.5-VL-7B-Instruct")
    adapter = read_adapter(folder, None)
    assert another_model(adapter, "Qwen/Qwen2-VL-7B-Instruct-AWQ") == adapter.base
    assert another_model(adapter, "Qwen/Qwen2.5-VL-7B-Instruct-AWQ") is None
    assert another_model(adapter, "/models/mine") is None
    with pytest.raises(PreflightError, match=r"was trained on .*Qwen2\.5-VL-7B"):
        check_room(adapter, profile("model=Qwen/Qwen2-VL-7B-Instruct"))


def test_engine_arguments_follow_from_the_adapters(tmp_path: Path) -> None:
    """Two of rank 12 and 2 get two places of rank 16; a vision part turns on the tower's."""
    one = write_adapter(tmp_path / "one", rank=12)
    two = write_adapter(tmp_path / "two", {VISION: DEMO_SIZES[VISION]})
    asked = profile(f"adapters.lora_modules={{one: {one}, two: {two}}}")
    engine = with_adapters(asked, named_adapters(asked)).engine
    assert engine.enable_lora
    assert engine.enable_tower_connector_lora
    assert (engine.max_loras, engine.max_lora_rank, engine.max_cpu_loras) == (2, 16, 2)
    assert asked.engine_args()["enable_lora"] is True
    assert asked.vllm_command()[-3:] == ["--lora-modules", f"one={one}", f"two={two}"]
    later = profile(f"adapters.allowed_paths=[{tmp_path}]")
    engine = with_adapters(later, {}).engine
    assert (engine.max_loras, engine.max_lora_rank, engine.max_cpu_loras) == (1, 16, 8)
    assert not engine.enable_tower_connector_lora


def test_what_the_profile_says_goes_before(tmp_path: Path) -> None:
    """All four fields stay as they were set; without adapters the profile is not changed at all."""
    one = write_adapter(tmp_path / "one")
    asked = profile(
        f"adapters.lora_modules.one={one}", "engine.max_lora_rank=64", "engine.max_loras=3",
        "engine.max_cpu_loras=5", "engine.enable_tower_connector_lora=true",
    )  # fmt: skip
    assert with_adapters(asked, named_adapters(asked)).engine == asked.engine.model_copy(
        update={"enable_lora": True}
    )
    assert with_adapters(profile(), {}) == profile()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adapters.lora_modules={demo: /x}"], "a name of the model itself"),
        (["adapters.lora_modules={a: /x}", "engine.enable_lora=false"], "beside section adapters"),
        (["adapters.allowed_paths=[here]"], "from the root"),
        (["engine.max_loras=4", "engine.max_cpu_loras=2"], "less than engine.max_loras"),
        (["adapters.lora_modules={a: /x, b: /y}", "engine.max_cpu_loras=1"], "for 2 adapters"),
        (["engine.max_lora_rank=9"], "max_lora_rank"),
        (['adapters.lora_modules={"": /x}'], "at least 1 character"),
    ],
)
def test_contradictions_of_the_profile(overrides: list[str], words: str) -> None:
    """A ``ProfileError`` when the profile is loaded, before any folder is looked into."""
    with pytest.raises(ProfileError, match=words):
        profile(*overrides)


def test_a_rehearsal_has_no_adapters(tmp_path: Path) -> None:
    """They belong to the profile's model, and the demo model is another."""
    rehearsed = rehearsal(profile(f"adapters.lora_modules.a={tmp_path}", "engine.max_loras=3"))
    assert not rehearsed.adapters.wanted
    assert "enable_lora" not in rehearsed.engine_args()
    assert "max_loras" not in rehearsed.engine_args()


@given(rank=st.integers(1, 512))
def test_ranks_are_rounded_up_to_vllms(rank: int) -> None:
    """Each rank from 1 to 512 finds the least ``max_lora_rank`` of vLLM's that holds it."""
    assert rank_for(rank) == min(one for one in RANKS if one >= rank)


@pytest.mark.parametrize(("name", "vision"), [("sailor", False), ("mirror", True)])
def test_the_adapters_that_ship_are_small_and_sound(name: str, vision: bool) -> None:
    """``mirror`` trains the vision tower alone, ``sailor`` not; each has less than 200 kB."""
    found = read_adapter(SHIPPED / name, CONFIG)
    assert found.vision_parts == (found.parts if vision else 0)
    assert sum(file.stat().st_size for file in (SHIPPED / name).iterdir()) < 200_000
