"""The model's control tokens in what clients write: found, or made ordinary characters.

Typed by a user they forge a role or take a picture's place. Grounding markers (box, object_ref)
are text that users and assistants may write.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from qwen2vl_serve.protocol.content import TextPart, UserPart

MARK = "\ud800"
"""Breaks a control token, for whoever encodes the prompt to take out again.

Half of a surrogate pair: JSON that holds one is refused, so that no client can send it.
"""

RESERVED = re.compile(
    r"<\|(?:im_start|im_end|endoftext|vision_start|vision_end|vision_pad|image_pad|video_pad)\|>"
)
"""Finds one."""

Content = str | Sequence[TextPart] | Sequence[UserPart]


def first_in(content: Content) -> str | None:
    """Return the first control token of a message, None where there is none.

    The template puts adjacent text parts side by side, where two halves make one token.
    """
    for text in [content] if isinstance(content, str) else map(_joined, _runs(content)):
        if found := RESERVED.search(text):
            return found.group()
    return None


def escaped(content: Content) -> Content:
    """Return the content with a ``MARK`` after the first character of each control token."""
    if isinstance(content, str):
        return RESERVED.sub(lambda found: _broken(found.group(), 1), content)
    made: list[TextPart | UserPart] = list(content)
    for run in _runs(content):
        cuts = [found.start() + 1 for found in RESERVED.finditer(_joined(run))]
        for place, part in run:
            within = [cut for cut in cuts if 0 <= cut < len(part.text)]
            text = part.text
            for cut in reversed(within):  # from the end, so that places stay what they are
                text = _broken(text, cut)
            made[place] = part.model_copy(update={"text": text}) if within else part
            cuts = [cut - len(part.text) for cut in cuts]
    return made


def _broken(text: str, place: int) -> str:
    return text[:place] + MARK + text[place:]


_Run = Sequence[tuple[int, TextPart]]
"""Adjacent text parts, each with its place in the message."""


def _runs(content: Sequence[TextPart] | Sequence[UserPart]) -> Iterator[_Run]:
    run: list[tuple[int, TextPart]] = []
    for place, part in enumerate(content):
        if isinstance(part, TextPart):
            run.append((place, part))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _joined(run: _Run) -> str:
    return "".join(part.text for _, part in run)
