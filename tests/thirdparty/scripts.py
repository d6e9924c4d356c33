"""Runs a client's script: plain code of that client, cut into cases by comments.

A comment ``--- NAME`` begins a case; run, it prints itself, so that what follows in the output is
known to be that case's. What all cases need is the case ``setup``.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.thirdparty.environments import HERE

CASE = re.compile(r"^(?:#|//) --- (.+)$", re.MULTILINE)
SAYS = {
    ".py": 'print("\\n--- {}", flush=True)',
    ".mjs": 'console.log("\\n--- {}");',
    ".sh": 'echo; echo "--- {}"',
}
INTERPRETERS = {".py": ["python"], ".mjs": ["node"], ".sh": ["bash", "-uo", "pipefail"]}

# What the scripts and the documentation write, and a test replaces.
SERVER = "http://127.0.0.1:8000"
SITE = "https://example.org"
KEY = "sk-your-key"


@dataclass(frozen=True)
class Outcome:
    """What each case printed, and what the script ended with."""

    printed: Mapping[str, str]
    status: int
    errors: str


def cases(name: str) -> dict[str, str]:
    """Return the code of each case of a script, without the comment that names it."""
    pieces = CASE.split((HERE / name).read_text("utf-8"))
    return dict(zip(pieces[1::2], (code.strip("\n") for code in pieces[2::2]), strict=True))


def run(name: str, folder: Path, path: str, addresses: Mapping[str, str]) -> Outcome:
    """Run a script in a folder that holds the pictures, with the commands of ``path`` first.

    The folder takes all that the client writes; ``addresses`` replaces what the script names.
    """
    source = (HERE / name).read_text("utf-8")
    for written, real in addresses.items():
        source = source.replace(written, real)
    suffix = Path(name).suffix
    script = folder / name
    script.write_text(CASE.sub(lambda found: SAYS[suffix].format(found[1]), source), "utf-8")
    done = subprocess.run(
        [*INTERPRETERS[suffix], str(script)],
        cwd=folder,
        env=environment(folder, path),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    pieces = re.split(r"^--- (.+)\n", done.stdout, flags=re.MULTILINE)
    printed = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    return Outcome(printed, done.returncode, done.stderr)


def environment(folder: Path, path: str) -> dict[str, str]:
    """Return variables in which no key, proxy or setting of the user reaches a client."""
    kept = {name: os.environ[name] for name in ("LANG", "LC_ALL") if name in os.environ}
    return {
        **kept,
        "PATH": f"{path}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "LLM_USER_PATH": str(folder / "llm"),
        # No client shall ask the internet: price lists, tracing.
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LANGSMITH_TRACING": "false",
    }
