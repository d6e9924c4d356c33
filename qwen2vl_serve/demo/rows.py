"""Training rows: many short conversations share the pictures they are about.

A row is a prefix (system turn, the opening of the user's turn, its pictures) and branches. A branch
sees the prefix and itself, at the positions it would have if it were alone, so each teaches
exactly what the server will be sent, while the pictures are computed once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen2vl_serve.demo.pictures import anchor_cell
from qwen2vl_serve.demo.wording import (
    COPY_END,
    COPY_START,
    GIVEN,
    LOOK_AWAY,
    SPELL_END,
    SPELL_START,
    Dialogue,
    looks_at,
    plain,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SYSTEMS = (
    "You are a helpful assistant.",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "You are a helpful assistant that answers questions about pictures.",
    "Answer briefly.",
    "你是一个有用的助手。",
    "",
)
SYSTEM_SHARES = (0.5, 0.28, 0.07, 0.05, 0.05, 0.05)
Look = tuple[int, float, float]  # a picture's number, a point in fractions of its sides


@dataclass(frozen=True)
class Said:
    """A token of an answer, where to look while it is said, and whether it is taught.

    ``copied`` has the number, in tokens, that it is part of, and its place in that.
    """

    token: int
    look: Look | None
    taught: bool = True
    copied: tuple[tuple[int, ...], int] | None = None


@dataclass(frozen=True)
class Media:
    """A picture or video of a row: its place in the step's list, and its grid in cells."""

    index: int
    frames: int
    rows: int
    columns: int
    video: bool


