"""NVIDIA cards: driver, number, format, free memory, and how they reach each other."""

from __future__ import annotations

import os

from qwen2vl_serve.doctor import software
from qwen2vl_serve.doctor.finding import Finding, fatal, ok, warning
from qwen2vl_serve.doctor.world import World
from qwen2vl_serve.machine import hardware, nvidia
from qwen2vl_serve.plan.suitable import CARD_TOLERANCE
from qwen2vl_serve.profile import Profile

BFLOAT16_CAPABILITY = (8, 0)
# vLLM's wheels hold kernels from Turing on, and the compilers of CUDA 13 make none for older cards.
WHEEL_CAPABILITY, COMPILED_BEFORE = (7, 5), 13
WITHOUT_CARDS = "not needed: this profile runs on the CPU"
# What ends P2P over PCIe, by NCCL's manual; LOC was once written 0.
P2P_OFF = {"NCCL_P2P_DISABLE": ("1",), "NCCL_P2P_LEVEL": ("LOC", "NVL", "0")}


def driver(world: World) -> Finding:
    """Compare the driver with the CUDA version that torch was built for."""
    if not world.on_cards:
        return ok(WITHOUT_CARDS)
    found, built = world.driver, software.torch_cuda()
    if found.fault is not None:
        return fatal(
            f"the NVIDIA driver does not answer: {found.fault}",
            "after an update of the driver, its old half stays in the kernel",
            "`sudo reboot`, or load the kernel module nvidia anew; `nvidia-smi` has to answer",
        )
    if found.cuda is None:
        return warning(
            "no NVIDIA driver",
            "no card can be used",
            "install the driver (`sudo ubuntu-drivers install`, or nvidia.com/drivers); in a "
            "container: `docker run --gpus all`, with the NVIDIA Container Toolkit",
        )
    if built is None and world.build == "cuda" and software.installed("torch") is not None:
        return fatal(
            "torch is a CPU build, and vLLM a CUDA build",
            "vLLM's kernels do not load beside it",
            "`pip install --force-reinstall '.[gpu]'` in the checkout",
        )
    return _compared(found, found.cuda, built)


def _compared(driver: nvidia.Driver, newest: tuple[int, int], built: str | None) -> Finding:
    """Within one major version of CUDA older drivers run newer builds, but for PTX."""
    text = f"driver {driver.version} runs CUDA up to {newest[0]}.{newest[1]}"
    if built is None:
        return ok(text)
    text += f", torch is built for {built}"
    needed = tuple(map(int, (*built.split("."), "0")))[:2]
    if newest[0] < needed[0]:
        return fatal(
            text,
            "torch finds no card: the NVIDIA driver on your system is too old",
            f"update the driver to one for CUDA {needed[0]} (nvidia-smi shows it at the top right)",
        )
    if newest < needed:
        return warning(
            text,
            "kernels that are compiled on the spot fail: PTX was compiled with an unsupported "
            "toolchain",
            f"update the driver to one for CUDA {built}",
        )
    return ok(text)


def cards(world: World) -> Finding:
    """Compare number and size of the cards with what the profile needs."""
    profile, found = world.profile, world.cards
    if not world.on_cards:
        return ok(WITHOUT_CARDS)
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
        if engine.data_parallel_size > 1:
            split += f" × data_parallel_size {engine.data_parallel_size}"
        return fatal(
            f"{_title(profile)} needs {needed} NVIDIA card{'s' * (needed > 1)}{kind}{split}; "
            f"this machine has {hardware.describe(found)}",
            "each worker needs a card of its own",
            "choose another profile (qwen2vl-serve profiles) or try this one on the CPU with "
            "--rehearse",
        )
    wanted = profile.hardware.card_memory_gib
    smallest = min(world.used_cards, key=lambda card: card.memory_gib)
    if wanted is not None and smallest.memory_gib < wanted * CARD_TOLERANCE:
        return fatal(
            f"hardware.card_memory_gib: {_title(profile)} needs {wanted:g} GiB on each card; "
            f"card {smallest.index}, {smallest.name}, has {smallest.memory_gib:.1f}",
            "weights and KV cache will not fit",
            world.advice(profile) or "choose another profile (qwen2vl-serve profiles)",
        )
    return ok(hardware.describe(found))


