"""The driver's probe: right where NVML answers, quiet where it does not."""

from __future__ import annotations

import os

import psutil
import pynvml
import pytest

from qwen2vl_serve.machine import nvidia
from qwen2vl_serve.machine.nvidia import Driver
from tests.worlds import Lab


@pytest.fixture
def lab(monkeypatch, tmp_path) -> Lab:
    return Lab(monkeypatch, tmp_path)


def test_the_driver_tells_its_version_and_newest_cuda(lab):
    """NVML's 12040 is read as CUDA 12.4, and a driver that answers has no fault."""
    lab.cards(cuda=12040)
    assert nvidia.driver() == Driver("580.65.06", (12, 4))


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, False),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, False),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, True),
        (pynvml.NVML_ERROR_UNKNOWN, True),
    ],
)
def test_a_driver_that_is_not_there_is_told_from_one_that_is_broken(lab, error, fault):
    """Only the second has a fault to report."""
    lab.no_driver(error)
    found = nvidia.driver()
    assert (found.version, found.cuda) == (None, None)
    assert bool(found.fault) is fault
    assert nvidia.holders(0) == ()
    assert nvidia.apart([0, 1]) == ()


def test_holders_are_named_largest_first(lab):
    """With the system's name and user of the process; one that is gone has none."""
    gone = 2**22 + 1
    lab.cards(holders=[(gone, 1.0), (os.getpid(), 2.5)])
    mine, other = nvidia.holders(0)
    assert (mine.pid, mine.name, mine.gib) == (os.getpid(), psutil.Process().name(), 2.5)
    assert str(mine).endswith("2.5 GiB)")
    assert (other.name, other.user) == ("a process", "another user")


def test_memory_that_the_driver_keeps_to_itself_is_not_invented(lab, monkeypatch):
    """On Windows and in some containers NVML names the process alone."""
    lab.cards(holders=[(os.getpid(), 1.0)])
    (process,) = pynvml.nvmlDeviceGetComputeRunningProcesses(0)
    process.usedGpuMemory = None
    (holder,) = nvidia.holders(0)
    assert holder.gib is None
    assert "GiB" not in str(holder)


def test_pairs_without_p2p_are_listed(lab, monkeypatch):
    """Each pair once; what the driver does not know counts as reaching each other."""
    lab.cards(3)
    told = {(0, 1): pynvml.NVML_P2P_STATUS_CHIPSET_NOT_SUPPORTED, (0, 2): 6, (1, 2): 0}
    monkeypatch.setattr(pynvml, "nvmlDeviceGetP2PStatus", lambda a, b, index: told[a, b])
    assert pynvml.NVML_P2P_STATUS_UNKNOWN == 6
    assert nvidia.apart([0, 1, 2]) == ((0, 1),)
