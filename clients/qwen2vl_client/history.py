"""The turns of a conversation: what is sent, what each costs, what stands for those that went."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from qwen2vl_client.media_info import MediaInfo
from qwen2vl_client.wording import Wording

MARKERS = 12
"""At most so many tokens does a chat template put around a message, or markers around a picture."""

BYTES_PER_TOKEN = 3
"""Of English text a few more, of Chinese about as many: for guesses, which the server corrects."""

Message = dict[str, Any]
Kind = Literal["image", "video"]


@dataclass(frozen=True)
class Turn:
    """A question and its answer; ``tokens`` is what both take, None where nobody has told.

    ``numbers`` are those of its pictures, counted from 1 through the whole conversation.
    """

    user: Message
    answer: Message
    tokens: int | None
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Note:
    """What stands for the turns that went: their summary, and pictures that are still needed.

    ``tokens`` is what the text takes, None where nobody has told.
    """

    text: str = ""
    pictures: tuple[tuple[int, Mapping[str, Any]], ...] = ()
    tokens: int | None = None

    def __bool__(self) -> bool:
        return bool(self.text or self.pictures)

    def messages(self, wording: Wording) -> list[Message]:
        """Return it as a turn of user and assistant; nothing where it is empty."""
        if not self:
            return []
        told = [wording.heading, self.text] if self.text else [wording.kept]
        parts: list[Message] = [{"type": "text", "text": "\n".join(told)}]
        for number, part in self.pictures:
            parts += [_label(number, wording), dict(part)]
        content: Any = parts if self.pictures else parts[0]["text"]
        return [
            {"role": "user", "content": content},
            {"role": "assistant", "content": wording.reply},
        ]


@dataclass(frozen=True)
class History:
    """What a conversation sends before its next question; each change makes a new one.

    ``seen`` counts the pictures that were ever shown. Once something has gone (``changed``) the
    pictures that stay are labelled with their numbers, which the model could no longer count.
    ``known`` is what all of it takes, as the server has counted; ``costs`` are the visual tokens
    of pictures and videos by ``key_of``.
    """

    system: str | None
    turns: tuple[Turn, ...] = ()
    note: Note = Note()
    seen: int = 0
    changed: bool = False
    known: int | None = None
    costs: Mapping[str, int] = field(default_factory=dict)

    def messages(self, wording: Wording, upto: int | None = None) -> list[Message]:
        """Return the messages in OpenAI's shape, of all turns or of those before ``upto``."""
        messages: list[Message] = []
        if self.system is not None:
            messages.append({"role": "system", "content": self.system})
        messages += self.note.messages(wording)
        for turn in self.turns[:upto]:
            messages += [self.shown(turn.user, turn.numbers, wording), dict(turn.answer)]
        return messages

    def shown(self, user: Message, numbers: Sequence[int], wording: Wording) -> Message:
        """Return a question as it is sent: its pictures labelled, once something has gone."""
        if not self.changed or not numbers:
            return dict(user)
        content: list[Message] = []
        rest = iter(numbers)
        for part in user["content"]:
            if is_picture(part):
                content.append(_label(next(rest), wording))
            content.append(part)
        return {**user, "content": content}

    def numbers_of(self, user: Message) -> tuple[int, ...]:
        """Return the numbers that the pictures of the next question get."""
        return tuple(range(self.seen + 1, self.seen + 1 + count_of(user, "image")))

    def count(self, kind: Kind) -> int:
        """Return how many pictures or videos are sent before the next question's."""
        shown = sum(count_of(turn.user, kind) for turn in self.turns)
        return shown + (len(self.note.pictures) if kind == "image" else 0)

    def total(self, wording: Wording) -> int | None:
        """Return about how many tokens the history takes; None where nobody has told."""
        if self.known is not None:
            return self.known
        tokens = [turn.tokens for turn in self.turns]
        note = self.note_tokens(self.note, wording)
        if note is None or None in tokens:
            return None
        head = 0 if self.system is None else len(self.system.encode()) + MARKERS
        return head + note + sum(one or 0 for one in tokens)

    def left_with(self, turns: Sequence[Turn], note: Note, wording: Wording) -> History:
        """Return the history with the last of its turns, and a note for those before them."""
        known = self.known
        old, new = self.note_tokens(self.note, wording), self.note_tokens(note, wording)
        gone = self.turns[: len(self.turns) - len(turns)]
        if known is not None:
            known += (new or 0) - (old or 0) - sum(turn.tokens or 0 for turn in gone)
            known = max(known, 1)
        return replace(self, turns=tuple(turns), note=note, changed=True, known=known)

    def note_tokens(self, note: Note, wording: Wording) -> int | None:
        """Return about how many tokens a note takes; None with a picture of unknown cost."""
        told = note if note.tokens is None else replace(note, text=".")
        around = self.bound(*told.messages(wording), bytes_per_token=BYTES_PER_TOKEN)
        if note.tokens is None:
            return around
        return None if around is None else around + note.tokens

    def bound(self, *messages: Message, bytes_per_token: int = 1) -> int | None:
        """Return how many tokens messages take at most; None with a picture of unknown cost.

        No tokenizer of bytes makes more tokens of a text than it has bytes; with more
        ``bytes_per_token`` it is a guess.
        """
        bound = 0
        for message in messages:
            bound += MARKERS
            for part in parts_of(message):
                if part.get("type") == "text":
                    size = len(str(part.get("text")).encode("utf-8", "replace"))
                    bound += -(-size // bytes_per_token)
                    continue
                cost = self.costs.get(key_of(part))
                if cost is None:
                    return None
                bound += cost + 2 * MARKERS  # and its label
        return bound

    def grown(
        self, user: Message, answer: Message, tokens: int | None, wording: Wording
    ) -> History:
        """Return the history with one more turn; ``tokens`` is what all of it takes, if told."""
        before = self.total(wording)
        cost = self.bound(user, answer)
        if tokens is not None:
            told = tokens if self.known is None else max(tokens - self.known, 1)
            cost = told if cost is None else min(cost, told)
        known = tokens
        if known is None and before is not None and cost is not None:
            known = before + cost
        numbers = self.numbers_of(user)
        turns = (*self.turns, Turn(user, answer, cost, numbers))
        return replace(self, turns=turns, seen=self.seen + len(numbers), known=known)

    def learnt(self, messages: Sequence[Message], media: Sequence[MediaInfo]) -> History:
        """Return the history knowing what the pictures and videos of ``messages`` cost."""
        shown = [part for one in messages for part in parts_of(one) if part.get("type") != "text"]
        if len(shown) != len(media):  # pages of a PDF, say: it cannot be told which is which
            return self
        costs = dict(self.costs)
        for part, info in zip(shown, media, strict=True):
            if info.visual_tokens is not None:
                costs[key_of(part)] = info.visual_tokens
        return replace(self, costs=costs)


def parts_of(message: Mapping[str, Any]) -> list[Message]:
    """Return a message's content as parts."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return list(content or ())


def is_picture(part: Mapping[str, Any]) -> bool:
    """Tell whether a part is a picture."""
    return part.get("type") == "image_url"


def is_video(part: Mapping[str, Any]) -> bool:
    """Tell whether a part is a video."""
    return part.get("type") == "video_url"


def count_of(message: Mapping[str, Any], kind: Kind) -> int:
    """Return how many pictures or videos a message shows."""
    return sum(part.get("type") == f"{kind}_url" for part in parts_of(message))


def key_of(part: Mapping[str, Any]) -> str:
    """Return what stands for a part's content and the size that it is shown at."""
    text = json.dumps(part, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _label(number: int, wording: Wording) -> Message:
    return {"type": "text", "text": wording.picture.format(number=number)}


def text_of(message: Mapping[str, Any]) -> str:
    """Return the words of a message."""
    return "\n".join(str(part["text"]) for part in parts_of(message) if part.get("type") == "text")
