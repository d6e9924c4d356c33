"""Machines and checkpoints for the doctor: a healthy one, and what it takes to break it.

Cards are faked at NVML's own calls, packages as metadata on the path, all else is real files.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from qwen2vl_serve.doctor import World, machine
from qwen2vl_serve.machine import hardware
from qwen2vl_serve.machine.installed import Build
from qwen2vl_serve.profile import load_profile
from tests.adapter_files import DEMO_SIZES, Q_PROJ, write_adapter

GIB = 1024**3
DEMO = Path(load_profile("demo").model.path)
VARIABLES = (
    "HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy",
    "NO_PROXY", "no_proxy", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_USE_MODELSCOPE",
    "NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL", "CUDA_VISIBLE_DEVICES", "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "QWEN2VL_API_KEY", "HF_HOME", "VLLM_CPU_KVCACHE_SPACE", "VLLM_ALLOW_LONG_MAX_MODEL_LEN",
)  # fmt: skip


@dataclass
class Lab:
    """Builds worlds below ``folder``; what it changes is undone with the test."""

    monkeypatch: pytest.MonkeyPatch
    folder: Path

    def __post_init__(self) -> None:
        for name in VARIABLES:
            self.monkeypatch.delenv(name, raising=False)
        self.monkeypatch.setenv("XDG_STATE_HOME", str(self.folder / "state"))
        self.monkeypatch.setenv("XDG_CONFIG_HOME", str(self.folder / "config"))
        self.monkeypatch.setenv("HF_HUB_CACHE", str(self.folder / "hub"))
        self.monkeypatch.setenv("MODELSCOPE_CACHE", str(self.folder / "modelscope"))
        self._site = self.folder / "site"
        self._site.mkdir()
        self.monkeypatch.syspath_prepend(str(self._site))
        self.memory(1024, free=1000)
        self.roomy_disks()
        self.model = shutil.copytree(DEMO, self.folder / "model")

    def world(
        self, *overrides: str, build: Build | None = "cpu", adapter: Path | None = None
    ) -> World:
        """A profile for the copied demo checkpoint, on the CPU unless ``build`` says otherwise."""
        profile = load_profile("demo", ["port=0", f"model={self.model}", *overrides])
        return World(profile, build, adapter)

    def world_with_cards(self, *overrides: str) -> World:
        """The same on cards, under a CUDA build of vLLM and torch; call ``cards`` before."""
        self.package("torch", "2.13.0", files={"torch/version.py": "cuda: Optional[str] = '13.0'"})
        self.package("vllm", "0.32.0", requires=["torch==2.13.0"])
        kv_cache = "engine.kv_cache_memory_bytes=null"
        return self.world("hardware.device=cuda", kv_cache, *overrides, build="cuda")

    def package(
        self,
        name: str,
        version: str,
        *,
        requires: Sequence[str] = (),
        files: dict[str, str] | None = None,
    ) -> None:
        """Install a distribution that wins over one of the same name."""
        info = self._site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += ["Requires-Python: >=3.11", *(f"Requires-Dist: {one}" for one in requires)]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        for file, text in (files or {}).items():
            (self._site / file).parent.mkdir(exist_ok=True)
            (self._site / file).write_text(text + "\n")

    def cards(
        self,
        count: int = 1,
        *,
        gib: float = 24.0,
        free: float = 23.9,
        capability: tuple[int, int] = (8, 6),
        cuda: int = 13000,
        holders: Sequence[tuple[int, float]] = (),
        p2p: bool = True,
    ) -> None:
        """Put cards into the machine; ``cuda`` is the newest that their driver runs."""
        running = [SimpleNamespace(pid=pid, usedGpuMemory=int(g * GIB)) for pid, g in holders]
        status = pynvml.NVML_P2P_STATUS_OK if p2p else pynvml.NVML_P2P_STATUS_CHIPSET_NOT_SUPPORTED
        memory = SimpleNamespace(total=int(gib * GIB), reserved=0, free=int(free * GIB))
        answers = {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlSystemGetDriverVersion": lambda: "580.65.06",
            "nvmlSystemGetCudaDriverVersion_v2": lambda: cuda,
            "nvmlDeviceGetCount": lambda: count,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetMemoryInfo": lambda handle, version=None: memory,
            "nvmlDeviceGetCudaComputeCapability": lambda handle: capability,
            "nvmlDeviceGetName": lambda handle: "NVIDIA GeForce RTX 3090",
            "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}",
            "nvmlDeviceGetComputeRunningProcesses": lambda handle: running,
            "nvmlDeviceGetGraphicsRunningProcesses": lambda handle: [],
            "nvmlDeviceGetP2PStatus": lambda one, other, index: status,
        }
        for name, answer in answers.items():
            self.monkeypatch.setattr(pynvml, name, answer)

    def swell(self, size: int) -> None:
        """Add a tensor of ``size`` bytes, which take no room, to the weights."""
        file = self.model / "model.safetensors"
        data = file.read_bytes()
        (length,) = struct.unpack_from("<Q", data)
        entries = json.loads(data[8 : 8 + length])
        end = len(data) - 8 - length
        entries["more"] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        header = json.dumps(entries).encode()
        file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
        with file.open("r+b") as made:
            made.truncate(8 + len(header) + end + size)

    def no_driver(self, error: int = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND) -> None:
        """Let NVML's first call fail."""

        def fail() -> None:
            raise pynvml.NVMLError(error)

        self.monkeypatch.setattr(pynvml, "nvmlInit", fail)

    def roomy_disks(self) -> None:
        """Leave a TiB on every disk, whatever this machine has."""
        usage = shutil.disk_usage("/")._replace(free=2**40)
        self.monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    def full_disk(self, place: Path, free: int) -> None:
        """Leave ``free`` bytes on the disk of ``place``."""
        usage = shutil.disk_usage

        def measured(path: Any) -> Any:
            there = Path(path).is_relative_to(place) or place.is_relative_to(path)
            return usage(path)._replace(free=free) if there else usage(path)

        self.monkeypatch.setattr(shutil, "disk_usage", measured)

    def memory(self, gib: float, free: float, nodes: int = 1) -> None:
        """Give the host this memory, in so many memory nodes."""
        place = self.folder / "nodes"
        for number in range(nodes):
            (place / f"node{number}").mkdir(parents=True, exist_ok=True)
        self.monkeypatch.setattr(machine, "MEMORY_NODES", place)
        self.monkeypatch.setattr(hardware, "host", lambda: hardware.Host((0, 1), gib, free))

    def edit(self, name: str, **changes: Any) -> None:
        """Change values of one of the checkpoint's JSON files; None takes a key away."""
        path = self.model / name
        values = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    def added_tokens(self) -> list[dict[str, Any]]:
        """The tokenizer's special tokens."""
        tokens: list[dict[str, Any]]
        tokens = json.loads((self.model / "tokenizer.json").read_text())["added_tokens"]
        return tokens

    def text_config(self, **changes: Any) -> None:
        """Change values of config.json's ``text_config``."""
        text = json.loads((self.model / "config.json").read_text())["text_config"]
        self.edit("config.json", text_config={**text, **changes})

    def adapter(self, part: str = Q_PROJ, rank: int = 2, **settings: Any) -> Path:
        """Write a LoRA of one part of the demo model."""
        return write_adapter(self.folder / "adapter", {part: DEMO_SIZES[part]}, rank, **settings)


def copy_tensors(source: Path, target: Path, kept: Callable[[str], bool]) -> None:
    """Write the tensors of ``source`` whose names are ``kept``; both may be the same file."""
    data = source.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    entries, held = {}, b""
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__" and kept(name):
            begin, end = entry["data_offsets"]
            offsets = [len(held), len(held) + end - begin]
            entries[name] = {**entry, "data_offsets": offsets}
            held += data[8 + length + begin : 8 + length + end]
    header = json.dumps(entries).encode()
    target.write_bytes(struct.pack("<Q", len(header)) + header + held)


def write_safetensors(path: Path, names: Sequence[str]) -> None:
    """Write one float32 a name."""
    entries = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * n, 4 * n + 4]}
        for n, name in enumerate(names)
    }
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4 * len(names)))
