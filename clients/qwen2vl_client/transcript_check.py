"""What the file of a saved conversation must hold, field by field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, get_args, get_type_hints

from qwen2vl_client.errors import InvalidArgumentError
from qwen2vl_client.fitting import Event
from qwen2vl_client.history import count_of

_Rule: TypeAlias = tuple[bool, str]
"""Whether a value is right, and what it must be."""


class _Field(NamedTuple):
    name: str
    value: Any
    rule: _Rule


def check(raw: Mapping[str, Any], path: Path) -> None:
    """Raise ``InvalidArgumentError`` that names the first field that is not as ``save`` writes it.

    A field that is missing is a ``KeyError``.
    """
    for field in _fields(raw):  # one by one: a later one is read where those before it are right
        right, what = field.rule
        if not right:
            raise InvalidArgumentError(
                f"{path}: {field.name}={field.value!r:.80} must be {what}; the file is damaged, "
                "save the conversation again"
            )


def _fields(raw: Mapping[str, Any]) -> Iterator[_Field]:
    yield _Field("settings", raw["settings"], _object(raw["settings"]))
    taken = sorted(raw["settings"].keys() & {"self", "client", "system"})
    yield _Field("settings", taken, (not taken, "settings of a conversation"))
    yield _Field("system", raw["system"], _text(raw["system"], null=True))
    yield _Field("turns", raw["turns"], _list(raw["turns"]))
    for place, turn in enumerate(raw["turns"]):
        yield from _turn(f"turns[{place}]", turn)
    yield from _summary(raw["summary"])
    yield _Field("seen", raw["seen"], _count(raw["seen"]))
    yield _Field("changed", raw["changed"], (isinstance(raw["changed"], bool), "true or false"))
    yield _Field("known", raw["known"], _count(raw["known"], null=True))
    yield _Field("costs", raw["costs"], _object(raw["costs"]))
    for key, cost in raw["costs"].items():
        yield _Field(f"costs.{key}", cost, _count(cost))
    yield _Field("events", raw["events"], _list(raw["events"]))
    for place, event in enumerate(raw["events"]):
        yield from _event(f"events[{place}]", event)
    yield _Field("pictures", raw["pictures"], _object(raw["pictures"]))


def _turn(name: str, turn: Any) -> Iterator[_Field]:
    yield _Field(name, turn, _object(turn))
    yield from _message(f"{name}.user", turn["user"])
    yield from _message(f"{name}.answer", turn["answer"])
    yield _Field(f"{name}.tokens", turn["tokens"], _count(turn["tokens"], null=True))
    numbers, shown = turn["numbers"], count_of(turn["user"], "image")
    right = isinstance(numbers, list) and len(numbers) == shown and all(map(_is_count, numbers))
    yield _Field(f"{name}.numbers", numbers, (right, f"the numbers of its {shown} pictures"))


def _message(name: str, message: Any) -> Iterator[_Field]:
    yield _Field(name, message, _object(message))
    yield _Field(f"{name}.role", message["role"], _text(message["role"]))
    content = message["content"]
    right = isinstance(content, str | list)
    yield _Field(f"{name}.content", content, (right, "a text or a list of parts"))
    for place, part in enumerate(content if isinstance(content, list) else ()):
        at = f"{name}.content[{place}]"
        yield _Field(at, part, _object(part))
        if part.get("type") == "text":
            yield _Field(f"{at}.text", part.get("text"), _text(part.get("text")))


def _summary(summary: Any) -> Iterator[_Field]:
    yield _Field("summary", summary, _object(summary))
    yield _Field("summary.text", summary["text"], _text(summary["text"]))
    yield _Field("summary.tokens", summary["tokens"], _count(summary["tokens"], null=True))
    yield _Field("summary.pictures", summary["pictures"], _list(summary["pictures"]))
    for place, kept in enumerate(summary["pictures"]):
        pair = isinstance(kept, list) and len(kept) == 2
        right = pair and _is_count(kept[0]) and isinstance(kept[1], Mapping)
        yield _Field(f"summary.pictures[{place}]", kept, (right, "a number and a picture"))


def _event(name: str, event: Any) -> Iterator[_Field]:
    yield _Field(name, event, _object(event))
    kinds = get_args(get_type_hints(Event)["kind"])
    kind = event["kind"]
    yield _Field(f"{name}.kind", kind, (kind in kinds, f"one of {', '.join(kinds)}"))
    for key, value in event.items():
        if key == "summary":
            yield _Field(f"{name}.{key}", value, _text(value, null=True))
        elif key != "kind":
            yield _Field(f"{name}.{key}", value, _count(value))


def _object(value: object) -> _Rule:
    return isinstance(value, Mapping), "an object"


def _list(value: object) -> _Rule:
    return isinstance(value, list), "a list"


def _text(value: object, *, null: bool = False) -> _Rule:
    right = isinstance(value, str) or (null and value is None)
    return right, "a text or null" if null else "a text"


def _count(value: object, *, null: bool = False) -> _Rule:
    right = _is_count(value) or (null and value is None)
    return right, f"a whole number, 0 or more{', or null' if null else ''}"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
