"""The sections of a profile but for media; keys are vLLM's own parameter names, without aliases.

Every field has a description and an effect: ``docs/profiles.md`` is held against them by a test.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from qwen2vl_serve.profile.api_keys import API_KEY_VARIABLE, usable_key

DEMO_MODEL = "demo"
DEMO_MODEL_FOLDER = Path(__file__).parents[1] / "demo" / "model"

DType = Literal["auto", "half", "float16", "bfloat16", "float", "float32"]
Quantization = Literal[
    "awq", "awq_marlin", "auto_awq", "gptq", "gptq_marlin", "auto_gptq", "compressed-tensors",
    "fp8", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel", "modelopt", "modelopt_fp4",
    "quark", "torchao", "inc", "int8_per_channel_weight_only", "mxfp8",
]  # fmt: skip
LoadFormat = Literal[
    "auto", "hf", "safetensors", "pt", "npcache", "dummy", "fastsafetensors", "runai_streamer",
    "runai_streamer_sharded", "sharded_state", "tensorizer",
]  # fmt: skip
LoRARank = Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]
KVCacheDType = Literal["auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"]


def _as_list(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _as_cpus(value: object) -> object:
    """Return one CPU, which YAML reads as a number, as text."""
    return str(value) if type(value) is int else value


def _as_binding(text: str) -> str:
    """Return what vLLM reads as CPUs of its workers (``utils/ompmultiprocessing.py``)."""
    parts = (part.strip() for part in re.split("[|,]", text))
    spans = [part for part in parts if not part.isdecimal()]
    ends = [re.fullmatch(r"(\d+)-(\d+)", span) for span in spans]
    if text not in ("auto", "nobind") and not all(e and int(e[1]) <= int(e[2]) for e in ends):
        raise PydanticCustomError(
            "binding", "must be auto, nobind, or the CPUs of each worker, as 0-3|4-7 or 0,2|1,3"
        )
    return text


def _as_origin(text: str) -> str:
    """Return what a browser may send as ``Origin``; all else would never match."""
    if text not in ("*", "null") and not _ORIGIN.fullmatch(text):
        raise PydanticCustomError(
            "origin",
            "must be an origin in small letters with its scheme and without a path, as "
            "https://example.com, or *",
        )
    return text


def _as_host(text: str) -> str:
    """Return what can be the name in a header ``Host``; all else would never match."""
    if text != "*" and not _HOST.fullmatch(text):
        raise PydanticCustomError(
            "host", "must be names or addresses without scheme, port and path, as example.com, or *"
        )
    return text


_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9.:_\[\]-]+")
_HOST = re.compile(
    r"\[[0-9A-Fa-f:.]+\]|[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Fa-f:.]*|[A-Za-z0-9._-]*[A-Za-z0-9_-]"
)
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]+$")]
Names = Annotated[tuple[Text, ...], Field(strict=False, min_length=1), BeforeValidator(_as_list)]
Hosts = Annotated[
    tuple[Annotated[Text, AfterValidator(_as_host)], ...],
    Field(strict=False, min_length=1),
    BeforeValidator(_as_list),
]
Origins = Annotated[
    tuple[Annotated[Text, AfterValidator(_as_origin)], ...],
    Field(strict=False, min_length=1),
    BeforeValidator(_as_list),
]
Positive = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=1, le=65535)]


class Section(BaseModel):
    """Strict, immutable and closed: no coercion, no unknown key, no NaN."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


def contradiction(text: str, at: str) -> PydanticCustomError:
    """Say that keys do not agree; ``at`` is the dotted key whose line is to be shown."""
    return PydanticCustomError("contradiction", "{text}", {"text": text, "at": at})


