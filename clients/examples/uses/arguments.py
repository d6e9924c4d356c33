"""The command line that the examples of the uses share, and where their pictures are."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

PICTURES = Path(__file__).resolve().parent / "pictures"


def parse(description: str | None, *pictures: str, words: str | None = None) -> argparse.Namespace:
    """Return ``url``, ``api_key``, ``images`` (those named, or these) and ``fields`` of the API.

    With ``words`` the command line may end in ``--words``, whose default they are.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--url", help="the server (default: http://127.0.0.1:8000/v1)")
    parser.add_argument("--api-key", help="the key (default: QWEN2VL_API_KEY)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="as --set max_tokens=400"
    )
    if words is not None:
        parser.add_argument("--words", default=words, help=f"(default: {words})")
    own = [str(PICTURES / name) for name in pictures]
    parser.add_argument("images", nargs="*", default=own, help="in place of the small ones")
    args = parser.parse_args()
    pairs = (pair.partition("=") for pair in args.set)
    args.fields = {name: json.loads(value) for name, _, value in pairs}
    return args
