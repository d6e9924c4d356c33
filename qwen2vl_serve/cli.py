"""The command line: ``serve`` and ``qwen2vl-serve``; the only module that prints or exits.

Exit status: 0 done, 1 the engine failed, 2 the command, the profile or this machine does not
allow a start (one line on standard error), 130 interrupted. ``plan`` ends with 1 where the profile
does not fit, ``doctor`` where something is fatal.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

import yaml

from qwen2vl_serve import __version__, doctor, hardware, preflight
from qwen2vl_serve.doctor import mend, report
from qwen2vl_serve.errors import BootError, ServeError, SetupError
from qwen2vl_serve.keys_file import KeyLimits, KeysFile, expiry_of
from qwen2vl_serve.profile import (
    BARE_OVERRIDES,
    Profile,
    default_keys_path,
    load_profile,
    profile_names,
    section_of,
)

if TYPE_CHECKING:
    from qwen2vl_serve.plan.answer import Answer

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
    _add_doctor(commands)
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
    _add_plan_options(
        commands.add_parser(
            "plan", help="tell whether a profile fits given cards", allow_abbrev=False
        )
    )
    _add_keys(commands)
    commands.add_parser("ask", help="ask a running server (ask --help)", add_help=False)

    def run() -> int:
        arguments = _parse(parser, words)
        command: Callable[[argparse.Namespace], int] = arguments.run
        return command(arguments)

    return _run(run)


def _add_keys(commands: argparse._SubParsersAction[_Parser]) -> None:
    keys = commands.add_parser("keys", help="add, list or revoke named keys", allow_abbrev=False)
    actions = keys.add_subparsers(dest="action", required=True, metavar="ACTION")
    add = actions.add_parser("add", help="make a key and print it, once", allow_abbrev=False)
    add.add_argument("name", metavar="NAME")
    for field in KeyLimits.model_fields:
        option = f"--{field.replace('_', '-')}"
        add.add_argument(option, type=_count, metavar="N", help="default: no limit")
    add.add_argument("--models", metavar="A,B", help="names it may use; default: all")
    add.add_argument("--expires", metavar="WHEN", help="as 2027-01-01, 30d or 12h")
    add.set_defaults(run=_add_key)
    listing = actions.add_parser("list", help="list the keys", allow_abbrev=False)
    listing.set_defaults(run=_list_keys)
    revoke = actions.add_parser("revoke", help="remove a key", allow_abbrev=False)
    revoke.add_argument("name", metavar="NAME")
    revoke.set_defaults(run=_revoke_key)
    for action in (add, listing, revoke):
        action.add_argument(
            "--file", type=Path, default=default_keys_path(), help="default: %(default)s"
        )


def _count(text: str) -> int:
    if text.isascii() and text.isdigit() and 1 <= int(text[:20]) <= 2**53:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number from 1 to {2**53}")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other refusal does."""

    def error(self, message: str) -> NoReturn:
        raise SetupError(f"{message} (see {self.prog} --help)")


def _add_doctor(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "doctor", help="say what would go wrong on this machine", allow_abbrev=False
    )
    _add_profile(parser)
    _add_overrides(parser)
    parser.add_argument("--adapter", metavar="FOLDER", type=Path, help="a LoRA to be served")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument(
        "--fix",
        action="store_true",
        help="write a copy of the model's folder with mended rotary settings (config.json)",
    )
    parser.set_defaults(run=_doctor)


def _add_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile",
        default=AUTO,
        metavar="NAME|PATH",
        help="a profile that ships or a YAML file; default: what fits this machine's cards",
    )


