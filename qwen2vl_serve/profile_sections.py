"""The sections of a profile; keys are vLLM's own parameter names, without aliases.

Every field has a description and an effect: ``docs/profiles.md`` is held against them by a test.
"""

from __future__ import annotations

import re
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from qwen2vl_serve.api_keys import API_KEY_VARIABLE, usable_key

DEMO_MODEL = "demo"
DEMO_MODEL_FOLDER = Path(__file__).parent / "demo" / "model"

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
KVCacheDType = Literal["auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"]


ImageFormat = Literal["JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", "AVIF", "HEIC"]


def _as_list(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]+$")]
Names = Annotated[tuple[Text, ...], Field(strict=False, min_length=1), BeforeValidator(_as_list)]
Positive = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=1, le=65535)]


class Section(BaseModel):
    """Strict, immutable and closed: no coercion, no unknown key, no NaN."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


def _refuse_bad_bounds(bounds: MediaSection | VideoPixels, section: str) -> None:
    if bounds.min_pixels > bounds.max_pixels:
        raise contradiction(
            f"is {bounds.min_pixels}, above max_pixels {bounds.max_pixels}; lower one or raise "
            "the other",
            f"{section}.min_pixels",
        )
    if bounds.least_pixels > bounds.min_pixels:
        raise contradiction(
            f"is {bounds.least_pixels}, above min_pixels {bounds.min_pixels}; lower it",
            f"{section}.client_min_pixels",
        )
    if bounds.most_pixels < bounds.max_pixels:
        raise contradiction(
            f"is {bounds.most_pixels}, below max_pixels {bounds.max_pixels}; raise it",
            f"{section}.client_max_pixels",
        )


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
        "`pipeline_parallel_size`.",
    )
    card: Text | None = Field(
        default=None,
        description="Name of the card, as `RTX 3090`; shown where cards do not suffice.",
    )
    card_memory_gib: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Memory that each card must have, in GiB; 5 % less is accepted."
    )
    cpu_kvcache_gib: Positive | None = Field(
        default=None,
        description="KV cache of each CPU worker in whole GiB (`VLLM_CPU_KVCACHE_SPACE`). Unset: "
        "vLLM takes its share of the memory.",
    )
    cpu_threads_bind: Text | None = Field(
        default=None,
        description="CPUs of each CPU worker, as `0-3|4-7` (`VLLM_CPU_OMP_THREADS_BIND`). Unset: "
        "vLLM decides for one worker; several get one CPU each, in turn.",
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
    distributed_executor_backend: Literal["mp", "ray"] | None = Field(
        default=None,
        description="How workers are started. Unset: vLLM chooses, `mp` on one machine.",
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
    kv_cache_dtype: KVCacheDType | None = Field(
        default=None, description="Number format of the KV cache. Unset: `auto`, the model's own."
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
    seed: int | None = Field(
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
    ssl_certfile: Text | None = Field(
        default=None, description="PEM file of the certificate chain; turns HTTPS on."
    )
    ssl_keyfile: Text | None = Field(
        default=None, description="PEM file of the certificate's key. Unset: within `ssl_certfile`."
    )
    shutdown_timeout: Annotated[float, Field(ge=0)] = Field(
        default=30.0, description="Seconds that running answers are given to finish on SIGTERM."
    )
    boot_stall_seconds: Annotated[float, Field(gt=0)] = Field(
        default=120.0,
        description="A start whose log stays silent for so long is reported with its phase and "
        "what that usually means; again after twice, four times … the time.",
    )
    log_file: Text | None = Field(
        default=None,
        description="File that keeps the engine's whole log. Unset: `serve-PORT.log` in "
        "`$XDG_STATE_HOME/qwen2vl-serve` (`~/.local/state/qwen2vl-serve`).",
    )

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


class MediaLimits(Section):
    """How many of each kind one request may hold; what is not named is refused."""

    image: Annotated[int, Field(ge=0, le=512)] = Field(
        default=0, description="Most pictures a request."
    )
    video: Annotated[int, Field(ge=0, le=64)] = Field(
        default=0, description="Most videos a request."
    )


class VideoIO(Section):
    """How frames are taken from a video."""

    fps: Annotated[float, Field(gt=0, le=30)] | None = Field(
        default=None,
        description="Frames taken a second, where a request says nothing. Unset: 2.",
    )
    num_frames: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="Most frames that the model sees of one video. Unset: 768, as qwen-vl-utils.",
    )


class MediaIO(Section):
    """How media are decoded, by kind."""

    video: VideoIO = Field(default=VideoIO(), description="Sampling of frames.")


class VideoPixels(Section):
    """Bounds of one frame; the defaults are those of qwen-vl-utils."""

    min_pixels: Positive = Field(
        default=128 * 28 * 28,
        description="Smaller frames are enlarged to about this many pixels.",
    )
    max_pixels: Positive = Field(
        default=768 * 28 * 28,
        description="Larger frames are reduced to at most this many pixels; two frames of "
        "28 × 28 pixels become one token.",
    )
    client_min_pixels: Positive | None = Field(
        default=None,
        description="Least that a request's own fields may ask of a frame. Unset: `min_pixels`.",
    )
    client_max_pixels: Positive | None = Field(
        default=None,
        description="Most that a request's own fields may ask of a frame. Unset: `max_pixels`.",
    )
    total_pixels: Positive = Field(
        default=int(128_000 * 28 * 28 * 0.9),
        description="Most pixels that all frames of one video share; many frames are reduced so "
        "far, but not below 1.05 × `min_pixels` each.",
    )

    @property
    def least_pixels(self) -> int:
        """Lower bound of a frame's pixels, whatever a request asks for."""
        return self.min_pixels if self.client_min_pixels is None else self.client_min_pixels

    @property
    def most_pixels(self) -> int:
        """Upper bound of a frame's pixels, whatever a request asks for."""
        return self.max_pixels if self.client_max_pixels is None else self.client_max_pixels

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        _refuse_bad_bounds(self, "media.videos_kwargs")
        return self


