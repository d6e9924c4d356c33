"""CUDA builds of torchvision, torchaudio and torchcodec do not keep vLLM from starting."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DECLARE = "from qwen2vl_serve.torchvision_ops import declare_missing_operators as declare\n"

needs_cpu_torch = pytest.mark.skipif(
    not importlib.metadata.version("torch").endswith("+cpu"),
    reason="an accelerator's torch loads torchvision's own operators",
)


def run(
    code: str, *flags: str, first: Path | None = None, autoload: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, with stub packages from ``first`` and this checkout."""
    path = [str(folder) for folder in (first, ROOT) if folder is not None]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": str(int(autoload)),
    }
    return subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def printed(result: subprocess.CompletedProcess[str]) -> list[str]:
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def make_package(folder: Path, name: str, code: str = "") -> Path:
    package = folder / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(textwrap.dedent(code))
    return package


@needs_cpu_torch
def test_processors_of_qwen2_vl_work_after_two_calls() -> None:
    """A second call is harmless, and pictures and frames become pixel values."""
    result = run(
        DECLARE
        + """
declare()
declare()
import numpy as np
from PIL import Image
from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor
picture = Qwen2VLImageProcessor()(images=Image.new("RGB", (280, 140)), return_tensors="pt")
frames = np.zeros((4, 56, 84, 3), dtype=np.uint8)
video = Qwen2VLVideoProcessor(min_pixels=784, max_pixels=4704)(videos=[frames], return_tensors="pt")
print(picture["image_grid_thw"].tolist(), picture["pixel_values"].shape[0])
print(video["video_grid_thw"].tolist(), video["pixel_values_videos"].shape[1])
"""
    )
    assert printed(result) == ["[[1, 10, 20]] 200", "[[2, 4, 6]] 1176"]


@needs_cpu_torch
def test_import_of_torch_alone_is_enough_in_every_process() -> None:
    """torch calls the entry point, also when torchvision's import is what imports torch."""
    (ours,) = (
        entry
        for entry in importlib.metadata.entry_points(group="torch.backends")
        if entry.value == "qwen2vl_serve.torchvision_ops:declare_missing_operators"
    )
    assert ours.name == "qwen2vl_torchvision_ops"
    assert printed(
        run("import torchvision; print(torchvision.ops.nms.__name__)", autoload=True)
    ) == ["nms"]


@needs_cpu_torch
def test_declared_operator_without_kernel_says_so(tmp_path: Path) -> None:
    """Nothing computes a wrong answer: calling a declared operator raises."""
    (make_package(tmp_path, "torchvision") / "_C.so").write_bytes(b"built for CUDA")
    result = run(
        DECLARE
        + """
declare()
import torch
for operator in (torch.ops.torchvision.nms, torch.ops.torchvision.qnms):
    try:
        operator(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except NotImplementedError:
        print("no kernel")
""",
        first=tmp_path,
    )
    assert printed(result) == ["no kernel", "no kernel"]


@needs_cpu_torch
def test_operators_that_exist_are_left_alone(tmp_path: Path) -> None:
    """A real kernel keeps answering, and nothing is declared beside it."""
    (make_package(tmp_path, "torchvision") / "_C.so").write_bytes(b"built for CUDA")
    result = run(
        DECLARE
        + """
import torch
torch.library.define("torchvision::nms", "(Tensor a, Tensor b, float c) -> Tensor")
torch.library.impl("torchvision::nms", "cpu", lambda a, b, c: torch.tensor([7]))
declare()
print(torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5).item())
print(hasattr(torch.ops.torchvision, "qnms"))
""",
        first=tmp_path,
    )
    assert printed(result) == ["7", "False"]


@needs_cpu_torch
def test_extension_that_loads_is_used(tmp_path: Path) -> None:
    """Where torchvision's library loads, it brings its own operators: none are declared."""
    loadable = next(Path(sysconfig.get_path("platlib")).glob("numpy/**/_multiarray_umath*.so"))
    package = make_package(tmp_path, "torchvision")
    shutil.copy(loadable, package / "_C.so")
    code = DECLARE + "declare()\nimport torch; print(hasattr(torch.ops.torchvision, 'nms'))"
    assert printed(run(code, first=tmp_path)) == ["False"]


@needs_cpu_torch
@pytest.mark.parametrize("package", ["torchaudio", "torchcodec"])
@pytest.mark.parametrize("error", ["OSError", "RuntimeError", "ImportError"])
def test_unloadable_package_counts_as_absent(tmp_path: Path, package: str, error: str) -> None:
    """transformers and vLLM handle an absent package, but not one that raises OSError."""
    make_package(tmp_path, package, f"from . import part\nraise {error}('no CUDA here')")
    (tmp_path / package / "part.py").touch()
    result = run(
        DECLARE
        + f"""
declare()
import importlib.util, sys
print(importlib.util.find_spec("{package}"), "{package}.part" in sys.modules)
try:
    import {package}
except ImportError:
    print("absent")
""",
        first=tmp_path,
    )
    assert printed(result) == ["None False", "absent"]


def test_loadable_package_stays(tmp_path: Path) -> None:
    """A torchaudio that works is there afterwards."""
    make_package(tmp_path, "torchaudio", "answer = 42")
    code = DECLARE + "declare()\nimport torchaudio; print(torchaudio.answer)"
    assert printed(run(code, first=tmp_path)) == ["42"]


@pytest.mark.parametrize("accelerator", ["cuda", "hip"])
def test_nothing_changes_on_an_accelerators_torch(tmp_path: Path, accelerator: str) -> None:
    """CUDA's and ROCm's torch load torchvision's own operators: hands off."""
    make_package(
        tmp_path,
        "torch",
        f"""
        class version:
            cuda = hip = None
        version.{accelerator} = "13.0"
        """,
    )
    make_package(tmp_path, "torchvision")
    make_package(tmp_path, "torchaudio", "raise OSError")
    code = (
        DECLARE + "declare()\nimport sys, torch; print(*(m for m in sys.modules if 'torchau' in m))"
    )
    assert printed(run(code, first=tmp_path)) == [""]


def test_base_installation_without_torch() -> None:
    """The base package has no torch: the call returns."""
    assert printed(run(DECLARE + "declare(); print('fine')", "-S")) == ["fine"]
