"""The command line: ``serve`` and ``qwen2vl-serve``; a file a command.

Nothing else prints or exits.

Exit status: 0 done, 1 the engine failed, 2 the command, the profile or this machine does not
allow a start (one line on standard error), 130 interrupted. ``plan`` ends with 1 where the profile
does not fit, ``doctor`` where something is fatal.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from qwen2vl_serve import __version__
from qwen2vl_serve.cli import doctor, download, keys, plan, profiles, serve
from qwen2vl_serve.cli.options import Commands, Parser, parse
from qwen2vl_serve.errors import BootError, ServeError, SetupError

COMMANDS: Mapping[str, Callable[[Commands], None]] = {
    "serve": serve.add,
    "doctor": doctor.add,
    "profiles": profiles.add,
    "plan": plan.add,
    "download": download.add,
    "keys": keys.add,
}
"""What adds each command of the server; the client's package has its own."""


def serve_main(argv: Sequence[str] | None = None) -> int:
    """Run the command ``serve`` and return its exit status."""
    parser = Parser(
        prog="serve",
        description="Serve a model of the Qwen2-VL family with OpenAI's API.",
        allow_abbrev=False,
    )
    serve.add_options(parser)
    return _run(lambda: serve.run(parse(parser, argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command ``qwen2vl-serve`` and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    of_client: Mapping[str, str] = {}
    if not words or words[0] not in COMMANDS:
        from qwen2vl_client import cli as client  # noqa: PLC0415 -- takes as long as all the rest

        if words and words[0] in client.COMMANDS:
            return client.main(words)
        of_client = client.COMMANDS
    parser = Parser(
        prog="qwen2vl-serve",
        description="Serve the Qwen2-VL family on vLLM with OpenAI's API.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"qwen2vl-serve {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS.values():
        add(commands)
    for name, purpose in of_client.items():
        commands.add_parser(name, help=purpose, add_help=False)

    def run() -> int:
        arguments = parse(parser, words)
        chosen: Callable[[argparse.Namespace], int] = arguments.run
        return chosen(arguments)

    return _run(run)


def _run(command: Callable[[], int]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without → must not end it
    try:
        try:
            return command()
        except SetupError as error:
            return _fail(error, 2)
        except BootError as error:
            return _fail(error, 1)
        except KeyboardInterrupt:
            return 130
        finally:
            print(end="", flush=True)  # nothing where standard output is closed
    except OSError as error:  # of standard output: `profiles | head`, a disk that is full
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # Python would complain again while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.ENOSPC:
            print("serve: standard output cannot be written: its disk is full", file=sys.stderr)
        return 1


def _fail(error: ServeError, status: int) -> int:
    print(f"serve: {' '.join(str(error).split())}", file=sys.stderr)
    return status
