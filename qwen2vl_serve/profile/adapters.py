"""The section of a profile for LoRA adapters; their engine arguments stand in ``engine``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from qwen2vl_serve.profile.sections import Section, Text

AdapterName = Annotated[Text, Field(max_length=100)]


class AdaptersSection(Section):
    """LoRA adapters: those that are there from the start, and where others may come from."""

    lora_modules: dict[AdapterName, Text] = Field(
        default_factory=dict,
        description="Adapters by the names that clients put into `model`, each with the folder "
        "that PEFT or ms-swift wrote.",
    )
    allowed_paths: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        default=(),
        description="Folders on the server from which adapters may be loaded while it runs "
        "(`POST /v1/load_lora_adapter`), with a key of `server.api_keys`, `api_key_file` or the "
        "environment. Empty: none.",
    )

    @property
    def wanted(self) -> bool:
        """Whether the engine has to be started for adapters."""
        return bool(self.lora_modules or self.allowed_paths)

    @property
    def folders(self) -> dict[str, Path]:
        """The folders of ``lora_modules``."""
        return {name: Path(path).expanduser() for name, path in self.lora_modules.items()}

    @field_validator("allowed_paths")
    @classmethod
    def _absolute(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        for path in paths:
            if not Path(path).expanduser().is_absolute():
                raise PydanticCustomError(
                    "not_absolute", "must name folders from the root, as /srv/adapters"
                )
        return paths
