"""The gate before vLLM is imported: the doctor's checks, of which only fatal findings stop a start.

It takes well under a second and loads nothing heavy.
"""

from __future__ import annotations

from qwen2vl_serve import doctor
from qwen2vl_serve.doctor.model import split
from qwen2vl_serve.errors import PreflightError
from qwen2vl_serve.machine import installed
from qwen2vl_serve.profile import Profile


def check(profile: Profile) -> tuple[doctor.Finding, ...]:
    """Make the doctor's checks; return the findings that only warn.

    Raises ``PreflightError`` with one line at the first that is fatal.
    """
    warnings = []
    for finding in doctor.examine(doctor.World(profile, installed.vllm_build())):
        if finding.level == "fatal":
            raise PreflightError(finding.line)
        if finding.level == "warning":
            warnings.append(finding)
    return tuple(warnings)


def check_topology(profile: Profile) -> None:
    """Check that the model divides over the cards, so far as this machine knows the model.

    For a rehearsal: neither checkpoint nor cards need to be here.
    """
    world = doctor.World(profile, None)
    if world.folder is not None and (world.folder / "config.json").is_file():
        world.read_config(world.folder)
    finding = split(world)
    if finding.level == "fatal":
        raise PreflightError(finding.line)
