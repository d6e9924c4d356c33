"""The overflow policy ``summarise``: the model itself sums up the oldest turns.

A server keeps no conversation: it gets the whole history with each request. So a summary is
remembered by what it stands for, and the next request of the same conversation finds it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files

from qwen2vl_serve.context.overflow import Fitted, Measured, without_pictures, without_turns
from qwen2vl_serve.context.turns import BYTES_PER_TOKEN, Turns, texts
from qwen2vl_serve.context.window import Context
from qwen2vl_serve.engine import Usage
from qwen2vl_serve.media.loader import MediaLoader, Medium
from qwen2vl_serve.media.lru import LRU
from qwen2vl_serve.protocol import control_tokens
from qwen2vl_serve.protocol.chat import (
    AssistantMessage,
    ChatRequest,
    Message,
    UserMessage,
)

KEPT_BYTES = 4 * 2**20
"""Of all remembered summaries together."""

MOST_WINDOWS = 8
"""How many windows of a history are summed up for one request; what is before them is left out."""

Generate = Callable[[ChatRequest, Sequence[Medium], Usage], Awaitable[bytes]]
"""Answers a request of our own, in the place and on the account of the client's."""


@dataclass(frozen=True)
class Wording:
    """What is said around a summary: data, in ``summaries.json``, by language."""

    instruction: str
    heading: str
    reply: str


@lru_cache
def wordings() -> dict[str, Wording]:
    """Return the wordings by language: ``en``, ``zh``."""
    text = files(__package__).joinpath("summaries.json").read_text("utf-8")
    return {language: Wording(**words) for language, words in json.loads(text).items()}


