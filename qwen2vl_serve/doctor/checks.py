"""All checks, in the order in which they are made and told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from qwen2vl_serve.doctor import (
    adapter,
    cards,
    disk,
    fit,
    machine,
    model,
    server,
    software,
    tokens,
)
from qwen2vl_serve.doctor.finding import Finding, warning
from qwen2vl_serve.doctor.world import World

Check = Callable[[World], Finding]

CHECKS: tuple[Check, ...] = (
    machine.python,
    server.keys,
    server.certificate,
    server.address,
    server.log,
    server.uploads,
    cards.driver,
    cards.cards,
    cards.dtype,
    software.vllm,
    software.versions,
    software.torchvision,
    software.libnuma,
    machine.memory,
    cards.gpu_memory,
    cards.p2p,
    machine.shared_memory,
    machine.limits,
    machine.clock,
    machine.proxy,
    model.model,
    disk.disk,
    model.config,
    model.processor,
    tokens.tokens,
    model.weights,
    model.quantisation,
    model.split,
    fit.fit,
    adapter.adapter,
)
"""Each is known by its function's name, in the output and in ``docs/doctor.md``."""


def examine(world: World) -> Iterator[Finding]:
    """Make every check in turn; only the profile's port and folder for uploads are tried."""
    for check in CHECKS:
        try:
            finding = check(world)
        except OSError as error:
            finding = warning(
                f"cannot be looked at: {error}",
                "this check says nothing",
                "give this user the right to read it",
            )
        yield replace(finding, check=check.__name__)