class MediaSection(Section):
    """Pictures and videos."""

    limit_mm_per_prompt: MediaLimits = Field(
        default=MediaLimits(image=1),
        description="Most media a request; a kind that is not named is limited to 0.",
    )
    min_pixels: Positive = Field(
        default=4 * 28 * 28,
        description="Smaller pictures are enlarged to about this many pixels.",
    )
    max_pixels: Positive = Field(
        default=1280 * 28 * 28,
        description="Larger pictures are reduced to at most this many pixels; "
        "28 × 28 pixels become one token.",
    )
    client_min_pixels: Positive | None = Field(
        default=None,
        description="Least that a request's own pixel fields may ask for. Unset: `min_pixels`.",
    )
    client_max_pixels: Positive | None = Field(
        default=None,
        description="Most that a request's own pixel fields may ask for; vLLM reserves memory for "
        "it. Unset: `max_pixels`.",
    )
    max_image_pixels: Positive = Field(
        default=100_000_000,
        description="Largest picture that is decoded, in pixels of the file.",
    )
    max_video_bytes: Positive = Field(
        default=64 * 1024 * 1024,
        description="Largest video in bytes, from wherever it comes; of a list, its frames' sum.",
    )
    max_video_frames: Positive = Field(
        default=18_000, description="Longest video that is decoded, in frames of the file."
    )
    max_video_pixels: Positive = Field(
        default=4096 * 2304,
        description="Largest video that is decoded, in pixels of one frame of the file.",
    )
    video_decode_seconds: Annotated[float, Field(gt=0)] = Field(
        default=30.0, description="Time for decoding one video."
    )
    max_decoding_pixels: Positive = Field(
        default=400_000_000,
        description="Pixels of files that are decoded at once over all requests, about three bytes "
        "of memory each; further ones wait.",
    )
    fast_decode: bool = Field(
        default=False,
        description="Decode JPEGs at the nearest of 1/2, 1/4 and 1/8 of their size that is not "
        "below the model's: faster, but no longer the reference's pixels to the bit.",
    )
    max_download_bytes: Positive = Field(
        default=32 * 1024 * 1024, description="Largest file that is fetched by URL, in bytes."
    )
    download_seconds: Annotated[float, Field(gt=0)] = Field(
        default=20.0, description="Time for fetching one file, redirects and all."
    )
    allowed_ports: Annotated[tuple[Port, ...], Field(strict=False)] = Field(
        default=(80, 443), description="Ports that URLs may name."
    )
    allowed_domains: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        default=(),
        description="Domains, with their subdomains, that media may be fetched from. Empty: all.",
    )
    denied_domains: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        default=(), description="Domains, with their subdomains, that nothing is fetched from."
    )
    allowed_networks: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        default=(),
        description="Networks in CIDR notation that may be fetched from though they are not "
        "public, as `10.0.0.0/8`; without it no URL reaches this machine or its network.",
    )
    allowed_local_paths: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        default=(),
        description="Folders on the server that `file:///…` addresses may lead into. Empty: none.",
    )
    formats: Annotated[tuple[ImageFormat, ...], Field(strict=False, min_length=1)] = Field(
        default=("JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF", "AVIF", "HEIC"),
        description="Formats of pictures that are taken, as far as the installed Pillow decodes "
        "them; HEIC needs the extra `heif`.",
    )
    max_pdf_pages: Annotated[int, Field(ge=0, le=512)] = Field(
        default=16,
        description="Most pages that one PDF may be shown by, each of them a picture; needs the "
        "extra `pdf`. 0 refuses PDFs.",
    )
    videos_kwargs: VideoPixels = Field(
        default=VideoPixels(), description="Bounds of a video's frames, where videos are allowed."
    )
    media_io_kwargs: MediaIO = Field(default=MediaIO(), description="Decoding of videos.")

    @property
    def least_pixels(self) -> int:
        """Lower bound of a picture's pixels, whatever a request asks for."""
        return self.min_pixels if self.client_min_pixels is None else self.client_min_pixels

    @property
    def most_pixels(self) -> int:
        """Upper bound of a picture's pixels, whatever a request asks for."""
        return self.max_pixels if self.client_max_pixels is None else self.client_max_pixels

    @field_validator("allowed_networks")
    @classmethod
    def _networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            ip_network(network)  # a ValueError here is pydantic's
        return networks

    @field_validator("allowed_local_paths")
    @classmethod
    def _absolute(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        for path in paths:
            if not Path(path).expanduser().is_absolute():
                raise PydanticCustomError(
                    "not_absolute", "must name folders from the root, as /srv/pictures"
                )
        return paths

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        _refuse_bad_bounds(self, "media")
        return self


class FilesSection(Section):
    """Uploads: `POST /v1/files`."""

    max_files: Annotated[int, Field(ge=0)] = Field(
        default=1000,
        description="Most files that are kept; what was unused the longest makes room for new "
        "ones. 0 turns uploads off.",
    )
    max_bytes: Positive = Field(
        default=1024**3, description="Most bytes that all files take together."
    )
    max_file_bytes: Positive = Field(
        default=32 * 1024 * 1024, description="Largest file that is taken, in bytes."
    )
    ttl_seconds: Annotated[float, Field(gt=0)] = Field(
        default=86400.0, description="How long a file is kept, from its last upload."
    )
    folder: Text | None = Field(
        default=None,
        description="Folder that keeps the files from one run of the server to the next; no two "
        "servers may share it. Unset: a temporary folder, removed when the server stops.",
    )

    @model_validator(mode="after")
    def _quota(self) -> Self:
        if self.max_file_bytes > self.max_bytes:
            raise contradiction(
                f"is {self.max_file_bytes}, above max_bytes {self.max_bytes}; lower it",
                "files.max_file_bytes",
            )
        return self


class LimitsSection(Section):
    """What one request may ask for."""

    max_body_bytes: Positive = Field(
        default=64 * 1024 * 1024,
        description="Largest request body in bytes; pictures come as base64.",
    )
    max_media_bytes: Positive = Field(
        default=128 * 1024 * 1024,
        description="Most bytes of all pictures and videos of a request, fetched ones as well.",
    )
    max_media_pixels: Positive = Field(
        default=200_000_000,
        description="Most pixels of all pictures and taken frames of a request, at their own size.",
    )
    max_media_frames: Positive = Field(
        default=1536, description="Most frames taken from all videos of a request."
    )
    max_messages: Positive = Field(default=1000, description="Most messages in one request.")
    overflow: Literal["error", "shrink", "drop_oldest_images"] = Field(
        default="error",
        description="What to do with a request that does not fit into `max_model_len`, unless it "
        "says so itself: refuse it, shrink its pictures, or drop pictures of earlier turns.",
    )
    max_n: Positive = Field(default=8, description="Most answers (`n`) to one request.")
    max_tokens: Positive | None = Field(
        default=None, description="Most tokens of one answer. Unset: what `max_model_len` leaves."
    )
