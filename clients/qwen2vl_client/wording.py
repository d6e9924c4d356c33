"""What a conversation says of itself to the model: data, in ``summaries.json``, by language."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files


@dataclass(frozen=True)
class Wording:
    """``instruction`` asks for a summary; the others stand around it, or for what was shown."""

    instruction: str
    heading: str
    kept: str
    reply: str
    picture: str
    removed: str
    removed_video: str


@lru_cache
def wordings() -> dict[str, Wording]:
    """Return the wordings by language: ``en``, ``zh``."""
    text = files("qwen2vl_client").joinpath("summaries.json").read_text("utf-8")
    return {language: Wording(**words) for language, words in json.loads(text).items()}


def wording_for(texts: Iterable[str]) -> Wording:
    """Return the wording in the language of what was said: Chinese where a third of it is."""
    letters = [letter for text in texts for letter in text[:10_000] if letter.isalpha()]
    chinese = sum("\u4e00" <= letter <= "\u9fff" for letter in letters)
    return wordings()["zh" if letters and chinese * 3 >= len(letters) else "en"]
