"""A conversation as JSON, its pictures by content: each is kept once, under its hash."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeAlias

from qwen2vl_client.errors import InvalidArgumentError, MediaError
from qwen2vl_client.fitting import Event
from qwen2vl_client.history import History, Note, Turn
from qwen2vl_client.request import plain
from qwen2vl_client.transcript_check import check

FORMAT = "qwen2vl-conversation"
VERSION = 1
_SCHEME = "sha256:"
_DATA = re.compile(r"data:([a-z]+/[a-z0-9.+-]+);base64,([A-Za-z0-9+/=]*)")
_HASH = re.compile(r"[0-9a-f]{64}")

Pictures: TypeAlias = Literal["inside", "beside"]


def folder_of(path: Path) -> Path:
    """Return where the pictures of a conversation are that are kept beside its file."""
    return path.with_name(f"{path.stem}.pictures")


def write(
    path: Path,
    history: History,
    events: list[Event],
    settings: Mapping[str, Any],
    pictures: Pictures,
) -> None:
    """Write a conversation; ``pictures`` says where those go, base64 inside or files beside.

    ``InvalidArgumentError`` where it cannot be written.
    """
    if pictures not in ("inside", "beside"):
        raise InvalidArgumentError(f"pictures={pictures!r} is neither 'inside' nor 'beside'")
    try:
        _write(path, history, events, settings, beside=pictures == "beside")
    except (OSError, TypeError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidArgumentError(f"cannot write {path}: {reason}") from error


def _write(
    path: Path,
    history: History,
    events: list[Event],
    settings: Mapping[str, Any],
    *,
    beside: bool,
) -> None:
    kept: dict[str, str] = {}

    def keep(url: str) -> str:
        found = _DATA.fullmatch(url)
        data = base64.b64decode(found[2]) if found else _bytes(url)
        name = hashlib.sha256(data).hexdigest()
        kept[name] = url
        if beside and found:
            folder_of(path).mkdir(exist_ok=True)
            (folder_of(path) / name).write_bytes(data)
            kept[name] = found[1]
        return _SCHEME + name

    def outside(part: Any) -> Any:
        return _with_urls(part, lambda url: keep(url) if url.startswith("data:") else url)

    turns = [
        {**asdict(turn), "user": outside(turn.user), "answer": turn.answer}
        for turn in history.turns
    ]
    note = [[number, outside(part)] for number, part in history.note.pictures]
    document = {
        "format": FORMAT,
        "version": VERSION,
        "settings": dict(settings),
        "system": history.system,
        "summary": {"text": history.note.text, "pictures": note, "tokens": history.note.tokens},
        "turns": turns,
        "seen": history.seen,
        "changed": history.changed,
        "known": history.known,
        "costs": dict(history.costs),
        "events": [asdict(event) for event in events],
        "pictures": kept,
        "folder": folder_of(path).name,
    }
    unfinished = path.with_name(f".{path.name}.part")
    text = json.dumps(document, ensure_ascii=False, indent=1, default=plain)
    try:
        # Half of a surrogate pair becomes the escape that JSON has for it.
        unfinished.write_bytes(text.encode("utf-8", "backslashreplace"))
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def read(path: Path) -> tuple[History, list[Event], dict[str, Any]]:
    """Read what ``write`` wrote: history, events, settings.

    ``InvalidArgumentError`` for a file that is none, ``MediaError`` for a picture that is missing
    or is not the one that was saved.
    """
    try:
        raw = json.loads(path.read_text("utf-8"))
        if raw["format"] != FORMAT or raw["version"] != VERSION:
            raise ValueError(f"{raw['format']} {raw['version']}")
        check(raw, path)
        beside = raw.get("folder", folder_of(path).name)
        if beside == "..":
            raise ValueError("folder ..")
        folders = path.with_name(beside), folder_of(path)  # both may have been renamed

        def inside(part: Any) -> Any:
            return _with_urls(part, lambda url: _url(url, raw["pictures"], path, folders))

        turns = tuple(
            Turn(inside(one["user"]), one["answer"], one["tokens"], tuple(one["numbers"]))
            for one in raw["turns"]
        )
        summary = raw["summary"]
        note = Note(
            summary["text"],
            tuple((number, inside(part)) for number, part in summary["pictures"]),
            summary["tokens"],
        )
        history = History(
            raw["system"], turns, note, raw["seen"], raw["changed"], raw["known"], raw["costs"]
        )
        events = [Event(**event) for event in raw["events"]]
        return history, events, dict(raw["settings"])
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, InvalidArgumentError):
            raise
        raise InvalidArgumentError(
            f"{path} holds no conversation of version {VERSION} ({type(error).__name__}: {error})"
        ) from error
    except OSError as error:
        raise InvalidArgumentError(f"cannot read {path}: {error.strerror or error}") from error


def _url(url: str, pictures: Mapping[str, str], path: Path, folders: Sequence[Path]) -> str:
    """Return the data URL of a picture; its content must have the hash that it is named by."""
    if not url.startswith(_SCHEME):
        return url
    name = url.removeprefix(_SCHEME)
    kept = pictures.get(name, "")
    # The name becomes a path: nothing but a hash may be one.
    if not _HASH.fullmatch(name) or not kept:
        raise MediaError(f"{path} lacks a picture that it names ({name[:80]!r})")
    if kept.startswith("data:"):
        found = _DATA.fullmatch(kept)
        try:
            data = (
                base64.b64decode(found[2], validate=True)
                if found
                else kept.encode("utf-8", "surrogatepass")
            )
        except binascii.Error:
            data = b""
        whole = kept
    else:
        files = [folder / name for folder in folders]
        file = next((one for one in files if one.is_file()), files[0])
        try:
            data = file.read_bytes()
        except OSError as error:
            raise MediaError(f"cannot read {file}: {error.strerror or error}") from error
        whole = f"data:{kept};base64,{base64.b64encode(data).decode('ascii')}"
    if hashlib.sha256(data).hexdigest() != name:
        raise MediaError(f"the picture {name} of {path} is not the one that was saved")
    return whole


def _bytes(url: str) -> bytes:
    return url.encode("utf-8", "surrogatepass")


def _with_urls(value: Any, changed: Callable[[str], str]) -> Any:
    """Return a message or part with every address changed."""
    if isinstance(value, list):
        return [_with_urls(one, changed) for one in value]
    if isinstance(value, dict):
        return {
            key: changed(inner)
            if key == "url" and isinstance(inner, str)
            else _with_urls(inner, changed)
            for key, inner in value.items()
        }
    return value
