"""Where API keys come from: the profile, a file, the environment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from qwen2vl_serve.errors import ProfileError

API_KEY_VARIABLE = "QWEN2VL_API_KEY"


def usable_key(key: str) -> bool:
    """Tell whether a key can stand in a header: printable ASCII without spaces."""
    return bool(key) and all("!" <= character <= "~" for character in key)


def keys_of_environment(environ: Mapping[str, str]) -> list[str]:
    """Read the comma-separated keys of ``QWEN2VL_API_KEY``; empty, it counts as unset.

    Raises ``ProfileError`` (which never shows a key) for blanks and commas alone, and for a key
    that cannot be sent in a header.
    """
    text = environ.get(API_KEY_VARIABLE, "")
    keys = _usable(text.split(","), API_KEY_VARIABLE)
    if text and not keys:
        raise ProfileError(
            f"{API_KEY_VARIABLE}: holds no key, only blanks or commas; write one or unset it"
        )
    return keys


def keys_of_file(path: Path) -> list[str]:
    """Read one key a line, skipping empty lines and ``#`` comments.

    Raises ``ProfileError`` (which never shows a key) when the file cannot be read, holds no key
    or one that cannot be sent in a header.
    """
    source = f"server.api_key_file {path}"
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise ProfileError(f"{source}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise ProfileError(f"{source}: is not UTF-8 text") from None
    keys = _usable(("" if line.lstrip().startswith("#") else line for line in lines), source)
    if not keys:
        raise ProfileError(f"{source}: holds no key; write one a line")
    return keys


def _usable(entries: Iterable[str], source: str) -> list[str]:
    keys = []
    for number, entry in enumerate(entries, 1):
        if not (key := entry.strip()):
            continue
        if not usable_key(key):
            raise ProfileError(f"{source}: entry {number} has to be printable ASCII without spaces")
        keys.append(key)
    return keys
