"""The prompts of the uses: data in files of their own, English and Chinese, that users may change.

::

    from dataclasses import replace
    from qwen2vl_client.prompts import Prompts

    mine = replace(Prompts.shipped("en"), read="Copy every line of this receipt.")
    ocr(client, "receipt.jpg", prompts=mine)
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TypeAlias

from qwen2vl_client.errors import InvalidArgumentError

#: A language that ships (``"en"``, ``"zh"``), or prompts of one's own.
PromptsGiven: TypeAlias = "str | Prompts"

LANGUAGES = ("en", "zh")
"""Of the prompts that ship."""

_PLACE = re.compile(r"\{(\w+)\}")
#: What a prompt must leave room for; other prompts hold no ``{name}`` that is filled.
PLACES: dict[str, frozenset[str]] = {
    "translate": frozenset({"language"}),
    "fields": frozenset({"fields"}),
    "moderate": frozenset({"categories"}),
    "product": frozenset({"knowledge"}),
    "compare": frozenset({"count"}),
    "locate": frozenset({"what"}),
    "locate_json": frozenset({"what"}),
}


@dataclass(frozen=True)
class Prompts:
    """One text a use; ``{name}`` in a text is filled by the use, other braces stay as they are.

    Raises ``InvalidArgumentError`` for an empty text and for one that lacks its ``{name}``.
    """

    read: str
    translate: str
    table: str
    fields: str
    html: str
    solve: str
    moderate: str
    product: str
    compare_two: str
    compare: str
    video: str
    locate: str
    locate_json: str

    def __post_init__(self) -> None:
        for name in prompt_names():
            text = getattr(self, name)
            if not isinstance(text, str) or not text.strip():
                raise InvalidArgumentError(f"the prompt {name!r} must be a text, not {text!r}")
            missing = PLACES.get(name, frozenset()) - set(_PLACE.findall(text))
            if missing:
                raise InvalidArgumentError(
                    f"the prompt {name!r} must hold {{{min(missing)}}}, which is filled: {text!r}"
                )

    @classmethod
    def shipped(cls, language: str) -> Prompts:
        """Return the prompts that ship in a language: ``en`` or ``zh``."""
        if language not in LANGUAGES:
            raise InvalidArgumentError(
                f"prompts={language!r}: {' and '.join(LANGUAGES)} ship; load your own with "
                "Prompts.load(path)"
            )
        return _shipped(language)

    @classmethod
    def load(cls, path: str | os.PathLike[str], base: str = "en") -> Prompts:
        """Read a TOML file of ``name = "text"``; what it leaves out is ``base``'s."""
        try:
            given = tomllib.loads(Path(path).read_text("utf-8-sig"))
        except (OSError, ValueError) as error:
            raise InvalidArgumentError(f"cannot read the prompts {str(path)!r}: {error}") from error
        unknown = sorted(set(given) - set(prompt_names()))
        if unknown:
            raise InvalidArgumentError(
                f"{str(path)!r} has a prompt {unknown[0]!r}; known are {', '.join(prompt_names())}"
            )
        return replace(cls.shipped(base), **given)


def prompt_names() -> tuple[str, ...]:
    """The names of the prompts, in their order."""
    return tuple(field.name for field in fields(Prompts))


def chosen(given: PromptsGiven) -> Prompts:
    """Return the prompts that a use was given, by language or as they are."""
    return given if isinstance(given, Prompts) else Prompts.shipped(given)


def filled(text: str, **values: object) -> str:
    """Return the prompt with each ``{name}`` of ``values`` filled, once and not in the values."""
    return _PLACE.sub(lambda found: str(values.get(found[1], found[0])), text)


@lru_cache(maxsize=2)
def _shipped(language: str) -> Prompts:
    file = resources.files(__package__) / f"{language}.toml"
    return Prompts(**tomllib.loads(file.read_text("utf-8")))