def dtype(world: World) -> Finding:
    """Compare the cards' compute capability with the profile's number format and with kernels.

    vLLM itself is content with Volta (``supported_dtypes`` in its ``platforms/cuda.py``): it is the
    kernels that a wheel lacks. Only a build of one's own, under CUDA 12, can have them.
    """
    if not world.used_cards:
        return ok(WITHOUT_CARDS if not world.on_cards else "no card to compare with")
    profile = world.profile
    oldest = min(world.used_cards, key=lambda card: card.capability)
    capability = "{}.{}".format(*oldest.capability)
    if profile.model.dtype == "bfloat16" and oldest.capability < BFLOAT16_CAPABILITY:
        return fatal(
            f"model.dtype: bfloat16 needs compute capability 8.0; card {oldest.index}, "
            f"{oldest.name}, has {capability}",
            "vLLM refuses it",
            "set model.dtype=half",
        )
    if oldest.capability < WHEEL_CAPABILITY:
        found = f"card {oldest.index}, {oldest.name}, has compute capability {capability}"
        mend = "take a card of 7.5 or newer, or build torch and vLLM from source for it, on CUDA 12"
        built = software.torch_cuda()
        if built is None or int(built.partition(".")[0]) >= COMPILED_BEFORE:
            why = "vLLM's wheels have no kernels below 7.5: no kernel image is available"
            return fatal(found, why, mend)
        why = "vLLM's wheels have no kernels below 7.5, and a build of one's own none for AWQ"
        return warning(f"{found}, and torch is built for CUDA {built}", why, mend)
    return ok(f"{profile.model.dtype} at compute capability {capability}")


def gpu_memory(world: World) -> Finding:
    """Compare each card's free memory with what vLLM will ask for, and name who holds the rest."""
    if not world.used_cards:
        return ok(WITHOUT_CARDS if not world.on_cards else "no card to look at")
    utilization = world.utilization
    fullest = min(world.used_cards, key=lambda card: card.free_gib / card.memory_gib)
    asked = fullest.memory_gib * utilization
    if fullest.free_gib >= asked:
        return ok(f"{fullest.free_gib:.1f} GiB or more free on each card")
    holding = "; ".join(map(str, nvidia.holders(fullest.index)[:3]))
    share = int(fullest.free_gib / fullest.memory_gib * 100 - 1) / 100
    lower = f"set engine.gpu_memory_utilization={share:.2f}" if share > 0 else "take another card"
    return fatal(
        f"card {fullest.index}, {fullest.name}, has {fullest.free_gib:.1f} of "
        f"{fullest.memory_gib:.1f} GiB free, engine.gpu_memory_utilization {utilization:g} asks "
        f"for {asked:.1f}. Held by: {holding or 'nobody that this user or container can see'}",
        "vLLM refuses to start: free memory is less than desired GPU memory utilization",
        f"stop that program or {lower}",
    )


def p2p(world: World) -> Finding:
    """See which cards cannot read each other's memory, and that NCCL is told so."""
    if len(world.used_cards) < 2:
        return ok("not needed: one card or none")
    each = world.profile.workers // world.profile.engine.data_parallel_size
    if each == 1:
        return ok("not needed: one card an engine")
    # Engines have nothing to tell each other.
    engines = {card.index: place // each for place, card in enumerate(world.used_cards)}
    pairs = [(a, b) for a, b in nvidia.apart(list(engines)) if engines[a] == engines[b]]
    if not pairs:
        return ok(f"{len(world.used_cards)} cards reach each other")
    told = next((name for name, off in P2P_OFF.items() if os.environ.get(name) in off), None)
    disabled = world.profile.engine.disable_custom_all_reduce is True
    cards = "{} and {}".format(*pairs[0])
    found = f"cards {cards} cannot read each other's memory (P2P)"
    if len(pairs) > 1:
        found += f", nor can {len(pairs) - 1} other pairs"
    mends = [] if told else ["`export NCCL_P2P_DISABLE=1`"]
    mends += [] if disabled else ["set engine.disable_custom_all_reduce=true"]
    if mends:
        return warning(
            found,
            "consumer cards often say otherwise when asked: NCCL then hangs at start, or "
            "answers are wrong",
            " and ".join(mends),
        )
    return ok(f"{found}; {told} is set and custom all-reduce is off")


def _title(profile: Profile) -> str:
    return f"profile {profile.name}" if profile.name else "this profile"
