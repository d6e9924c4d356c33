"""``doctor``: what would go wrong on this machine."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from qwen2vl_serve.cli.options import Commands, add_overrides, add_profile, choose, load


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
    """Print what was found; 1 where something is fatal."""
    from qwen2vl_serve import doctor, preflight  # noqa: PLC0415 -- as in options
    from qwen2vl_serve.doctor import mend, report  # noqa: PLC0415

    name = choose(arguments.profile, lambda line: print(line, file=sys.stderr, flush=True))
    profile = load(arguments, name)
    world = doctor.World(profile, preflight.vllm_build(), arguments.adapter)
    findings = list(doctor.examine(world))
    copy = mend.mended_copy(world) if arguments.fix else None
    if arguments.json:
        print(json.dumps(report.as_json(name, findings, copy), indent=2, ensure_ascii=False))
    else:
        width = min(shutil.get_terminal_size().columns, 100)
        _print_report(report.lines(findings, width))
        print(report.summary(findings, name))
        if copy is not None:
            print(f"A copy with mended rotary settings: {copy}")
            print(f"Serve it with: serve --profile {name} --model {copy}")
        elif arguments.fix:
            print("Nothing to mend: the rotary settings are as every version reads them.")
    return 1 if report.count(findings, "fatal") else 0


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
