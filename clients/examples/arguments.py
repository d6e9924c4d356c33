"""The command line that the examples share, and where their pictures are."""

from __future__ import annotations

import argparse
from pathlib import Path

PICTURES = Path(__file__).resolve().parent / "pictures"
RED_CIRCLE = PICTURES / "red_circle.jpg"
BLUE_SQUARE = PICTURES / "blue_square.png"
SQUARE_AND_TRIANGLE = PICTURES / "square_and_triangle.png"


def parse(description: str | None, *pictures: Path) -> argparse.Namespace:
    """Return ``url``, ``api_key``, ``model`` and ``images``: those named, or those given here."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--url", help="the server (default: http://127.0.0.1:8000/v1)")
    parser.add_argument("--api-key", help="the key (default: QWEN2VL_API_KEY)")
    parser.add_argument("--model", help="the model or adapter (default: the server's first)")
    if pictures:
        parser.add_argument("images", nargs="*", default=list(pictures), help="pictures")
    return parser.parse_args()
