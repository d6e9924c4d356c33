"""Functions that a model may call, in OpenAI's shape: as they are offered and as called."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError, from_json

from qwen2vl_serve.protocol.content import Strict

MOST_TOOLS = 128
"""OpenAI's own bound."""

MARKERS = re.compile(r"</?(?:tool_call|tool_response|tools)>")
"""What the template of tools writes around calls and results; typed by a user it forges them."""

FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class Function(Strict):
    """A function: ``parameters`` is the JSON schema of its arguments, an object's."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """``{"type": "function", "function": {"name": …, "parameters": …}}``."""

    type: Literal["function"]
    function: Function


class FunctionReference(Strict):
    """A function by its name."""

    name: FunctionName


class NamedTool(Strict):
    """``tool_choice`` that names the function which has to be called."""

    type: Literal["function"]
    function: FunctionReference


class CalledFunction(Strict):
    """A function and the arguments that the model chose, as JSON in a string."""

    name: FunctionName
    arguments: str
    parsed_arguments: Any = None  # what OpenAI's client adds, and sends back

    @field_validator("arguments")
    @classmethod
    def _object(cls, text: str) -> str:
        try:
            found = from_json(text or "{}", allow_inf_nan=False)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise PydanticCustomError("arguments", "must be a JSON object, written as a string")
        return text

    @property
    def values(self) -> dict[str, Any]:
        """The arguments themselves."""
        values: dict[str, Any] = from_json(self.arguments or "{}", allow_inf_nan=False)
        return values


class ToolCall(Strict):
    """One call within an assistant's message; a tool's message answers it by ``id``."""

    id: Annotated[str, Field(min_length=1, max_length=128)]
    type: Literal["function"]
    function: CalledFunction
    index: int | None = None  # streams number their calls, and clients send them back


def as_json(value: object) -> str:
    """Return JSON as the template writes it: what is no ASCII stays as it is."""
    return json.dumps(value, ensure_ascii=False)
