"""From the bytes of a body to a ``ChatRequest``, or a ``RequestError``.

Every message names the field, the limit and the value given, in our own words: those of the
libraries that read the body go to the log.
"""

from __future__ import annotations

import json
import logging
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, from_json

from qwen2vl_serve.errors import (
    InvalidJSON,
    InvalidType,
    InvalidValue,
    MissingParameter,
    RequestError,
    ReservedToken,
    TooManyItems,
    UnsupportedParameter,
)
from qwen2vl_serve.profile import Overflow
from qwen2vl_serve.protocol import control_tokens, json_schema, tool_rules
from qwen2vl_serve.protocol.chat import ASKING_NOTHING, UNSUPPORTED, ChatRequest
from qwen2vl_serve.protocol.content import FramesPart, ImagePart, VideoPart
from qwen2vl_serve.protocol.shown import shown

logger = logging.getLogger(__name__)

_ROLES = "system, developer, user, assistant"
_ROLES_WITH_TOOLS = f"{_ROLES}, tool"
_PARTS = "text everywhere; image_url, input_image, file, video_url and video in user messages"


class RequestLimits(BaseModel):
    """What one request may hold; counts, and ``max_tokens`` in tokens (None: the window).

    ``reserved_tokens`` says what is done with control tokens in texts, ``tools`` whether
    functions may be offered to the model.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    max_messages: int
    max_n: int
    max_tokens: int | None
    images: int
    videos: int
    reserved_tokens: Literal["refuse", "escape"] = "refuse"
    overflow: Overflow = "error"
    allowed_overflow: tuple[Overflow, ...] = get_args(Overflow)
    tools: bool = False


def parse_chat(body: bytes, limits: RequestLimits) -> ChatRequest:
    """Read a request body under ``limits``.

    Of a key given twice the last value holds, as in Python's ``json``.

    Raises:
        RequestError: ``InvalidJSON``, ``MissingParameter``, ``InvalidType``, ``InvalidValue``,
            ``UnsupportedParameter``, ``TooManyItems`` or ``ReservedToken``.
    """
    data = parse_json(body)
    for name, remedy in UNSUPPORTED.items():
        # Clients that spell out the defaults (echo: false, tools: []) ask for nothing.
        if (value := data.get(name)) and value != ASKING_NOTHING.get(name):
            raise UnsupportedParameter(f"{name} is not served here: {remedy}.", param=name)
    if not data.get("tools"):
        data.pop("tools", None)
    elif not limits.tools:
        raise UnsupportedParameter(f"tools is not served here: {tool_rules.OFF}.", param="tools")
    # Before validation, so that 10,000 messages are not walked to be refused.
    messages = data.get("messages")
    if isinstance(messages, list) and len(messages) > limits.max_messages:
        raise TooManyItems(
            f"messages holds {len(messages)} messages; at most {limits.max_messages} are taken: "
            "drop or summarise the oldest ones.",
            param="messages",
        )
    try:
        request = ChatRequest.model_validate(data)
    except ValidationError as error:
        roles = _ROLES_WITH_TOOLS if limits.tools else _ROLES
        raise as_request_error(error.errors(include_url=False)[0], roles) from None
    request.held_to(limits.max_tokens)
    _check_fields(request, limits)
    tool_rules.check(request, served=limits.tools)
    if (request.overflow or limits.overflow) not in LEAVING_OUT:
        refuse_excess_media(request, limits)
    return _without_control_tokens(request, limits)


Fields = TypeVar("Fields", bound=BaseModel)


def parse_fields(body: bytes, model: type[Fields]) -> Fields:
    """Read a small request's body into ``model``, a strict one.

    Raises:
        RequestError: as ``parse_chat``.
    """
    try:
        return model.model_validate(parse_json(body))
    except ValidationError as error:
        raise as_request_error(error.errors(include_url=False)[0]) from None


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the object that a body holds; raises ``InvalidJSON``."""
    if is_crowded(body):
        raise InvalidJSON(
            f"The body has more than {MOST_VALUES} commas and opening brackets and is not read: "
            "send fewer values."
        )
    try:
        data = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        logger.info("not JSON: %s", error)
        raise InvalidJSON(f"The body is not valid JSON: {_json_fault(body)}.") from None
    if not isinstance(data, dict):
        raise InvalidJSON('The body must be a JSON object, as {"messages": […]}.')
    return data


MOST_VALUES = 500_000
"""Of one body: each takes up to a hundred bytes in memory, and its time, where it is two here."""


_MARKS = (b",", b"[", b"{")
_FEW = 4000


def is_crowded(body: bytes) -> bool:
    """Tell whether a JSON text may hold more than ``MOST_VALUES``, without reading it."""
    if len(body) <= MOST_VALUES:
        return False
    found = 0
    for mark in _MARKS:
        place = body.find(mark)
        while place >= 0:
            found += 1
            if found > _FEW:
                return sum(map(body.count, _MARKS)) > MOST_VALUES
            # Base64, which is most of a body, is jumped over at ten times the speed of counting.
            place = body.find(mark, place + 1)
    return False


