"""Whether a JSON schema is one, and says nothing that a grammar would pass over.

The engine answers the first with an error of its own, and the second with an answer that breaks
the schema. Schemas are walked by their keywords: a property may have the name of one.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from qwen2vl_serve.errors import InvalidValue
from qwen2vl_serve.protocol.shown import shown

Schema = Mapping[str, Any]

_UNENFORCED = (
    "not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies",
    "$dynamicRef", "$recursiveRef",
)  # fmt: skip

_TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")

_BRANCHES = ("anyOf", "oneOf", "allOf")
_LISTS = (*_BRANCHES, "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_SINGLE = ("items", "additionalProperties")

_RANGES = (
    ("minimum", "maximum"),
    ("minLength", "maxLength"),
    ("minItems", "maxItems"),
    ("minProperties", "maxProperties"),
)


def check(schema: Schema, param: str) -> None:
    """Return if ``schema`` can be enforced; it must be known to be of a bounded size.

    Raises:
        InvalidValue: it cannot; the message names the place within it.
    """
    _Reader(schema, param).read()


class _Reader:
    def __init__(self, root: Schema, param: str) -> None:
        self.root = root
        self.param = param
        # By id: whatever a schema is without a step into a property or an item.
        self.same: dict[int, list[Schema]] = {}

    def read(self) -> None:
        rest: list[tuple[Schema, str]] = [(self.root, self.param)]
        while rest:
            schema, path = rest.pop()
            if id(schema) not in self.same:
                rest += self._inner(schema, path)
        self._refuse_circles()

    def _inner(self, schema: Schema, path: str) -> list[tuple[Schema, str]]:
        """Check one schema but for those within it, and return these."""
        self._check_words(schema, path)
        inner = list(_within(schema, path))
        same = [one for name in _BRANCHES for one in schema.get(name, ()) if _is_object(one)]
        if "$ref" in schema:
            target, place = self._referred(schema, path)
            if _is_object(target):
                same.append(target)
                inner.append((target, place))
        self.same[id(schema)] = same
        return inner

    def _check_words(self, schema: Schema, path: str) -> None:
        for name in _UNENFORCED:
            if name in schema:
                raise self._refused(path, name, "is nothing that answers can be held to")
        for name, (fits, words) in _FORMS.items():
            if name in schema and not fits(schema[name]):
                raise self._refused(path, name, f"must be {words}, not {shown(schema[name])}")
        for least, most in _RANGES:
            if least in schema and most in schema and schema[least] > schema[most]:
                told = f"is {shown(schema[least])}, more than {most} ({shown(schema[most])})"
                raise self._refused(path, least, told)
        patterns = [("pattern", schema["pattern"])] if "pattern" in schema else []
        patterns += [("patternProperties", one) for one in schema.get("patternProperties", ())]
        for name, pattern in patterns:
            if fault := _fault(pattern):
                raise self._refused(path, name, f"is {shown(pattern)}, {fault}")

    def _referred(self, schema: Schema, path: str) -> tuple[Any, str]:
        reference = schema["$ref"]
        if not isinstance(reference, str) or not re.match(r"#(/|$)", reference):
            told = f"is {shown(reference)}; it must be as '#/$defs/name'"
            raise self._refused(path, "$ref", told)
        target: Any = self.root
        for step in reference.split("/")[1:]:
            target = _step(target, unquote(step).replace("~1", "/").replace("~0", "~"))
        if not _is_schema(target):
            raise self._refused(path, "$ref", f"is {shown(reference)}, where no schema is")
        said = target if isinstance(target, Mapping) else {}
        for name in _BESIDE:
            if name in schema and (name not in said or schema[name] != said[name]):
                told = "stands beside $ref and would be passed over: say it in what is referred to"
                raise self._refused(path, name, told)
        return target, f"{self.param}{reference[1:_LONG].replace('/', '.')}"

    def _refuse_circles(self) -> None:
        """Raise where a schema is itself: a grammar of it has no end."""
        done: set[int] = set()
        for start in self.same:
            open_, rest = set[int](), [(start, False)]
            while rest:
                one, left = rest.pop()
                if left:
                    open_.discard(one)
                    done.add(one)
                elif one in open_:
                    raise InvalidValue(
                        f"{self.param} has a $ref that leads back to itself without a property or "
                        "an item between: no answer would have an end.",
                        param=self.param,
                    )
                elif one not in done:
                    open_.add(one)
                    rest.append((one, True))
                    rest += ((id(same), False) for same in self.same[one])

    def _refused(self, path: str, name: str, told: str) -> InvalidValue:
        where = path if len(path) <= _LONG else f"{path[:_LONG]}…"
        return InvalidValue(f"{where}.{name} {told}.", param=self.param)


_LONG = 200


def _within(schema: Schema, path: str) -> Iterator[tuple[Schema, str]]:
    for name in _MAPS:
        for key, one in schema.get(name, {}).items():
            if _is_object(one):
                yield one, f"{path}.{name}.{key[:_LONG]}"
    for name in _LISTS:
        for index, one in enumerate(schema.get(name, ())):
            if _is_object(one):
                yield one, f"{path}.{name}[{index}]"
    for name in _SINGLE:
        if _is_object(schema.get(name)):
            yield schema[name], f"{path}.{name}"


def _step(value: Any, step: str) -> Any:
    if isinstance(value, Mapping):
        return value.get(step)
    if isinstance(value, list) and step.isascii() and step.isdigit() and len(step) < 6:
        return value[int(step)] if int(step) < len(value) else None
    return None


def _is_object(value: object) -> bool:
    # Of schemas, ``true`` and ``false`` are the others.
    return isinstance(value, Mapping)


def _is_schema(value: object) -> bool:
    return isinstance(value, Mapping | bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0 and value % 1 == 0


def _is_type(value: object) -> bool:
    named = value if isinstance(value, list) else [value]
    return bool(named) and all(isinstance(one, str) and one in _TYPES for one in named)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _is_map(value: object) -> bool:
    return isinstance(value, Mapping) and all(map(_is_schema, value.values()))


def _is_list(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_schema, value))


_Form = tuple[Callable[[Any], bool], str]

_FORMS: Mapping[str, _Form] = {
    "type": (_is_type, f"one of {', '.join(_TYPES)}, or an array of some"),
    "enum": (lambda value: isinstance(value, list) and bool(value), "an array of some values"),
    "required": (_is_names, "an array of names"),
    "pattern": (lambda value: isinstance(value, str), "a string"),
    "format": (lambda value: isinstance(value, str), "a string"),
    **dict.fromkeys(_MAPS, (_is_map, "an object of schemas")),
    **dict.fromkeys(_SINGLE, (_is_schema, "a schema")),
    "prefixItems": (_is_list, "an array of schemas"),
    **dict.fromkeys(
        _BRANCHES, (lambda value: _is_list(value) and bool(value), "an array of some schemas")
    ),
    **dict.fromkeys(
        ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), (_is_number, "a number")
    ),
    **dict.fromkeys(
        (name for pair in _RANGES[1:] for name in pair), (_is_count, "a whole number from 0 on")
    ),
}  # fmt: skip

# Titles, defaults and definitions may stand beside a reference.
_BESIDE = (*(name for name in _FORMS if name not in ("$defs", "definitions")), "const")

_ATOM = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_LOOKS = re.compile(r"\(\?(?:=|!|<)")
# Of what Python's parser says: in other dialects, as JSON schemas are written in, there is more.
_SURE = (
    "nothing to repeat", "multiple repeat", "min repeat greater", "unbalanced parenthesis",
    "missing ), unterminated subpattern",
)  # fmt: skip


def _fault(pattern: str) -> str | None:
    """Say what is wrong with a pattern, as far as that is sure."""
    bare = _ATOM.sub("x", pattern)
    if _LOOKS.search(bare):
        return "and (?=, (?! and (?< are nothing that answers can be held to"
    try:
        with warnings.catch_warnings(action="ignore"):
            re.compile(bare)
    except re.error as error:
        return f"which is no pattern ({error.msg})" if error.msg.startswith(_SURE) else None
    except (OverflowError, RecursionError):
        return None
    return None
