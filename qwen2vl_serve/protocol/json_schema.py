"""What a JSON schema may cost: it becomes a grammar before the first token is drawn.

The engine compiles that grammar for every token of its vocabulary, beside the requests that run.
What takes seconds of a processor there is refused here; ``bench/grammars.py`` measures it.
What is no schema at all, or says what no grammar enforces, is ``schema_form``'s to refuse.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isnan
from typing import Any

from qwen2vl_serve.errors import InvalidValue
from qwen2vl_serve.protocol import schema_form

MOST_DEPTH = 64
"""Objects and arrays within each other."""

MOST_VALUES = 4000
"""Keys and items of all kinds, in all schemas of a request."""

MOST_CHARACTERS = 64 * 1024
"""Of all names and texts together."""

MOST_CHOICES = 1000
"""Values of every ``enum`` together."""

MOST_OPTIONAL = 50
"""Properties of one object that are not ``required``; their cost grows with the square."""

MOST_OPTIONAL_IN_ALL = 200
"""The same of all objects together."""

MOST_PATTERN = 500
"""Characters of all ``pattern`` together."""

MOST_STATES = 100
"""What lengths, counts within patterns and some formats come to; equal lengths count once.

Each is a state of the grammar in which almost every token of the vocabulary may come next.
"""

MOST_ITEMS = 100_000
"""The largest ``minItems``, ``maxItems``, ``minProperties`` or ``maxProperties``."""

_FORMATS = {"email": 3, "uri": 3, "uri-reference": 4, "uri-template": 10, "hostname": 1}
"""Formats whose own patterns cost something, each time they stand there, in states."""

_LENGTHS = ("minLength", "maxLength")
_COUNTS = ("minItems", "maxItems", "minProperties", "maxProperties")
_ATOMS = re.compile(
    r"(?P<open>\((?:\?[:=!])?)|(?P<close>\))|\{(?P<least>[0-9]*)(?:,(?P<most>[0-9]*))?\}"
    r"|\[\^?\]?(?:\\.|[^\]\\])*\]|\\.|.",
    re.DOTALL,
)


def check(schemas: Mapping[str, Mapping[str, Any]]) -> None:
    """Return if the schemas of a request, by where they stand in it, are cheap enough together.

    Raises:
        InvalidValue: they are not, or one is no schema that can be enforced; the message names
            the bound and the value.
    """
    bill = _Bill()
    for param, schema in schemas.items():
        bill.add(schema, param)
    for param, schema in schemas.items():
        schema_form.check(schema, param)


class _Bill:
    def __init__(self) -> None:
        self.values = self.characters = self.choices = self.optional = self.pattern = 0
        self.states: dict[object, int] = {}

    def add(self, schema: Mapping[str, Any], param: str) -> None:
        """Go over ``schema`` without recursion: its depth is what a client sends."""
        rest: list[tuple[Any, int]] = [(schema, 1)]
        while rest:
            value, depth = rest.pop()
            if isinstance(value, Mapping):
                self._object(value, param)
                inner: list[Any] = [*value, *value.values()]
            elif isinstance(value, list):
                inner = value
            else:
                if isinstance(value, str):
                    self.characters += len(value)
                    _bound(self.characters, MOST_CHARACTERS, param, "characters of text")
                continue
            self.values += len(inner)
            _bound(self.values, MOST_VALUES, param, "keys and values")
            _bound(depth, MOST_DEPTH, param, "levels")
            rest += ((one, depth + 1) for one in inner)

    def _object(self, value: Mapping[str, Any], param: str) -> None:
        reference = value.get("$ref")
        if isinstance(reference, str) and not reference.startswith("#"):
            raise InvalidValue(
                f"{param} refers to {reference[:80]!r}; references within it, as "
                "'#/$defs/name', are followed.",
                param=param,
            )
        if isinstance(choices := value.get("enum"), list):
            self.choices += len(choices)
            _bound(self.choices, MOST_CHOICES, param, "values of enum")
        if isinstance(properties := value.get("properties"), Mapping):
            required = value.get("required")
            optional = len(properties.keys() - _names(required))
            _bound(optional, MOST_OPTIONAL, param, "optional properties of one object")
            self.optional += optional
            _bound(self.optional, MOST_OPTIONAL_IN_ALL, param, "optional properties")
        for key in _COUNTS:
            _bound(_number(value.get(key)), MOST_ITEMS, param, key)
        lengths = tuple(_number(value.get(key)) for key in _LENGTHS)
        self._states(lengths, max(lengths), param)
        if isinstance(name := value.get("format"), str) and name in _FORMATS:
            self._states(id(value), _FORMATS[name], param)
        if isinstance(pattern := value.get("pattern"), str):
            self._pattern(pattern, param)
        if isinstance(patterns := value.get("patternProperties"), Mapping):
            for pattern in patterns:
                self._pattern(pattern, param)

    def _pattern(self, pattern: str, param: str) -> None:
        self.pattern += len(pattern)
        _bound(self.pattern, MOST_PATTERN, param, "characters of pattern")
        self._states(pattern, repeats(pattern), param)

    def _states(self, key: object, count: float, param: str) -> None:
        self.states[key] = int(min(count, 1e15))
        what = "characters counted by lengths, patterns and formats"
        _bound(sum(self.states.values()), MOST_STATES, param, what)


def repeats(pattern: str) -> int:
    """Return how many characters the counts of a pattern come to: 12 for ``(a{2}b{4}){2}``."""
    groups, last = [0], 0
    for found in _ATOMS.finditer(pattern):
        if found["open"]:
            groups.append(0)
            last = 0
        elif found["close"] and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif found["least"] is not None:
            # Longer numbers need not be read to be too large.
            count = max(int(one[:9] or 0) for one in (found["least"], found["most"] or ""))
            groups[-1] += max(last, 1) * count - last
            last = max(last, 1) * count
        else:
            last = 0
    return sum(groups)


def _bound(found: float, most: int, param: str, what: str) -> None:
    if found > most:
        raise InvalidValue(
            f"{param} has at least {found:.15g} {what}; at most {most} are compiled: "
            "ask for less, and check the answer yourself.",
            param=param,
        )


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or isnan(value):
        return 0
    return value


def _names(required: object) -> set[str]:
    if not isinstance(required, list):
        return set()
    return {name for name in required if isinstance(name, str)}
