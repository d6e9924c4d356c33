"""``ocr``: the text in pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from qwen2vl_client.cli.options import (
    add_prompts,
    add_server,
    client_of,
    picture_of,
    prompts_of,
    run,
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
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "qwen2vl-serve ocr") -> int:
    """Read, print and return the exit status."""
    return run(build_parser(prog), argv, _run)


def _run(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        for word in arguments.pictures:
            found = ocr(client, picture_of(word), prompts=prompts_of(arguments))
            sys.stdout.write(f"{found.text}\n")
            sys.stdout.flush()
            if not found.complete:
                sys.stderr.write(f"{word}: the answer was cut at its limit of tokens\n")
    return 0
