"""Every class by its letter."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from tests.hostile import (
    addresses,
    fetching,
    fields,
    http_json,
    images,
    keys,
    limits,
    load,
    messages,
    sampling,
    texts,
)
from tests.hostile.case import Case

CLASSES: Mapping[str, ModuleType] = {
    "A": http_json,
    "B": fields,
    "C": messages,
    "D": addresses,
    "E": fetching,
    "F": images,
    "G": limits,
    "H": texts,
    "I": sampling,
    "J": keys,
    "K": load,
}
"""Those whose cases need no more than a server that is up; L starts and ends servers."""

LIFE = "L"


def cases(letters: str = "") -> list[Case]:
    """Return the cases of these classes, of all without any."""
    found = [case for letter in letters or CLASSES for case in CLASSES[letter].cases()]
    names = [case.id for case in found]
    if len(names) != len(set(names)):
        raise ValueError(f"named twice: {sorted({one for one in names if names.count(one) > 1})}")
    return found