def _json_fault(body: bytes) -> str:
    """Say what is wrong with a body that could not be read, and where.

    Python's own parser is asked, whose errors hold the place as numbers.
    """
    if not body.strip():
        return "it is empty; send a JSON object"
    if len(body) > _READ_TWICE:
        return f"somewhere in its {len(body)} bytes; was it cut short, or put together by hand?"
    constants: list[str] = []
    fault = f"{_TOO_DEEP}, or holds half of a surrogate pair (as \\ud800), which is no character"
    try:
        json.loads(body.decode(), parse_constant=constants.append)
    except UnicodeDecodeError as error:
        fault = f"byte {error.start + 1} is not UTF-8; send the body in UTF-8"
    except json.JSONDecodeError as error:
        fault = (
            f"it cannot be read on from line {error.lineno}, column {error.colno}; look there for "
            "a comma too many, a missing quote or bracket, or a body that was cut short"
        )
    except RecursionError:
        fault = _TOO_DEEP
    except ValueError:
        fault = "it holds an integer of too many digits; send fewer"
    if constants:
        fault = f"it holds {constants[0]}, which JSON has no number for; leave it out"
    return fault


_READ_TWICE = 1 << 20
"""Bytes up to which a faulty body is read again for the place; others wait for that meanwhile."""
_TOO_DEEP = "it nests objects and arrays more than 200 deep"


def _check_fields(request: ChatRequest, limits: RequestLimits) -> None:
    if request.n is not None and request.n > limits.max_n:
        raise InvalidValue(
            f"n is {request.n}; at most {limits.max_n} is served: ask for fewer, or raise "
            "limits.max_n in the server's profile.",
            param="n",
        )
    if (request.n or 1) > 1 and request.temperature is not None and request.temperature < _GREEDY:
        raise InvalidValue(
            f"n is {request.n} at temperature {request.temperature:g}, where all answers are the "
            "same: leave it out, or sample.",
            param="n",
        )
    asked = request.output_limit
    name = request.output_field
    if asked is not None and limits.max_tokens is not None and asked > limits.max_tokens:
        raise InvalidValue(
            f"{name} is {asked}; at most {limits.max_tokens} is served: ask for fewer, or raise "
            "limits.max_tokens in the server's profile.",
            param=name,
        )
    most = request.most_tokens
    if request.min_tokens and most is not None and request.min_tokens > most:
        known = name if asked is not None else "limits.max_tokens of the server's profile"
        raise InvalidValue(
            f"min_tokens is {request.min_tokens}, more than {known} ({most}): ask for fewer.",
            param="min_tokens",
        )
    if request.stream_options is not None and not request.stream:
        raise InvalidValue(
            "stream_options is given without stream: true; set stream or leave it out.",
            param="stream_options",
        )
    if request.top_logprobs and not request.logprobs:
        raise InvalidValue(
            f"top_logprobs is {request.top_logprobs} without logprobs: true; set logprobs.",
            param="top_logprobs",
        )
    _check_said_of_all(request)
    for key in request.logit_bias or ():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise InvalidValue(
                f"logit_bias has the key {key[:40]!r}; keys are token ids as digits.",
                param="logit_bias",
            )
    if request.overflow is not None and request.overflow not in limits.allowed_overflow:
        raise InvalidValue(
            f"overflow is {request.overflow!r}; allowed by overflow.allowed of the server's "
            f"profile: {', '.join(limits.allowed_overflow) or 'none'}.",
            param="overflow",
        )
    schema = request.response_format
    if schema is not None and (schema.type == "json_schema") != (schema.json_schema is not None):
        raise InvalidValue(
            "response_format.json_schema goes with type json_schema, and only with it.",
            param="response_format.json_schema",
        )
    if schema is not None and schema.json_schema is not None:
        within = "response_format.json_schema.schema"
        json_schema.check({within: schema.json_schema.schema_ or {}})


_GREEDY = 1e-5
"""Below this temperature vLLM takes the likeliest token, and no ``n``."""


def _check_said_of_all(request: ChatRequest) -> None:
    """Refuse two words on one thing, and half a size; of each part ``media`` sees to that."""
    first: dict[str, tuple[str, object]] = {}
    for name, path, value in request.said_of_all():
        if value is None:
            continue
        known, said = first.setdefault(name, (path, value))
        if said != value:
            raise InvalidValue(
                f"{path} is {shown(value)}, but {known} is {shown(said)}; give one of them.",
                param=path,
            )
    sides = [first[name][0] for name in ("resized_height", "resized_width") if name in first]
    if len(sides) == 1:
        raise InvalidValue(
            f"{sides[0]} is given without the other side; give both of resized_height and "
            "resized_width or none.",
            param=sides[0],
        )


LEAVING_OUT = ("drop_oldest_images", "drop_oldest_turns", "summarise")
"""Overflow policies that leave out what is too many before it is refused."""


