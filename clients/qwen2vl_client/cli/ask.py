"""``ask``: one question, the answer as it is generated."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

from qwen2vl_client.cli.options import (
    CUT,
    STDIN,
    add_sampling,
    add_server,
    client_of,
    given_of,
    picture_of,
    run,
    text_of,
)
from qwen2vl_client.client import Client
from qwen2vl_client.errors import ClientError, InvalidArgumentError

_ADDRESS = re.compile(r"[a-z]+://\S+")


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser; its defaults are the tutorials'."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [options] [PICTURE …] QUESTION",
        description="Ask a running server, with or without pictures. The answer goes to "
        "standard output as it is generated, the total time to standard error.",
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="PICTURE … QUESTION",
        help="pictures (paths, URLs, - for standard input), then the question",
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="PATH|URL",
        help="a picture to ask about; may be repeated",
    )
    parser.add_argument(
        "--video", action="append", default=[], metavar="PATH|URL", help="a video to ask about"
    )
    add_server(parser)
    add_sampling(parser)
    parser.add_argument(
        "--no-stream", action="store_true", help="print the answer when it is whole"
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "qwen2vl-serve ask") -> int:
    """Ask, print the answer and return the exit status."""
    return run(build_parser(prog), argv, _run)


def _run(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    with client_of(arguments) as client:
        _ask(client, arguments)
    sys.stdout.flush()
    sys.stderr.write(f"total time: {time.monotonic() - started:.2f} s\n")
    return 0


def _ask(client: Client, arguments: argparse.Namespace) -> None:
    *pictures, question = arguments.words
    if question == STDIN or _ADDRESS.fullmatch(question) or os.path.isfile(question):  # noqa: PTH113  (pathlib's raises for a long question)
        raise InvalidArgumentError(f"the question is missing: {question} is a picture")
    question = text_of(question)
    fields: dict[str, Any] = {
        "images": [picture_of(word) for word in [*pictures, *arguments.image]],
        "videos": arguments.video,
        **given_of(arguments),
    }
    if arguments.no_stream:
        answer = client.chat(question, **fields)
        sys.stdout.write(answer.text)
    else:
        with client.stream(question, **fields) as stream:
            try:
                for text in stream:
                    sys.stdout.write(text)
                    sys.stdout.flush()
            except ClientError:
                sys.stdout.write("\n")  # an error starts on a line of its own
                raise
        answer = stream.answer
    sys.stdout.write("\n")
    sys.stdout.flush()
    if answer.finish_reason == "length":
        sys.stderr.write(f"{CUT}; --max-tokens raises it\n")
