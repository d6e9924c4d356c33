"""What the vision tower is handed of pictures is what transformers' processor makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from vllm.config import ModelConfig, VllmConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.cache import processor_cache_from_config
from vllm.multimodal.media.base import MediaWithBytes
from vllm.multimodal.parse import parse_mm_uuids
from vllm.multimodal.processing import ProcessorInputs, TimingContext

from qwen2vl_serve.demo.checkpoint import MODEL_FOLDER
from qwen2vl_serve.errors import InvalidImage
from qwen2vl_serve.vllm_engine.connector import Sampled
from qwen2vl_serve.vllm_engine.patches import make_patches
from qwen2vl_serve.vllm_engine.request import Pixels

CELL = 28
SIDES = st.integers(1, 9).map(lambda cells: cells * CELL)


@dataclass(frozen=True)
class Shown:
    """A picture as an engine takes it."""

    array: NDArray[np.uint8]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.array.shape[1], self.array.shape[0]

    def pixels(self) -> NDArray[np.uint8]:
        """Return the array."""
        return self.array


@lru_cache(maxsize=2)
def processors(*, device: bool = True) -> tuple[Any, Any]:
    """Return vLLM's processor as it is and with our patches, for pictures of any size.

    ``device``: whether the device does the arithmetic, as is vLLM's default.
    """
    config = ModelConfig(
        model=str(MODEL_FOLDER),
        mm_processor_kwargs={"min_pixels": CELL**2, "max_pixels": 10**8},
        mm_device_do_normalize=device,
    )
    plain, ours = (MULTIMODAL_REGISTRY.create_processor(config) for _ in range(2))
    make_patches(ours)
    return plain, ours


def drawn(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """Return a picture that holds every byte sooner or later."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pillow(pictures: list[NDArray[np.uint8]]) -> list[Image.Image]:
    """Return the pictures as vLLM has them of stock's clients."""
    return [Image.fromarray(picture) for picture in pictures]


def lazy(pictures: list[NDArray[np.uint8]]) -> list[Pixels]:
    """Return the pictures as ours are handed to vLLM."""
    return [Pixels(Shown(picture)) for picture in pictures]  # type: ignore[arg-type]  # key and param are not asked


def assert_same(found: Any, expected: Any) -> None:
    """Compare what two processors return, to the bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_patches_are_those_of_the_processor(sizes: list[tuple[int, int]], seed: int) -> None:
    """Pictures of any sizes come out the same, bit for bit."""
    plain, ours = processors()
    pictures = [drawn(seed + n, *size) for n, size in enumerate(sizes)]
    expected = plain._call_hf_processor({"images": pillow(pictures)}, {})
    assert_same(ours._call_hf_processor({"images": lazy(pictures)}, {}), expected)


def test_arithmetic_is_left_to_the_processor() -> None:
    """Where the device does none, the processor gets our pictures as any others."""
    plain, ours = processors(device=False)
    pictures = [drawn(1, 2 * CELL, 3 * CELL)]
    expected = plain._call_hf_processor({"images": pillow(pictures)}, {})
    assert expected["pixel_values"].dtype.is_floating_point
    assert_same(ours._call_hf_processor({"images": lazy(pictures)}, {}), expected)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 7), SIDES, SIDES), min_size=1, max_size=3),
    seed=st.integers(0, 99),
    beside=st.booleans(),
)
def test_videos_are_those_of_the_processor(
    sizes: list[tuple[int, int, int]], seed: int, beside: bool
) -> None:
    """Of any number of frames, alone and beside a picture: the same, bit for bit."""
    plain, ours = processors()
    videos = [
        np.stack([drawn(seed + n * 9 + frame, height, width) for frame in range(count)])
        for n, (count, height, width) in enumerate(sizes)
    ]
    picture = [drawn(seed, 2 * CELL, CELL)]
    theirs: dict[str, Any] = {"videos": videos}
    shown: dict[str, Any] = {"videos": [video.view(Sampled) for video in videos]}
    if beside:
        theirs, shown = theirs | {"images": pillow(picture)}, shown | {"images": lazy(picture)}
    expected = plain._call_hf_processor(theirs, {})
    assert_same(ours._call_hf_processor(shown, {}), expected)


def test_videos_of_others_beside_pictures_are_left_to_the_processor() -> None:
    """A request with both gets both, each as the processor makes it."""
    plain, ours = processors()
    picture = drawn(1, 2 * CELL, 3 * CELL)
    video = np.stack([drawn(n, 2 * CELL, 2 * CELL) for n in range(4)])
    expected = plain._call_hf_processor({"images": pillow([picture]), "videos": [video]}, {})
    found = ours._call_hf_processor({"images": lazy([picture]), "videos": [video]}, {})
    assert_same(found, expected)


def test_pictures_of_others_are_left_to_the_processor() -> None:
    """vLLM's own pictures, with which it warms up, are resized and all."""
    plain, ours = processors()
    pictures = pillow([drawn(1, 100, 130)])
    expected = plain._call_hf_processor({"images": pictures}, {})
    assert_same(ours._call_hf_processor({"images": pictures}, {}), expected)