class ModelSection(Section):
    """The checkpoint and how it is read."""

    model: Text = Field(
        description="Folder of a checkpoint, or its name on the hub (`owner/name`); `demo` is "
        "the small model that ships with this package."
    )
    served_model_name: Names | None = Field(
        default=None,
        description="Name or list of names that clients put into `model`; the first is reported. "
        "Unset: the last part of `model`.",
    )
    revision: Text | None = Field(default=None, description="Branch, tag or commit on the hub.")
    tokenizer: Text | None = Field(
        default=None, description="Folder or hub name of another tokenizer. Unset: the model's."
    )
    download_dir: Text | None = Field(
        default=None, description="Folder for downloaded weights. Unset: the hub's own cache."
    )
    dtype: DType = Field(
        default="auto",
        description="Number format of weights and activations; `half` for cards before Ampere "
        "(compute capability below 8.0), which lack bfloat16.",
    )
    quantization: Quantization | None = Field(
        default=None, description="Quantisation method. Unset: what the checkpoint's config says."
    )
    load_format: LoadFormat | None = Field(
        default=None, description="Format of the weight files. Unset: vLLM's `auto`."
    )
    generation_config: Text | None = Field(
        default=None,
        description="Where default sampling values come from: `auto` (the checkpoint), `vllm` "
        "(none) or a folder. Unset: `auto`. Qwen2-VL's own file makes answers nearly greedy.",
    )
    hf_overrides: dict[str, Any] = Field(
        default_factory=dict, description="Values that replace those of the model's config.json."
    )

    @field_validator("served_model_name")
    @classmethod
    def _each_once(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for place, name in enumerate(names or ()):
            if name in (names or ())[:place]:
                raise contradiction(f"has {name!r} twice; keep one", "model.served_model_name")
        return names

    @property
    def path(self) -> str:
        """What vLLM is to load: ``demo`` and ``~`` resolved, anything else as given."""
        if self.model == DEMO_MODEL:
            return str(DEMO_MODEL_FOLDER)
        return str(Path(self.model).expanduser()) if self.model.startswith("~") else self.model

    @property
    def served_names(self) -> tuple[str, ...]:
        """The names that clients may use, at least one."""
        if self.served_model_name is not None:
            return self.served_model_name
        return (re.split(r"[/\\]", self.model.rstrip("/\\"))[-1] or self.model,)


class HardwareSection(Section):
    """What the profile is meant for; checked before vLLM is started."""

    device: Literal["auto", "cuda", "cpu"] = Field(
        default="auto",
        description="`cuda` needs NVIDIA cards and `cpu` vLLM's CPU build; `auto` takes what the "
        "installed vLLM was built for.",
    )
    cards: Positive | None = Field(
        default=None,
        description="Number of cards, on this machine; has to equal `tensor_parallel_size` × "
        "`pipeline_parallel_size` × `data_parallel_size`.",
    )
    card: Text | None = Field(
        default=None,
        description="Name of the card, as `RTX 3090`; shown where cards do not suffice.",
    )
    card_memory_gib: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Memory that each card must have, in GiB; 7 % less is accepted."
    )
    cpu_kvcache_gib: Positive | None = Field(
        default=None,
        description="KV cache of each CPU worker in whole GiB (`VLLM_CPU_KVCACHE_SPACE`). Unset: "
        "vLLM takes its share of the memory.",
    )
    cpu_threads_bind: (
        Annotated[Text, BeforeValidator(_as_cpus), AfterValidator(_as_binding)] | None
    ) = Field(
        default=None,
        description="CPUs of each CPU worker, as `0-3|4-7` (`VLLM_CPU_OMP_THREADS_BIND`). Unset: "
        "vLLM decides for one worker; several get one CPU each, in turn, and several engines "
        "equal shares.",
    )


