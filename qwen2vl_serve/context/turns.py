"""A conversation by its turns: what was asked, with what was answered to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from qwen2vl_serve.media.loader import Medium
from qwen2vl_serve.protocol.chat import ChatRequest, Message
from qwen2vl_serve.protocol.content import ImagePart, TextPart

BYTES_PER_TOKEN = 16
"""More than texts have on average, in any language."""

_INSTRUCTIONS = frozenset({"system", "developer"})


@dataclass(frozen=True, slots=True)
class MediaCount:
    """How many pictures and videos messages hold."""

    images: int
    videos: int


def count_media(messages: Sequence[Message]) -> MediaCount:
    """Count the pictures and videos of messages; a PDF counts as one picture."""
    shown = [part for message in messages for part in _media_parts(message)]
    images = sum(isinstance(part, ImagePart) for part in shown)
    return MediaCount(images, len(shown) - images)


def texts(message: Message) -> list[str]:
    """Return the texts of a message in their order, its media as their kinds, its calls last."""
    content = message.content
    said = (
        [content or ""]
        if content is None or isinstance(content, str)
        else [getattr(part, "text", f"<{part.type}>") for part in content]
    )
    calls = getattr(message, "tool_calls", None) or ()
    return [
        *said,
        *(text for call in calls for text in (call.function.name, call.function.arguments)),
    ]


def _media_parts(message: Message) -> list[object]:
    if message.content is None or isinstance(message.content, str):
        return []
    return [part for part in message.content if not isinstance(part, TextPart)]


@dataclass(frozen=True)
class Turns:
    """A request's messages, each with the number of its turn; the media in the parts' order.

    A turn begins with a message of the user and holds all up to the next one. Instructions belong
    to none (``number`` None): they are always sent, in their places.
    """

    request: ChatRequest
    media: Sequence[Medium]
    number: tuple[int | None, ...]

    @classmethod
    def of(cls, request: ChatRequest, media: Sequence[Medium]) -> Turns:
        """Find the turns of a request."""
        numbers: list[int | None] = []
        current = 0
        begun = False
        for message in request.messages:
            if message.role in _INSTRUCTIONS:
                numbers.append(None)
                continue
            if message.role == "user" and begun:
                current += 1
            begun = True
            numbers.append(current)
        return cls(request, media, tuple(numbers))

    @cached_property
    def last(self) -> int:
        """The number of the last turn; so many are before it."""
        return max((number for number in self.number if number is not None), default=0)

    @cached_property
    def last_begins(self) -> int:
        """Where the last turn begins among the messages."""
        return self.number.index(self.last) if self.last in self.number else 0

    def each(self) -> Iterator[tuple[Message, int | None, Sequence[Medium]]]:
        """Yield each message with the number of its turn and the media that it shows."""
        at = 0
        for message, number in zip(self.request.messages, self.number, strict=True):
            begin, at = at, at + len(_media_parts(message))
            yield message, number, self.media[begin:at]

    def over(self, most_bytes: int) -> int:
        """Return how many of the oldest turns are beyond so many bytes of text.

        What is so long need not be counted in tokens, again and again, to be left out.
        """
        for message, number in zip(
            reversed(self.request.messages), reversed(self.number), strict=True
        ):
            if number is not None:
                most_bytes -= sum(len(text.encode("utf-8", "replace")) for text in texts(message))
                if most_bytes < 0:
                    return min(number + 1, self.last)
        return 0

    def fewest(self, fits: Callable[[int], bool], least: int = 0) -> int:
        """Return how few turns, ``least`` at the least, have to go until ``fits``.

        All but the last where it never does.
        """
        most = self.last
        while least < most:
            middle = (least + most) // 2
            least, most = (least, middle) if fits(middle) else (middle + 1, most)
        return least

    def messages_without(
        self, count: int, instead: Sequence[Message] = (), until: int | None = None
    ) -> list[Message]:
        """Return the messages without the oldest ``count`` turns, and ``instead`` in their place.

        ``until`` leaves out the turns from that number on, too.
        """
        messages: list[Message] = []
        placed = False
        for message, number in zip(self.request.messages, self.number, strict=True):
            if number is not None:
                if number < count or (until is not None and number >= until):
                    continue
                if not placed:
                    messages += instead
                    placed = True
            messages.append(message)
        return messages if placed else [*messages, *instead]

    def without(
        self, count: int, instead: Sequence[Message] = (), until: int | None = None
    ) -> tuple[ChatRequest, Sequence[Medium]]:
        """Return the request, and its media, without the oldest ``count`` turns."""
        messages = self.messages_without(count, instead, until)
        media: list[Medium] = []
        for _, number, own in self.each():
            if number is None or (number >= count and (until is None or number < until)):
                media += own
        return self.request.model_copy(update={"messages": messages}), media

    def media_of(self, turn: int) -> Sequence[Medium]:
        """Return the media of one turn."""
        return self.without(turn, until=turn + 1)[1]
