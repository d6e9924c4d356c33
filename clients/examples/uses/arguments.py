"""The command line that the examples of the uses share, and where their pictures are."""

from __future__ import annotations

import argparse
from pathlib import Path

PICTURES = Path(__file__).resolve().parent / "pictures"


def parse(description: str | None, *pictures: str) -> argparse.Namespace:
    """Return ``url``, ``api_key`` and ``images``: the files named, or those given here."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--url", help="the server (default: http://127.0.0.1:8000/v1)")
    parser.add_argument("--api-key", help="the key (default: QWEN2VL_API_KEY)")
    own = [str(PICTURES / name) for name in pictures]
    parser.add_argument("images", nargs="*", default=own, help="pictures (or a video)")
    return parser.parse_args()
