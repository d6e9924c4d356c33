"""The command line that the examples share, and where their pictures are."""

from __future__ import annotations

import argparse
from pathlib import Path

PICTURES = Path(__file__).resolve().parent / "pictures"
RED_CIRCLE = PICTURES / "red_circle.jpg"
BLUE_SQUARE = PICTURES / "blue_square.png"
SQUARE_AND_TRIANGLE = PICTURES / "square_and_triangle.png"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of ``url``, ``api_key`` and ``model``, to which an example adds its own."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--url", help="the server (default: http://127.0.0.1:8000/v1)")
    made.add_argument("--api-key", help="the key (default: QWEN2VL_API_KEY)")
    made.add_argument("--model", help="the model or adapter (default: the server's first)")
    return made


def parse(description: str | None, *pictures: Path) -> argparse.Namespace:
    """Return ``url``, ``api_key``, ``model`` and ``images``: those named, or those given here."""
    made = parser(description)
    if pictures:
        made.add_argument("images", nargs="*", default=list(pictures), help="pictures")
    return made.parse_args()
