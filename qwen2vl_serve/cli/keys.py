"""``keys``: add, list and revoke the named keys of a server."""

from __future__ import annotations

import argparse
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from qwen2vl_serve.auth.keys_file import KeyLimits, KeysFile, expiry_of
from qwen2vl_serve.cli.options import Commands
from qwen2vl_serve.errors import SetupError
from qwen2vl_serve.profile import default_keys_path


def add(commands: Commands) -> None:
    """Add the command and its actions."""
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