def _add_serve_options(parser: argparse.ArgumentParser) -> None:
    _add_profile(parser)
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


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    parser.description = "Tell whether a profile fits given cards; nothing is loaded for that."
    parser.add_argument(
        "--profile", metavar="NAME|PATH", help="a profile that ships or a YAML file"
    )
    parser.add_argument(
        "--model",
        help="a checkpoint by itself: folder, hub name or demo; with --profile, its model",
    )
    parser.add_argument(
        "--gpus",
        metavar="CARDS",
        help="8x2080ti-11g, 2x3090, 1xa100-80g, 4x24GiB@8.6 or, of two machines, 2x8xh100; "
        "default: this machine's, else the profile's own",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="SECTION.FIELD=VALUE",
        help="set any field of the profile; may be repeated",
    )
    parser.add_argument(
        "--typical",
        metavar="REQUEST",
        help='the request that is counted, as "2 images 1280x960, 300 in, 200 out"',
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument(
        "--fix", action="store_true", help="print the nearest profile that fits, as YAML"
    )
    parser.set_defaults(run=_plan)


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


def _choose(name: str, say: Callable[[str], None]) -> str:
    """Return the profile's name, or that of the one that suits this machine's cards."""
    if name != AUTO:
        return name
    found = hardware.cards()
    name = preflight.suitable_profile(found, preflight.vllm_build())
    say(f"profile {name}, for a machine with {hardware.describe(found)} (--profile to choose)")
    return name


def _serve(arguments: argparse.Namespace) -> int:
    name = _choose(arguments.profile, lambda line: print(line, flush=True))
    profile = _load(arguments, name)
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


def _doctor(arguments: argparse.Namespace) -> int:
    name = _choose(arguments.profile, lambda line: print(line, file=sys.stderr, flush=True))
    profile = _load(arguments, name)
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


def _plan(arguments: argparse.Namespace) -> int:
    from qwen2vl_serve.plan import answer as answers  # noqa: PLC0415 -- of no use to serve
    from qwen2vl_serve.plan import question, request  # noqa: PLC0415
    from qwen2vl_serve.plan.planning import plan_for  # noqa: PLC0415

    if arguments.profile is None and arguments.model is not None:
        asked = question.of_model(arguments.model, arguments.gpus, arguments.overrides)
    else:
        model = [] if arguments.model is None else [f"model={arguments.model}"]
        name = arguments.profile or question.suitable(arguments.gpus)
        asked = question.of_profile(name, arguments.gpus, [*arguments.overrides, *model])
    plan = plan_for(asked.profile, asked.machines, host=asked.host, architecture=asked.architecture)
    typical = arguments.typical
    wanted = request.default_request(plan.profile) if typical is None else None
    told = answers.answer(plan, wanted or request.parse_request(typical), asked.host)
    if arguments.fix:
        return _print_fix(told)
    if arguments.json:
        print(json.dumps(answers.as_json(told), ensure_ascii=False, indent=2))
    else:
        from rich.console import Console  # noqa: PLC0415 -- of no use to programs

        from qwen2vl_serve.plan.report import report  # noqa: PLC0415

        Console(highlight=False).print(report(told, asked.whence))
    return 0 if told.fits else 1


def _print_fix(told: Answer) -> int:
    from qwen2vl_serve.plan import answer as answers  # noqa: PLC0415 -- as above

    if told.fits:
        print(answers.as_yaml(told.plan.profile), end="")
        return 0
    if not told.remedies:
        print("serve: no change of this profile makes it fit these cards", file=sys.stderr)
        return 1
    first = told.remedies[0]
    for change in first.changes:
        print(f"# {change}: {change.cost}")
    print(answers.as_yaml(answers.fixed(first)), end="")
    return 0


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


def _add_key(arguments: argparse.Namespace) -> int:
    limits = KeyLimits(**{name: getattr(arguments, name) for name in KeyLimits.model_fields})
    models = None
    if arguments.models is not None:
        models = [name.strip() for name in arguments.models.split(",") if name.strip()]
        if not models:
            raise SetupError("--models: names none")
    when = arguments.expires
    expires = None if when is None else expiry_of(when, datetime.now(UTC))
    secret = KeysFile(arguments.file).add(arguments.name, limits, models, expires)
    print(secret)
    print(
        f"key {arguments.name} is in {arguments.file}; its secret is shown this once",
        file=sys.stderr,
    )
    return 0


def _list_keys(arguments: argparse.Namespace) -> int:
    file = KeysFile(arguments.file)
    rows = [("NAME", "CREATED", "EXPIRES", "MODELS", "LIMITS")]
    for key in file.read() if arguments.file.exists() else ():
        limits = [f"{name}={value}" for name, value in key.limits if value is not None]
        ends = "never" if key.expires_at is None else _day(key.expires_at)
        if key.expired(time.time()):
            ends += " (over)"
        models = "all" if key.models is None else ",".join(key.models)
        rows.append((key.name, _day(key.created_at), ends, models, " ".join(limits) or "none"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join([*map(str.ljust, row[:4], widths), row[4]]))
    return 0


def _revoke_key(arguments: argparse.Namespace) -> int:
    KeysFile(arguments.file).revoke(arguments.name)
    print(f"key {arguments.name} is revoked")
    return 0


def _day(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _cards(profile: Profile) -> str:
    if profile.hardware.device != "cuda":
        return "none"
    return f"{profile.workers} × {profile.hardware.card or 'any'}"


def _show_profile(arguments: argparse.Namespace) -> int:
    profile = _load(arguments, arguments.profile)
    title = f"{profile.name}, rehearsed" if arguments.rehearse else profile.name
    values = profile.model_dump(mode="json", exclude_none=True, exclude={"server": {"api_keys"}})
    storage = profile.server.quota_storage
    if storage is not None and "@" in storage:  # before it stands a password
        values["server"]["quota_storage"] = f"…@{storage.rpartition('@')[2]}"
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
