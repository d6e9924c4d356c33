"""Let packages built for CUDA stand beside a CPU build of torch.

Package mirrors carry torchvision, torchaudio and torchcodec as CUDA builds only, and vLLM
requires all three. Their compiled parts cannot load on CPU torch: ``import torchvision`` then
fails while it describes the result shapes of ``nms`` and ``qnms``, and transformers fails on
the other two, which it imports merely because they are there. Qwen2-VL needs only
torchvision's Python transforms: a schema without a kernel is enough for them.

The function is an entry point of the group ``torch.backends``, which torch calls at the end of
``import torch``. That is the one moment early enough in every process: vLLM spawns its engine
and workers, and their first import already reaches torchvision, before any vLLM plugin.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

# Signatures of torchvision 0.28; the only two that its import asks for.
_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def declare_missing_operators() -> None:
    """Declare the operators ``import torchvision`` needs where the real ones cannot load.

    Call it before torchvision is imported; a call after that, or a second one, changes
    nothing. It also changes nothing where torch is absent or built for an accelerator, and it
    leaves torchvision's own operators alone where they load. A declared operator has no
    kernel: calling it raises ``NotImplementedError``.

    A torchaudio or torchcodec that cannot load beside this torch counts as not installed for
    the rest of the process.
    """
    if importlib.util.find_spec("torch") is None:
        return
    torch: Any = importlib.import_module("torch")  # absent from the base installation
    if torch.version.cuda is not None or torch.version.hip is not None:
        return
    _declare_schemas(torch)
    for package in ("torchaudio", "torchcodec"):
        _hide_if_unloadable(package)


def _declare_schemas(torch: Any) -> None:
    """Register torchvision's compiled operators, or bare schemas where they cannot load."""
    torchvision = importlib.util.find_spec("torchvision")
    if torchvision is None or not torchvision.submodule_search_locations:
        return
    if hasattr(torch.ops.torchvision, "nms"):
        return
    for library in Path(torchvision.submodule_search_locations[0]).glob("_C.*"):
        with suppress(OSError):
            torch.ops.load_library(str(library))
            return
    for name, signature in _SCHEMAS.items():
        torch.library.define(f"torchvision::{name}", signature)


def _hide_if_unloadable(package: str) -> None:
    """Make ``import package`` raise ``ImportError``, which is handled, instead of ``OSError``."""
    if importlib.util.find_spec(package) is None:
        return
    try:
        importlib.import_module(package)
    except (ImportError, OSError, RuntimeError):
        for name in [m for m in sys.modules if m.partition(".")[0] == package]:
            del sys.modules[name]
        sys.modules[package] = None  # type: ignore[assignment]  # the documented way to block
