"""Where the engine's words go: one file, which is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwen2vl_serve.errors import PreflightError
from qwen2vl_serve.launch.output import fresh_log


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "/dev/full"])
def test_what_is_no_file_keeps_no_log(tmp_path: Path, name: str) -> None:
    """One line at once, also where it came after the preflight: a pipe is not waited for."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PreflightError, match=r"^server\.log_file: "), fresh_log(tmp_path / name):
        pass
