"""The conversations of one training step: which pictures are shown, and what is asked about them."""  # noqa: E501

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qwen2vl_serve.demo.compose import Clip
from qwen2vl_serve.demo.draw import Scene
from qwen2vl_serve.demo.eyes import Shown
from qwen2vl_serve.demo.imagined import imagined
from qwen2vl_serve.demo.lesson import about_picture, about_pictures, about_video, language_of
from qwen2vl_serve.demo.names import Language
from qwen2vl_serve.demo.pictures import Grid, Store
from qwen2vl_serve.demo.rows import SYSTEM_SHARES, SYSTEMS, Encoder, Media, Packed, Row, pack
from qwen2vl_serve.demo.talk import talk_question
from qwen2vl_serve.demo.wording import Dialogue

ROW_TOKENS = 304
# Shares of a step's rows by what they are about.
KINDS = ("picture", "pictures", "video", "question first", "talk", "imagined")
KIND_SHARES = (0.39, 0.21, 0.09, 0.09, 0.05, 0.17)
PICTURES, PICTURES_SHARES = (2, 3, 4), (0.65, 0.25, 0.10)
# Four pictures fill a row of the usual length before anything is asked about them. In these steps
# rows are longer and fewer, and all of them of several pictures.
LONG_STEPS, LONG_ROW_TOKENS, LONG_SHARES = 0.2, 432, (0.1, 0.3, 0.6)
IMAGINED_SHARE = 0.06  # of the questions about pictures
# Most Chinese names of shapes end in the same token, so that two are harder to tell apart.
IMAGINED_CHINESE = 0.62
SHOUTED_SHARE = 0.03  # of all questions, beside those that are asked so


