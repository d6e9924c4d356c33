"""Python, clock, shared memory, limits, memory and proxies of this machine."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from urllib.request import (  # type: ignore[attr-defined]  # typeshed lacks the second
    getproxies_environment,
    proxy_bypass_environment,
)

from packaging.specifiers import SpecifierSet
from pydantic import SecretStr

from qwen2vl_serve.doctor.finding import Finding, fatal, ok, refused, warning
from qwen2vl_serve.doctor.world import World
from qwen2vl_serve.errors import PreflightError, ProfileError
from qwen2vl_serve.machine import hardware
from qwen2vl_serve.plan import plan_for
from qwen2vl_serve.plan.assessment import host_weights
from qwen2vl_serve.plan.cards import Machines
from qwen2vl_serve.plan.deployment import cache_size
from qwen2vl_serve.plan.environment import cpu_cache_gib
from qwen2vl_serve.plan.processes import process_bytes, shares_bytes
from qwen2vl_serve.profile import Profile
from qwen2vl_serve.profile.media import proxy_variable

DISTRIBUTION = "qwen2vl-serve"
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # not a file of ours: the system's own place
INFINIBAND = Path("/sys/class/infiniband")
MEMORY_NODES = Path("/sys/devices/system/node")
MIB = 1024**2
# vLLM 0.32 maps a ring of 10 × 16 MiB for requests, and one of 10 × 24
# MiB for each worker's answers (multiproc_executor.py, shm_broadcast.py).
RING_MIB, WORKER_RING_MIB = 160, 240
OPEN_FILES = 4096
# This program is younger, and so is every certificate that a hub shows today.
YOUNGER_THAN = datetime(2026, 1, 1, tzinfo=UTC)
DAY = 24 * 3600


def python(_: World) -> Finding:
    """See that this Python is one that the packages are built and tested for."""
    version = platform.python_version()
    try:
        wanted = metadata.metadata(DISTRIBUTION)["Requires-Python"]
    except metadata.PackageNotFoundError:
        return warning(
            f"Python {version}; {DISTRIBUTION} runs without being installed",
            "its tested versions are not known here, and its entry points are missing",
            "`pip install -e .` in the checkout",
        )
    if version not in SpecifierSet(wanted, prereleases=True):
        return fatal(
            f"Python {version} at {sys.executable} is outside {wanted}",
            "vLLM and torch have no build for it",
            "`python3.11 -m venv .venv`, and install into that",
        )
    return ok(f"Python {version}")


def clock(world: World) -> Finding:
    """Compare the date with the age of the files around."""
    now = time.time()
    files = [Path(__file__), *([world.folder / "config.json"] if world.folder else [])]
    newest = max((file.stat().st_mtime for file in files if file.exists()), default=now)
    date = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M UTC")
    if now < YOUNGER_THAN.timestamp() or newest > now + DAY:
        return warning(
            f"the clock says {date}, which files on this disk are younger than",
            "certificates seem not yet valid: pictures by HTTPS and downloads fail",
            "`sudo timedatectl set-ntp true` (in a virtual machine: on its host)",
        )
    return ok(date)


def shared_memory(world: World) -> Finding:
    """See that workers find room to talk to each other in."""
    if not os.access(SHARED_MEMORY, os.W_OK):
        return fatal(
            f"{SHARED_MEMORY} is missing or cannot be written",
            "Python's processes cannot share semaphores without it, and vLLM starts several",
            "`mount -t tmpfs tmpfs /dev/shm`; in a container: `docker run --ipc=host`",
        )
    free = shutil.disk_usage(SHARED_MEMORY).free / MIB
    workers = world.profile.workers
    if workers == 1:
        return ok(f"{free:.0f} MiB free in {SHARED_MEMORY}")
    needed = RING_MIB + WORKER_RING_MIB * workers
    found = f"{free:.0f} MiB free in {SHARED_MEMORY}; vLLM maps {needed} for {workers} workers"
    if free < needed:
        return warning(
            found,
            "a worker that writes beyond it dies with a bus error, often at the first picture, "
            "and NCCL hangs or fails",
            "`docker run --ipc=host` or `--shm-size=8g`; on the host: "
            "`mount -o remount,size=8G /dev/shm`",
        )
    return ok(found)


def limits(world: World) -> Finding:
    """See that the system lets this process open files and lock memory."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if files != resource.RLIM_INFINITY and files < OPEN_FILES:
        return warning(
            f"at most {files} open files (ulimit -Hn)",
            "each client and each file being fetched takes one; further clients are refused",
            f"`LimitNOFILE=65536` in the unit, `docker run --ulimit nofile=65536`, or "
            f"`ulimit -n {OPEN_FILES}` as root",
        )
    over_infiniband = world.on_cards and world.profile.workers > 1 and INFINIBAND.is_dir()
    if over_infiniband and locked != resource.RLIM_INFINITY:
        return warning(
            f"at most {locked // 1024} KiB of locked memory (ulimit -l)",
            "NCCL registers its buffers with InfiniBand, which needs locked memory",
            "`docker run --ulimit memlock=-1`, or `LimitMEMLOCK=infinity` in the unit",
        )
    many = "unlimited" if files == resource.RLIM_INFINITY else str(files)
    return ok(f"{many} open files")