def test_no_picture_of_ours_becomes_one_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the whole way through vLLM's processor, past its cache, only the array is asked for."""
    plain, ours = processors()
    shown = Shown(drawn(1, 2 * CELL, 3 * CELL))
    expected = applied(plain, "another key", shown, new_cache(plain))
    monkeypatch.setattr(Pixels, "im", property(lambda _: pytest.fail("asked Pillow")))
    assert_same(applied(ours, "a key", shown, new_cache(ours)), expected)


def new_cache(processor: Any) -> Any:
    """Return the cache that vLLM puts before a processor."""
    return processor_cache_from_config(VllmConfig(model_config=processor.info.ctx.model_config))


def applied(processor: Any, key: str, shown: Shown, cache: Any) -> dict[str, torch.Tensor]:
    """Return what vLLM's processor, behind its cache, makes of a request that shows one picture."""
    info = processor.info
    picture = MediaWithBytes(Pixels(shown), b"")  # type: ignore[arg-type]  # as in ``lazy``
    prompt = info.get_tokenizer().encode("<|vision_start|><|image_pad|><|vision_end|>")
    inputs = ProcessorInputs(
        prompt,
        info.parse_mm_data({"image": [picture]}),
        parse_mm_uuids({"image": [key]}),
        cache=cache,
    )
    (item,) = processor.apply(inputs, TimingContext(enabled=False))["mm_kwargs"]["image"]
    return dict(item.get_data())


def test_damage_that_is_found_late_is_told_in_our_words() -> None:
    """A picture that cannot be decoded within vLLM's processor: the error comes out as it is.

    The next request with its key gets what it shows.
    """

    class Damaged(Shown):
        def pixels(self) -> NDArray[np.uint8]:
            raise InvalidImage("damaged", param="p")

    _, ours = processors()
    picture, cache = drawn(1, 2 * CELL, 3 * CELL), new_cache(ours)
    with pytest.raises(InvalidImage, match="damaged"):
        applied(ours, "a key", Damaged(picture), cache)
    expected = applied(ours, "a key", Shown(picture), new_cache(ours))
    assert_same(applied(ours, "a key", Shown(picture), cache), expected)


def test_pillow_can_have_the_pixels() -> None:
    """For a processor of another family it is an image as any other."""
    picture = drawn(1, CELL, 2 * CELL)
    image = lazy([picture])[0]
    assert np.array_equal(np.asarray(image), picture)
    assert image.getpixel((3, 4)) == tuple(picture[4, 3])
    assert np.array_equal(
        np.asarray(image.resize((5, 5))), np.asarray(pillow([picture])[0].resize((5, 5)))
    )


def test_other_families_are_left_alone() -> None:
    """A model without pictures, or with a processor of its own, keeps what it has."""
    other = object()
    make_patches(None)
    make_patches(other)  # type: ignore[arg-type]
    assert not hasattr(other, "_call_hf_processor")
