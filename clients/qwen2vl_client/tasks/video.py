"""A video, in words."""

from __future__ import annotations

from typing import Any

from qwen2vl_client.media import VideoSource
from qwen2vl_client.prompts import PromptsGiven, chosen
from qwen2vl_client.tasks.task import EXACT, Reply, Task, Use, as_reply


@Use
def describe_video(
    video: VideoSource,
    *,
    fps: float | None = None,
    max_pixels: int | None = None,
    max_frames: int | None = None,
    question: str | None = None,
    prompts: PromptsGiven = "en",
    **fields: Any,
) -> Task[Reply]:
    """Describe a video: a path, a URL, bytes, or its frames as a list of pictures.

    ``fps`` frames a second are seen (of a list of frames: the rate at which they were taken), at
    most ``max_frames``, each of at most ``max_pixels``; the tutorials take ``fps=1.0`` and
    ``max_pixels=360 * 420``. What is left out is the server's. ``question`` replaces the prompt.
    """
    beside = {"fps": fps, "max_pixels": max_pixels, "max_frames": max_frames}
    return Task(
        question or chosen(prompts).video,
        as_reply,
        videos=(video,),
        video_fields={name: value for name, value in beside.items() if value is not None},
        fields=fields,
        defaults=EXACT,
    )