def refuse_excess_media(request: ChatRequest, limits: RequestLimits) -> None:
    """Raise ``TooManyItems`` for more pictures or videos than are taken."""
    images = videos = 0
    for message in request.messages:
        if not isinstance(message.content, str):
            images += sum(isinstance(part, ImagePart) for part in message.content)
            videos += sum(isinstance(part, VideoPart | FramesPart) for part in message.content)
    for count, limit, noun in ((images, limits.images, "image"), (videos, limits.videos, "video")):
        if count > limit:
            raise TooManyItems(
                f"messages hold {count} {noun}s; at most {limit} per request: send fewer, or "
                f"raise media.limit_mm_per_prompt.{noun} in the server's profile.",
                param="messages",
            )


def _without_control_tokens(request: ChatRequest, limits: RequestLimits) -> ChatRequest:
    """Refuse control tokens in the messages, or break them, as the profile says."""
    if request.uses_tools:
        request = tool_rules.without_markers(request, refuse=limits.reserved_tokens == "refuse")
    messages = list(request.messages)
    changed = False
    for index, message in enumerate(messages):
        token = control_tokens.first_in(message.content)
        if token is None:
            continue
        if limits.reserved_tokens == "refuse":
            raise ReservedToken(
                f"messages[{index}].content contains the control token {token}; "
                "remove it from the text.",
                param=f"messages[{index}].content",
            )
        content = control_tokens.escaped(message.content)
        messages[index] = message.model_copy(update={"content": content})
        changed = True
    return request.model_copy(update={"messages": messages}) if changed else request


_TYPE_NAMES = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "none_required": "null",
}


# What a value must be where it is out of bounds; filled with what pydantic tells of the bound.
_BOUNDS = {
    "greater_than": "be above {gt}",
    "greater_than_equal": "be at least {ge}",
    "less_than": "be below {lt}",
    "less_than_equal": "be at most {le}",
    "finite_number": "be a finite number",
    "int_parsing_size": "be an integer of fewer digits",
    "string_too_short": "have at least {min_length} characters",
    "string_too_long": "have at most {max_length} characters",
    "string_pattern_mismatch": "match {pattern}",
    "too_short": "hold at least {min_length} of them",
    "too_long": "hold at most {max_length} of them",
    "literal_error": "be {expected}",
}


def as_request_error(error: ErrorDetails, roles: str = _ROLES) -> RequestError:
    """Return our error for one of pydantic's; ``roles`` are those that messages may have."""
    param = _path(error["loc"])
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "missing":
        return MissingParameter(f"{param} is required.", param=param)
    if kind == "one_of":
        return _as_one_of_error(param, given, context["names"])
    if kind == "extra_forbidden":
        return UnsupportedParameter(f"{param} is not served here: leave it out.", param=param)
    if kind in _TYPE_NAMES:
        either = "a string or " if kind == "list_type" and error["loc"][-1] == "@parts" else ""
        return InvalidType(
            f"{param} must be {either}{_TYPE_NAMES[kind]}, not {shown(given)}.", param=param
        )
    if kind.startswith("union_tag"):
        field = "role" if "_role" in context["discriminator"] else "type"
        return _as_tag_error(param, given, field, roles if field == "role" else _PARTS)
    return _as_bound_error(param, error)


def _as_bound_error(param: str, error: ErrorDetails) -> InvalidValue:
    """Return the error for a value of the right type that is out of bounds."""
    kind, held, context = error["type"], shown(error["input"]), error.get("ctx", {})
    if kind in _BOUNDS:
        told = {name: _bound(value) for name, value in context.items()}
        words, held = _BOUNDS[kind].format(**told), told.get("actual_length", held)
        return InvalidValue(f"{param} must {words}, not {held}.", param=param)
    if kind in _OURS:
        return InvalidValue(f"{param}: {error['msg']}; {held} was given.", param=param)
    logger.warning("%s: pydantic's %s has no words of ours: %s", param, kind, error["msg"])
    return InvalidValue(f"{param} is not taken; {held} was given.", param=param)


def _bound(value: object) -> str:
    """Return a bound as JSON has it; pydantic tells ``true`` as Python does, and whole floats."""
    return f"{value:g}" if isinstance(value, float) else str(value).replace("True", "true")


_OURS = frozenset({"arguments", "metadata"})
"""Errors that our own models raise, in our words."""


def _as_one_of_error(param: str, given: object, names: tuple[str, str]) -> RequestError:
    """Return the error for none or both of two fields of which one is to be given."""
    first, second = names
    path = f"{param}.{first}"
    if isinstance(given, dict) and given.get(first) is not None:
        return InvalidValue(f"{path} stands beside {second}; give one of the two.", param=path)
    return MissingParameter(f"{path} is required.", param=path)


def _as_tag_error(param: str, given: object, field: str, served: str) -> RequestError:
    """Return the error for a message without a known role, or a part without a known type."""
    if not isinstance(given, dict):
        return InvalidType(f"{param} must be an object, not {shown(given)}.", param=param)
    param = f"{param}.{field}"
    if field not in given:
        return MissingParameter(f"{param} is required.", param=param)
    if not isinstance(given[field], str):
        return InvalidType(f"{param} must be a string, not {shown(given[field])}.", param=param)
    return InvalidValue(f"{param} is {shown(given[field])}; served are {served}.", param=param)


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not step.startswith("@"):
            path += f".{step}" if path else step
    return path or "body"
