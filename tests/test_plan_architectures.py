"""Sizes of models: parameters to the last one, from the name and from config.json alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen2vl_serve.machine.hardware import GIB
from qwen2vl_serve.plan.architectures import PADDED_72B, Architecture, published, published_names
from qwen2vl_serve.plan.configuration import read_architecture
from qwen2vl_serve.plan.weights import layers_of_stages, stage_weights, stored_bytes
from qwen2vl_serve.profile.sections import DEMO_MODEL_FOLDER

PARAMETERS = {
    "Qwen2-VL-2B": 2_208_985_600,
    "Qwen2-VL-7B": 8_291_375_616,
    "Qwen2-VL-72B": 73_405_560_320,
    "Qwen2.5-VL-3B": 3_754_622_976,
    "Qwen2.5-VL-7B": 8_292_166_656,
    "Qwen2.5-VL-32B": 33_452_718_336,
    "Qwen2.5-VL-72B": 73_410_777_344,
}
TOWERS = {"Qwen2-VL-2B": 665_271_296, "Qwen2-VL-7B": 675_759_104, "Qwen2-VL-72B": 699_356_672}
CACHE_KIB = {
    "Qwen2-VL-2B": 28,
    "Qwen2-VL-7B": 56,
    "Qwen2-VL-72B": 320,
    "Qwen2.5-VL-3B": 36,
    "Qwen2.5-VL-7B": 56,
    "Qwen2.5-VL-32B": 256,
    "Qwen2.5-VL-72B": 320,
}
STORED_GIB = {
    ("Qwen2-VL-2B", ""): 4.115,
    ("Qwen2-VL-7B", ""): 15.444,
    ("Qwen2-VL-72B", ""): 136.729,
    ("Qwen2.5-VL-3B", ""): 6.994,
    ("Qwen2.5-VL-7B", ""): 15.445,
    ("Qwen2.5-VL-32B", ""): 62.311,
    ("Qwen2.5-VL-72B", ""): 136.738,
    ("Qwen2-VL-2B", "-Instruct-AWQ"): 2.31,
    ("Qwen2-VL-7B", "-Instruct-AWQ"): 6.45,
    ("Qwen2-VL-72B", "-Instruct-AWQ"): 40.04,
    ("Qwen2.5-VL-3B", "-Instruct-AWQ"): 3.17,
    ("Qwen2.5-VL-7B", "-Instruct-AWQ"): 6.45,
    ("Qwen2.5-VL-32B", "-Instruct-AWQ"): 19.28,
    ("Qwen2.5-VL-72B", "-Instruct-AWQ"): 40.05,
    # Zero points of eight bits are stored, but not kept on the card.
    ("Qwen2-VL-2B", "-Instruct-GPTQ-Int8"): 2.92,
    ("Qwen2-VL-7B", "-Instruct-GPTQ-Int8"): 9.51,
    ("Qwen2-VL-72B", "-Instruct-GPTQ-Int8"): 73.11,
    ("Qwen2.5-VL-3B", "-Instruct-GPTQ-Int8"): 4.47,
    ("Qwen2.5-VL-32B", "-Instruct-GPTQ-Int8"): 33.93,
}


def known(name: str) -> Architecture:
    found = published(f"Qwen/{name}")
    assert found is not None
    return found


def config_of(model: Architecture) -> dict[str, Any]:
    """Write a config.json as the hub has it for ``model``."""
    text, vision = model.text, model.vision
    assert vision is not None
    config: dict[str, Any] = {
        "model_type": model.kind,
        "torch_dtype": model.dtype,
        "hidden_size": text.hidden,
        "intermediate_size": text.intermediate,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "vocab_size": text.vocabulary,
        "tie_word_embeddings": text.tied,
        "max_position_embeddings": text.positions,
    }
    if vision.gated:
        config["vision_config"] = {
            "depth": 32, "hidden_size": 1280, "num_heads": 16, "out_hidden_size": text.hidden,
            "intermediate_size": vision.intermediate, "patch_size": 14,
        }  # fmt: skip
    else:
        config["vision_config"] = {
            "depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": text.hidden,
            "mlp_ratio": 4, "patch_size": 14,
        }  # fmt: skip
    if (packing := model.quantisation) is not None:
        config["quantization_config"] = {
            "quant_method": packing.method,
            "bits": packing.bits,
            "group_size": packing.group,
            "zero_point" if packing.method == "awq" else "sym": True,
            "desc_act": False,
            "modules_to_not_convert": ["visual"],
        }
    return config


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_counted_from_the_layers(name: str) -> None:
    """No table of counts: the layers' own sizes add up to what the checkpoints hold."""
    model = known(name)
    assert model.parameters == PARAMETERS[name]
    assert model.vision_parameters == TOWERS.get(name, model.vision_parameters)


