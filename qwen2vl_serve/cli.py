"""The command line: ``serve`` and ``qwen2vl-serve``; the only module that prints or exits.

Exit status: 0 done, 1 the engine failed, 2 the command, the profile or this machine does not
allow a start (one line on standard error), 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TextIO

import yaml

from qwen2vl_serve import __version__, hardware, preflight
from qwen2vl_serve.errors import BootError, ServeError, SetupError
from qwen2vl_serve.profile import (
    BARE_OVERRIDES,
    Profile,
    load_profile,
    profile_names,
    section_of,
)

AUTO = "auto"


def serve_main(argv: Sequence[str] | None = None) -> int:
    """Run the command ``serve`` and return its exit status."""
    parser = _Parser(
        prog="serve",
        description="Serve a model of the Qwen2-VL family with OpenAI's API.",
        allow_abbrev=False,
    )
    _add_serve_options(parser)
    return _run(lambda: _serve(_parse(parser, argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command ``qwen2vl-serve`` and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["ask"]:
        return _ask(words[1:])
    parser = _Parser(
        prog="qwen2vl-serve",
        description="Serve the Qwen2-VL family on vLLM with OpenAI's API.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"qwen2vl-serve {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="start a server", allow_abbrev=False)
    _add_serve_options(serve)
    serve.set_defaults(run=_serve)
    profiles = commands.add_parser(
        "profiles", help="list the profiles, or show one", allow_abbrev=False
    )
    profiles.set_defaults(run=_list_profiles)
    actions = profiles.add_subparsers(dest="action", metavar="ACTION")
    actions.add_parser("list", help="list the profiles that ship", allow_abbrev=False)
    show = actions.add_parser(
        "show", help="print a profile as resolved, and its vllm serve line", allow_abbrev=False
    )
    show.add_argument("profile", metavar="NAME|PATH")
    _add_overrides(show)
    show.set_defaults(run=_show_profile)
    commands.add_parser("ask", help="ask a running server (ask --help)", add_help=False)

    def run() -> int:
        arguments = _parse(parser, words)
        command: Callable[[argparse.Namespace], int] = arguments.run
        return command(arguments)

    return _run(run)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other refusal does."""

    def error(self, message: str) -> NoReturn:
        raise SetupError(f"{message} (see {self.prog} --help)")


def _add_serve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile",
        default=AUTO,
        metavar="NAME|PATH",
        help="a profile that ships or a YAML file; default: what fits this machine's cards",
    )
    _add_overrides(parser)
    parser.add_argument(
        "--check", action="store_true", help="check profile and machine, start nothing"
    )
    parser.add_argument(
        "--verbose", action="store_true", help="print the engine's log as well as the phases"
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="another checkpoint: folder, hub name or demo")
    parser.add_argument("--host", help="address to listen on")
    parser.add_argument("--port", help="TCP port, 0 for a free one")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="SECTION.FIELD=VALUE",
        help="set any field of the profile, e.g. engine.max_model_len=4096; may be repeated",
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="run the profile's topology and limits with the demo model on CPU workers",
    )


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
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


def _run(command: Callable[[], int]) -> int:
    try:
        return command()
    except SetupError as error:
        return _fail(error, 2)
    except BootError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `profiles | head`; Python would complain again while it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _fail(error: ServeError, status: int) -> int:
    print(f"serve: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def _load(arguments: argparse.Namespace, name: str) -> Profile:
    bare = [
        f"{option}={value}"
        for option in BARE_OVERRIDES
        if (value := getattr(arguments, option)) is not None
    ]
    profile = load_profile(name, [*arguments.overrides, *bare])
    if not arguments.rehearse:
        return profile
    preflight.check_topology(profile)
    return profile.rehearsal()


def _serve(arguments: argparse.Namespace) -> int:
    name = arguments.profile
    if name == AUTO:
        found = hardware.cards()
        name = preflight.suitable_profile(found, preflight.vllm_build())
        print(
            f"profile {name}, for a machine with {hardware.describe(found)} (--profile to choose)",
            flush=True,
        )
    profile = _load(arguments, name)
    preflight.check(profile)
    if arguments.check:
        print(f"profile {name} can start on this machine")
        return 0

    from qwen2vl_serve import launch  # noqa: PLC0415 -- brings the web framework along

    with _terminal() as terminal:

        def report(line: str) -> None:
            try:
                print(line, file=terminal, flush=True)
            except OSError:
                return  # whoever read this is gone; the server is not

        return launch.serve(
            profile,
            verbose=arguments.verbose,
            report=report,
            read_again=lambda: _load(arguments, name),
        )


def _terminal() -> TextIO:
    """Keep standard output to ourselves: the engine's processes inherit a log file instead."""
    sys.stdout.flush()
    return os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", errors="replace")


def _ask(words: list[str]) -> int:
    from qwen2vl_client.cli import main as ask  # noqa: PLC0415 -- a package of its own

    return ask(words)


def _list_profiles(_: argparse.Namespace) -> int:
    rows = [("NAME", "MODEL", "CARDS", "PURPOSE")]
    for name in profile_names():
        profile = load_profile(name)
        rows.append((name, profile.model.model, _cards(profile), profile.description or ""))
    if sys.stdout.isatty():
        from rich.console import Console  # noqa: PLC0415 -- of no use to a pipe
        from rich.table import Table  # noqa: PLC0415

        table = Table(*rows[0], box=None, pad_edge=False)
        for row in rows[1:]:
            table.add_row(*row)
        Console().print(table)
        return 0
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        *columns, purpose = row
        print("  ".join([*map(str.ljust, columns, widths), purpose]))
    return 0


def _cards(profile: Profile) -> str:
    if profile.hardware.device != "cuda":
        return "none"
    return f"{profile.workers} × {profile.hardware.card or 'any'}"


def _show_profile(arguments: argparse.Namespace) -> int:
    profile = _load(arguments, arguments.profile)
    title = f"{profile.name}, rehearsed" if arguments.rehearse else profile.name
    values = profile.model_dump(mode="json", exclude_none=True, exclude={"server": {"api_keys"}})
    print(f"# Profile {title}, as resolved; fields that are not here keep vLLM's default.")
    print(_yaml(values), end="")
    if profile.server.api_keys:
        print(f"# server.api_keys: {len(profile.server.api_keys)}, not shown")
    print("# The same engine under plain vLLM:")
    variables = [f"{name}={shlex.quote(value)}" for name, value in profile.environment().items()]
    print("#", *variables, shlex.join(profile.vllm_command()))
    return 0


def _yaml(values: dict[str, object]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


if __name__ == "__main__":
    sys.exit(main())
