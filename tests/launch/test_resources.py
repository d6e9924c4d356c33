"""What a profile says of media is what the loader does."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from PIL import Image

from qwen2vl_serve.errors import InvalidImage, InvalidImageURL
from qwen2vl_serve.launch.resources import media_loader
from qwen2vl_serve.profile import load_profile
from qwen2vl_serve.protocol.validation import RequestLimits, parse_chat
from tests.media.test_loader import loaded


def test_the_profiles_formats_and_folders_reach_the_loader(tmp_path: Path) -> None:
    """What a profile switches off is refused, what it opens is read."""
    with Image.new("RGB", (56, 56), "red") as picture:
        picture.save(tmp_path / "a.png")
        picture.save(tmp_path / "a.webp", lossless=True)
    overrides = [f"media.allowed_local_paths=[{tmp_path}]", "media.formats=[PNG]"]
    loader = media_loader(load_profile("demo", overrides))
    limits = RequestLimits(max_messages=9, max_n=1, max_tokens=None, images=9, videos=0)

    def load(name: str) -> None:
        image = {"type": "image_url", "image_url": {"url": f"file://{tmp_path}/{name}"}}
        body = {"messages": [{"role": "user", "content": [image]}]}
        asyncio.run(loaded(loader, parse_chat(json.dumps(body).encode(), limits)))

    load("a.png")
    with pytest.raises(InvalidImage, match="holds WebP data; this server takes PNG"):
        load("a.webp")
    with pytest.raises(InvalidImageURL):
        load("b.png")
