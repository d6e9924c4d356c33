"""How messages show what a client gave."""

from __future__ import annotations

_MOST_CHARACTERS = 60


def shown(value: object) -> str:
    """Return a short JSON-like rendering; long strings (base64) are cut."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an empty array" if not value else "an array"
    text = repr(value)
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[:40]}… ({len(text)} characters)"
