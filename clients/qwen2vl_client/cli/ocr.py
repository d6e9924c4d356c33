"""``ocr``: the text in pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from qwen2vl_client.cli.options import (
    CUT,
    add_fields,
    add_prompts,
    add_server,
    client_of,
    picture_of,
    prompts_of,
    run,
    with_fields,
)
from qwen2vl_client.tasks import ocr


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Print the text in pictures, one after the other."
    )
    parser.add_argument(
        "pictures", nargs="+", metavar="PICTURE", help="paths, URLs, or - for standard input"
    )
    add_server(parser)
    add_prompts(parser)
    add_fields(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "qwen2vl-serve ocr") -> int:
    """Read, print and return the exit status."""
    return run(build_parser(prog), argv, _run)


def _run(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        for word in arguments.pictures:
            task = ocr.task(picture_of(word), prompts=prompts_of(arguments))
            found = with_fields(task, arguments).run(client)
            sys.stdout.write(f"{found.text}\n")
            sys.stdout.flush()
            if not found.complete:
                sys.stderr.write(f"{word}: {CUT}; --set max_tokens=4096 raises it\n")
    return 0
