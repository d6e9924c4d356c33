"""Named fields of a document, as data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, overload

from qwen2vl_client.answer import Answer
from qwen2vl_client.errors import AnswerError, InvalidArgumentError
from qwen2vl_client.media import ImageSource
from qwen2vl_client.prompts import PromptsGiven, chosen, filled
from qwen2vl_client.tasks.task import (
    EXACT,
    Asker,
    AsyncAsker,
    Task,
    Use,
    json_format,
    json_of,
    pictures,
    text_of,
)

M = TypeVar("M")
Names = Sequence[str] | Mapping[str, str]
Found = dict[str, str | None]


def _build(
    image: ImageSource, wanted: Any, *, prompts: PromptsGiven = "en", **fields: Any
) -> Task[Any]:
    """Extract fields from a picture, bound to their shape by the engine.

    ``wanted`` is a list of names (or a mapping of names to what they mean), and a dict comes
    back, a field that the picture does not show as None; or it is a pydantic model, and an
    object of it comes back. ``AnswerError`` where the answer does not pass its validation.
    """
    read: Callable[[Answer], Any]
    if isinstance(wanted, type) and hasattr(wanted, "model_json_schema"):
        schema = _said(wanted.model_json_schema())
        names = {name: _meaning(part) for name, part in schema.get("properties", {}).items()}
        if not names:
            raise InvalidArgumentError(
                f"{wanted.__name__} has no fields at its top: give a model whose fields are named"
            )
        read = partial(_validated, wanted)
    else:
        names = _named(wanted)
        schema = {
            "type": "object",
            "properties": {name: {"type": ["string", "null"]} for name in names},
            "required": list(names),
            "additionalProperties": False,
        }
        read = partial(_found, tuple(names))

    listed = ", ".join(
        f"{name} ({meaning})" if meaning else name for name, meaning in names.items()
    )
    text = filled(chosen(prompts).fields, fields=listed)
    given = {"response_format": json_format("fields", schema), **fields}
    return Task(text, read, pictures(image), fields=given, defaults=EXACT)


class ExtractFields(Use[..., Any]):
    """``extract_fields``: what comes back follows from what is asked for."""

    @overload
    def __call__(
        self, client: Asker, /, image: ImageSource, wanted: type[M], **options: Any
    ) -> M: ...
    @overload
    def __call__(
        self, client: Asker, /, image: ImageSource, wanted: Names, **options: Any
    ) -> Found: ...
    @overload
    def __call__(
        self, client: AsyncAsker, /, image: ImageSource, wanted: type[M], **options: Any
    ) -> Coroutine[Any, Any, M]: ...
    @overload
    def __call__(
        self, client: AsyncAsker, /, image: ImageSource, wanted: Names, **options: Any
    ) -> Coroutine[Any, Any, Found]: ...
    def __call__(self, client: Any, /, image: ImageSource, wanted: Any, **options: Any) -> Any:
        """Ask, and return the dict or the object."""
        return self.task(image, wanted, **options).run(client)


extract_fields = ExtractFields(_build)


def _named(wanted: Any) -> dict[str, str]:
    names = [] if isinstance(wanted, str) or not isinstance(wanted, Iterable) else list(wanted)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise InvalidArgumentError(
            f"the fields {wanted!r} must be a list of names, a mapping of names to what they "
            "mean, or a pydantic model"
        )
    return dict(wanted) if isinstance(wanted, Mapping) else dict.fromkeys(names, "")


def _said(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's schema in which whatever may be null has to be said, null or not.

    Left to its choice a model leaves fields out that the picture does show.
    """
    said = copy.deepcopy(dict(schema))
    parts = said.get("$defs", {})
    if "$ref" in said:  # a model that holds itself is there as a part alone
        said = {**copy.deepcopy(parts[said["$ref"].rpartition("/")[2]]), "$defs": parts}
    for part in [said, *parts.values()]:
        properties = part.get("properties")
        if not properties:
            continue
        required = set(part.get("required", ()))
        part["required"] = [n for n, kind in properties.items() if n in required or _nullable(kind)]
        part.setdefault("additionalProperties", False)
    return said


def _nullable(kind: Mapping[str, Any]) -> bool:
    return any(one.get("type") == "null" for one in kind.get("anyOf", ()))


def _meaning(part: Mapping[str, Any]) -> str:
    return str(part.get("description", ""))


def _found(names: Sequence[str], answer: Answer) -> Found:
    value = json_of(answer)
    return {name: text_of(value.get(name)).strip() or None for name in names}


def _validated(model: Any, answer: Answer) -> Any:
    value = json_of(answer)
    try:
        return model.model_validate(value)
    except ValueError as error:  # pydantic's ValidationError is one
        raise AnswerError(f"the answer does not fit {model.__name__}: {error}", answer) from error
