"""What Ray's file says of a fleet (``args`` of its application), and what Ray is told of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from qwen2vl_serve.errors import ProfileError
from qwen2vl_serve.fleet.affinity import AT_EASE, SLACK
from qwen2vl_serve.profile.yaml import shown

Routing = Literal["affinity", "random"]
"""How a fleet chooses the replica for a request."""


class FleetOptions(BaseModel):
    """``args`` of the application.

    ``profile`` is a name, or a path that is the same on every machine; ``set`` is set in it as by
    ``--set``. There are ``replicas`` at least and ``max_replicas`` at most: as many as it takes for
    each to have ``target_ongoing_requests``, those that wait included. More come when that has held
    for ``upscale_delay_s``, and they go after ``downscale_delay_s``; both are Ray's names and Ray's
    defaults. A replica takes the cards of the profile where ``hardware.device`` is ``cuda``, and
    none elsewhere. ``slack`` and ``at_ease`` bound a replica's load; see ``affinity.bound``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    profile: str
    set: tuple[str, ...] = ()
    replicas: PositiveInt = 1
    max_replicas: PositiveInt | None = None
    target_ongoing_requests: PositiveFloat = 32
    upscale_delay_s: NonNegativeFloat = 30
    downscale_delay_s: NonNegativeFloat = 600
    replica_cpus: NonNegativeFloat = 1
    gateways: PositiveInt = 1
    routing: Routing = "affinity"
    slack: Annotated[float, Field(ge=1)] = SLACK
    at_ease: PositiveInt = AT_EASE

    @field_validator("max_replicas")
    @classmethod
    def _range(cls, most: int | None, info: ValidationInfo) -> int | None:
        least = info.data.get("replicas", 1)
        if most is not None and most < least:
            text = f"must be at least replicas ({least}), is {most}; raise it, or leave it out"
            raise PydanticCustomError("range", "{text}", {"text": text})
        return most

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> Self:
        """Return the options that Ray's file gives.

        Raises:
            ProfileError: one is unknown, missing or out of its bounds.
        """
        try:
            return cls.model_validate(args)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            match first["type"]:
                case "extra_forbidden":
                    problem = f"is unknown; there are {', '.join(cls.model_fields)}"
                case "missing":
                    problem = "is required"
                case "range":
                    problem = first["msg"]
                case _:
                    said = re.sub(r"^\w+ should", "must", first["msg"])
                    problem = f"{said}, is {shown(first['input'])}"
            where = ".".join(("args", *map(str, first["loc"])))
            raise ProfileError(f"{where}: {problem}") from None

    def count(self) -> dict[str, Any]:
        """Return how many replicas Ray is to run, in its words.

        ``initial_replicas`` is not among them: Ray would begin with it again at each new version,
        and stop what the load needs. Without it, it begins with ``min_replicas``, once.
        """
        if self.max_replicas is None:
            return {"num_replicas": self.replicas}
        return {
            "autoscaling_config": {
                "min_replicas": self.replicas,
                "max_replicas": self.max_replicas,
                "target_ongoing_requests": self.target_ongoing_requests,
                "upscale_delay_s": self.upscale_delay_s,
                "downscale_delay_s": self.downscale_delay_s,
            }
        }
