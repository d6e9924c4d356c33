"""``python3 requirements.py EXTRA …``: print what the project and these extras of it require.

Reads the ``pyproject.toml`` beside this file or one folder up. It lets an image install everything
but our own code in a layer of its own.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path


def requirements(project: dict[str, object], extra: str) -> Iterator[str]:
    """Yield the requirements of an extra, of those that it names in turn as well."""
    for line in project["optional-dependencies"][extra]:  # type: ignore[index]  # parsed TOML
        own = re.fullmatch(r"qwen2vl-serve\[([\w,-]+)\]", line)
        if own is None:
            yield line
            continue
        for name in own[1].split(","):
            yield from requirements(project, name)


def main(extras: list[str]) -> None:
    """Print one requirement a line."""
    here = Path(__file__).resolve().parent
    path = next(p for p in (here / "pyproject.toml", here.parent / "pyproject.toml") if p.exists())
    project = tomllib.loads(path.read_text("utf-8"))["project"]
    lines = [*project["dependencies"]]
    for extra in extras:
        lines += requirements(project, extra)
    sys.stdout.write("\n".join(dict.fromkeys(lines)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
