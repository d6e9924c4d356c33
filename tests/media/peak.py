"""How much memory decoding a picture takes at most: ``python -m tests.media.peak SMALL LARGE``.

For a process of its own: what was freed before would be taken again unseen.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from qwen2vl_serve.media.image import decode, read_header
from qwen2vl_serve.vision import PixelBudget, smart_resize

BUDGET = PixelBudget(3136, 1_003_520)


def decoded(path: str) -> None:
    data = Path(path).read_bytes()
    header = read_header(data, 10**9, "it")
    decode(data, smart_resize(header.height, header.width, BUDGET), "it")


def status(name: str) -> int:
    """Return a figure of this process in bytes."""
    text = Path("/proc/self/status").read_text("ascii")
    (found,) = re.findall(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found) * 1024


def main(small: str, large: str) -> None:
    """Print by how many bytes the peak exceeds what the process has, the file not counted."""
    decoded(small)  # libraries are loaded, loops compiled
    data = Path(large).read_bytes()
    header = read_header(data, 10**9, "it")
    size = smart_resize(header.height, header.width, BUDGET)
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak is what it has now
    before = status("VmHWM")
    decode(data, size, "it")
    print(status("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