def memory(world: World) -> Finding:
    """See that the system has what a server on the CPU will take, by the plan's own figures.

    Source: ``v1/worker/cpu_worker.py``. A worker whose KV cache has no size takes
    ``gpu_memory_utilization`` of its memory node, and stops where that is not free.
    """
    try:
        machines = Machines((), cpu_cache_gib=cpu_cache_gib())
    except PreflightError as error:
        return refused(error, "every process of vLLM reads it, and ends at it")
    if world.on_cards:
        return ok("not needed: this profile runs on cards")
    profile, host = world.profile, hardware.host()
    field, each = cache_size(profile, machines.cpu_cache_gib, on_cards=False)
    if each is None:
        return _share(world, host, machines)
    workers, cache = profile.workers, each / hardware.GIB
    weights = _weights(profile, host, machines)
    engines, in_core = profile.engine.data_parallel_size, profile.worker_in_core
    processes = process_bytes(workers, engines, in_core=in_core) / hardware.GIB
    parts = (
        f"{workers} × {cache:g} GiB of KV cache, {weights:.1f} GiB of weights and "
        f"{processes:.1f} GiB of processes"
    )
    if cache * workers + weights + processes > host.available_gib:
        smaller = "take a smaller model, or set model.dtype=bfloat16"
        return fatal(
            f"{field}: {parts} are asked for and {host.available_gib:.1f} GiB of memory are free",
            "vLLM refuses to start, or the system kills it",
            f"{smaller if weights > cache * workers else 'lower it'}, or stop other programs",
        )
    return ok(f"{host.available_gib:.1f} GiB free for {parts}; the cache's are of {field}")


def _share(world: World, host: hardware.Host, machines: Machines) -> Finding:
    profile = world.profile
    workers, engines = profile.workers, profile.engine.data_parallel_size
    nodes = len(list(MEMORY_NODES.glob("node[0-9]*"))) or 1
    each = host.memory_gib / nodes * world.utilization
    share, in_core = each * hardware.GIB, profile.worker_in_core
    taken = shares_bytes(share, workers, engines, in_core=in_core) / hardware.GIB
    found = (
        f"{host.available_gib:.1f} GiB of memory are free, {workers} × {each:.1f} are taken, "
        f"{taken:.1f} with the server's processes"
    )
    if taken > host.available_gib:
        return fatal(
            f"engine.gpu_memory_utilization: {found}, {world.utilization:g} of the memory by each "
            "worker",
            "vLLM refuses to start (less than desired CPU memory utilization), or the system "
            "kills it",
            "set hardware.cpu_kvcache_gib, or lower engine.gpu_memory_utilization",
        )
    weights = _weights(profile, host, machines)
    if weights > each * workers:
        return fatal(
            f"engine.gpu_memory_utilization: {found}, and the weights alone are {weights:.1f}",
            "vLLM refuses to start: nothing is left for the KV cache",
            "take a smaller model, set model.dtype=bfloat16, or raise it",
        )
    return ok(found)


def _weights(profile: Profile, host: hardware.Host, machines: Machines) -> float:
    """Return the GiB of all CPU workers' weights as planned; 0 where the model is not known."""
    try:
        plan = plan_for(profile, machines, host=host, ask_hub=False)
    except PreflightError:
        return 0.0
    return host_weights(plan.deployment, plan.stages) / hardware.GIB


def proxy(world: World) -> Finding:
    """See that media's proxy is one, and that clients on this machine do not ask a proxy for it."""
    if (stopped := _unusable(world.profile.media.proxy)) is not None:
        return stopped
    server = world.profile.server
    proxies = getproxies_environment()
    scheme = "https" if server.ssl_certfile else "http"
    kind = next((kind for kind in (scheme, "all") if kind in proxies), None)
    if kind is None:
        return ok("no proxy between this machine's clients and the server")
    variable = proxy_variable(kind, os.environ)
    everywhere = server.host in ("0.0.0.0", "::", "localhost")  # noqa: S104  # compared only
    names = ["localhost", "127.0.0.1"] if everywhere else [server.host]
    missing = [name for name in names if not proxy_bypass_environment(name, proxies)]
    if missing:
        hosts = ",".join(dict.fromkeys(["localhost", "127.0.0.1", *missing]))
        return warning(
            f"{variable} is set and NO_PROXY lacks {', '.join(missing)}",
            "curl, requests and openai on this machine ask the proxy for the server, and get 502 "
            "or 503",
            f"`export NO_PROXY={hosts} no_proxy={hosts}`",
        )
    asked = world.profile.media.proxy is not None
    through = "as media.proxy says" if asked else "without it"
    return ok(f"{variable}, and NO_PROXY spares {', '.join(names)}; media are fetched {through}")


def _unusable(word: SecretStr | None) -> Finding | None:
    """Read the proxy as the server will once vLLM is imported; its address is not repeated."""
    try:
        from qwen2vl_serve.media.proxies import Proxies  # noqa: PLC0415 -- not in the base install
    except ImportError:
        return None  # the check ``versions`` says so
    try:
        Proxies(None if word is None else word.get_secret_value())
    except ProfileError as error:
        return refused(error, "no picture or video could be fetched")
    return None
