"""Programs of Debian's packages for the tests: unpacked into a folder, not installed.

That needs no root. A folder of lists of its own is used, so that the machine's are left alone.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock

from tests.markdown import ROOT

FOLDER = ROOT / "build" / "debian"
SECONDS = 120


def program(name: str, *packages: str) -> Path:
    """Return the path of a program: this machine's, else the packages'; skip where neither is.

    The packages are taken without what they depend on: it is for programs that need little more
    than the C library.
    """
    if (found := shutil.which(name, path=os.defpath + ":/usr/sbin:/usr/local/sbin")) is not None:
        return Path(found)
    try:
        root = unpacked(*packages)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        pytest.skip(f"no {name} here, nor Debian's package of it: {' '.join(said)[:200]}")
    for folder in ("usr/sbin", "usr/bin"):
        if (found := shutil.which(name, path=str(root / folder))) is not None:
            return Path(found)
    pytest.fail(f"{packages} hold no {name}")


@functools.cache
def unpacked(*packages: str) -> Path:
    """Return a folder that holds the files of the newest versions of Debian packages."""
    root = FOLDER / "-".join(packages)
    if (root / "complete").exists():
        return root
    shutil.rmtree(root, ignore_errors=True)
    archives = root / "archives"
    archives.mkdir(parents=True)
    _apt("download", *packages, folder=archives)
    for archive in archives.glob("*.deb"):
        _run("dpkg-deb", "-x", str(archive), str(root))
    shutil.rmtree(archives)
    (root / "complete").touch()
    return root


def _apt(*words: str, folder: Path) -> None:
    lists, cache = FOLDER / "lists", FOLDER / "cache"
    for one in (lists / "partial", cache / "archives" / "partial"):
        one.mkdir(parents=True, exist_ok=True)
    options = [
        *("-o", f"Dir::State::Lists={lists}"),
        *("-o", f"Dir::Cache={cache}"),
        *("-o", "Debug::NoLocking=true"),
        *("-o", "APT::Sandbox::User="),
    ]
    # Of the workers of a run, more than one may want a program.
    with FileLock(FOLDER / "lock"):
        if not any(lists.glob("*Packages*")):
            _run("apt-get", *options, "update", folder=folder)
        _run("apt-get", *options, *words, folder=folder)


def _run(*words: str, folder: Path | None = None) -> None:
    subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True, timeout=SECONDS)
