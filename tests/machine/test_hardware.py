"""The probe of cards and host: right where NVML answers, quiet where it does not."""

from __future__ import annotations

import os
from types import SimpleNamespace

import psutil
import pynvml
import pytest

from qwen2vl_serve.machine import hardware
from qwen2vl_serve.machine.hardware import GIB, Card

UUIDS = ["GPU-aaaa-1", "GPU-aabb-2", "GPU-cccc-3"]


def memory_of(handle: int, version: int | None = None) -> SimpleNamespace:
    """Answer as NVML does: only the second version tells what the driver keeps for itself."""
    told = SimpleNamespace(total=(handle + 1) * GIB, free=GIB // 2)
    if version == pynvml.nvmlMemory_v2:
        told.reserved = GIB // 4
    return told


@pytest.fixture
def three_cards(monkeypatch):
    """NVML's own calls answered as a machine with three cards would."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 3,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetMemoryInfo": memory_of,
        "nvmlDeviceGetCudaComputeCapability": lambda handle: (8, handle),
        "nvmlDeviceGetName": lambda handle: b"Card" if handle == 0 else "Card",
        "nvmlDeviceGetUUID": lambda handle: UUIDS[handle],
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)


def test_cards_have_what_the_driver_leaves_to_cuda(three_cards):
    """``torch.cuda.mem_get_info`` tells the total without what the driver keeps for itself."""
    assert hardware.cards()[1] == Card(1, "Card", 1.75, 0.5, (8, 1))
    assert len(hardware.cards()) == 3


@pytest.mark.parametrize(
    "error",
    [
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    ],
)
def test_driver_that_does_not_tell_what_it_keeps(three_cards, monkeypatch, error):
    """Drivers before 510 have the first version of the call alone; the whole card is told then."""

    def older(handle: int, version: int | None = None) -> SimpleNamespace:
        if version is not None:
            raise pynvml.NVMLError(error)
        return memory_of(handle)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", older)
    assert hardware.cards()[1] == Card(1, "Card", 2.0, 0.5, (8, 1))


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        ("0", [0]),
        ("2,0", [2, 0]),
        (" 1 , 2", [1, 2]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0,7,1", [0]),
        ("GPU-cc", [2]),
        ("GPU-aa", []),
        ("GPU-aabb-2,0", [1, 0]),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(three_cards, monkeypatch, visible, indices):
    """The list ends at the first entry that names no card, or more than one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [card.index for card in hardware.cards()] == indices


def test_machine_without_driver_has_no_card(monkeypatch):
    """NVML without its library is an empty answer and no exception, so that a laptop can plan."""

    def no_driver() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    assert hardware.cards() == ()


def test_card_that_breaks_off_is_not_an_exception(three_cards, monkeypatch):
    """Where NVML says that a GPU is lost it is not told, rather than with unknown memory."""

    def lost(handle: int, version: int | None = None) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lost)
    assert hardware.cards() == ()


@pytest.mark.parametrize(
    "call", ["nvmlDeviceGetHandleByIndex", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetUUID"]
)
@pytest.mark.parametrize("visible", [None, "0,1,2"])
def test_one_lost_card_leaves_the_others(three_cards, monkeypatch, call, visible):
    """The second of three is lost, at whichever call: the first and the third are told."""
    answer = getattr(pynvml, call)

    def lost(handle: int, **version: int) -> object:
        if handle == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return answer(handle, **version)

    monkeypatch.setattr(pynvml, call, lost)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [card.index for card in hardware.cards()] == [0, 2]


def test_this_machine_can_be_probed():
    """With the real NVML and psutil: the processors are those that this process may run on."""
    assert isinstance(hardware.cards(), tuple)
    host = hardware.host()
    assert set(host.cpus) == os.sched_getaffinity(0)
    assert 0 < host.available_gib <= host.memory_gib


def test_control_group_bounds_the_memory(monkeypatch, tmp_path):
    """In a container, what the host has is not what this process may use."""
    (tmp_path / "memory.max").write_text(f"{2**29}\n")
    (tmp_path / "memory.current").write_text(f"{2**28}\n")
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
    assert hardware.host().memory_gib == 0.5
    assert hardware.host().available_gib <= 0.25
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware.host().memory_gib == psutil.virtual_memory().total / GIB


def test_cards_in_words():
    """Equal ones are counted together, with GiB in whole numbers; none is told as such."""
    card = Card(0, "NVIDIA GeForce RTX 3090", 23.58, 23.0, (8, 6))
    other = Card(1, "T4", 14.6, 14.0, (7, 5))
    assert hardware.describe(()) == "no NVIDIA card"
    assert (
        hardware.describe((card, card, other))
        == "2 × NVIDIA GeForce RTX 3090 (24 GiB), 1 × T4 (15 GiB)"
    )
