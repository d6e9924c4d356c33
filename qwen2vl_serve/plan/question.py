"""What is asked of ``plan``: which profile on which cards, from the words of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwen2vl_serve.adapters.named import named_adapters, with_adapters
from qwen2vl_serve.errors import PreflightError
from qwen2vl_serve.machine import hardware
from qwen2vl_serve.machine.hardware import Card, Host
from qwen2vl_serve.plan.architectures import Architecture
from qwen2vl_serve.plan.cards import MOST_CARDS, Machines, card_called, parse_cards
from qwen2vl_serve.plan.environment import cpu_cache_gib
from qwen2vl_serve.plan.source import architecture_of
from qwen2vl_serve.plan.suitable import suitable_profile
from qwen2vl_serve.profile import Profile, load_profile, make_profile

# What a profile of its own starts from: pictures as in the profiles that ship.
_PICTURES = {"limit_mm_per_prompt": {"image": 4}}
_SPLIT = ("engine.tensor_parallel_size", "engine.pipeline_parallel_size")


@dataclass(frozen=True, slots=True)
class Question:
    """A profile, its model's sizes, and the cards; without cards, the ``host`` whose CPU serves.

    ``whence`` says where the cards come from: ``given``, ``found`` here or the ``profile``'s own.
    """

    profile: Profile
    architecture: Architecture
    machines: Machines
    host: Host
    whence: str


def of_profile(name: str, gpus: str | None, overrides: Sequence[str]) -> Question:
    """Ask about a profile on the cards given, else those found here, else its own.

    Raises:
        PreflightError, ProfileError: a profile, model, card or adapter that does not exist, or a
            profile for cards where none is known of.
    """
    profile = load_profile(name, overrides)
    _refuse_more_workers_than_cards_are(profile)
    profile = with_adapters(profile, named_adapters(profile))
    machines, whence = _machines(profile, gpus)
    return Question(profile, architecture_of(profile), machines, hardware.host(), whence)


def of_model(model: str, gpus: str | None, overrides: Sequence[str]) -> Question:
    """Ask about a model by itself: vLLM's defaults, split over all the cards.

    Raises:
        PreflightError, ProfileError: a model or card that does not exist, or no card at all.
    """
    found = parse_cards(gpus) if gpus is not None else Machines(hardware.cards())
    if not found.cards:
        raise PreflightError(
            "--gpus: this machine has no NVIDIA card; say which ones are meant, as --gpus 1x3090"
        )
    values: dict[str, Any] = {
        "model": {"model": model},
        "hardware": {"device": "cuda"},
        "media": dict(_PICTURES),
    }
    asked = make_profile(values, overrides)
    _refuse_more_workers_than_cards_are(asked)
    architecture = architecture_of(asked)
    if not any(override.startswith(_SPLIT) for override in overrides):
        tensor, stages = split_over(architecture, found, replicas=asked.engine.data_parallel_size)
        values["engine"] = {"tensor_parallel_size": tensor, "pipeline_parallel_size": stages}
    profile = make_profile(values, overrides)
    whence = "found" if gpus is None else "given"
    return Question(profile, architecture, found, hardware.host(), whence)


def suitable(gpus: str | None) -> str:
    """Name the profile that ships for the cards given, or for those found here.

    Raises:
        PreflightError: no such card.
    """
    cards = hardware.cards() if gpus is None else parse_cards(gpus).cards
    return suitable_profile(cards, None)


def split_over(
    architecture: Architecture, machines: Machines, *, replicas: int = 1
) -> tuple[int, int]:
    """Return the widest tensor split within a machine that uses all cards, and its stages.

    ``replicas`` share the cards among them; of numbers that cannot be split over, as many cards
    are used as can.
    """
    shape = architecture.shape()
    widest_first = sorted(shape.legal(), reverse=True)
    for count in range(len(machines.cards) // replicas, 0, -1):
        for tensor in widest_first:
            stages, rest = divmod(count, tensor)
            if not rest and tensor <= machines.cards_each and stages <= shape.layers:
                return tensor, stages
    return 1, 1


def _refuse_more_workers_than_cards_are(profile: Profile) -> None:
    if profile.workers > MOST_CARDS:
        engine = profile.engine
        raise PreflightError(
            f"engine.tensor_parallel_size {engine.tensor_parallel_size} × pipeline_parallel_size "
            f"{engine.pipeline_parallel_size} × data_parallel_size {engine.data_parallel_size} = "
            f"{profile.workers} workers; plan counts at most {MOST_CARDS}: lower one of them"
        )


def _machines(profile: Profile, gpus: str | None) -> tuple[Machines, str]:
    on_cpu = profile.hardware.device == "cpu"
    if gpus is not None and on_cpu:
        raise PreflightError(
            f"--gpus {gpus}: hardware.device is cpu, which uses no card; leave out one of them"
        )
    if gpus is not None:
        return parse_cards(gpus), "given"
    found = () if on_cpu else hardware.cards()
    if found:
        return Machines(found), "found"
    own = own_cards(profile)
    if profile.hardware.device == "cuda" and not own:
        raise PreflightError(
            "hardware.device: cuda, and this machine has no NVIDIA card; say which ones are "
            "meant, as --gpus 1x3090, or name them by hardware.card and hardware.card_memory_gib"
        )
    if own:
        return Machines(own), "profile"
    return Machines((), cpu_cache_gib=cpu_cache_gib()), "found"


def own_cards(profile: Profile) -> tuple[Card, ...]:
    """Return the cards that a profile was written for; none where it names none.

    Raises:
        PreflightError: it names cards that nothing is known of.
    """
    wanted = profile.hardware
    if wanted.device != "cuda" or wanted.card is None:
        return ()
    card = card_called(wanted.card, wanted.card_memory_gib)
    return tuple(replace(card, index=index) for index in range(profile.workers))
