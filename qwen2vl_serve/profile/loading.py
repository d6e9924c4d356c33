"""From a name, a file or plain values to a profile; what is wrong with them, in one line."""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qwen2vl_serve.errors import ProfileError
from qwen2vl_serve.profile.profile import BARE_OVERRIDES, SECRETS, Profile
from qwen2vl_serve.profile.sections import Section
from qwen2vl_serve.profile.yaml import Document, KeyPath, dotted, parse_yaml, read_yaml, shown


def profiles_folder() -> Path:
    """The folder of the profiles that ship: within the package, or the checkout's ``deploy``."""
    package = Path(__file__).parents[1]
    packaged = package / "profiles"
    return packaged if packaged.is_dir() else package.parent / "deploy" / "profiles"


def profile_names() -> list[str]:
    """Names of the profiles that ship, sorted."""
    return sorted(path.stem for path in profiles_folder().glob("*.yaml"))


def load_profile(name_or_path: str, overrides: Sequence[str] = ()) -> Profile:
    """Load a profile that ships by its name, or any by the path of its YAML file.

    ``overrides`` are ``section.field=VALUE`` with a YAML value, or ``model=…``, ``host=…``,
    ``port=…`` as plain text; later ones win. Raises ``ProfileError`` in one line naming where
    the fault stands, the key, the value given and, for an unknown key, the nearest valid one.
    """
    document = read_yaml(_find(name_or_path))
    if document.values is None:
        document = Document(document.source, {})
    if not isinstance(document.values, dict):
        raise ProfileError(f"{document.source}: must hold the sections {_sections()}")
    return _resolved(document, overrides).named(name_or_path)


def make_profile(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Profile:
    """Make a profile without a file, from plain values and ``overrides`` as of ``load_profile``."""
    return _resolved(Document("the profile", copy.deepcopy(dict(values))), overrides)


def _resolved(document: Document, overrides: Sequence[str]) -> Profile:
    for override in overrides:
        _override(document, override)
    try:
        return Profile.model_validate(document.values)
    except ValidationError as error:
        raise ProfileError(_explain(error.errors(), document)) from None


def section_of(name: str) -> str | None:
    """Name the section that has a field of this name."""
    for section, field in Profile.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section) and name in inner.model_fields:
            return section
    return None


def _find(name_or_path: str) -> Path:
    names = profile_names()
    if name_or_path in names:
        return profiles_folder() / f"{name_or_path}.yaml"
    if name_or_path.endswith((".yaml", ".yml")) or os.sep in name_or_path:
        return Path(name_or_path).expanduser()
    raise ProfileError(
        f"no profile is named {shown(name_or_path)}{_nearest(name_or_path, names)}; there are "
        f"{', '.join(names)}, or give the path of a .yaml file"
    )


def _override(document: Document, override: str) -> None:
    """Write ``section.field=VALUE`` into the document."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ProfileError(f"--set {shown(override)}: must be section.field=value")
    if key in BARE_OVERRIDES:
        source, key = f"--{key}", BARE_OVERRIDES[key]
        number = key == BARE_OVERRIDES["port"] and re.fullmatch("-?[0-9]+", text)
        value: Any = int(text[:9]) if number else text
    else:
        source = "--set"
        value = parse_yaml(text, f"{source} {shown(key)}").values
    path: KeyPath = tuple(key.split("."))
    target = document.values
    for depth, part in enumerate(path[:-1], 1):
        inner = target.get(part)
        if inner is None:
            inner = target[part] = {}
            document.places[path[:depth]] = source
        if not isinstance(inner, dict):
            raise ProfileError(f"{source}: {part} is a value, not a section")
        target = inner
    target[path[-1]] = value
    for known in [known for known in document.places if known[: len(path)] == path]:
        del document.places[known]
    document.places[path] = source


def _explain(errors: Iterable[ErrorDetails], document: Document) -> str:
    """Put pydantic's first error into one line."""
    first, *others = errors
    path: KeyPath = tuple(first["loc"])
    kind = first["type"]
    if kind == "contradiction":
        path = tuple(str(first["ctx"]["at"]).split("."))
        problem = first["msg"]
    elif kind == "extra_forbidden":
        return f"{document.place(path)}: unknown key {dotted(path)}{_whereabouts(path)}"
    elif kind == "missing":
        problem = "is required"
    elif kind == "model_type" and first["input"] is None:
        problem = "is empty; write its keys or leave it out"
    elif kind == "model_type":
        problem = f"must be a section of keys and values, is {shown(first['input'])}"
    elif kind == "unusable_key":
        problem = first["msg"]
    else:
        problem = re.sub(r"^\w+ should", "must", first["msg"])
        if kind == "string_pattern_mismatch":
            problem = "must be one line without control characters"
        elif kind == "tuple_type":
            problem = "must be a list"
        if path[:2] not in SECRETS:  # an error may be logged; a key must not
            problem += f", is {shown(first['input'])}"
    rest = f" (and {len(others)} more)" if others else ""
    return f"{document.place(path)}: {dotted(path)} {problem}{rest}"


def _whereabouts(path: KeyPath) -> str:
    """Say which valid key an unknown one may have meant."""
    model = _model_at(path[:-1])
    name = str(path[-1]).replace("-", "_")
    if model is None:
        return ""
    fields = list(model.model_fields)
    if nearest := _nearest(name, fields):
        return nearest
    if section := section_of(name):
        return f"; it belongs to section {section}"
    return f"; there are {', '.join(fields)}"


def _model_at(path: KeyPath) -> type[Section] | None:
    model: type[Section] = Profile
    for part in path:
        inner = model.model_fields[str(part)].annotation
        if not (isinstance(inner, type) and issubclass(inner, Section)):
            return None
        model = inner
    return model


def _nearest(name: str, names: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _sections() -> str:
    return ", ".join(name for name in Profile.model_fields if name != "description")
