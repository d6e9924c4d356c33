"""``locate``: where something is in a picture."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from qwen2vl_client.cli.options import (
    add_fields,
    add_prompts,
    add_server,
    client_of,
    picture_of,
    prompts_of,
    run,
    text_of,
    with_fields,
)
from qwen2vl_client.draw import draw_boxes
from qwen2vl_client.errors import InvalidArgumentError
from qwen2vl_client.tasks import locate


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Print a line for each box, in the picture's own pixels: left, top, right, "
        "bottom, label. Ends with 1 where nothing was found.",
    )
    parser.add_argument("picture", metavar="PICTURE", help="a path, a URL, or - for standard input")
    parser.add_argument("what", metavar="WHAT", help='what to look for, as "the red circle"')
    parser.add_argument("--draw", metavar="PATH", help="write the picture with its boxes")
    parser.add_argument("--json", action="store_true", help="print a JSON array, for programs")
    parser.add_argument(
        "--convention",
        choices=("qwen2-vl", "qwen2.5-vl", "qwen-vl"),
        help="how the model writes boxes (default: as the answer shows)",
    )
    add_server(parser)
    add_prompts(parser)
    add_fields(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "qwen2vl-serve locate") -> int:
    """Look, print and return the exit status."""
    return run(build_parser(prog), argv, _run)


def _run(arguments: argparse.Namespace) -> int:
    picture = picture_of(arguments.picture)
    if arguments.draw:
        if isinstance(picture, str) and "://" in picture:
            raise InvalidArgumentError("--draw needs a picture that is here: a file, or -")
        _check_drawn(Path(arguments.draw))
    task = locate.task(
        picture,
        text_of(arguments.what),
        convention=arguments.convention,
        prompts=prompts_of(arguments),
    )
    with client_of(arguments) as client:
        found = with_fields(task, arguments).run(client)
    if arguments.json:
        sys.stdout.write(json.dumps([asdict(box) for box in found.boxes], ensure_ascii=False))
        sys.stdout.write("\n")
    else:
        for box in found.boxes:
            sys.stdout.write(f"{box.left} {box.top} {box.right} {box.bottom}  {box.label}\n")
    if arguments.draw:
        draw_boxes(picture, found.boxes).save(arguments.draw)
    return 0 if found.boxes else 1


def _check_drawn(path: Path) -> None:
    """Raise ``InvalidArgumentError`` where no picture can be written, before the model is asked."""
    try:
        from PIL import Image  # noqa: PLC0415  (an extra, for those who ask for it)
    except ImportError:
        raise InvalidArgumentError("--draw needs Pillow: pip install pillow") from None
    try:
        kind = Image.registered_extensions().get(path.suffix.lower())
        Image.new("RGB", (1, 1)).save(io.BytesIO(), kind)
    except (OSError, ValueError, KeyError) as error:  # as Pillow's writers have it
        raise InvalidArgumentError(
            f"--draw {path}: give a name that tells the format, as {path.stem}.png"
        ) from error
    if not path.parent.is_dir():
        raise InvalidArgumentError(f"--draw {path}: there is no folder {path.parent}")
