"""Tools in vLLM's words: template, parser, and the grammar that arguments have to obey."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.entrypoints.generate.base.protocol import FunctionDefinition
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionNamedFunction,
    ChatCompletionNamedToolChoiceParam,
    ChatCompletionToolsParam,
)
from vllm.tool_parsers import ToolParserManager
from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser
from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features

from qwen2vl_serve.errors import InvalidValue
from qwen2vl_serve.protocol.chat import (
    AssistantMessage,
    ChatRequest,
    Message,
    ToolMessage,
)
from qwen2vl_serve.protocol.tools import NamedTool, Tool

TEMPLATE = (Path(__file__).parent / "tools.jinja").read_text("utf-8")
"""Qwen2-VL's own template has no tools; without any, this one renders what that does."""

PARSER = "qwen2vl_hermes"

SERVED: dict[str, Any] = {
    "enable_auto_tools": True,
    "tool_parser": PARSER,
    # Arguments obey their schema whether the call was asked for or not.
    "tool_strict_level": "parameter",
}
"""What vLLM's serving class and renderer are told where tools are on."""


class Calls(Hermes2ProToolParser):  # type: ignore[misc]  # vLLM ships no type information
    """vLLM's ``hermes`` parser; its grammar leaves one blank between the parts of arguments.

    vLLM's own leaves any number.
    """

    def get_structural_tag(self, *given: Any, **named: Any) -> Any:
        """Return the grammar of calls; None where none is demanded."""
        grammar = super().get_structural_tag(*given, **named)
        for call in getattr(getattr(grammar, "format", None), "tags", ()):
            call.content.max_whitespace_cnt = 1
        return grammar


def register() -> None:
    """Tell vLLM of the parser."""
    ToolParserManager.register_module(PARSER, module=Calls)


def fields(request: ChatRequest) -> dict[str, Any]:
    """Return the fields of vLLM's request that speak of tools.

    Raises:
        InvalidValue: a schema uses what the grammar of calls cannot enforce.
    """
    if request.tools is None or request.tool_choice == "none":
        return {}
    chosen = request.tool_choice or "auto"
    if isinstance(chosen, NamedTool):
        function = ChatCompletionNamedFunction(name=chosen.function.name)
        chosen = ChatCompletionNamedToolChoiceParam(function=function)
    return {
        "tools": [_as_tool(tool, index) for index, tool in enumerate(request.tools)],
        "tool_choice": chosen,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
    }


def _as_tool(tool: Tool, index: int) -> ChatCompletionToolsParam:
    function = tool.function
    parameters = function.parameters or {"type": "object", "properties": {}}
    parameters = {"type": "object", **parameters}
    refuse_unenforceable(parameters, f"tools[{index}].function.parameters")
    return ChatCompletionToolsParam(
        function=FunctionDefinition(
            name=function.name, description=function.description, parameters=parameters
        )
    )


def refuse_unenforceable(schema: dict[str, Any] | bool, param: str) -> None:
    """Return where the grammar enforces all of a schema.

    Raises:
        InvalidValue: it would pass over a part.
    """
    if has_xgrammar_unsupported_json_features(schema):
        raise InvalidValue(
            f"{param} asks for what answers cannot be held to: one of multipleOf, uniqueItems, "
            "contains, propertyNames, patternProperties beside properties, allOf of several, "
            "length beside pattern or format, or an unknown format; leave it out.",
            param=param,
        )


def offered(request: ChatRequest) -> list[dict[str, Any]] | None:
    """Return the tools as the template reads them; None where there are none."""
    if request.tools is None or request.tool_choice == "none":
        return None
    return [_as_tool(tool, index).model_dump() for index, tool in enumerate(request.tools)]


def beside_content(message: Message, *, parsed: bool) -> dict[str, Any]:
    """Return what a message has beside role and content.

    The template reads arguments ``parsed``; vLLM takes them as they came and parses them itself.
    """
    if isinstance(message, ToolMessage):
        return {"tool_call_id": message.tool_call_id}
    if not isinstance(message, AssistantMessage) or not message.tool_calls:
        return {}
    calls = [
        {
            "id": call.id,
            "type": "function",
            "function": {
                "name": call.function.name,
                "arguments": call.function.values if parsed else call.function.arguments or "{}",
            },
        }
        for call in message.tool_calls
    ]
    return {"tool_calls": calls}
