"""Texts as the installed vLLM and transformers would say them, read from their sources."""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

FILLED = "7"
"""Stands where a text has a value."""


def site_packages() -> Path | None:
    """The folder that vLLM is installed in, None where it is not."""
    found = importlib.util.find_spec("vllm")
    return None if found is None or found.origin is None else Path(found.origin).parents[1]


@cache
def texts(source: str) -> tuple[str, ...]:
    """Every text of a source file below site-packages, whole and with its values filled in."""
    root = site_packages()
    assert root is not None
    tree = ast.parse((root / source).read_text("utf-8"))
    return tuple(filter(None, map(_text, ast.walk(tree))))


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[\d.]*[sdfr]", FILLED, node.value)
    if isinstance(node, ast.JoinedStr):
        parts = [_text(part) if isinstance(part, ast.Constant) else FILLED for part in node.values]
        return "".join(part or "" for part in parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return None
    return None