@pytest.mark.parametrize(("name", "variant"), STORED_GIB)
def test_weights_take_what_the_files_hold(name: str, variant: str) -> None:
    """Within 1 % of the files, quantised or not, beside the rotary table that is computed."""
    model = known(name + variant)
    (stage,) = stage_weights(model, tensor_parallel=1, stages=1, dtype_bytes=2)
    rotary = model.text.rotary_values * 2
    assert (stage.total.exact - rotary) / GIB == pytest.approx(STORED_GIB[name, variant], rel=0.01)
    assert stage.total.exact <= stage.total.allocated <= stage.total.exact + 0.5 * GIB


# Memory at one token of input with transformers on an A100 of 80 GB, from Qwen2-VL's README.
PUBLISHED = {
    "2B": {"": 4.68, "-GPTQ-Int8": 3.55, "-GPTQ-Int4": 2.91, "-AWQ": 2.88},
    "7B": {"": 16.07, "-GPTQ-Int8": 10.11, "-GPTQ-Int4": 7.20, "-AWQ": 7.07},
    "72B": {"": 138.74, "-GPTQ-Int8": 75.17, "-GPTQ-Int4": 42.46, "-AWQ": 41.98},
}


@pytest.mark.parametrize(("size", "most"), [("2B", 0.7), ("7B", 0.8), ("72B", 2.7)])
def test_weights_agree_with_what_qwen_published(size: str, most: float) -> None:
    """Their figures hold activations as well: each is above the weights, and by little."""
    for variant, told in PUBLISHED[size].items():
        weights = stored_bytes(known(f"Qwen2-VL-{size}-Instruct{variant}")) / GIB
        assert 0.5 < told - weights < most, variant


@pytest.mark.parametrize("name", published_names())
def test_a_config_json_tells_what_the_name_tells(name: str) -> None:
    """A folder with the checkpoint's config.json is planned as the hub's name is."""
    model = published(name)
    assert model is not None
    assert read_architecture(name, config_of(model)) == model


@pytest.mark.parametrize("name", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("inner", [False, True])
def test_packing_is_read_wherever_vllm_looks_for_it(name: str, inner: bool) -> None:
    """Of the whole model or of its text model, under either name."""
    model = known("Qwen2-VL-7B-Instruct-AWQ")
    config = config_of(model)
    packing = config.pop("quantization_config")
    place = config.setdefault("text_config", dict(config)) if inner else config
    place[name] = packing
    assert read_architecture(model.name, config) == model


@pytest.mark.parametrize(
    ("packing", "vision"),
    [
        ({"quant_method": "compressed_tensors"}, True),
        ({"quant_method": "compressed-tensors", "ignore": ["visual.blocks.0.attn.qkv"]}, False),
        ({"quant_method": "auto-round"}, True),
        ({"quant_method": "auto-round", "block_name_to_quantize": "model.layers"}, False),
        (
            {
                "quant_method": "auto-round",
                "to_quant_block_names": ["model.language_model.layers", "model.visual.blocks"],
            },
            True,
        ),
    ],
)
def test_the_tower_is_packed_where_nothing_says_otherwise(
    packing: dict[str, Any], vision: bool
) -> None:
    """Some tools say what they leave out, AutoRound what it packs."""
    numbers = {"bits": 4, "group_size": 128}
    if packing["quant_method"] != "auto-round":
        numbers = {"config_groups": {"0": {"weights": {"num_bits": 4, "group_size": 128}}}}
    config = config_of(known("Qwen2-VL-7B-Instruct")) | {"quantization_config": packing | numbers}
    model = read_architecture("packed", config)
    assert model is not None
    assert model.quantisation is not None
    assert (model.quantisation.bits, model.quantisation.group) == (4, 128)
    assert model.quantisation.vision is vision


@pytest.mark.parametrize("whole", [True, False, None])
def test_one_word_of_tied_embeddings_is_enough(whole: bool | None) -> None:
    """Of the whole model or of its text model, as transformers reads it."""
    model = known("Qwen2-VL-2B-Instruct")
    config = config_of(model)
    text = {**config, "tie_word_embeddings": whole is not True}
    config |= {"text_config": text, "tie_word_embeddings": whole}
    assert read_architecture(model.name, config) == model


def test_factors_below_one_are_factors() -> None:
    """A narrow tower, and a context that is made shorter, are odd and no damage."""
    config = config_of(known("Qwen2-VL-2B-Instruct"))
    config["vision_config"]["mlp_ratio"] = 0.5
    config["rope_scaling"] = {
        "type": "yarn", "factor": 0.5, "original_max_position_embeddings": 32768
    }  # fmt: skip
    model = read_architecture("odd", config)
    assert model is not None
    assert model.vision is not None
    assert (model.vision.intermediate, model.text.positions) == (640, 16384)
    with pytest.raises(ValueError, match="mlp_ratio is 0"):
        read_architecture("odd", config | {"vision_config": {"mlp_ratio": 0}})


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2-VL-7B-Instruct"),
        ("Qwen/Qwen2-VL-7B", "Qwen/Qwen2-VL-7B-Instruct"),
        ("/models/Qwen2-VL-72B-Instruct-AWQ/", "Qwen/Qwen2-VL-72B-Instruct-AWQ"),
        ("Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),
        ("QWEN/QWEN2-VL-2B-INSTRUCT-GPTQ-INT4", "Qwen/Qwen2-VL-2B-Instruct-GPTQ-Int4"),
    ],
)
def test_other_spellings_of_a_name(name: str, same: str) -> None:
    """ModelScope's owner, folders, base models and other letters name the same sizes."""
    one, other = published(name), published(same)
    assert one is not None
    assert other is not None
    assert (one.text, one.vision, one.quantisation) == (
        other.text,
        other.vision,
        other.quantisation,
    )


