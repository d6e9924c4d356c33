"""Strict YAML: one document of plain values, every key's line remembered.

PyYAML scans and parses; what it is lenient about is refused here: duplicate keys, aliases
(a few lines of them expand to gigabytes), tags, and YAML 1.1's guesses (``no`` as false,
``010`` as eight, ``1:30`` as ninety).
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from qwen2vl_serve.errors import ProfileError

KeyPath: TypeAlias = tuple[str | int, ...]

MAX_BYTES = 64 * 1024
MAX_DEPTH = 16
SHOWN_CHARACTERS = 60

_RESOLVERS = (
    ("null", re.compile(r"^(?:~|null|)$"), ["~", "n", ""]),
    ("bool", re.compile(r"^(?:true|false)$"), list("tf")),
    ("int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789")),
    (
        "float",
        re.compile(
            r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"
        ),
        list("-+.0123456789"),
    ),
)
# Of PyYAML's words for what has a meaning of its own at the beginning of a value.
_UNQUOTED = re.compile(r"alphabetic or numeric|cannot start any token")
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", *(r[0] for r in _RESOLVERS))}


@dataclass(frozen=True, slots=True)
class Document:
    """Plain values and where each came from.

    ``places`` maps a key's path to text such as ``multi-gpu.yaml:12`` or ``--set``'s argument.
    """

    source: str
    values: Any
    places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """Name where ``path`` was written, or the nearest enclosing key that was."""
        for length in range(len(path), 0, -1):
            if (found := self.places.get(path[:length])) is not None:
                return found
        return self.source


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's core scalars, without aliases, of bounded depth."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 -- PyYAML's own class attribute

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "aliases are not allowed, write the value out", self._mark()
            )
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(
                None, None, f"nested deeper than {MAX_DEPTH} levels", self._mark()
            )
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def _mark(self) -> yaml.Mark:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # types-PyYAML leaves it bare
        mark: yaml.Mark = event.start_mark
        return mark


for _name, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)


def read_yaml(path: Path) -> Document:
    """Read one file of at most 64 KiB of UTF-8; raises ``ProfileError`` naming file and line."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ProfileError(f"{path}: is not a file; name a profile's YAML file")
        if status.st_size > MAX_BYTES:
            raise ProfileError(
                f"{path}: has {status.st_size} bytes; a profile holds at most {MAX_BYTES}"
            )
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ProfileError(
            f"{path}: byte {error.start} is not UTF-8; save the file in UTF-8"
        ) from None
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:  # a NUL in the name
        raise ProfileError(f"{str(path)!r}: is not a file name") from None
    return parse_yaml(text, str(path), numbered=True)


def parse_yaml(text: str, source: str, *, numbered: bool = False) -> Document:
    """Parse one document; ``source`` is named in errors, with the line when ``numbered``."""

    def place(mark: yaml.Mark | None) -> str:
        return f"{source}:{mark.line + 1}" if numbered and mark is not None else source

    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        raise ProfileError(
            f"{source}: character {error.position} ({ord(error.character):#x}) is not allowed"
            if isinstance(error.character, str)
            else f"{source}: {error.reason}"
        ) from None
    document = Document(source, None)
    try:
        node = loader.get_single_node()
        values = None if node is None else _build(loader, node, (), document.places, place)
    except yaml.MarkedYAMLError as error:
        problem = (error.problem or "is not YAML").replace("\n", " ")
        if "\\t" in problem or "'\t'" in problem:
            problem = "a tab cannot indent YAML; use spaces"
        elif _UNQUOTED.search(problem):
            problem = "a value that begins with *, &, @ or ` must stand in quotes"
        raise ProfileError(f"{place(error.problem_mark)}: {problem}") from None
    finally:
        loader.dispose()
    return Document(source, values, document.places)


def _build(
    loader: _Loader, node: yaml.Node, path: KeyPath, places: dict[KeyPath, str], place: Any
) -> Any:
    """Turn a node into plain values, noting where each key stands."""
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            where = place(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                raise ProfileError(f"{where}: a key must be a plain name")
            key = key_node.value
            if key in values:
                first = places[(*path, key)]
                raise ProfileError(
                    f"{where}: {dotted((*path, key))} is given twice, first at {first}; keep one"
                )
            places[(*path, key)] = where
            values[key] = _build(loader, value_node, (*path, key), places, place)
        return values
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        items = []
        for index, item in enumerate(node.value):
            places[(*path, index)] = place(item.start_mark)
            items.append(_build(loader, item, (*path, index), places, place))
        return items
    if isinstance(node, yaml.ScalarNode) and node.tag in _PLAIN_TAGS:
        try:
            return loader.construct_object(node)
        except (ValueError, KeyError):
            raise ProfileError(
                f"{place(node.start_mark)}: {shown(node.value)} cannot be read as "
                f"{node.tag.rpartition(':')[2]}"
            ) from None
    raise ProfileError(
        f"{place(node.start_mark)}: the tag {shown(node.tag)} is not allowed; "
        "write plain text, numbers, lists and mappings"
    )


def dotted(path: KeyPath) -> str:
    """Write a key's path as ``section.field``, strange keys in quotes."""
    return ".".join(
        str(part) if re.fullmatch(r"[\w<>-]{1,60}", str(part)) else shown(part) for part in path
    )


def shown(value: object) -> str:
    """Show a value on one line, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
