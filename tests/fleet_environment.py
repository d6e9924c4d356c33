"""The environment of Ray's tests: Ray beside the packages that are here, which it does not touch.

Ray brings a command ``serve`` of its own, so it is not put into the environment of this project.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

from tests.thirdparty.environments import Environment, made, run, uv

ROOT = Path(__file__).parents[1]


def requirement() -> str:
    """Return what the extra ``ray`` asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (found,) = (one for one in project["optional-dependencies"]["ray"] if one.startswith("ray["))
    return str(found)


def ray_environment() -> Environment:
    """Return the environment; made once for each set of packages, in the user's cache."""
    frozen = subprocess.run(
        uv("pip", "freeze", "--python", sys.executable), capture_output=True, text=True, check=True
    ).stdout
    pins = "\n".join(line for line in frozen.splitlines() if re.match(r"[\w.-]+==", line))

    def make(folder: Path) -> None:
        run(uv("venv", "--no-project", "--python", sys.executable, str(folder)))
        constraints = folder / "constraints.txt"
        constraints.write_text(pins)
        python = Environment(folder).python
        run(uv("pip", "install", "--link-mode", "copy", "--python", str(python),
               "-c", str(constraints), requirement()))  # fmt: skip
        packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
        (packages / "shared.pth").write_text(f"{sysconfig.get_path('purelib')}\n")

    return Environment(made("ray", [requirement(), pins], make))