class EngineSection(Section):
    """vLLM's engine arguments; what is unset keeps vLLM's default."""

    max_model_len: Positive | None = Field(
        default=None,
        description="Longest context in tokens, prompt and answer together. Unset: the model's.",
    )
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="Share of each card's memory that vLLM may use. Unset: 0.92."
    )
    tensor_parallel_size: Positive = Field(
        default=1,
        description="Cards that share each layer; has to divide the heads of text and vision.",
    )
    pipeline_parallel_size: Positive = Field(
        default=1, description="Groups of cards that hold successive layers."
    )
    data_parallel_size: Positive = Field(
        default=1,
        description="Engines with a copy of the model each, on cards or CPUs of their own, behind "
        "one address. One that dies or hangs is started anew while the others serve.",
    )
    distributed_executor_backend: Literal["mp", "ray"] | None = Field(
        default=None,
        description="How workers are started: `mp` on this machine, `ray` on the machines of a Ray "
        "cluster, which need cards, and the model under the same path. Unset: vLLM chooses, `mp` "
        "on one machine; on a CPU an engine's only worker computes in the engine's own process.",
    )
    max_num_seqs: Positive | None = Field(
        default=None, description="Most requests that are computed at the same time."
    )
    max_num_batched_tokens: Positive | None = Field(
        default=None,
        description="Most tokens that one step computes, of all requests together.",
    )
    enforce_eager: bool | None = Field(
        default=None,
        description="Skip compilation and CUDA graphs: a faster start, slower answers.",
    )
    compilation_config: dict[str, Any] | None = Field(
        default=None,
        description="How vLLM compiles and captures CUDA graphs, as in its `--compilation-config`: "
        "`{cudagraph_mode: FULL_DECODE_ONLY}`. Not beside `enforce_eager`, which rules it out.",
    )
    kv_cache_dtype: KVCacheDType | None = Field(
        default=None, description="Number format of the KV cache. Unset: `auto`, the model's own."
    )
    block_size: Literal[16, 32, 64, 128] | None = Field(
        default=None,
        description="Tokens of one block of the KV cache. Only whole blocks of a known beginning "
        "are reused, so short conversations want small ones; CPUs compute multiples of 32 faster. "
        "Unset: 16 on cards, 128 on CPUs.",
    )
    kv_cache_memory_bytes: Positive | None = Field(
        default=None,
        description="KV cache of each worker in bytes, instead of what "
        "`gpu_memory_utilization` leaves.",
    )
    cpu_offload_gb: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="GiB of weights that each card keeps in the host's memory (slow)."
    )
    enable_prefix_caching: bool | None = Field(
        default=None, description="Reuse the KV cache of a prompt's known beginning. Unset: on."
    )
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = Field(
        default=None, description="Seed of the engine; requests may bring their own. Unset: 0."
    )
    disable_custom_all_reduce: bool | None = Field(
        default=None,
        description="Leave all-reduce to NCCL, for cards that cannot reach each other (P2P).",
    )
    mm_processor_cache_gb: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="GiB of processed pictures kept for repeated ones. Unset: 4."
    )
    mm_encoder_tp_mode: Literal["weights", "data"] | None = Field(
        default=None,
        description="Under tensor parallelism, split the vision encoder's `weights` or its "
        "`data`. Unset: `weights`.",
    )
    enable_lora: bool | None = Field(
        default=None,
        description="Start the engine for LoRA adapters. Unset: where section `adapters` asks for "
        "it.",
    )
    max_loras: Positive | None = Field(
        default=None,
        description="Most adapters that are computed in one step; requests for others wait. Unset: "
        "as many as are named, at most 4.",
    )
    max_lora_rank: LoRARank | None = Field(
        default=None,
        description="Largest rank that room is kept for, in each of `max_loras` places. Unset: the "
        "named adapters' largest, rounded up; 16 where others may be loaded later.",
    )
    max_cpu_loras: Positive | None = Field(
        default=None,
        description="Most adapters that are held at once, those still finishing included. Unset: "
        "those that are named, and 8 more where others may be loaded later.",
    )
    fully_sharded_loras: bool | None = Field(
        default=None,
        description="Split both matrices of an adapter over the cards, instead of one of them.",
    )
    enable_tower_connector_lora: bool | None = Field(
        default=None,
        description="Apply adapters to the vision tower as well (vLLM calls it experimental). "
        "Unset: where a named adapter has such parts.",
    )


def shown_storage(address: str) -> str:
    """Return a ``quota_storage`` without user, password and query, which may hold either."""
    if address.startswith("sqlite"):
        return address  # a path
    place, query, rest = address.partition("?")
    if "@" in rest:  # a password with a question mark in it, or a query: nobody can tell
        return f"{address.partition(':')[0]}://…"
    _, at, place = place.rpartition("@")
    return ("…@" if at else "") + place + ("?…" if query else "")


