"""``doctor``: what would go wrong on this machine."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2vl_serve.cli.options import (
    Commands,
    add_overrides,
    add_profile,
    choose,
    load,
    shows_all,
)
from qwen2vl_serve.errors import PreflightError

if TYPE_CHECKING:
    from qwen2vl_serve.doctor import World


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "doctor", help="say what would go wrong on this machine", allow_abbrev=False
    )
    add_profile(parser)
    add_overrides(parser)
    parser.add_argument("--adapter", metavar="FOLDER", type=Path, help="a LoRA to be served")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument(
        "--fix",
        action="store_true",
        help="write a copy of the model's folder with mended rotary settings (config.json)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; 1 where something is fatal, or ``--fix`` cannot do what is asked."""
    from qwen2vl_serve import doctor  # noqa: PLC0415 -- as in options
    from qwen2vl_serve.doctor import report  # noqa: PLC0415
    from qwen2vl_serve.machine import installed  # noqa: PLC0415

    name = choose(arguments.profile, lambda line: print(line, file=sys.stderr, flush=True))
    profile = load(arguments, name)
    world = doctor.World(profile, installed.vllm_build(), arguments.adapter)
    findings = list(doctor.examine(world))
    copy, reason = _mended(world) if arguments.fix else (None, None)
    if arguments.json:
        told = report.as_json(name, findings, copy, reason)
        print(json.dumps(told, indent=2, ensure_ascii=not shows_all()))
    else:
        width = min(shutil.get_terminal_size().columns, 100)
        _print_report(report.lines(findings, width))
        print(report.summary(findings, name))
        if copy is not None:
            print(f"A copy with mended rotary settings: {copy}")
            print(f"Serve it with: serve --profile {name} --model {copy}")
        elif reason is not None:
            print(f"Not mended: {reason}")
        elif arguments.fix:
            print("Nothing to mend: the rotary settings are as every version reads them.")
    return 1 if reason is not None or report.count(findings, "fatal") else 0


def _mended(world: World) -> tuple[Path | None, str | None]:
    """Return the mended copy, None where nothing is to be mended; or why it cannot be made.

    Raises:
        PreflightError: the model is not on this machine.
    """
    from qwen2vl_serve.doctor.mend import mended_copy  # noqa: PLC0415 -- as above

    try:
        return mended_copy(world), None
    except PreflightError as error:
        if world.folder is None:
            raise
        return None, str(error)


def _print_report(lines: Iterable[str]) -> None:
    """Print a report, its levels in colour on a terminal."""
    from rich.console import Console  # noqa: PLC0415 -- as for the list of profiles
    from rich.text import Text  # noqa: PLC0415

    console = Console(soft_wrap=True, highlight=False)
    for line in lines:
        text = Text(line)
        for level, style in (("ok ", "green"), ("warning ", "yellow"), ("fatal ", "bold red")):
            if line.startswith(level):
                text.stylize(style, 0, len(level))
        console.print(text)
