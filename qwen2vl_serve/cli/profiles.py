"""``profiles``: list the profiles that ship, or show one as resolved."""

from __future__ import annotations

import argparse
import shlex
import sys

import yaml

from qwen2vl_serve.cli.options import Commands, add_overrides, load
from qwen2vl_serve.profile import Profile, load_profile, profile_names


def add(commands: Commands) -> None:
    """Add the command."""
    profiles = commands.add_parser(
        "profiles", help="list the profiles, or show one", allow_abbrev=False
    )
    profiles.set_defaults(run=_list)
    actions = profiles.add_subparsers(dest="action", metavar="ACTION")
    actions.add_parser("list", help="list the profiles that ship", allow_abbrev=False)
    show = actions.add_parser(
        "show", help="print a profile as resolved, and its vllm serve line", allow_abbrev=False
    )
    show.add_argument("profile", metavar="NAME|PATH")
    add_overrides(show)
    show.set_defaults(run=_show)


def _list(_: argparse.Namespace) -> int:
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


def _show(arguments: argparse.Namespace) -> int:
    profile = load(arguments, arguments.profile)
    title = f"{profile.name}, rehearsed" if arguments.rehearse else profile.name
    values = profile.model_dump(mode="json", exclude_none=True, exclude={"server": {"api_keys"}})
    secrets = [
        ("media", "proxy", profile.media.proxy_is_secret),
        ("server", "quota_storage", profile.server.quota_storage_is_secret),
    ]
    # Without its password a value is none, and the output a profile.
    cut = {f"{at}.{name}": values[at].pop(name) for at, name, is_secret in secrets if is_secret}
    print(f"# Profile {title}, as resolved; fields that are not here keep vLLM's default.")
    print(_yaml(values), end="")
    if profile.server.api_keys:
        print(f"# server.api_keys: {len(profile.server.api_keys)}, not shown")
    for name, rest in cut.items():
        print(f"# {name}: {rest}, not shown whole")
    print("# The same engine under plain vLLM:")
    variables = [f"{name}={shlex.quote(value)}" for name, value in profile.environment().items()]
    print("#", *variables, shlex.join(profile.vllm_command()))
    return 0


def _cards(profile: Profile) -> str:
    if profile.hardware.device != "cuda":
        return "none"
    return f"{profile.workers} × {profile.hardware.card or 'any'}"


def _yaml(values: dict[str, object]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
