"""How a conversation is made to fit into the window, before a request would fail.

No I/O: what has to be asked of the server (a summary) is a flow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from qwen2vl_client.answer import Answer
from qwen2vl_client.errors import BadRequestError
from qwen2vl_client.history import (
    BYTES_PER_TOKEN,
    History,
    Message,
    Note,
    Turn,
    is_picture,
    is_video,
    key_of,
    parts_of,
    text_of,
)
from qwen2vl_client.naming import named_pictures
from qwen2vl_client.steps import Flow
from qwen2vl_client.wording import Wording

Policy: TypeAlias = Literal["error", "summarise", "drop_oldest_images", "drop_oldest_turns"]
POLICIES = ("error", "summarise", "drop_oldest_images", "drop_oldest_turns")

SPARE = 8
"""Where turns are dropped, a share of the window of one in so many is left free, so that the
next turns need no more of it and the server finds the beginning of the prompt in its cache."""

Ask: TypeAlias = Callable[[list[Message], int], Flow[Answer]]
"""Has the server answer messages in at most so many tokens."""


@dataclass(frozen=True)
class Event:
    """What a conversation did to fit: ``conversation.events`` lists them, the oldest first.

    ``tokens`` is about what it saved; ``lost`` of the turns are not in the ``summary`` either.
    """

    kind: Literal["summarised", "dropped_turns", "dropped_images", "dropped_videos"]
    turns: int = 0
    images: int = 0
    videos: int = 0
    tokens: int = 0
    summary: str | None = None
    lost: int = 0


@dataclass
class Fitting:
    """One attempt to make room: a history to change, and the events of it.

    ``excess`` tokens have to go; ``question`` is what is asked next; of the last ``keep_last``
    turns none goes unless there is no other way.
    """

    history: History
    question: Message
    excess: int
    window: int
    keep_last: int
    wording: Wording
    events: list[Event]

    def drop_images(self, most: int | None = None) -> bool:
        """Put words in place of the oldest pictures, those that are named again last."""
        named = self._named(self.history.turns)
        places = [
            (number in named, index, number)
            for index, turn in enumerate(self.history.turns)
            for number in turn.numbers
        ]
        carried = list(self.history.note.pictures)
        freed = images = 0
        while carried and self._wanted(freed, images, most):
            number, part = carried.pop(0)
            freed += self._cost(part)
            images += 1
        for _, index, number in sorted(places):
            if not self._wanted(freed, images, most):
                break
            freed += self._remove(index, number)
            images += 1
        if not images:
            return False
        note = replace(self.history.note, pictures=tuple(carried))
        self.history = replace(self.history, note=note, changed=True)
        self._freed(freed)
        self.events.append(Event("dropped_images", images=images, tokens=max(freed, 0)))
        return True

    def drop_videos(self, most: int) -> bool:
        """Put words in place of the oldest videos."""
        places = [
            (index, at)
            for index, turn in enumerate(self.history.turns)
            for at, part in enumerate(parts_of(turn.user))
            if is_video(part)
        ][:most]
        freed = 0
        for index, at in places:
            turn = self.history.turns[index]
            freed += self._put_words(index, at, self.wording.removed_video, turn.numbers)
        self._freed(freed)
        if places:
            event = Event("dropped_videos", videos=len(places), tokens=max(freed, 0))
            self.events.append(event)
        return bool(places)

    def _freed(self, tokens: int) -> None:
        if self.history.known is not None:
            self.history = replace(self.history, known=max(self.history.known - tokens, 1))
        self.excess -= tokens

    def drop_turns(self) -> bool:
        """Leave out the oldest turns; pictures that are named again stay, where there is room."""
        turns = self.history.turns
        goal = self.excess + self.window // SPARE
        count = freed = 0
        for position, turn in enumerate(turns):
            old = position < len(turns) - self.keep_last
            if freed >= (goal if old else self.excess):
                break
            freed += turn.tokens or 1
            count += 1
        if not count and not self.history.note:
            return False
        note = Note()
        if count < len(turns) or freed >= self.excess:  # else the note has to go as well
            room = freed - self.excess
            note = self._carrying(self.history.note, turns[:count], turns[count:], room)
        saved = self._leave(turns[count:], note)
        self.events.append(Event("dropped_turns", turns=count, tokens=max(saved, 0)))
        return True

    def summarise(self, ask: Ask, instruction: str, most_tokens: int) -> Flow[bool]:
        """Have the model sum up all but the last turns; the summary takes their place."""
        turns = self.history.turns
        kept = min(self.keep_last, max(len(turns) - 1, 0))
        goal = len(turns) - kept
        if goal <= 0:
            return self.drop_turns()
        most_tokens = max(min(most_tokens, self.window // 4), 1)
        lost = summed = 0
        text, tokens = self.history.note.text, self.history.note.tokens
        old = turns[:goal]
        left = list(old)
        while left:
            count = self._that_fit(left, text, instruction, most_tokens)
            while count:
                try:
                    asked = self._request(left[:count], text, instruction)
                    answer = yield from ask(asked, most_tokens)
                    break
                except BadRequestError as error:
                    if error.code not in ("context_length_exceeded", "too_many_items"):
                        raise
                    count //= 2  # the estimate was wrong
            if count:
                if told := str(answer.message["content"]).strip():
                    text, usage = told, answer.usage
                    tokens = None if usage is None else usage.completion_tokens
                left, summed = left[count:], summed + count
            elif bare := _without_media(left[0], self.wording):
                left[0] = bare
            else:
                left, lost = left[1:], lost + 1
        note = Note(text, self.history.note.pictures, tokens)
        room = sum(turn.tokens or 0 for turn in old) - self.excess
        saved = self._leave(turns[goal:], self._carrying(note, old, turns[goal:], room))
        event = Event("summarised", goal, tokens=max(saved, 0), summary=text, lost=lost)
        self.events.append(event if summed else replace(event, kind="dropped_turns", summary=None))
        return True

    def _leave(self, turns: tuple[Turn, ...], note: Note) -> int:
        """Keep these turns and the note, and return about how many tokens that saves."""
        before = self.history.total(self.wording)
        self.history = self.history.left_with(turns, note, self.wording)
        after = self.history.total(self.wording)
        saved = 1 if before is None or after is None else before - after
        self.excess -= saved
        return saved

    def _that_fit(self, turns: list[Turn], text: str, instruction: str, answer: int) -> int:
        """Return how many of ``turns`` are likely to fit into one request for a summary."""
        around = self.history.bound(
            *self._request([], text, instruction), bytes_per_token=BYTES_PER_TOKEN
        )
        room = self.window - answer - (around or 0)
        count = 0
        for turn in turns:
            room -= turn.tokens or 0
            if room < 0:
                break
            count += 1
        return max(count, 1)

    def _request(self, turns: list[Turn], text: str, instruction: str) -> list[Message]:
        part = replace(self.history, turns=tuple(turns), note=Note(text), changed=True)
        return [*part.messages(self.wording), {"role": "user", "content": instruction}]

    def _carrying(
        self, note: Note, gone: tuple[Turn, ...], kept: tuple[Turn, ...], room: int
    ) -> Note:
        """Return the note with the pictures that are named again, the newest first, within room."""
        named = self._named(kept)
        found = list(note.pictures)
        for turn in gone:
            pictures = [part for part in parts_of(turn.user) if is_picture(part)]
            found += zip(turn.numbers, pictures, strict=True)
        room += self.history.note_tokens(self.history.note, self.wording) or 0
        fitting = replace(note, pictures=())
        for number, part in reversed(found):
            if number not in named:
                continue
            more = replace(fitting, pictures=((number, part), *fitting.pictures))
            cost = self.history.note_tokens(more, self.wording)
            if cost is not None and cost <= room:
                fitting = more
        return fitting

    def _named(self, kept: tuple[Turn, ...]) -> set[int]:
        """Return the pictures that the next question, or a turn that stays, names.

        "The last picture" is for a question the last before it, and for an answer the last that
        the model had been shown by then.
        """
        last = self.history.seen
        said = [(text_of(self.question), last)]
        for turn in reversed(kept[max(len(kept) - self.keep_last, 0) :]):
            said.append((text_of(turn.answer), last))
            last = min(turn.numbers, default=last + 1) - 1
            said.append((text_of(turn.user), last))
        return {number for text, last in said for number in named_pictures(text, last)}

    def _wanted(self, freed: int, images: int, most: int | None) -> bool:
        return freed < self.excess if most is None else images < most

    def _cost(self, part: Any) -> int:
        return self.history.costs.get(key_of(part), 4)  # the least that a picture takes

    def _remove(self, index: int, number: int) -> int:
        """Take one picture out of a turn and return how many tokens that frees."""
        turn = self.history.turns[index]
        place = turn.numbers.index(number)
        at = [n for n, part in enumerate(parts_of(turn.user)) if is_picture(part)][place]
        numbers = (*turn.numbers[:place], *turn.numbers[place + 1 :])
        return self._put_words(index, at, self.wording.removed, numbers)

    def _put_words(self, index: int, at: int, words: str, numbers: tuple[int, ...]) -> int:
        """Put words in place of one part of a turn and return how many tokens that frees."""
        turn = self.history.turns[index]
        content = parts_of(turn.user)
        freed = self._cost(content[at]) - len(words)
        content[at] = {"type": "text", "text": words}
        tokens = None if turn.tokens is None else max(turn.tokens - freed, 1)
        changed = Turn({**turn.user, "content": content}, turn.answer, tokens, numbers)
        turns = (*self.history.turns[:index], changed, *self.history.turns[index + 1 :])
        self.history = replace(self.history, turns=turns)
        return freed


def _without_media(turn: Turn, wording: Wording) -> Turn | None:
    """Return the turn with words for its pictures and videos; None where it has none."""
    parts = parts_of(turn.user)
    if not any(is_picture(part) or is_video(part) for part in parts):
        return None
    removed = {"type": "text", "text": wording.removed}
    removed_video = {"type": "text", "text": wording.removed_video}
    content = [
        removed if is_picture(part) else removed_video if is_video(part) else part for part in parts
    ]
    bare = {**turn.user, "content": content}
    bound = History(None).bound(bare, turn.answer)
    return Turn(bare, turn.answer, bound)
