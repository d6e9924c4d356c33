"""A checkpoint's folder without weights: ``python -m qwen2vl_serve.demo.hollow NAME --out FOLDER``.

The sizes of one of Qwen's published checkpoints, and the demo's tokenizer and processors. With
``load_format: dummy`` vLLM makes up the weights, so that a profile can be started on the true
shapes before anything is downloaded; what it then says means nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen2vl_serve.demo.checkpoint import MODEL_FOLDER
from qwen2vl_serve.plan.architectures import Architecture, published, published_names

_ROPE = {"rope_type": "default", "type": "mrope", "mrope_section": [16, 24, 24]}
# As published, where transformers' defaults are others.
_WINDOWS = {"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2}
_TOKENS = (
    "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def shortened(model: Architecture, layers: int) -> Architecture:
    """The same widths with at most ``layers`` layers of text, and of the vision tower."""
    text = replace(model.text, layers=min(layers, model.text.layers))
    vision = model.vision and replace(model.vision, depth=min(layers, model.vision.depth))
    return replace(model, text=text, vision=vision)


def _class_name(model: Architecture) -> str:
    """How the names of transformers' classes for it begin."""
    return "Qwen2_5_VL" if model.vision and model.vision.gated else "Qwen2VL"


def config_of(model: Architecture) -> dict[str, Any]:
    """The content of config.json, in the form that the hub has it, with the demo's token ids."""
    text, vision = model.text, model.vision
    if vision is None:
        raise ValueError(f"{model.name}: has no vision tower")
    demo = json.loads((MODEL_FOLDER / "config.json").read_text("utf-8"))
    tower: dict[str, Any] = {
        "model_type": model.kind,
        "depth": vision.depth,
        "num_heads": vision.heads,
        "patch_size": vision.patch,
        "spatial_merge_size": vision.merge,
        "temporal_patch_size": vision.frames,
        "in_channels": vision.channels,
    }
    if vision.gated:
        tower |= {"hidden_size": vision.embed, "intermediate_size": vision.intermediate,
                  "out_hidden_size": vision.out, "hidden_act": "silu", **_WINDOWS}  # fmt: skip
    else:
        tower |= {"embed_dim": vision.embed, "mlp_ratio": vision.intermediate // vision.embed,
                  "hidden_size": vision.out, "hidden_act": "quick_gelu"}  # fmt: skip
    config: dict[str, Any] = {
        "architectures": [f"{_class_name(model)}ForConditionalGeneration"],
        "model_type": model.kind,
        "torch_dtype": model.dtype,
        "vocab_size": text.vocabulary,
        "hidden_size": text.hidden,
        "intermediate_size": text.intermediate,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "max_position_embeddings": text.positions,
        "tie_word_embeddings": text.tied,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": _ROPE,
        "vision_config": tower,
        **{name: demo[name] for name in _TOKENS},
    }
    packing = model.quantisation
    if packing is not None:
        config["quantization_config"] = {
            "quant_method": packing.method,
            "bits": packing.bits,
            "group_size": packing.group,
        }
        # vLLM sees from the files what is packed, and here are none.
        config["quantization_config"] |= (
            {"zero_point": True, "version": "gemm", "modules_to_not_convert": ["visual"]}
            if packing.method == "awq"
            else {"sym": True, "desc_act": False, "dynamic": {r"-:visual\.": {}}}
        )
    return config


def write(folder: Path, model: Architecture) -> None:
    """Write the folder: everything that serving reads, but weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in MODEL_FOLDER.iterdir():
        if file.suffix not in (".safetensors", ".md"):
            shutil.copy(file, folder / file.name)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        sizes = json.loads((MODEL_FOLDER / name).read_text("utf-8"))
        sizes["processor_class"] = f"{_class_name(model)}Processor"
        (folder / name).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    text = json.dumps(config_of(model), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen2vl_serve.demo.hollow", description=__doc__
    )
    parser.add_argument("name", metavar="NAME", help="as Qwen/Qwen2-VL-7B-Instruct-AWQ")
    parser.add_argument("--out", type=Path, required=True, help="the folder")
    parser.add_argument(
        "--layers", type=int, help="at most so many, of text and of the tower; default: all"
    )
    options = parser.parse_args(arguments)
    model = published(options.name)
    if model is None:
        parser.error(f"{options.name}: is none of {', '.join(published_names())}")
    if options.layers is not None and options.layers < 1:
        parser.error(f"--layers: {options.layers} is below 1")
    write(options.out, model if options.layers is None else shortened(model, options.layers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
