"""The NVIDIA driver, who holds the cards' memory, and which cards reach each other.

Like ``hardware``, nothing here raises where there is no driver or no permission.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import psutil
import pynvml

from qwen2vl_serve.machine.hardware import GIB, nvml


@dataclass(frozen=True, slots=True)
class Driver:
    """``version`` as 580.65.06 and the newest CUDA (major, minor) that it runs.

    ``fault`` is NVML's own text where the driver is installed and does not answer.
    """

    version: str | None = None
    cuda: tuple[int, int] | None = None
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class Holder:
    """A process with memory on a card; ``gib`` is None where the driver keeps it to itself."""

    pid: int
    name: str
    user: str
    gib: float | None

    def __str__(self) -> str:
        held = "" if self.gib is None else f", {self.gib:.1f} GiB"
        return f"{self.name} (process {self.pid} of {self.user}{held})"


def driver() -> Driver:
    """Ask the driver for its version."""
    try:
        with nvml():
            version = pynvml.nvmlSystemGetDriverVersion()
            cuda = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
    except OSError:
        return Driver()
    except pynvml.NVMLError as error:
        absent = error.value in (
            pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
            pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        )
        return Driver() if absent else Driver(fault=str(error))
    text = version.decode() if isinstance(version, bytes) else str(version)
    return Driver(text, (cuda // 1000, cuda % 1000 // 10))


def holders(index: int) -> tuple[Holder, ...]:
    """List the processes with memory on the card of this NVML index, the largest first.

    A container sees only its own; the memory of others shows as used by nobody.
    """
    found = []
    try:
        with nvml():
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            processes = [
                *pynvml.nvmlDeviceGetComputeRunningProcesses(handle),
                *pynvml.nvmlDeviceGetGraphicsRunningProcesses(handle),
            ]
    except (pynvml.NVMLError, OSError):
        return ()
    for pid, used in {process.pid: process.usedGpuMemory for process in processes}.items():
        name, user = _process(pid)
        found.append(Holder(pid, name, user, None if used is None else used / GIB))
    return tuple(sorted(found, key=lambda holder: -(holder.gib or 0)))


def apart(indices: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """List the pairs of cards that cannot read each other's memory (P2P).

    Pairs about which the driver says nothing count as reaching each other.
    """
    found = []
    try:
        with nvml():
            handles = {index: pynvml.nvmlDeviceGetHandleByIndex(index) for index in indices}
            for one, other in combinations(indices, 2):
                status = pynvml.nvmlDeviceGetP2PStatus(
                    handles[one], handles[other], pynvml.NVML_P2P_CAPS_INDEX_READ
                )
                if status not in (pynvml.NVML_P2P_STATUS_OK, pynvml.NVML_P2P_STATUS_UNKNOWN):
                    found.append((one, other))
    except (pynvml.NVMLError, OSError):
        return ()
    return tuple(found)


def _process(pid: int) -> tuple[str, str]:
    try:
        process = psutil.Process(pid)
        return process.name(), process.username()
    except (psutil.Error, KeyError):
        return "a process", "another user"
