"""Where something is in a picture, in the picture's own pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen2vl_client.answer import Answer
from qwen2vl_client.boxes import Box, Convention, Size, boxes_in, marks_in
from qwen2vl_client.errors import AnswerError, InvalidArgumentError
from qwen2vl_client.media import ImageSource
from qwen2vl_client.prompts import PromptsGiven, chosen, filled
from qwen2vl_client.tasks.task import EXACT, Task, Use, pictures


@dataclass(frozen=True)
class Located:
    """The boxes, none where the model saw none, and the (upright) picture's size in pixels."""

    boxes: tuple[Box, ...]
    size: Size
    source: Answer = field(repr=False)


@Use
def locate(
    image: ImageSource,
    what: str,
    *,
    convention: Convention | None = None,
    size: Size | None = None,
    seen: Size | None = None,
    prompts: PromptsGiven = "en",
    **fields: Any,
) -> Task[Located]:
    """Find something in a picture: ``locate(client, "a.jpg", "the red circle").boxes``.

    ``convention`` says how the model writes boxes; without it the answer is recognised by its
    marks, and the question is Qwen2-VL's. ``size`` (of the upright picture) and ``seen`` (what the
    model saw of it after the resize), both width and height in pixels, are told by this project's
    server and need be given for others only.
    """
    if convention is not None:
        marks_in("", convention)  # an unknown one is told before anything is asked
    texts = chosen(prompts)
    prompt = texts.locate_json if convention == "qwen2.5-vl" else texts.locate
    # Boxes are written in special tokens, which a server leaves out unless told to keep them.
    marks = {"skip_special_tokens": False, "include_media_info": True}

    def read(answer: Answer) -> Located:
        told = _told(answer)
        whole = size or _size(told, "width", "height")
        if whole is None:
            raise AnswerError(
                "the server does not tell the picture's size: give size=(width, height)", answer
            )
        shown = seen or _size(told, "resized_width", "resized_height")
        try:
            boxes = boxes_in(answer.text, whole, shown, convention)
        except InvalidArgumentError as error:
            raise AnswerError(str(error), answer) from error
        return Located(boxes, whole, answer)

    return Task(
        filled(prompt, what=what),
        read,
        pictures(image),
        fields={**marks, **fields},
        defaults=EXACT,
    )


def _told(answer: Answer) -> Mapping[str, Any]:
    media = answer.raw.get("media")
    first = media[0] if isinstance(media, list) and media else None
    return first if isinstance(first, Mapping) else {}


def _size(told: Mapping[str, Any], width: str, height: str) -> Size | None:
    found = told.get(width), told.get(height)
    return found if all(isinstance(side, int) and side > 0 for side in found) else None  # type: ignore[return-value]  # mypy does not see through all()