class ServerSection(Section):
    """The HTTP server."""

    host: Text = Field(
        default="127.0.0.1",
        description="Address to listen on; `0.0.0.0` opens the server to the network.",
    )
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=8000, description="TCP port; 0 takes a free one."
    )
    api_keys: Annotated[tuple[SecretStr, ...], Field(strict=False)] = Field(
        default=(),
        description="Keys that clients may send as `Authorization: Bearer …`. With none here, in "
        f"`api_key_file` or in the variable `{API_KEY_VARIABLE}` (comma separated), "
        "every client is served.",
    )
    api_key_file: Text | None = Field(
        default=None,
        description="File with one key a line; empty lines and `#` comments are skipped.",
    )
    keys_file: Text | None = Field(
        default=None,
        description="File of named keys, written by `qwen2vl-serve keys`; read again when it "
        "changes. Unset: `keys.json` in `$XDG_CONFIG_HOME/qwen2vl-serve` "
        "(`~/.config/qwen2vl-serve`), where there is one.",
    )
    quota_storage: Text | None = Field(
        default=None,
        description="Where uses of keys with limits are counted: `redis://…`, `memory://` or "
        "`sqlite:////path`. Unset: an SQLite file in `$XDG_STATE_HOME/qwen2vl-serve`, which "
        "the servers of this user share.",
    )
    allowed_hosts: Hosts | None = Field(
        default=None,
        description="Names that the header `Host` may have; `*` for any. Unset: on a loopback "
        "address any address and any name without a dot, elsewhere any.",
    )
    cors_origins: Origins | None = Field(
        default=None,
        description="Origins whose web pages may use the server from a browser, as "
        "`https://example.com`; `*` for all. Unset: none.",
    )
    ssl_certfile: Text | None = Field(
        default=None, description="PEM file of the certificate chain; turns HTTPS on."
    )
    ssl_keyfile: Text | None = Field(
        default=None, description="PEM file of the certificate's key. Unset: within `ssl_certfile`."
    )
    tools: Literal["off", "experimental"] = Field(
        default="off",
        description="Whether requests may offer functions to the model (`tools`). The family was "
        "not trained for it, hence `experimental`.",
    )
    shutdown_timeout: Annotated[float, Field(ge=0)] = Field(
        default=30.0, description="Seconds that running answers are given to finish on SIGTERM."
    )
    boot_stall_seconds: Annotated[float, Field(gt=0)] = Field(
        default=120.0,
        description="A start whose log stays silent for so long is reported with its phase and "
        "what that usually means; again after twice, four times … the time.",
    )
    hang_seconds: Annotated[float, Field(ge=0)] = Field(
        default=60.0,
        description="How long the engine may have work and not move before it counts as hung. 0: "
        "for ever.",
    )
    probe_seconds: Annotated[float, Field(ge=0)] = Field(
        default=60.0,
        description="An engine that was idle for so long is asked for one token, so that its "
        "failure is noticed before a client comes. 0: never.",
    )
    exit_on_hang: bool = Field(
        default=True,
        description="End with status 1 when the engine hangs, for a supervisor to start anew; "
        "otherwise only readiness turns red, until it moves again. Of several engines one that "
        "hangs is started anew by itself.",
    )
    log_format: Literal["console", "json"] = Field(
        default="console",
        description="Lines on standard output, one a request: for eyes, or JSON objects.",
    )
    log_file: Text | None = Field(
        default=None,
        description="File that keeps the engine's whole log; no two servers may share it. Unset: "
        "`serve-PORT.log` in `$XDG_STATE_HOME/qwen2vl-serve` (`~/.local/state/qwen2vl-serve`).",
    )

    @property
    def quota_storage_is_secret(self) -> bool:
        """Whether ``quota_storage`` has a user or a password in it."""
        storage = self.quota_storage
        return storage is not None and shown_storage(storage) != storage

    @field_serializer("quota_storage", when_used="json-unless-none")
    def _without_password(self, storage: str) -> str:
        return shown_storage(storage)

    @field_validator("api_keys")
    @classmethod
    def _usable_keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for number, key in enumerate(keys, 1):
            if not usable_key(key.get_secret_value()):
                raise PydanticCustomError(
                    "unusable_key",
                    "key {number} has to be printable ASCII without spaces",
                    {"number": number},
                )
        return keys

    @model_validator(mode="after")
    def _certificate(self) -> Self:
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise contradiction("needs server.ssl_certfile beside it", "server.ssl_keyfile")
        return self
