"""Figures of many servers in one page for Prometheus: each sample says whose it is."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SAMPLE = re.compile(r"([A-Za-z_:][A-Za-z0-9_:]*)(?:\{(.*)\})? (\S+.*)")


def together(pages: Mapping[str, bytes]) -> bytes:
    """Return pages of Prometheus's text format as one, with the label ``replica`` on each sample.

    A page without a name is the gateway's; its samples have ``replica="gateway"``. What was
    created when is left out.
    """
    families: dict[str, list[str]] = {}
    for name, page in pages.items():
        label = f'replica="{name or "gateway"}"'
        family: list[str] = []
        for line in page.decode().splitlines():
            if line.startswith("# HELP "):
                family = families.setdefault(line.split(" ")[2], [])
                if not family:
                    family.append(line)
            elif line.startswith("# TYPE "):
                if len(family) == 1:
                    family.append(line)
            elif (found := _SAMPLE.fullmatch(line)) is not None:
                labels = f"{label},{found[2]}" if found[2] else label
                family.append(f"{found[1]}{{{labels}}} {found[3]}")
    lines = [line for family in families.values() for line in family]
    return "\n".join([*lines, ""]).encode()