@pytest.mark.parametrize(
    "name",
    ["Qwen/Qwen2-VL-13B", "Qwen/Qwen3-VL-8B", "me/Qwen2-VL-7B-Instruct-cats", "x", "Qwen/Qwen2-7B"],
)
def test_names_that_nothing_is_known_of(name: str) -> None:
    """A name that is only like a known one may hold other sizes."""
    assert published(name) is None


def test_the_quantised_72b_is_wider() -> None:
    """29568 is not divided by groups of 128 on eight cards, 29696 is."""
    assert known("Qwen2-VL-72B-Instruct-AWQ").text.intermediate == PADDED_72B
    assert known("Qwen2-VL-72B-Instruct").text.intermediate == 29568


def test_the_demo_folder_holds_its_parameters() -> None:
    """What is read from a config.json is what the weight files hold, tensor by tensor."""
    config = json.loads((DEMO_MODEL_FOLDER / "config.json").read_bytes())
    model = read_architecture("demo", config)
    assert model is not None
    held = 0
    for file in DEMO_MODEL_FOLDER.glob("*.safetensors"):
        held += parameters_in(file)
    assert model.parameters == held


def parameters_in(file: Path) -> int:
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    counts = []
    for name, entry in header.items():
        if name != "__metadata__":
            count = 1
            for size in entry["shape"]:
                count *= size
            counts.append(count)
    return sum(counts)


def test_qwen3_vl_is_read_for_planning() -> None:
    """The 8B of another family, from its config.json's sizes: 8.77 G parameters."""
    text = {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936, "max_position_embeddings": 262144,
    }  # fmt: skip
    config = {"model_type": "qwen3_vl", "text_config": text, "vision_config": {}}
    model = read_architecture("Qwen3-VL", config)
    assert model is not None
    assert model.parameters == 8_767_123_696


@pytest.mark.parametrize(
    ("layers", "stages", "expected"),
    [
        (28, 1, (28,)),
        (28, 2, (14, 14)),
        (28, 3, (9, 10, 9)),
        (36, 8, (4, 4, 4, 5, 5, 5, 5, 4)),
        (80, 3, (27, 27, 26)),
        (64, 6, (10, 11, 11, 11, 11, 10)),
    ],
)
def test_layers_of_pipeline_stages(layers: int, stages: int, expected: tuple[int, ...]) -> None:
    """As vLLM parts them: what is left goes to stages before the last."""
    assert layers_of_stages(layers, stages) == expected


def test_layers_are_parted_as_vllm_parts_them() -> None:
    """Every number of layers and stages that may occur, against vLLM's own function."""
    theirs = pytest.importorskip("vllm.distributed.utils").get_pp_indices
    for layers in (28, 36, 64, 80):
        for stages in range(1, 17):
            bounds = [theirs(layers, rank, stages) for rank in range(stages)]
            assert layers_of_stages(layers, stages) == tuple(end - start for start, end in bounds)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_stages_hold_the_whole_model_once_and_the_encoder_each(ranks: int) -> None:
    """Two stages hold one text model between them, but two vision encoders and rotary tables."""
    model = known("Qwen2-VL-7B")
    whole = stage_weights(model, tensor_parallel=ranks, stages=1, dtype_bytes=2)[0]
    first, last = stage_weights(model, tensor_parallel=ranks, stages=2, dtype_bytes=2)
    assert first.vision == last.vision == whole.vision
    rotary = model.text.rotary_values * 2
    assert first.text.exact + last.text.exact - rotary == pytest.approx(whole.text.exact)


def test_tied_embeddings_are_on_the_first_stage_and_the_last() -> None:
    """The 2B's one table serves as input on one stage and as output on the other."""
    model = known("Qwen2-VL-2B")
    whole = stage_weights(model, tensor_parallel=1, stages=1, dtype_bytes=2)[0]
    first, last = stage_weights(model, tensor_parallel=1, stages=2, dtype_bytes=2)
    table = model.text.embedding().parameters * 2
    rotary = model.text.rotary_values * 2
    assert first.text.exact + last.text.exact == pytest.approx(whole.text.exact + table + rotary)


@pytest.mark.parametrize("name", CACHE_KIB)
def test_kv_cache_of_a_token(name: str) -> None:
    """2 × layers × KV heads × 128 numbers of 16 bit."""
    text = known(name).text
    assert 2 * text.layers * text.kv_heads * text.head_dim * 2 == CACHE_KIB[name] * 1024
