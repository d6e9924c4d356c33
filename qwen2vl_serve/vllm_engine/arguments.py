"""A profile's engine arguments as vLLM's own object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.config.structured_outputs import StructuredOutputsConfig
from vllm.engine.arg_utils import AsyncEngineArgs


def as_engine_args(arguments: Mapping[str, Any]) -> AsyncEngineArgs:
    """Return vLLM's object for ``Profile.engine_args()``.

    vLLM makes objects of mappings for most of its nested arguments, and not for this one.
    """
    wanted = StructuredOutputsConfig(**arguments["structured_outputs_config"])
    return AsyncEngineArgs(**{**arguments, "structured_outputs_config": wanted})