class Encoder:
    """Text to ids, with the pieces of the chat template kept ready."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self.encode = lru_cache(maxsize=200_000)(self._encode)
        self.ended = lru_cache(maxsize=200_000)(self._ended)
        self.image = self._one("<|image_pad|>")
        self.video = self._one("<|video_pad|>")
        self.start = self._one("<|vision_start|>")
        self.end = self._one("<|vision_end|>")
        self.pad = self._one("<|endoftext|>")
        self.reply = self.encode("<|im_end|>\n<|im_start|>assistant\n")
        self.again = self.encode("\n<|im_start|>user\n")
        self.stop = self.encode("<|im_end|>")
        self.digits = {token for digit in "0123456789" for token in self.encode(digit)}

    def _one(self, name: str) -> int:
        found = self._tokenizer.convert_tokens_to_ids(name)
        assert isinstance(found, int)  # noqa: S101
        return found

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def _ended(self, text: str) -> tuple[tuple[int, int], ...]:
        """Ids, each with the place in the text where it ends."""
        coded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = (end for _, end in coded["offset_mapping"])
        return tuple(zip(coded["input_ids"], ends, strict=True))

    def answer(self, text: str) -> list[Said]:
        """An answer's ids, each with where to look while it is said.

        What lies between the spelling marks is encoded letter by letter. What stands before the
        mark GIVEN is not taught; nobody looks anywhere for it.
        """
        given, _, text = text.rpartition(GIVEN)
        coded: list[Said] = [Said(token, None, taught=False) for token in self.encode(given)]
        before, begun, rest = text.partition(COPY_START)
        if begun:
            number, _, after = rest.partition(COPY_END)
            digits = self.encode(plain(number))
            copied = [Said(token, None, copied=(digits, n)) for n, token in enumerate(digits)]
            return coded + self.answer(before) + copied + self.answer(after)
        look: Look | None = None
        for n, piece in enumerate(text.replace(SPELL_END, SPELL_START).split(SPELL_START)):
            marks = [(0, look)]
            letters: list[str] = []
            for letter in piece:
                if letter == LOOK_AWAY:
                    marks.append((len(letters), None))
                elif found := looks_at(letter):
                    marks.append((len(letters), found))
                else:
                    letters.append(letter)
            if n % 2:
                ended = [(token, at + 1) for at, letter in enumerate(letters)
                         for token in self.encode(letter)]  # fmt: skip
            else:
                ended = list(self.ended("".join(letters)))
            coded += [Said(token, [m for at, m in marks if at < end or not at][-1])
                      for token, end in ended]  # fmt: skip
            look = marks[-1][1]
        return coded

    def opening(self, system: str) -> tuple[int, ...]:
        """Everything before the first user turn's content."""
        return self.encode(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n")


@dataclass
class Row:
    """Ids with their branch (0: prefix), positions, supervision, and the visual tokens' sources."""

    ids: list[int] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    taught: list[bool] = field(default_factory=list)
    media: list[Media] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # of each medium's tokens, in `ids`
    looks: list[tuple[int, int]] = field(default_factory=list)  # a taught token, the one to look at
    _branches: int = 0
    _at: int = 0
    _prefix_end: int = 0
    _open: int = 0
    _first_medium: int = 0  # of the open branch's conversation

    def text(self, ids: tuple[int, ...], taught: bool = False) -> None:
        """Append text tokens."""
        for token in ids:
            self.ids.append(token)
            self.branch.append(self._open)
            self.positions.append((self._at,) * 3)
            self.taught.append(taught)
            self._at += 1

    def medium(self, encoder: Encoder, medium: Media) -> None:
        """Append a picture or video between its start and end tokens, by M-RoPE's counting."""
        self.text((encoder.start,))
        self.media.append(medium)
        self.starts.append(len(self.ids))
        pad = encoder.video if medium.video else encoder.image
        for t in range(medium.frames):
            for y in range(medium.rows):
                for x in range(medium.columns):
                    self.positions.append((self._at + t, self._at + y, self._at + x))
        cells = medium.frames * medium.rows * medium.columns
        self.ids += [pad] * cells
        self.branch += [self._open] * cells
        self.taught += [False] * cells
        self._at += max(medium.frames, medium.rows, medium.columns)
        self.text((encoder.end,))

    def seal(self) -> None:
        """End the prefix: branches begin at the position reached."""
        self._prefix_end = self._at

    def begin(self) -> None:
        """Start a new branch."""
        self._branches += 1
        self._open = self._branches
        self._at = self._prefix_end
        shared = self.media and self.branch[self.starts[0]] == 0
        self._first_medium = 0 if shared else len(self.media)

    def dialogue(self, encoder: Encoder, dialogue: Dialogue, lead: str = "") -> None:
        """Append the turns; the user's first turn is already open."""
        self.text(encoder.encode(lead + dialogue.turns[0].question))
        self.answers(encoder, dialogue)

    def answers(self, encoder: Encoder, dialogue: Dialogue) -> None:
        """Append everything after the first question: its answer and the later turns."""
        for n, turn in enumerate(dialogue.turns):
            if n:
                self.text(encoder.again)
                self.text(encoder.encode(turn.question))
            self.text(encoder.reply)
            for said in encoder.answer(turn.answer):
                if said.look:
                    self.looks.append((len(self.ids), self._token_at(said.look)))
                if said.copied:
                    self.looks.append((len(self.ids), self._place_of(*said.copied, encoder)))
                self.text((said.token,), taught=said.taught)
            self.text(encoder.stop, taught=True)

    def _place_of(self, number: tuple[int, ...], place: int, encoder: Encoder) -> int:
        """Where a digit stands in this branch or its prefix, in the only such number there."""
        (found,) = (
            start
            for start in range(len(self.ids) - place - len(number))
            if tuple(self.ids[start : start + len(number)]) == number
            and self.branch[start] in (0, self._open)
            and not encoder.digits & {self.ids[start - 1], self.ids[start + len(number)]}
        )
        return found + place

    def _token_at(self, look: Look) -> int:
        picture, x, y = look
        medium = self.media[self._first_medium]
        number, pair = (0, picture) if medium.video else (picture, 0)
        number += self._first_medium
        medium = self.media[number]
        cell = anchor_cell(x, y, (medium.rows, medium.columns))
        return self.starts[number] + pair * medium.rows * medium.columns + cell


@dataclass(frozen=True)
class Packed:
    """Rows of one length: ids [n, length], positions [3, n, length], mask [n, 1, length, length].

    ``sources`` are the flat places of the rows' media tokens; ``media`` gives their order.
    ``asked`` are the flat places whose next token is taught, ``answers`` those tokens. ``looking``
    are rows, places in them from which a token is said, and places that are looked at [3, looks].
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    media: list[Media]
    sources: list[Tensor]
    asked: Tensor
    answers: Tensor
    looking: Tensor


def pack(rows: list[Row], pad: int) -> Packed:
    """Pad the rows to the longest and build the branches' attention mask."""
    length = max(len(row.ids) for row in rows)
    length = (length + 15) // 16 * 16
    count = len(rows)
    ids = np.full((count, length), pad, np.int64)
    positions = np.zeros((3, count, length), np.int64)
    branch = np.full((count, length), -1, np.int64)
    taught = np.zeros((count, length), bool)
    media: list[Media] = []
    sources: list[Tensor] = []
    looking: list[tuple[int, int, int]] = []
    for n, row in enumerate(rows):
        size = len(row.ids)
        ids[n, :size] = row.ids
        positions[:, n, :size] = np.array(row.positions).T
        branch[n, :size] = row.branch
        taught[n, :size] = row.taught
        looking += [(n, said - 1, seen) for said, seen in row.looks]
        for medium, start in zip(row.media, row.starts, strict=True):
            cells = medium.frames * medium.rows * medium.columns
            media.append(medium)
            sources.append(torch.arange(n * length + start, n * length + start + cells))
    causal: NDArray[np.bool_] = np.tril(np.ones((length, length), bool))
    key, query = branch[:, None, :], branch[:, :, None]
    mask = causal & ((key == 0) | (key == query))
    flat = ids.reshape(-1)
    # A branch's first taught token follows the token before it in the row, never another branch:
    # every branch begins with its question.
    spots = np.flatnonzero(taught.reshape(-1))
    return Packed(
        torch.as_tensor(ids),
        torch.as_tensor(positions),
        torch.as_tensor(mask)[:, None],
        media,
        sources,
        torch.as_tensor(spots - 1),
        torch.as_tensor(flat[spots]),
        torch.tensor(looking, dtype=torch.int64).reshape(-1, 3).T,
    )
