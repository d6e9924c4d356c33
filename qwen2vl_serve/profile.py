"""Deployment profiles: which model, on which cards, within which limits.

A profile is a YAML file with the sections of ``profile_sections`` and ``profile_media``; it is
immutable once loaded.
Nothing here imports vLLM: ``engine_args`` returns plain values.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from pydantic import Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import ErrorDetails

from qwen2vl_serve.api_keys import keys_of_environment, keys_of_file
from qwen2vl_serve.errors import ProfileError
from qwen2vl_serve.profile_adapters import AdaptersSection
from qwen2vl_serve.profile_media import FilesSection, MediaSection
from qwen2vl_serve.profile_sections import (
    BatchesSection,
    EngineSection,
    HardwareSection,
    LimitsSection,
    ModelSection,
    OverflowSection,
    Section,
    ServerSection,
    Text,
    contradiction,
)
from qwen2vl_serve.profile_yaml import Document, KeyPath, dotted, parse_yaml, read_yaml, shown

DEMO_PROFILE = "demo"
SECRETS = frozenset({("server", "api_keys"), ("media", "proxy")})
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


def profiles_folder() -> Path:
    """The folder of the profiles that ship: within the package, or the checkout's ``deploy``."""
    package = Path(__file__).parent
    packaged = package / "profiles"
    return packaged if packaged.is_dir() else package.parent / "deploy" / "profiles"


def profile_names() -> list[str]:
    """Names of the profiles that ship, sorted."""
    return sorted(path.stem for path in profiles_folder().glob("*.yaml"))


def load_profile(name_or_path: str, overrides: Sequence[str] = ()) -> Profile:
    """Load a profile that ships by its name, or any by the path of its YAML file.

    ``overrides`` are ``section.field=VALUE`` with a YAML value, or ``model=…``, ``host=…``,
    ``port=…`` as plain text; later ones win. Raises ``ProfileError`` in one line naming where
    the fault stands, the key, the value given and, for an unknown key, the nearest valid one.
    """
    document = read_yaml(_find(name_or_path))
    if document.values is None:
        document = Document(document.source, {})
    if not isinstance(document.values, dict):
        raise ProfileError(f"{document.source}: must hold the sections {_sections()}")
    return _resolved(document, overrides).named(name_or_path)


def make_profile(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Profile:
    """Make a profile without a file, from plain values and ``overrides`` as of ``load_profile``."""
    return _resolved(Document("the profile", copy.deepcopy(dict(values))), overrides)


def _resolved(document: Document, overrides: Sequence[str]) -> Profile:
    for override in overrides:
        _override(document, override)
    try:
        return Profile.model_validate(document.values)
    except ValidationError as error:
        raise ProfileError(_explain(error.errors(), document)) from None


def section_of(name: str) -> str | None:
    """Name the section that has a field of this name."""
    for section, field in Profile.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section) and name in inner.model_fields:
            return section
    return None


def one_cpu_each(workers: int) -> str:
    """Bind each worker to one of the CPUs that this process may use, in turn: ``0|1|0|1``."""
    cpus = _cpus()
    return "|".join(str(cpus[worker % len(cpus)]) for worker in range(workers))


def equal_shares(workers: int) -> str:
    """Bind each worker to as many CPUs as the others: ``0,1|2,3``; one in turn if they are few."""
    cpus = _cpus()
    each = len(cpus) // workers
    if each == 0:
        return one_cpu_each(workers)
    shares = [cpus[worker * each : (worker + 1) * each] for worker in range(workers)]
    return "|".join(",".join(map(str, share)) for share in shares)


def _cpus() -> list[int]:
    """The CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _find(name_or_path: str) -> Path:
    names = profile_names()
    if name_or_path in names:
        return profiles_folder() / f"{name_or_path}.yaml"
    if name_or_path.endswith((".yaml", ".yml")) or os.sep in name_or_path:
        return Path(name_or_path).expanduser()
    raise ProfileError(
        f"no profile is named {shown(name_or_path)}{_nearest(name_or_path, names)}; there are "
        f"{', '.join(names)}, or give the path of a .yaml file"
    )


def _override(document: Document, override: str) -> None:
    """Write ``section.field=VALUE`` into the document."""
    key, equals, text = override.partition("=")
    if not equals:
        raise ProfileError(f"--set {shown(override)}: must be section.field=value")
    if key in BARE_OVERRIDES:
        source, key = f"--{key}", BARE_OVERRIDES[key]
        number = key == BARE_OVERRIDES["port"] and text.isascii() and text.isdigit()
        value: Any = int(text[:9]) if number else text
    else:
        source = "--set"
        value = parse_yaml(text, f"{source} {shown(key)}").values
    path: KeyPath = tuple(key.split("."))
    target = document.values
    for part in path[:-1]:
        inner = target.get(part)
        if inner is None:
            inner = target[part] = {}
        if not isinstance(inner, dict):
            raise ProfileError(f"{source}: {part} is a value, not a section")
        target = inner
    target[path[-1]] = value
    for known in [known for known in document.places if known[: len(path)] == path]:
        del document.places[known]
    document.places[path] = source


def _explain(errors: Iterable[ErrorDetails], document: Document) -> str:
    """Put pydantic's first error into one line."""
    first, *others = errors
    path: KeyPath = tuple(first["loc"])
    kind = first["type"]
    if kind == "contradiction":
        path = tuple(str(first["ctx"]["at"]).split("."))
        problem = first["msg"]
    elif kind == "extra_forbidden":
        return f"{document.place(path)}: unknown key {dotted(path)}{_whereabouts(path)}"
    elif kind == "missing":
        problem = "is required"
    elif kind == "model_type":
        problem = f"must be a section of keys and values, is {shown(first['input'])}"
    elif kind == "unusable_key":
        problem = first["msg"]
    else:
        problem = re.sub(r"^\w+ should", "must", first["msg"])
        if kind == "string_pattern_mismatch":
            problem = "must be one line without control characters"
        if path[:2] not in SECRETS:  # an error may be logged; a key must not
            problem += f", is {shown(first['input'])}"
    rest = f" (and {len(others)} more)" if others else ""
    return f"{document.place(path)}: {dotted(path)} {problem}{rest}"


def _whereabouts(path: KeyPath) -> str:
    """Say which valid key an unknown one may have meant."""
    model = _model_at(path[:-1])
    name = str(path[-1]).replace("-", "_")
    if model is None:
        return ""
    fields = list(model.model_fields)
    if nearest := _nearest(name, fields):
        return nearest
    if section := section_of(name):
        return f"; it belongs to section {section}"
    return f"; there are {', '.join(fields)}"


def _model_at(path: KeyPath) -> type[Section] | None:
    model: type[Section] = Profile
    for part in path:
        inner = model.model_fields[str(part)].annotation
        if not (isinstance(inner, type) and issubclass(inner, Section)):
            return None
        model = inner
    return model


def _nearest(name: str, names: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _sections() -> str:
    return ", ".join(name for name in Profile.model_fields if name != "description")


def _set_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Drop None and what is left empty by that, at every level."""
    kept = {
        key: _set_values(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
    }
    return {key: value for key, value in kept.items() if value is not None and value != {}}
