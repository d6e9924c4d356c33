"""Videos on their way through vLLM's own parser and processor, without an engine."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen2vl_serve.demo import hollow
from qwen2vl_serve.errors import InternalError
from qwen2vl_serve.launch.resources import media_loader
from qwen2vl_serve.media.clip import Video
from qwen2vl_serve.plan.architectures import published
from qwen2vl_serve.profile import load_profile
from qwen2vl_serve.protocol.validation import RequestLimits, parse_chat
from tests.media.movies import data_url, movie, picture
from tests.media.test_loader import loaded

pytest.importorskip("vllm")

LIMITS = RequestLimits(max_messages=9, max_n=1, max_tokens=None, images=9, videos=9)
PROFILE = load_profile("demo", ["media.limit_mm_per_prompt={image: 4, video: 9}"])


@dataclass
class Front:
    """What vLLM does with a request's media before its engine sees them."""

    config: Any
    processor: Any
    ours: bool
    """Whether patches are ours."""

    def parse(self, messages: list[Any]) -> tuple[Any, Any]:
        """Return media and keys, as vLLM's chat parser gathers them."""
        from vllm.renderers.chat_utils import parse_chat_messages_async

        async def parsed() -> Any:
            return await parse_chat_messages_async(messages, self.config, "openai")

        _, data, keys = asyncio.run(parsed())
        return data, keys

    def process(self, data: Any) -> Any:
        """Return the tensors of vLLM's processor, which calls transformers' ."""
        items = self.processor.info.parse_mm_data(data)
        return self.processor._apply_hf_processor_main(items, {})


LATER = "Qwen/Qwen2.5-VL-3B-Instruct"


@pytest.fixture(scope="module", params=["Qwen2-VL", LATER])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The demo model, or a folder as Qwen2.5-VL's, without weights."""
    if request.param != LATER:
        return str(PROFILE.engine_args()["model"])
    folder = tmp_path_factory.mktemp("later")
    published_model = published(LATER)
    assert published_model is not None
    hollow.write(folder, published_model)
    return str(folder)


@pytest.fixture(scope="module", params=[True, False], ids=["patches of ours", "transformers'"])
def front(model: str, request: pytest.FixtureRequest) -> Iterator[Front]:
    """What stands before a model, with our patches and without."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    from qwen2vl_serve.vllm_engine import connector
    from qwen2vl_serve.vllm_engine.patches import make_patches

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_MEDIA_CONNECTOR", connector.MEDIA_CONNECTOR)
        connector.register()
        config = AsyncEngineArgs(**PROFILE.engine_args() | {"model": model}).create_model_config()
        processor = MULTIMODAL_REGISTRY.create_processor(config)
        if request.param:
            make_patches(processor)
        yield Front(config, processor, request.param)


def image_url(number: int) -> str:
    data = io.BytesIO()
    Image.fromarray(picture(number, (333, 222))).save(data, "PNG")
    return data_url(data.getvalue(), "image/png")


def request(*parts: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Return our media, still to be decoded, and vLLM's messages."""
    from qwen2vl_serve.vllm_engine.request import as_vllm

    content = [*parts, {"type": "text", "text": "x"}]
    body = {"messages": [{"role": "user", "content": content}]}
    chat = parse_chat(json.dumps(body).encode(), LIMITS)
    loader = media_loader(PROFILE)
    media = list(asyncio.run(loaded(loader, chat)))
    again = list(asyncio.run(loaded(loader, chat)))
    assert [one.key for one in media] == [one.key for one in again]
    return again, as_vllm(chat, again, "id").messages


FILM = {"type": "video_url", "video_url": {"url": data_url(movie(50, (320, 240)))}}
PARTS: list[dict[str, Any]] = [
    {"type": "image_url", "image_url": {"url": image_url(0)}},
    {**FILM, "max_pixels": 100_000},
    {**FILM, "resized_height": 28, "resized_width": 140},
    {**FILM, "nframes": 2, "min_pixels": 100_352},
    {"type": "video", "video": [image_url(number) for number in range(3)]},
    {"type": "video", "video": [image_url(number) for number in range(3)], "fps": 0.3},
]


def test_frames_are_not_touched_before_they_are_processed(front: Front) -> None:
    """vLLM gathers them under our keys and looks at none: of cached ones it never will."""
    media, messages = request(*PARTS)
    data, keys = front.parse(messages)
    assert keys["video"] == [one.key for one in media if isinstance(one, Video)]
    front.processor.info.parse_mm_data(data)
    assert [one.key for one in media if one.decoded] == []


def test_the_processor_takes_the_frames_as_they_are(front: Front) -> None:
    """Neither sampled nor resized again: the grids are ours and every pixel is in its patch."""
    media, messages = request(*PARTS)
    videos = [one for one in media if isinstance(one, Video)]
    made = front.process(front.parse(messages)[0])
    grids = made["video_grid_thw"].tolist()
    sizings = [one.sampling.sizing for one in videos]
    assert grids == [
        [one.sampling.frames // 2, size.height // 14, size.width // 14]
        for one, size in zip(videos, sizings, strict=True)
    ]
    assert [t * h * w // 4 for t, h, w in grids] == [one.visual_tokens for one in videos]
    patches = made["pixel_values_videos"]
    start = 0
    for video, (t, h, w) in zip(videos, grids, strict=True):
        own = patches[start : start + t * h * w]
        start += t * h * w
        assert np.array_equal(unpatched(own, t, h, w), video.frames())


def test_the_time_of_two_frames_is_that_of_the_video(front: Front) -> None:
    """Qwen2.5-VL places frames in time: by the rate they were taken at, not by a guess of 24.

    Ours in float32; vLLM's own way rounds it to what the model computes in.
    """
    media, messages = request(*PARTS)
    rates = [one.sampled_fps for one in media if isinstance(one, Video)]
    assert rates == pytest.approx([2.0, 2.0, 0.4, 2.0, 0.3], rel=1e-9)
    made = front.process(front.parse(messages)[0])
    if front.config.hf_config.model_type == "qwen2_vl":  # it counts frames, and no time
        assert "second_per_grid_ts" not in made
        return
    found = made["second_per_grid_ts"]
    assert found.is_floating_point()
    assert found.dtype.itemsize == 4 or not front.ours
    close = 1e-7 if found.dtype.itemsize == 4 else 0.004
    assert found.tolist() == pytest.approx([2 / rate for rate in rates], rel=close)


def unpatched(patches: Any, t: int, h: int, w: int) -> np.ndarray:
    """Put Qwen2-VL's patches, of merged 2 × 2 and of two frames, together to [2t, h, w, 3]."""
    cut = patches.reshape(t, h // 2, w // 2, 2, 2, 3, 2, 14, 14)
    frames = cut.permute(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(2 * t, h * 14, w * 14, 3)
    return np.asarray(frames.float().round().byte())


def test_vllm_fetches_nothing(front: Front) -> None:
    """What was not loaded before is an error of ours, whichever way vLLM asks."""
    from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY

    connector = MEDIA_CONNECTOR_REGISTRY.load("qwen2vl_serve")
    for part in (
        {"type": "video_url", "video_url": {"url": data_url(movie(4))}},
        {"type": "image_url", "image_url": {"url": image_url(0)}},
    ):
        with pytest.raises(InternalError):
            front.parse([{"role": "user", "content": [part]}])
    with pytest.raises(InternalError):
        connector.fetch_video("http://127.0.0.1/x.mp4")
