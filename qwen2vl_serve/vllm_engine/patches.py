"""From pictures at the model's size to the patches that its vision tower takes.

vLLM leaves the arithmetic to the device, so that nothing but the order of the bytes is to be
changed. transformers finds that out anew for every request, in a millisecond.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import BatchFeature
from vllm.model_executor.models.qwen2_vl import Qwen2VLMultiModalProcessor
from vllm.multimodal.processing import BaseMultiModalProcessor

from qwen2vl_serve.vllm_engine.request import Pixels

COLOURS = 3


def make_patches(processor: BaseMultiModalProcessor[Any] | None) -> None:
    """Have vLLM's processor of the family make patches of our pictures here.

    What it does with anything else is left to it, and so is all that other processors do.
    """
    if not isinstance(processor, Qwen2VLMultiModalProcessor):
        return
    if not processor.info.ctx.get_mm_config().mm_device_do_normalize:
        return
    call, images = processor._call_hf_processor, processor.info.get_image_processor()

    def call_hf_processor(data: Mapping[str, Any], options: Mapping[str, object]) -> BatchFeature:
        pictures = data.get("images", ())
        if not pictures or not all(isinstance(one, Pixels) for one in pictures):
            return call(data, options)
        rest = {name: given for name, given in data.items() if name != "images"}
        processed = call(rest, options) if rest else BatchFeature()
        made = [
            patches(one.array, images.patch_size, images.merge_size, images.temporal_patch_size)
            for one in pictures
        ]
        processed["pixel_values"] = made[0] if len(made) == 1 else torch.cat(made)
        processed["image_grid_thw"] = torch.tensor(
            [[1, *(side // images.patch_size for side in one.array.shape[:2])] for one in pictures]
        )
        return processed

    processor._call_hf_processor = call_hf_processor


def patches(pixels: NDArray[np.uint8], side: int, merge: int, frames: int) -> torch.Tensor:
    """Return the patches of pixels [height, width, 3]: [patches, 3 × frames × side × side], uint8.

    The ``merge`` × ``merge`` patches of a visual token are next to one another; a picture's frames
    are all the same.
    """
    height, width, _ = pixels.shape
    rows, columns = height // side, width // side
    made = np.empty((rows * columns, COLOURS * frames * side**2), np.uint8)
    places = made.reshape(
        rows // merge, columns // merge, merge, merge, COLOURS, frames, side, side
    )
    # A plane at a time, for the bytes of a row of a patch are then next to one another.
    for colour, plane in enumerate(cv2.split(pixels)):
        found = plane.reshape(rows // merge, merge, side, columns // merge, merge, side)
        by_patch = found.transpose(0, 3, 1, 4, 2, 5)
        for frame in range(frames):
            places[:, :, :, :, colour, frame] = by_patch
    return torch.from_numpy(made)
