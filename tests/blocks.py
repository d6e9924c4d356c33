"""Shell blocks of a document: each is run by a test, or its mark says what it needs.

The last table of such a page lists the marks, what they need, and what is checked without it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.markdown import ROOT, Block, Document

BIN = Path(sys.executable).parent


def shell_blocks(document: Document) -> list[Block]:
    return [block for block in document.blocks if block.language == "bash"]


def unmarked(document: Document) -> list[Block]:
    """The blocks that need nothing."""
    return [block for block in shell_blocks(document) if not block.tags]


def assert_marks_are_listed(document: Document, marks: set[str]) -> None:
    """No mark is without its row in the last table, and no row without a mark."""
    used = {tag for block in shell_blocks(document) for tag in block.tags}
    listed = {code for row in document.tables[-1] for code in row[0].codes}
    assert used == listed == marks


def lines(block: Block) -> list[str]:
    """The commands of a block; a continued line is one."""
    return block.text.replace("\\\n", " ").splitlines()


def printed(commands: str, folder: Path = ROOT, env: Mapping[str, str] | None = None) -> str:
    """Run commands with this environment's programs, to status 0; return what they print."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder,
        env={**os.environ, **(env or {}), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
