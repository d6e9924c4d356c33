"""What this machine has: NVIDIA cards by NVML, processors and memory by psutil.

Nothing here raises on a machine without a card, a driver or a readable limit: it then reports
none. Neither torch nor vLLM is imported.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pynvml

GIB = 1024**3
_CGROUP = Path("/sys/fs/cgroup")
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Card:
    """One NVIDIA card; ``memory_gib`` is what CUDA gives of it, which is what vLLM shares out.

    ``capability`` is the CUDA compute capability as (major, minor).
    """

    index: int
    name: str
    memory_gib: float
    free_gib: float
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Host:
    """Processors that this process may use, and the host's memory in GiB."""

    cpus: tuple[int, ...]
    memory_gib: float
    available_gib: float


def cards() -> tuple[Card, ...]:
    """List the cards that CUDA programs started from here will see.

    ``CUDA_VISIBLE_DEVICES`` is honoured as CUDA does: indices or the beginnings of UUIDs, in
    that order, up to the first that does not exist. A card that does not answer is left out.
    """
    found: dict[int, tuple[str, Card]] = {}
    try:
        with nvml():
            count = pynvml.nvmlDeviceGetCount()
            for index in range(count):
                # It may have fallen off the bus, or a container hides it.
                with suppress(pynvml.NVMLError):
                    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                    found[index] = _text(pynvml.nvmlDeviceGetUUID(handle)), _card(index, handle)
    except (pynvml.NVMLError, OSError):  # no driver
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    uuids = {index: uuid for index, (uuid, _) in found.items()}
    order = range(count) if visible is None else _visible(visible, count, uuids)
    return tuple(found[index][1] for index in order if index in found)


def host() -> Host:
    """Measure the host, within the limits of the control group that this process runs in."""
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    limit = _read_int(_CGROUP / "memory.max")
    if limit is not None and limit < total:
        total = limit
        available = min(available, limit - (_read_int(_CGROUP / "memory.current") or 0))
    return Host(usable_cpus(), total / GIB, max(available, 0) / GIB)


def usable_cpus() -> tuple[int, ...]:
    """Numbers of the processors that this process may run on, at least one."""
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):
        return tuple(process.cpu_affinity() or (0,))
    return tuple(range(psutil.cpu_count() or 1))


def has_avx512() -> bool:
    """Whether an x86 processor has AVX-512; of other kinds, and unknown ones, True.

    vLLM takes one of its CPU libraries by this (``import_kernels`` in ``platforms/cpu.py``).
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    try:
        text = _CPUINFO.read_text("ascii", "replace")
    except OSError:
        return True
    flags = next((line for line in text.splitlines() if line.startswith("flags")), None)
    return flags is None or {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(flags.split())


def describe(found: tuple[Card, ...]) -> str:
    """Put cards into words: ``2 × NVIDIA GeForce RTX 3090 (24 GiB)`` or ``no NVIDIA card``."""
    if not found:
        return "no NVIDIA card"
    kinds: dict[str, int] = {}
    for card in found:
        kind = f"{card.name} ({card.memory_gib:.0f} GiB)"
        kinds[kind] = kinds.get(kind, 0) + 1
    return ", ".join(f"{count} × {kind}" for kind, count in kinds.items())


@contextmanager
def nvml() -> Iterator[None]:
    """Hold NVML open; raises ``pynvml.NVMLError`` or ``OSError`` where there is none."""
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def _card(index: int, handle: Any) -> Card:
    total, free = _memory(handle)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Card(
        index=index,
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        memory_gib=total / GIB,
        free_gib=free / GIB,
        capability=(int(major), int(minor)),
    )


def _memory(handle: Any) -> tuple[int, int]:
    """Return the bytes that CUDA gives of a card, and those of them that are free.

    NVML's total also holds what the driver keeps for itself, which only the second version of the
    call tells. Drivers before 510 have the first alone; there it is the whole card.
    """
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
        return int(memory.total) - int(memory.reserved), int(memory.free)
    except pynvml.NVMLError:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return int(memory.total), int(memory.free)


def _visible(variable: str, count: int, uuids: Mapping[int, str]) -> list[int]:
    order: list[int] = []
    for entry in (part.strip() for part in variable.split(",")):
        if entry.isascii() and entry.isdigit():
            matches = [int(entry)] if int(entry) < count else []
        else:
            matches = [index for index in uuids if entry and uuids[index].startswith(entry)]
        if len(matches) != 1:
            break
        order += matches
    return order


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text("ascii"))
    except (OSError, ValueError):  # absent, or the word "max"
        return None
