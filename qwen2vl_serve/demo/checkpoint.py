"""The checkpoint folder: Qwen2-VL's files, readable by transformers and by vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

    from qwen2vl_serve.demo.network import Geometry

MODEL_FOLDER = Path(__file__).parent / "model"

# Pixel bounds of a picture (48 to 64 visual tokens) and of a video's frame (16 to 25 each two
# frames). They settle the scale at which the model sees, whatever the size that was sent.
IMAGE_PIXELS = (48 * 28 * 28, 64 * 28 * 28)
FRAME_PIXELS = (16 * 28 * 28, 25 * 28 * 28)
MAX_POSITIONS = 8192


def model_config(geometry: Geometry, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The content of config.json for this geometry and this tokenizer's ids."""

    def token(name: str) -> int:
        found = tokenizer.convert_tokens_to_ids(name)
        assert isinstance(found, int)  # noqa: S101
        return found

    rope = {
        "rope_type": "default",
        "type": "mrope",
        "rope_theta": geometry.theta,
        "mrope_section": list(geometry.mrope),
    }
    shared = {
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
    }
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
        **shared,
        "text_config": {
            "model_type": "qwen2_vl_text",
            "dtype": "bfloat16",
            "vocab_size": geometry.vocab,
            "hidden_size": geometry.hidden,
            "intermediate_size": geometry.intermediate,
            "num_hidden_layers": geometry.layers,
            "num_attention_heads": geometry.heads,
            "num_key_value_heads": geometry.kv_heads,
            "hidden_act": "silu",
            "max_position_embeddings": MAX_POSITIONS,
            "rms_norm_eps": geometry.eps,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
            "rope_parameters": rope,
            **shared,
        },
        "vision_config": {
            "model_type": "qwen2_vl_vision",
            "depth": geometry.vision_depth,
            "embed_dim": geometry.vision_dim,
            "hidden_size": geometry.hidden,
            "num_heads": geometry.vision_heads,
            "mlp_ratio": geometry.vision_mlp,
            "hidden_act": "quick_gelu",
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "in_channels": 3,
        },
    }


def write_checkpoint(
    folder: Path,
    geometry: Geometry,
    tokenizer: PreTrainedTokenizerFast,
    weights: dict[str, Tensor],
) -> None:
    """Write every file of the checkpoint but its README; weights are stored as bfloat16."""
    import torch  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(geometry, tokenizer)
    tokenizer.save_pretrained(str(folder))
    (folder / "chat_template.json").unlink(missing_ok=True)
    pixels = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    normal = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    files: dict[str, Any] = {
        "config.json": config,
        "generation_config.json": {
            "do_sample": False,
            "bos_token_id": config["bos_token_id"],
            "eos_token_id": [config["eos_token_id"], config["pad_token_id"]],
            "pad_token_id": config["pad_token_id"],
        },
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
            "size": {"shortest_edge": IMAGE_PIXELS[0], "longest_edge": IMAGE_PIXELS[1]},
            "min_pixels": IMAGE_PIXELS[0],
            "max_pixels": IMAGE_PIXELS[1],
            **pixels,
            **normal,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "Qwen2VLVideoProcessor",
            "processor_class": "Qwen2VLProcessor",
            "size": {"shortest_edge": FRAME_PIXELS[0], "longest_edge": FRAME_PIXELS[1]},
            "cap_pixels_per_frame": False,
            "do_sample_frames": False,
            "min_frames": 4,
            "max_frames": 16,
            **pixels,
            **normal,
        },
    }
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    stored = {
        name: value.detach().to(torch.bfloat16).contiguous() for name, value in weights.items()
    }
    save_file(stored, str(folder / "model.safetensors"), metadata={"format": "pt"})
