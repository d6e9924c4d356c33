"""What holds between the tools of a request, its choice and its messages; and what texts may say.

The template writes tools, calls and results between markers of its own. A text that holds one of
those, or a control token, would forge a call or a result, so that it is refused or made harmless
wherever it stands.
"""

from __future__ import annotations

import json
import re
from typing import Any

from qwen2vl_serve.errors import (
    InvalidValue,
    ReservedToken,
    TooManyItems,
    UnsupportedParameter,
)
from qwen2vl_serve.protocol import control_tokens, json_schema
from qwen2vl_serve.protocol.chat import (
    AssistantMessage,
    ChatRequest,
    Message,
    ToolMessage,
)
from qwen2vl_serve.protocol.content import TextPart
from qwen2vl_serve.protocol.tools import MARKERS, CalledFunction, NamedTool, Tool, as_json

OFF = "tools are off; server.tools: experimental in the server's profile turns them on"

_RESERVED = re.compile(f"{control_tokens.RESERVED.pattern}|{MARKERS.pattern}")


def check(request: ChatRequest, *, served: bool) -> None:
    """Return if tools, choice and messages fit together.

    Raises:
        RequestError: ``UnsupportedParameter`` where tools are not ``served``, ``InvalidValue`` or
            ``TooManyItems`` for what contradicts itself or costs too much.
    """
    chosen = request.tool_choice
    if request.tools is None:
        if chosen not in (None, "none", "auto"):
            raise InvalidValue(
                "tool_choice asks for a call and there are no tools; send tools beside it.",
                param="tool_choice",
            )
    else:
        _check_tools(request.tools, chosen)
    calls: set[str] = set()
    for index, message in enumerate(request.messages):
        at = f"messages[{index}]"
        if isinstance(message, AssistantMessage) and message.tool_calls:
            if not served:
                raise UnsupportedParameter(
                    f"{at}.tool_calls is not served here: {OFF}.", param=f"{at}.tool_calls"
                )
            calls.update(call.id for call in message.tool_calls)
        elif isinstance(message, ToolMessage):
            if not served:
                raise InvalidValue(
                    f"{at}.role is 'tool', which is not served here: {OFF}.", param=f"{at}.role"
                )
            if message.tool_call_id not in calls:
                raise InvalidValue(
                    f"{at}.tool_call_id is {message.tool_call_id[:60]!r}; no tool_calls of an "
                    "assistant's message before it have this id.",
                    param=f"{at}.tool_call_id",
                )


def _check_tools(tools: list[Tool], chosen: object) -> None:
    names: dict[str, None] = {}
    for index, tool in enumerate(tools):
        name = tool.function.name
        if name in names:
            raise InvalidValue(
                f"tools[{index}].function.name is {name!r}, as that of another tool; give each "
                "its own name.",
                param=f"tools[{index}].function.name",
            )
        names[name] = None
    if isinstance(chosen, NamedTool) and chosen.function.name not in names:
        raise InvalidValue(
            f"tool_choice names {chosen.function.name!r}; there are {', '.join(names)[:200]}.",
            param="tool_choice",
        )
    for index, tool in enumerate(tools):
        kind = (tool.function.parameters or {}).get("type", "object")
        if kind != "object":
            param = f"tools[{index}].function.parameters.type"
            raise InvalidValue(
                f"{param} is {str(kind)[:40]!r}; arguments are an object.", param=param
            )
    json_schema.check(
        {
            f"tools[{index}].function.parameters": tool.function.parameters or {}
            for index, tool in enumerate(tools)
        }
    )
    described = sum(len(tool.function.description or "") for tool in tools)
    if described > json_schema.MOST_CHARACTERS:
        raise TooManyItems(
            f"The descriptions of tools hold {described} characters; at most "
            f"{json_schema.MOST_CHARACTERS} are taken: shorten them.",
            param="tools",
        )


def without_markers(request: ChatRequest, *, refuse: bool) -> ChatRequest:
    """Return the request with no marker or control token in its tools, calls and results.

    Control tokens in the messages' own texts are left to the caller. Where they are not refused,
    the ``<`` of each is written ``&lt;``.

    Raises:
        ReservedToken: one is there, and it is to be refused.
    """
    clean = _Clean(refuse)
    tools = request.tools and [
        clean.tool(tool, f"tools[{index}].function") for index, tool in enumerate(request.tools)
    ]
    messages = [
        clean.message(message, f"messages[{index}]")
        for index, message in enumerate(request.messages)
    ]
    if not clean.changed:
        return request
    return request.model_copy(update={"tools": tools, "messages": messages})


class _Clean:
    def __init__(self, refuse: bool) -> None:
        self.refuse = refuse
        self.changed = False

    def tool(self, tool: Tool, param: str) -> Tool:
        function = tool.function
        cleaned = function.model_copy(
            update={
                "description": self.value(function.description, f"{param}.description"),
                "parameters": self.value(function.parameters, f"{param}.parameters"),
            }
        )
        return tool.model_copy(update={"function": cleaned})

    def message(self, message: Message, param: str) -> Message:
        update: dict[str, Any] = {}
        if isinstance(message.content, str):
            update["content"] = self.text(message.content, MARKERS, f"{param}.content")
        else:
            update["content"] = self._parts(message.content, f"{param}.content")
        if isinstance(message, AssistantMessage) and message.tool_calls:
            update["tool_calls"] = [
                call.model_copy(
                    update={
                        "function": self.called(
                            call.function, f"{param}.tool_calls[{index}].function.arguments"
                        )
                    }
                )
                for index, call in enumerate(message.tool_calls)
            ]
        return message.model_copy(update=update)

    def called(self, function: CalledFunction, param: str) -> CalledFunction:
        # Their values, not their spelling: \u003c is a < as well.
        values = self.value(function.values, param)
        return function.model_copy(update={"arguments": as_json(values)})

    def value(self, value: Any, param: str) -> Any:
        text = as_json(value)
        cleaned = self.text(text, _RESERVED, param)
        return value if cleaned is text else json.loads(cleaned)

    def _parts(self, parts: Any, param: str) -> Any:
        """Clean a list of parts; adjacent texts are one in the prompt."""
        made = list(parts)
        run: list[int] = []
        for place, part in enumerate([*made, None]):
            if isinstance(part, TextPart):
                run.append(place)
                continue
            joined = "".join(made[one].text for one in run)
            cleaned = self.text(joined, MARKERS, param)
            if cleaned is not joined:
                made[run[0]] = made[run[0]].model_copy(update={"text": cleaned})
                for one in run[1:]:
                    made[one] = made[one].model_copy(update={"text": ""})
            run = []
        return made

    def text(self, text: str, pattern: re.Pattern[str], param: str) -> str:
        found = pattern.search(text)
        if found is None:
            return text
        if self.refuse:
            raise ReservedToken(
                f"{param} contains {found.group()}, by which the prompt tells tools from text; "
                "remove it.",
                param=param,
            )
        self.changed = True
        return pattern.sub(lambda one: "&lt;" + one.group()[1:], text)
