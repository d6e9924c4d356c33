"""``plan``: whether a profile fits given cards."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from qwen2vl_serve.cli.options import Commands, add_set, shows_all

if TYPE_CHECKING:
    from qwen2vl_serve.plan.answer import Answer


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "plan", help="tell whether a profile fits given cards", allow_abbrev=False
    )
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
    add_set(parser)
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
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan, or the profile that fits; 1 where the asked one does not."""
    from qwen2vl_serve.plan import answer as answers  # noqa: PLC0415 -- of no use to serve
    from qwen2vl_serve.plan import question, request  # noqa: PLC0415
    from qwen2vl_serve.plan.planning import plan_for  # noqa: PLC0415

    if arguments.profile is None and arguments.model is not None:
        asked = question.of_model(arguments.model, arguments.gpus, arguments.overrides)
    else:
        model = [] if arguments.model is None else [f"model={arguments.model}"]
        name = arguments.profile
        name = question.suitable(arguments.gpus) if name is None else name
        asked = question.of_profile(name, arguments.gpus, [*arguments.overrides, *model])
    plan = plan_for(asked.profile, asked.machines, host=asked.host, architecture=asked.architecture)
    typical = arguments.typical
    wanted = request.default_request(plan.profile) if typical is None else None
    told = answers.answer(plan, wanted or request.parse_request(typical), asked.host)
    if arguments.fix:
        return _print_fix(told)
    if arguments.json:
        print(json.dumps(answers.as_json(told), ensure_ascii=not shows_all(), indent=2))
    else:
        from rich.console import Console  # noqa: PLC0415 -- of no use to programs

        from qwen2vl_serve.plan.report import report  # noqa: PLC0415

        Console(highlight=False).print(report(told, asked.whence))
    return 0 if told.fits else 1


def _print_fix(told: Answer) -> int:
    from qwen2vl_serve.plan import answer as answers  # noqa: PLC0415 -- as above

    if told.fits:
        print(answers.as_yaml(answers.fixed(told.plan), escaped=not shows_all()), end="")
        return 0
    if not told.remedies:
        print("serve: no change of this profile makes it fit these cards", file=sys.stderr)
        return 1
    first = told.remedies[0]
    for change in first.changes:
        print(f"# {change}: {change.cost}")
    print(answers.as_yaml(answers.fixed(first.plan), escaped=not shows_all()), end="")
    return 0