@dataclass
class _Progress:
    """How far a conversation has been summed up: ``text`` stands for the turns before ``upto``."""

    upto: int = 0
    text: str = ""
    lost: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Summaries:
    """Makes requests fit by a summary; ``max_tokens`` is a summary's, ``instruction`` asks for it.

    Without an ``instruction`` it is the one of ``summaries.json`` in the conversation's language.
    """

    def __init__(self, max_tokens: int, instruction: str | None, loader: MediaLoader) -> None:
        self._max_tokens = max_tokens
        self._instruction = instruction
        self._loader = loader
        self._made: LRU[str] = LRU(KEPT_BYTES)

    async def fit(
        self,
        context: Context,
        request: ChatRequest,
        owner: str,
        measured: Measured,
        generate: Generate,
    ) -> Fitted:
        """Return the request with a summary in place of its oldest turns.

        As many are summed up as leave half of the room free, so that the next requests need no
        new summary; ``owner`` keeps one key's summaries from another's. Where even the last turn
        does not fit beside a summary it is sent alone.

        Raises:
            ContextLengthExceeded, VideoTooLarge, ImageTooLarge: the last turn alone does not fit.
            APIError: the engine failed.
        """
        work = _Work(
            Turns.of(request, context.media),
            self._wording(request),
            min(self._max_tokens, max(context.window // 4, 1)),
            measured,
        )
        keys = _keys(work.turns, owner, work.wording)
        known = {count: text for count, key in keys.items() if (text := self._made.get(key))}
        done = _Progress()
        for count, text in known.items():  # the fewest turns first
            if await asyncio.to_thread(work.suffices, count, text):
                done = _Progress(count, text)
                break
        else:
            first, goal = await asyncio.to_thread(work.span, context)
            upto = max((count for count in known if first <= count <= goal), default=first)
            text = known.get(upto, "")
            done = _Progress(upto, text, lost=0 if text else upto)
            while done.upto < goal:
                await self._advance(done, goal, work, generate)
                if done.text:
                    self._made.put(keys[done.upto], done.text, len(done.text.encode()))
        return await asyncio.to_thread(self._placed, context, request, done, work)

    async def _advance(self, done: _Progress, goal: int, work: _Work, generate: Generate) -> None:
        """Sum up as many of the next turns, until ``goal``, as fit into one request."""
        asked = await asyncio.to_thread(work.asked, done, goal)
        if asked is None:  # a single turn that leaves no room to sum it up
            done.upto += 1
            done.lost += 1
            return
        upto, request, media = asked
        used = Usage()
        answer = json.loads(await generate(request, media, used))
        content = answer["choices"][0]["message"]["content"] or ""
        done.text = content.strip()
        done.upto = upto
        done.prompt_tokens += used.prompt_tokens or 0
        done.completion_tokens += used.completion_tokens or 0

    def _placed(
        self, context: Context, request: ChatRequest, done: _Progress, work: _Work
    ) -> Fitted:
        """Put the summary into the request; where it still does not fit, leave out more turns."""
        turns = work.turns
        note = work.note(done.text)
        count = max(done.upto, 0)
        while count < turns.last and not work.suffices(count, done.text):
            count += 1
        rest, media = turns.without(count, note)
        left = work.measured(rest, media)
        if not left.fits:
            return without_turns(context, request, self._loader, work.measured)
        report: dict[str, object] = {
            "policy": "summarise",
            "dropped_turns": count,
            "saved_tokens": context.prompt - left.prompt,
            "summary": done.text,
            "usage": {
                "prompt_tokens": done.prompt_tokens,
                "completion_tokens": done.completion_tokens,
            },
        }
        lost = done.lost + count - done.upto
        if lost:
            report["lost_turns"] = lost
        return Fitted(rest, media, report)

    def _wording(self, request: ChatRequest) -> Wording:
        words = wordings()["zh" if _is_chinese(request.messages) else "en"]
        if self._instruction is None:
            return words
        return Wording(self._instruction, words.heading, words.reply)


@dataclass
class _Work:
    """One request's turns and what is counted of them."""

    turns: Turns
    wording: Wording
    max_tokens: int
    measured: Measured
    _silence: str = field(init=False)

    def __post_init__(self) -> None:
        # Stands for a summary that is not made yet: a word and its space are a token or two.
        self._silence = "word " * self.max_tokens

    def note(self, text: str) -> list[Message]:
        """Return the turn that holds a summary; none for an empty one."""
        if not text:
            return []
        # What the model wrote becomes part of a prompt: it must not forge a role there.
        told = str(control_tokens.escaped(f"{self.wording.heading}\n{text}"))
        return [
            UserMessage(role="user", content=told),
            AssistantMessage(role="assistant", content=self.wording.reply),
        ]

    def suffices(self, count: int, text: str) -> bool:
        """Whether the request fits with ``text`` in place of its oldest ``count`` turns."""
        return self.measured(*self.turns.without(count, self.note(text))).fits

    def span(self, context: Context) -> tuple[int, int]:
        """Return from which turn on, and up to which, is to be summed up.

        Half of the room is free then, where that can be.
        """
        room = max(context.window - context.answer, 0)
        most = MOST_WINDOWS * context.window

        def near(count: int) -> bool:
            return self.measured(*self.turns.without(count)).prompt <= most

        def light(count: int) -> bool:
            seen = self.measured(*self.turns.without(count, self.note(self._silence)))
            return seen.fits and seen.prompt <= room // 2

        first = self.turns.fewest(near, self.turns.over(most * BYTES_PER_TOKEN))
        return first, self.turns.fewest(light, first)

    def asked(self, done: _Progress, goal: int) -> tuple[int, ChatRequest, Sequence[Medium]] | None:
        """Return up to which turn, and the request, that sums up as many turns as fit."""
        least, most = done.upto, goal
        while least < most:
            middle = (least + most + 1) // 2
            fits = self.measured(*self._request(done, middle)).fits
            least, most = (middle, most) if fits else (least, middle - 1)
        if least > done.upto:
            return least, *self._request(done, least)
        # One turn does not fit: it may without its pictures.
        bare, _ = self._request(done, done.upto + 1)
        messages = [without_pictures(message, 10**6)[0] for message in bare.messages]
        request = bare.model_copy(update={"messages": messages})
        videos = [part for part in self.turns.media_of(done.upto) if not _is_picture(part)]
        if self.measured(request, videos).fits:
            return done.upto + 1, request, videos
        return None

    def _request(self, done: _Progress, upto: int) -> tuple[ChatRequest, Sequence[Medium]]:
        rest, media = self.turns.without(done.upto, self.note(done.text), until=upto)
        asked = UserMessage(role="user", content=self.wording.instruction)
        request = ChatRequest(
            messages=[*rest.messages, asked],
            model=rest.model,
            max_tokens=self.max_tokens,
            temperature=0.0,
            mm_processor_kwargs=rest.mm_processor_kwargs,
        )
        return request, media


def _is_picture(medium: Medium) -> bool:
    return not hasattr(medium, "frames")


def _keys(turns: Turns, owner: str, wording: Wording) -> dict[int, str]:
    """Return a key for each number of oldest turns, by their texts and their media's content."""
    hasher = hashlib.blake2b(digest_size=32)
    _take(hasher, turns.request.model or "", owner, wording.instruction)
    for message, number in zip(turns.request.messages, turns.number, strict=True):
        if number is None:
            _take(hasher, *texts(message))
    keys: dict[int, str] = {}
    for message, number, media in turns.each():
        if number is None:
            continue
        if number > len(keys):  # the turns before this one are complete
            keys[number] = hasher.hexdigest()
        _take(hasher, message.role, *texts(message), *(medium.key for medium in media))
    return keys


def _take(hasher: hashlib.blake2b, *texts: str) -> None:
    for text in texts:
        data = text.encode("utf-8", "replace")
        hasher.update(b"%d:" % len(data) + data)  # its length: no two lists of texts run together


def _is_chinese(messages: Sequence[Message]) -> bool:
    """Whether a third of the letters that users wrote are Chinese."""
    text = "".join("".join(texts(one)) for one in messages if one.role == "user")[:100_000]
    letters = [letter for letter in text if letter.isalpha()]
    chinese = sum("\u4e00" <= letter <= "\u9fff" for letter in letters)
    return bool(letters) and chinese * 3 >= len(letters)
