"""What the checks look at: a profile and this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qwen2vl_serve.checkpoints import checkpoint, hubs
from qwen2vl_serve.errors import SetupError
from qwen2vl_serve.machine import hardware, nvidia
from qwen2vl_serve.machine.installed import Build
from qwen2vl_serve.plan.advice import advice
from qwen2vl_serve.plan.configuration import unpacked
from qwen2vl_serve.plan.source import of_config
from qwen2vl_serve.profile import Profile

Advice = Callable[[Profile], str | None]
"""Says what to change in a profile that does not fit into memory; None when it knows nothing."""

DEFAULT_UTILIZATION = 0.92
"""vLLM 0.32's ``gpu_memory_utilization`` where a profile sets none."""


@dataclass(frozen=True)
class World:
    """A profile on this machine; what several checks need of the machine is read once.

    ``build`` is the vLLM that is installed, None for none. ``adapter`` is a folder of a LoRA
    that is to be served with the model.
    """

    profile: Profile
    build: Build | None
    adapter: Path | None = None
    advice: Advice = advice

    @property
    def on_cards(self) -> bool:
        """Whether this profile, with this vLLM, runs on NVIDIA cards."""
        device = self.profile.hardware.device
        return device == "cuda" or (device == "auto" and self.build == "cuda")

    @cached_property
    def cards(self) -> tuple[hardware.Card, ...]:
        """The cards that the engine will see, in its order; none for a profile without cards."""
        return hardware.cards() if self.on_cards else ()

    @property
    def used_cards(self) -> tuple[hardware.Card, ...]:
        """The cards that the engine's workers will take."""
        return self.cards[: self.profile.workers]

    @cached_property
    def driver(self) -> nvidia.Driver:
        """The NVIDIA driver, or why there is none."""
        return nvidia.driver()

    @property
    def local(self) -> bool:
        """Whether the profile names a folder of this machine rather than a model on the hub."""
        name = self.profile.model.path
        return name != self.profile.model.model or checkpoint.is_folder(name)

    @property
    def places(self) -> list[Path]:
        """Where the checkpoint may be: the profile's folder, or those of the hubs' caches."""
        model = self.profile.model
        if self.local:
            return [Path(model.path)]
        return hubs.places(model.path, model.revision, model.download_dir)

    @cached_property
    def folder(self) -> Path | None:
        """The checkpoint's folder: the profile's, or the one in a hub's cache."""
        model = self.profile.model
        if self.local:
            return Path(model.path)
        return hubs.cached_folder(model.path, model.revision, model.download_dir)

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """config.json under the profile's overrides; None where it is absent or not usable."""
        if self.folder is None:
            return None
        try:
            return self.read_config(self.folder)
        except SetupError:
            return None  # the check ``config`` says why

    @property
    def shape(self) -> checkpoint.Shape | None:
        """The sizes that decide about splitting; None without a usable config.json."""
        if self.config is None:
            return None
        name = self.profile.model.model
        try:
            return of_config(name, self.config, {}, "config.json").shape()
        except SetupError:  # packing of no known form
            return of_config(name, unpacked(self.config), {}, "config.json").shape()

    def read_config(self, folder: Path) -> dict[str, Any]:
        """Read config.json under the profile's overrides.

        Raises:
            SetupError: no file, another family, rotary settings or sizes that cannot be.
        """
        source = folder / "config.json"
        found = checkpoint.read_json(source, "it is not a checkpoint's folder")
        config = checkpoint.merged(found, self.profile.model.hf_overrides)
        if config.get("model_type") in checkpoint.SERVED_TYPES:
            # How weights are packed is another check's.
            of_config(self.profile.model.model, unpacked(config), {}, str(source))
        checkpoint.check_config(config, source)
        return config

    @property
    def utilization(self) -> float:
        """The share of each card's memory that vLLM will ask for."""
        return self.profile.engine.gpu_memory_utilization or DEFAULT_UTILIZATION
