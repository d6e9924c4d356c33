"""Options that several commands share, and how their words are read."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeAlias

from qwen2vl_serve.errors import SetupError
from qwen2vl_serve.profile import BARE_OVERRIDES, Profile, load_profile, section_of
from qwen2vl_serve.profile.rehearsal import rehearsal

AUTO = "auto"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other refusal does."""

    def error(self, message: str) -> NoReturn:
        """Raise ``SetupError`` instead of printing a usage and leaving."""
        raise SetupError(f"{message} (see {self.prog} --help)")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
"""What a command adds its own parser to."""


def shows_all() -> bool:
    """Whether standard output has every character, so that JSON and YAML need escape none."""
    return (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")


def add_profile(parser: argparse.ArgumentParser) -> None:
    """Add ``--profile``; ``choose`` reads it."""
    parser.add_argument(
        "--profile",
        default=AUTO,
        metavar="NAME|PATH",
        help="a profile that ships or a YAML file; default: what fits this machine's cards",
    )


def add_set(parser: argparse.ArgumentParser) -> None:
    """Add ``--set``, which reaches every field of a profile."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="SECTION.FIELD=VALUE",
        help="set any field of the profile, e.g. engine.max_model_len=4096; may be repeated",
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add what changes a profile; ``load`` reads it."""
    parser.add_argument("--model", help="another checkpoint: folder, hub name or demo")
    parser.add_argument("--host", help="address to listen on")
    parser.add_argument("--port", help="TCP port, 0 for a free one")
    add_set(parser)
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="run the profile's topology and limits with the demo model on CPU workers",
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and tell users of vLLM's own options where those are set here."""
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        option, _, value = unknown[0].partition("=")
        field = option.removeprefix("--").replace("-", "_")
        section = section_of(field) if option.startswith("--") else None
        instead = f"; use --set {section}.{field}={value or 'VALUE'}" if section else ""
        if not option.startswith("-"):
            instead = f"; a profile is named by --profile {option}, a model by --model {option}"
        parser.error(f"unknown argument {option}{instead}")
    return arguments


def load(arguments: argparse.Namespace, name: str) -> Profile:
    """Return the profile with the overrides of the command line, or its rehearsal."""
    bare = [
        f"{option}={value}"
        for option in BARE_OVERRIDES
        if (value := getattr(arguments, option)) is not None
    ]
    profile = load_profile(name, [*arguments.overrides, *bare])
    if not arguments.rehearse:
        return profile
    from qwen2vl_serve import preflight  # noqa: PLC0415 -- the checks, which a listing never runs

    preflight.check_topology(profile)
    return rehearsal(profile)


def choose(name: str, say: Callable[[str], None]) -> str:
    """Return the profile's name, or that of the one that suits this machine's cards."""
    if name != AUTO:
        return name
    from qwen2vl_serve.machine import hardware, installed  # noqa: PLC0415 -- as above
    from qwen2vl_serve.plan.suitable import suitable_profile  # noqa: PLC0415 -- as above

    found = hardware.cards()
    name = suitable_profile(found, installed.vllm_build())
    say(f"profile {name}, for a machine with {hardware.describe(found)} (--profile to choose)")
    return name
