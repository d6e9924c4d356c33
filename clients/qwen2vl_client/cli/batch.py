"""``batch``: many requests from a file or a folder, each answered once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from qwen2vl_client.batch import batch
from qwen2vl_client.batch.sources import UTF_8
from qwen2vl_client.cli.options import (
    add_fields,
    add_server,
    client_of,
    fields_of,
    run,
    text_of,
)
from qwen2vl_client.errors import InvalidArgumentError
from qwen2vl_client.tasks.task import Reply, Task, as_reply


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Ask everything in a JSONL or CSV file, or one question of every picture in a "
        "folder. Outcomes are written as they come, one line each; started again with the same "
        "output, it goes on where it was. Ends with 1 where a request failed for good.",
    )
    parser.add_argument("requests", metavar="IN", help="a .jsonl or .csv file, or a folder")
    parser.add_argument("output", metavar="OUT", help="the .jsonl file of outcomes")
    parser.add_argument("--question", help="what to ask of each picture of a folder")
    parser.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=2,
        metavar="N",
        help="how often what failed in passing is asked again (default: %(default)s)",
    )
    parser.add_argument(
        "--encoding",
        default=UTF_8,
        metavar="NAME",
        help="of the file, where it is not UTF-8 (Excel in Chinese: gb18030)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_server(parser)
    add_fields(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "qwen2vl-serve batch") -> int:
    """Run the batch, print its report and return the exit status."""
    return run(build_parser(prog), argv, _run)


def _run(arguments: argparse.Namespace) -> int:
    question = None if arguments.question is None else text_of(arguments.question)
    if question is not None and Path(arguments.requests).is_file():
        raise InvalidArgumentError(
            f"--question is for a folder of pictures; {arguments.requests} has its own questions"
        )
    if question is None and Path(arguments.requests).is_dir():
        raise InvalidArgumentError(
            f"{arguments.requests} is a folder: say with --question what to ask of each picture"
        )

    def about(picture: Path) -> Task[Reply]:
        return Task(question, as_reply, (picture,))

    with_bar = not arguments.quiet and sys.stderr.isatty() and find_spec("rich") is not None
    with client_of(arguments) as client:
        report = batch(
            client,
            arguments.requests,
            each=None if question is None else about,
            fields=fields_of(arguments),
            encoding=arguments.encoding,
            concurrency=arguments.concurrency,
            output=arguments.output,
            retries=arguments.retries,
            progress=with_bar,
        )
    sys.stdout.write(f"{report}\n")
    for outcome in report.failed:
        sys.stderr.write(f"{outcome.id}: {outcome.error}\n")
    return 1 if report.failed else 0
