"""From pictures and frames at the model's size to the patches that its vision tower takes.

vLLM leaves the arithmetic to the device, so that nothing but the order of the bytes is to be
changed. transformers finds that out anew for every request, in a millisecond, and copies a video
several times.
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

from qwen2vl_serve.vllm_engine.connector import Sampled
from qwen2vl_serve.vllm_engine.request import Pixels

COLOURS = 3


def make_patches(processor: BaseMultiModalProcessor[Any] | None) -> None:
    """Have vLLM's processor of the family make patches of our pictures and videos here.

    What it does with anything else is left to it, and so is all that other processors do.
    """
    if not isinstance(processor, Qwen2VLMultiModalProcessor):
        return
    if not processor.info.ctx.get_mm_config().mm_device_do_normalize:
        return
    call, sizes = processor._call_hf_processor, processor.info.get_image_processor()
    side, merge, together = sizes.patch_size, sizes.merge_size, sizes.temporal_patch_size

    def patched(shown: list[NDArray[np.uint8]]) -> tuple[torch.Tensor, torch.Tensor]:
        made = [patches(frames, side, merge, together) for frames in shown]
        grids = [
            [-(-len(frames) // together), frames.shape[1] // side, frames.shape[2] // side]
            for frames in shown
        ]
        return made[0] if len(made) == 1 else torch.cat(made), torch.tensor(grids)

    def call_hf_processor(data: Mapping[str, Any], options: Mapping[str, object]) -> BatchFeature:
        pictures, videos = data.get("images", ()), data.get("videos", ())
        done: dict[str, torch.Tensor] = {}
        rest = dict(data)
        if pictures and all(isinstance(one, Pixels) for one in pictures):
            shown = [one.array[np.newaxis] for one in pictures]
            done["pixel_values"], done["image_grid_thw"] = patched(shown)
            del rest["images"]
        if videos and all(isinstance(one, Sampled) for one in videos):
            done["pixel_values_videos"], done["video_grid_thw"] = patched(videos)
            del rest["videos"]
            if (told := rest.pop("video_metadata", None)) is not None:  # Qwen2.5-VL's
                seconds = [together / metadata.sampled_fps for metadata in told]
                done["second_per_grid_ts"] = torch.tensor(seconds)
        processed = call(rest, options) if rest else BatchFeature()
        processed.update(done)
        return processed

    processor._call_hf_processor = call_hf_processor


def patches(frames: NDArray[np.uint8], side: int, merge: int, together: int) -> torch.Tensor:
    """Return the patches of frames [frames, height, width, 3], uint8.

    [patches, 3 × together × side × side]: ``together`` frames make one layer, of which a picture's
    are all the same, and the last of an uneven video. The ``merge`` × ``merge`` patches of a
    visual token are next to one another.
    """
    count, height, width, _ = frames.shape
    rows, columns = height // side, width // side
    layers = -(-count // together)
    made = np.empty((layers * rows * columns, COLOURS * together * side**2), np.uint8)
    places = made.reshape(
        layers, rows // merge, columns // merge, merge, merge, COLOURS, together, side * side
    )
    # A row of a patch is moved as one value: its bytes, of one plane, are next to one another.
    row = np.dtype((np.void, side))
    to = made.view(row).reshape(*places.shape[:-1], side)
    for number, frame in enumerate(frames):
        layer, within = divmod(number, together)
        for colour, plane in enumerate(cv2.split(np.asarray(frame))):
            found = plane.view(row).reshape(rows // merge, merge, side, columns // merge, merge)
            to[layer, :, :, :, :, colour, within] = found.transpose(0, 3, 1, 4, 2)
    last = (count - 1) % together
    places[-1, ..., last + 1 :, :] = places[-1, ..., last : last + 1, :]
    return torch.from_numpy(made)
