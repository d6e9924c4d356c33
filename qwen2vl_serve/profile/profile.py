"""Deployment profiles: which model, on which cards, within which limits.

A profile is a YAML file with the sections that stand beside this module; it is immutable once
loaded.
Nothing here imports vLLM: ``engine_args`` returns plain values.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from pydantic import Field, PrivateAttr, model_validator

from qwen2vl_serve.profile.adapters import AdaptersSection
from qwen2vl_serve.profile.api_keys import keys_of_environment, keys_of_file
from qwen2vl_serve.profile.cpus import equal_shares, one_cpu_each
from qwen2vl_serve.profile.limits import BatchesSection, LimitsSection, OverflowSection
from qwen2vl_serve.profile.media import FilesSection, MediaSection
from qwen2vl_serve.profile.sections import (
    EngineSection,
    HardwareSection,
    ModelSection,
    Section,
    ServerSection,
    Text,
    contradiction,
)
from qwen2vl_serve.profile.yaml import shown

DEMO_PROFILE = "demo"
SECRETS = frozenset({("server", "api_keys"), ("server", "quota_storage"), ("media", "proxy")})
# Options of ``--set``'s kin on the command line: plain text, not YAML.
BARE_OVERRIDES = {"model": "model.model", "host": "server.host", "port": "server.port"}


class Profile(Section):
    """One deployment, complete and consistent."""

    description: Text | None = Field(
        default=None, description="What the profile is for, in one line."
    )
    model: ModelSection = Field(description="The checkpoint and how it is read.")
    hardware: HardwareSection = Field(
        default=HardwareSection(), description="What it is meant for."
    )
    engine: EngineSection = Field(default=EngineSection(), description="vLLM's engine arguments.")
    adapters: AdaptersSection = Field(default=AdaptersSection(), description="LoRA adapters.")
    server: ServerSection = Field(default=ServerSection(), description="The HTTP server.")
    media: MediaSection = Field(default=MediaSection(), description="Pictures and videos.")
    files: FilesSection = Field(default=FilesSection(), description="Uploads.")
    batches: BatchesSection = Field(default=BatchesSection(), description="Batches of requests.")
    limits: LimitsSection = Field(
        default=LimitsSection(), description="What one request may ask for."
    )
    overflow: OverflowSection = Field(
        default=OverflowSection(), description="Requests that do not fit into the window."
    )

    _name: str = PrivateAttr("")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        hardware, engine = self.hardware, self.engine
        if hardware.cards is not None and hardware.device == "cpu":
            raise contradiction(
                "has no use with hardware.device cpu; leave it out", "hardware.cards"
            )
        if engine.distributed_executor_backend == "ray" and hardware.device == "cpu":
            # vLLM asks Ray for cards by a name, and has none for CPUs.
            raise contradiction(
                "needs NVIDIA cards, and hardware.device is cpu; leave it out",
                "engine.distributed_executor_backend",
            )
        if hardware.cards is not None and hardware.cards != self.workers:
            engines = engine.data_parallel_size
            times = f" × engine.data_parallel_size {engines}" if engines > 1 else ""
            raise contradiction(
                f"is {hardware.cards}, but engine.tensor_parallel_size "
                f"{engine.tensor_parallel_size} × engine.pipeline_parallel_size "
                f"{engine.pipeline_parallel_size}{times} = {self.workers}; make them equal",
                "hardware.cards",
            )
        if engine.enforce_eager and engine.compilation_config is not None:
            raise contradiction(
                "has no use with engine.enforce_eager true; keep one", "engine.compilation_config"
            )
        if hardware.cpu_kvcache_gib is not None and engine.kv_cache_memory_bytes is not None:
            raise contradiction(
                "sets the same as engine.kv_cache_memory_bytes; keep one",
                "hardware.cpu_kvcache_gib",
            )
        self._adapters_consistent()
        bind = hardware.cpu_threads_bind
        if bind == "auto" and engine.data_parallel_size > 1:
            raise contradiction(
                "is auto, by which vLLM binds every engine to the same CPUs; leave it out for "
                "equal shares",
                "hardware.cpu_threads_bind",
            )
        if bind not in (None, "auto", "nobind") and len(bind.split("|")) != self.workers:
            raise contradiction(
                f"has {len(bind.split('|'))} entries for {self.workers} workers; "
                "write one a worker, separated by |",
                "hardware.cpu_threads_bind",
            )
        return self

    def _adapters_consistent(self) -> None:
        engine, adapters = self.engine, self.adapters
        if taken := sorted(set(adapters.lora_modules) & set(self.model.served_names)):
            raise contradiction(
                f"has {shown(taken[0])}, which is a name of the model itself; give it another",
                "adapters.lora_modules",
            )
        if engine.enable_lora is False and adapters.wanted:
            raise contradiction("is false beside section adapters; drop one", "engine.enable_lora")
        if (engine.max_cpu_loras or engine.max_loras or 1) < (engine.max_loras or 1):
            raise contradiction(
                f"is {engine.max_cpu_loras}, less than engine.max_loras {engine.max_loras}",
                "engine.max_cpu_loras",
            )
        if engine.max_cpu_loras is not None and engine.max_cpu_loras < len(adapters.lora_modules):
            raise contradiction(
                f"is {engine.max_cpu_loras} for {len(adapters.lora_modules)} adapters",
                "engine.max_cpu_loras",
            )

    @property
    def name(self) -> str:
        """The name or path it was loaded by; empty for one made in Python."""
        return self._name

    @property
    def workers(self) -> int:
        """Worker processes of all engines, on CUDA each with a card of its own: TP × PP × DP."""
        engine = self.engine
        each = engine.tensor_parallel_size * engine.pipeline_parallel_size
        return each * engine.data_parallel_size

    @property
    def worker_in_core(self) -> bool:
        """Whether an engine on the CPU computes in its core's process: it has one worker."""
        engine = self.engine
        one = engine.tensor_parallel_size * engine.pipeline_parallel_size == 1
        return one and engine.distributed_executor_backend is None

    @property
    def log_path(self) -> Path:
        """The file that keeps the engine's log; its folder may not exist yet."""
        if self.server.log_file is not None:
            return Path(self.server.log_file).expanduser()
        return _state_folder() / f"serve-{self.server.port}.log"

    def api_keys(self, environ: Mapping[str, str] = os.environ) -> frozenset[str]:
        """Gather the keys of profile, key file and environment; none means an open server.

        Raises ``ProfileError`` when the file cannot be read or a key cannot be sent in a header.
        """
        keys = [key.get_secret_value() for key in self.server.api_keys]
        keys += keys_of_environment(environ)
        if self.server.api_key_file is not None:
            keys += keys_of_file(Path(self.server.api_key_file).expanduser())
        return frozenset(keys)

    @property
    def keys_path(self) -> Path:
        """The file of named keys; it may not exist."""
        if self.server.keys_file is not None:
            return Path(self.server.keys_file).expanduser()
        return default_keys_path()

    @property
    def quota_storage(self) -> str:
        """The address, as ``limits`` reads it, of where uses of keys are counted."""
        if self.server.quota_storage is not None:
            return self.server.quota_storage
        return f"sqlite:///{quote(str(_state_folder().absolute() / 'quotas.sqlite'))}"

    @property
    def batches_path(self) -> Path:
        """The folder of batches; it may not exist yet."""
        if self.batches.folder is not None:
            return Path(self.batches.folder).expanduser()
        return _state_folder() / f"batches-{self.server.port}"

    def engine_args(self) -> dict[str, Any]:
        """Keyword arguments for ``vllm.AsyncEngineArgs``; unset ones are left out."""
        arguments: dict[str, Any] = self.model.model_dump() | self.engine.model_dump()
        arguments |= {
            "model": self.model.path,
            "served_model_name": list(self.model.served_names),
            "hf_overrides": self.model.hf_overrides or None,
            "limit_mm_per_prompt": self.media.limit_mm_per_prompt.model_dump(),
            "mm_processor_kwargs": self._mm_processor_kwargs(),
            "media_io_kwargs": _set_values(self.media.media_io_kwargs.model_dump()) or None,
        }
        if self.adapters.wanted:
            arguments["enable_lora"] = True
        return {name: value for name, value in arguments.items() if value is not None}

    def _mm_processor_kwargs(self) -> dict[str, Any]:
        # Pictures and frames arrive resized; these bounds are what vLLM reserves memory for.
        bounds: dict[str, Any] = {
            "min_pixels": self.media.least_pixels,
            "max_pixels": self.media.most_pixels,
        }
        if self.media.limit_mm_per_prompt.video:
            # Bounds at the top apply to frames as well, unless frames have their own.
            frames = self.media.videos_kwargs
            bounds["videos_kwargs"] = {
                "min_pixels": frames.least_pixels,
                "max_pixels": frames.most_pixels,
            }
        return bounds

    def environment(self) -> dict[str, str]:
        """Variables that vLLM's processes need; set them before ``vllm`` is imported."""
        hardware = self.hardware
        variables: dict[str, str] = {}
        if hardware.cpu_kvcache_gib is not None:
            variables["VLLM_CPU_KVCACHE_SPACE"] = str(hardware.cpu_kvcache_gib)
        if hardware.cpu_threads_bind is not None:
            variables["VLLM_CPU_OMP_THREADS_BIND"] = hardware.cpu_threads_bind
        elif hardware.device == "cpu" and self.workers > 1:
            bind = one_cpu_each if self.engine.data_parallel_size == 1 else equal_shares
            variables["VLLM_CPU_OMP_THREADS_BIND"] = bind(self.workers)
        return variables

    def vllm_command(self) -> list[str]:
        """The words of the ``vllm serve`` line that starts the same engine at the same address.

        API keys are left out, since a command line is public on its machine.
        """
        arguments = self.engine_args()
        words = ["vllm", "serve", arguments.pop("model")]
        server = self.server.model_dump(include={"host", "port", "ssl_certfile", "ssl_keyfile"})
        for name, value in (arguments | _set_values(server)).items():
            option = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{option}" if value else f"--no-{option}")
            elif isinstance(value, list):
                words += [f"--{option}", *value]
            else:
                words += [f"--{option}", value if isinstance(value, str) else json.dumps(value)]
        modules = [f"{name}={path}" for name, path in self.adapters.folders.items()]
        return [*words, "--lora-modules", *modules] if modules else words

    def at_port(self, port: int) -> Profile:
        """The same profile at another port."""
        server = self.server.model_copy(update={"port": port})
        return self.model_copy(update={"server": server}).named(self.name)

    def named(self, name: str) -> Profile:
        """The same profile under another name."""
        copy = self.model_copy()
        copy._name = name
        return copy


def default_keys_path() -> Path:
    """The file of named keys where a profile names no other."""
    config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(config).expanduser() / "qwen2vl-serve" / "keys.json"


def _state_folder() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "qwen2vl-serve"


def _set_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Drop None and what is left empty by that, at every level."""
    kept = {
        key: _set_values(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
    }
    return {key: value for key, value in kept.items() if value is not None and value != {}}
