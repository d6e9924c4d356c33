"""``serve``: check, then start a server."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import TextIO

from qwen2vl_serve import __version__
from qwen2vl_serve.cli.options import Commands, add_overrides, add_profile, choose, load

_STANDARD_INPUT = 0


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser("serve", help="start a server", allow_abbrev=False)
    add_options(parser)
    parser.set_defaults(run=run)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a start."""
    add_profile(parser)
    add_overrides(parser)
    parser.add_argument(
        "--check", action="store_true", help="check profile and machine, start nothing"
    )
    parser.add_argument(
        "--verbose", action="store_true", help="print the engine's log as well as the phases"
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")


def run(arguments: argparse.Namespace) -> int:
    """Check and serve until the server ends; its exit status."""
    if not os.isatty(_STANDARD_INPUT):
        # A supervisor's SIGHUP finds nothing to reload for as long as checks and downloads take;
        # `launch.serve` handles it from then on. A terminal that goes may end this.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    from qwen2vl_serve import preflight  # noqa: PLC0415 -- as in options

    name = choose(arguments.profile, lambda line: print(line, flush=True))
    profile = load(arguments, name)
    warnings = preflight.check(profile)
    if warnings:
        checks = ", ".join(finding.check for finding in warnings)
        print(
            f"serve: warnings: {checks}; qwen2vl-serve doctor --profile {name} explains",
            file=sys.stderr,
            flush=True,
        )
    if arguments.check:
        print(f"profile {name} can start on this machine")
        return 0

    from qwen2vl_serve.launch.serve import serve  # noqa: PLC0415 -- brings the web framework along

    with _terminal() as terminal:

        def report(line: str) -> None:
            try:
                print(line, file=terminal, flush=True)
            except OSError:
                return  # whoever read this is gone; the server is not

        return serve(
            profile,
            verbose=arguments.verbose,
            report=report,
            read_again=lambda: load(arguments, name),
        )


def _terminal() -> TextIO:
    """Keep standard output to ourselves: the engine's processes inherit a log file instead."""
    sys.stdout.flush()
    return os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", errors="replace")
