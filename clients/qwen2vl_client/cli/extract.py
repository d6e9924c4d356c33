"""``extract``: fields or a table of a picture, as data."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

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
from qwen2vl_client.errors import InvalidArgumentError
from qwen2vl_client.tasks import extract_fields, extract_table


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Print the fields that are named as a JSON object (null where the picture does "
        "not show one), or with --table its table.",
    )
    parser.add_argument("picture", metavar="PICTURE", help="a path, a URL, or - for standard input")
    parser.add_argument(
        "fields", nargs="*", metavar="FIELD", help="a name, or name=what it means, as total='sum'"
    )
    parser.add_argument(
        "--table", choices=("csv", "markdown"), help="the picture's table instead of fields"
    )
    add_server(parser)
    add_prompts(parser)
    add_fields(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "qwen2vl-serve extract") -> int:
    """Extract, print and return the exit status."""
    return run(build_parser(prog), argv, _run)


def _run(arguments: argparse.Namespace) -> int:
    if bool(arguments.fields) == bool(arguments.table):
        raise InvalidArgumentError("name the fields to extract, or give --table")
    picture = picture_of(arguments.picture)
    with client_of(arguments) as client:
        if arguments.table:
            task = extract_table.task(picture, prompts=prompts_of(arguments))
            table = with_fields(task, arguments).run(client)
            text = table.to_csv() if arguments.table == "csv" else table.to_markdown()
            sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
            return 0
        wanted = dict(text_of(field).partition("=")[::2] for field in arguments.fields)
        named = extract_fields.task(picture, wanted, prompts=prompts_of(arguments))
        found = with_fields(named, arguments).run(client)
        sys.stdout.write(json.dumps(found, ensure_ascii=False, indent=2) + "\n")
    return 0