class Step:
    """The rows of one step, all drawn from the step's own generator.

    With ``few_grids`` pictures come from two grids and videos from one, so that a tower that looks
    anew at each step runs over three stacks.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        stores: dict[str, Store],
        encoder: Encoder,
        *,
        few_grids: bool,
    ) -> None:
        self._rng, self._encoder = rng, encoder
        self._pictures, self._videos = stores["pictures"], stores["videos"]
        self._grids: list[Grid] | None = None
        self._video_grid: Grid | None = None
        if few_grids:
            self._grids = [common_grid(rng, self._pictures) for _ in range(2)]
            self._video_grid = common_grid(rng, self._videos)
        self.shown: list[Shown] = []

    def _candidates(self, count: int) -> list[int]:
        rng = self._rng
        if self._grids is None:
            found = rng.integers(len(self._pictures.grids), size=count)
        else:
            grid = self._grids[int(rng.integers(2))]
            found = rng.choice(self._pictures.members[grid], count)
        return [int(index) for index in found]

    def _picture(self, like: Scene | None = None) -> tuple[Media, Scene]:
        """A picture; with ``like``, one that shares its first thing's colour or shape."""
        index = 0
        for index in self._candidates(40 if like else 1):
            if like is None or _shares(like, self._pictures.truths[index]):
                break
        scene, mirrored = self._pictures.truths[index], False
        if not any(t.kind == "text" for t in scene.things) and self._rng.random() < 0.5:
            scene, mirrored = scene.mirrored(), True
        self.shown.append(Shown("pictures", index, mirrored))
        grid = self._pictures.grids[index]
        return Media(len(self.shown) - 1, 1, *grid, video=False), scene

    def _row(self, kind: str, *, long: bool = False) -> Row:
        rng, encoder, row = self._rng, self._encoder, Row()
        tokens = LONG_ROW_TOKENS if long else ROW_TOKENS
        system = SYSTEMS[int(rng.choice(len(SYSTEMS), p=SYSTEM_SHARES))]
        row.text(encoder.opening(system))
        if kind == "question first":
            row.seal()
            while len(row.ids) < ROW_TOKENS - 110:
                self._question_first(row)
            return row
        scenes: list[Scene] = []
        clip: Clip | None = None
        if kind == "video":
            medium, clip = self._video()
            row.medium(encoder, medium)
        elif kind in ("picture", "pictures"):
            shares = LONG_SHARES if long else PICTURES_SHARES
            count = 1 if kind == "picture" else int(rng.choice(PICTURES, p=shares))
            named = count > 1 and rng.random() < 0.12
            for n in range(count):
                if named:
                    row.text(encoder.encode(f"Picture {n + 1}: "))
                # Left to chance, two pictures would hardly ever agree in anything.
                alike = len(scenes) == 1 and rng.random() < 0.45
                medium, scene = self._picture(scenes[0] if alike else None)
                row.medium(encoder, medium)
                scenes.append(scene)
        row.seal()
        misses = 0
        while len(row.ids) < tokens - 30 and misses < 25:
            dialogue = self._asked(kind, scenes, clip)
            if dialogue is None:
                misses += 1
                continue
            row.begin()
            row.dialogue(encoder, dialogue, "\n" if rng.random() < 0.08 else "")
        return row

    def _asked(self, kind: str, scenes: list[Scene], clip: Clip | None) -> Dialogue | None:
        rng = self._rng
        if kind == "imagined" or (scenes and rng.random() < IMAGINED_SHARE):
            language: Language = "zh" if rng.random() < IMAGINED_CHINESE else "en"
            dialogue = imagined(rng, language, len(scenes) or int(rng.integers(1, 5)))
        elif kind == "picture":
            dialogue = about_picture(rng, scenes[0])
        elif kind == "pictures":
            dialogue = about_pictures(rng, scenes)
        elif clip is not None:
            dialogue = about_video(rng, clip)
        else:
            dialogue = talk_question(rng, language_of(rng))
        if dialogue is not None and rng.random() < SHOUTED_SHARE:
            return shouted(dialogue)
        return dialogue

    def _question_first(self, row: Row) -> None:
        rng = self._rng
        count = int(rng.choice([1, 2], p=[0.75, 0.25]))
        found = [self._picture() for _ in range(count)]
        scenes = [scene for _, scene in found]
        dialogue: Dialogue | None = None
        for _ in range(30):
            dialogue = about_picture(rng, scenes[0]) if count == 1 else about_pictures(rng, scenes)
            if dialogue is not None:
                break
        if dialogue is None:
            return
        row.begin()
        row.text(self._encoder.encode(dialogue.turns[0].question))
        for medium, _ in found:
            row.medium(self._encoder, medium)
        row.answers(self._encoder, dialogue)

    def _video(self) -> tuple[Media, Clip]:
        rng = self._rng
        if self._video_grid is None:
            index = int(rng.integers(len(self._videos.grids)))
        else:
            index = int(rng.choice(self._videos.members[self._video_grid]))
        clip, mirrored, backwards = self._videos.truths[index], rng.random() < 0.5, False
        if mirrored:
            clip = clip.mirrored()
        if rng.random() < 0.5:
            clip, backwards = clip.reversed(), True
        self.shown.append(Shown("videos", index, mirrored, backwards))
        pairs = (self._videos.frames[index] + 1) // 2
        grid = self._videos.grids[index]
        return Media(len(self.shown) - 1, pairs, *grid, video=True), clip

    def rows(self, count: int) -> Packed:
        """``count`` rows of the mixture, or fewer that are longer."""
        if self._rng.random() < LONG_STEPS:
            fewer = max(1, count * ROW_TOKENS // LONG_ROW_TOKENS)
            rows = [self._row("pictures", long=True) for _ in range(fewer)]
        else:
            kinds = self._rng.choice(KINDS, count, p=KIND_SHARES)
            rows = [self._row(str(kind)) for kind in kinds]
        return pack(rows, self._encoder.pad)


def shouted(dialogue: Dialogue) -> Dialogue:
    """The same dialogue, its first question in capitals."""
    first, *later = dialogue.turns
    return replace(dialogue, turns=(replace(first, question=first.question.upper()), *later))


def _shares(one: Scene, other: Scene) -> bool:
    if len(one.things) != 1 or len(other.things) != 1:
        return False
    a, b = one.things[0], other.things[0]
    return "text" not in (a.kind, b.kind) and (a.kind == b.kind or a.colour == b.colour)


def common_grid(rng: np.random.Generator, store: Store) -> Grid:
    """A grid, each as likely as its pictures are many."""
    grids = list(store.members)
    share = np.array([len(store.members[g]) for g in grids], dtype=np.float64)
    return grids[int(rng.choice(len(grids), p=share / share.sum()))]
