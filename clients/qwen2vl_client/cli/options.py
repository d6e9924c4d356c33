"""What every command has: the server to ask, and one way to end."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen2vl_client.client import DEFAULT_BASE_URL, DEFAULT_TIMEOUT, Client
from qwen2vl_client.errors import (
    AuthenticationError,
    ClientError,
    InvalidArgumentError,
    ServerNotReachedError,
)
from qwen2vl_client.prompts import LANGUAGES, Prompts
from qwen2vl_client.request import DEFAULT_SAMPLING, SYSTEM_PROMPT
from qwen2vl_client.tasks.task import T, Task

CUT = "the answer was cut at its limit of tokens"

STDIN = "-"
"""Stands for what comes on standard input, wherever a picture is named."""


def add_server(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which server is asked; ``client_of`` reads them."""
    parser.add_argument(
        "--url", help=f"the server (default: QWEN2VL_BASE_URL, then {DEFAULT_BASE_URL})"
    )
    parser.add_argument(
        "--api-key", help="the key; other users of this machine can see it: prefer QWEN2VL_API_KEY"
    )
    parser.add_argument("--model", help="the model's name (default: the first the server offers)")
    parser.add_argument(
        "--timeout", type=float, default=DEFAULT_TIMEOUT, metavar="SECONDS", help="(default: 600)"
    )
    parser.add_argument(
        "--verify",
        default=True,
        metavar="FILE",
        help="the certificate authority of your own (PEM) that vouches for an https:// server",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the settings of the answers and the system prompt; ``given_of`` reads them."""
    parser.add_argument("--system", help=f"the system prompt (default: {SYSTEM_PROMPT!r})")
    for option, kind in (("--max-tokens", int), ("--temperature", float), ("--top-p", float)):
        usual = DEFAULT_SAMPLING[option[2:].replace("-", "_")]
        parser.add_argument(option, type=kind, help=f"(default: {usual})")
    parser.add_argument("--seed", type=int, help="the same seed gives the same answer")


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Add the prompts that a use asks with; ``prompts_of`` reads them."""
    parser.add_argument(
        "--prompts",
        default="en",
        metavar="en|zh|PATH",
        help="the prompts that ship, by language, or a TOML file of your own (default: en)",
    )


def prompts_of(arguments: argparse.Namespace) -> Prompts:
    """Return the prompts; ``InvalidArgumentError`` where there are none of that name."""
    given: str = arguments.prompts
    return Prompts.shipped(given) if given in LANGUAGES else Prompts.load(given)


def add_fields(parser: argparse.ArgumentParser) -> None:
    """Add ``--set``, by which any field of the API is given; ``fields_of`` reads it."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of the API, as max_tokens=4096, max_pixels=4000000 or system='Be brief.'; "
        "may be repeated",
    )


def fields_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields that were set; a value that is no JSON is a text.

    Raises ``InvalidArgumentError`` for a word without ``=``, and for what the command asks itself.
    """
    fields: dict[str, Any] = {}
    for word in arguments.set:
        name, equals, value = text_of(word).partition("=")
        if not (name and equals) or name in _ASKED:
            raise InvalidArgumentError(f"--set {word} is no field of the API as FIELD=VALUE")
        try:
            fields[name] = json.loads(value)
        except (ValueError, RecursionError):
            fields[name] = value
    return fields


_ASKED = frozenset({"self", "text", "images", "videos", "messages", "stream"})
"""What is no field, or what the command's own words say."""


def with_fields(task: Task[T], arguments: argparse.Namespace) -> Task[T]:
    """Return a task with the fields that were set in place of its own."""
    return replace(task, fields={**task.fields, **fields_of(arguments)})


def client_of(arguments: argparse.Namespace) -> Client:
    """Return the client of the server that was named."""
    return Client(
        arguments.url,
        arguments.api_key,
        arguments.model,
        timeout=arguments.timeout,
        verify=arguments.verify,
    )


def given_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that were given, and no other: a saved conversation has its own."""
    names = ("system", "max_tokens", "temperature", "top_p", "seed")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if "system" in given:
        given["system"] = text_of(given["system"])
    return given


def picture_of(word: str) -> str | bytes:
    """Return a picture that was named: a path, an address, or the bytes on standard input.

    Raises ``InvalidArgumentError`` where standard input holds nothing.
    """
    if word != STDIN:
        return word
    data = b"" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read()
    if not data:
        raise InvalidArgumentError("'-' is a picture on standard input, and nothing came there")
    return data


def text_of(word: str) -> str:
    """Return a word of the command line as the text that was typed.

    Where the locale is not UTF-8, Python hands its bytes over as halves of characters.
    """
    try:
        return os.fsencode(word).decode("utf-8")
    except UnicodeError:
        return word.encode("utf-8", "replace").decode("utf-8")


def run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    command: Callable[[argparse.Namespace], int],
) -> int:
    """Parse, run and return the exit status; whatever fails is one line on standard error."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by what started this process
            stream = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115  (it stays open)
            setattr(sys, name, stream)
    try:
        try:
            arguments = parser.parse_args(argv)
        except SystemExit as stop:
            sys.stdout.flush()
            return int(stop.code or 0)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a terminal without Chinese must not end it
        status = command(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has gone, and what it wanted it has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return fail(130, "interrupted")
    except (InvalidArgumentError, OSError) as error:  # the latter of a file that is written
        return fail(2, str(error))
    except ClientError as error:
        return fail(1, with_advice(error))
    return status


def with_advice(error: ClientError) -> str:
    """Return what went wrong and what to do about it."""
    if isinstance(error, ServerNotReachedError):
        return (
            f"{error}. Start a server with: serve --profile demo (or name a running one with --url)"
        )
    if isinstance(error, AuthenticationError):
        return f"{error}. Give the key with QWEN2VL_API_KEY or --api-key"
    return str(error)


def fail(status: int, message: str) -> int:
    """Say what went wrong in a line of its own, and return ``status``."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.stderr.write(f"error: {message}\n")
    return status
