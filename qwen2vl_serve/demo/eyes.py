"""What the decoder is shown while it learns: the visual tokens of stored pictures and videos.

A tower at rest looks at every picture once, before the lesson; a tower that learns looks anew at
each step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen2vl_serve.demo.network import Network
from qwen2vl_serve.demo.pictures import Grid, Store
from qwen2vl_serve.demo.steps import Together

STACK = 64  # pictures that a tower at rest takes at once
# A stack is filled up to a multiple of this: each new shape costs the matrix library a compilation.
FILL = 8


@dataclass(frozen=True)
class Shown:
    """One picture or video as it is shown: where it is stored, and how it is turned."""

    store: str
    index: int
    mirrored: bool = False
    reversed: bool = False


class Eyes(Protocol):
    """Visual tokens of pictures and videos."""

    def look(self, shown: list[Shown]) -> list[Tensor]:
        """The tokens [tokens, hidden] of each, in order."""


def pixels(store: Store, shown: Shown) -> NDArray[np.uint8]:
    """What the tower is given: pictures as [1, 1, 3, height, width], videos as pairs of frames."""
    frames = store.load(shown.index)
    if shown.mirrored:
        frames = frames[..., ::-1]
    if shown.store != "videos":
        return frames[None]
    if shown.reversed:
        frames = frames[::-1]
    if len(frames) % 2:
        frames = np.concatenate([frames, frames[-1:]])
    return frames.reshape(-1, 2, *frames.shape[1:])


def filled(stack: NDArray[np.uint8], multiple: int) -> Tensor:
    """The stack with its first picture repeated until its length is a multiple."""
    lack = -len(stack) % multiple
    if lack:
        stack = np.concatenate([stack, np.repeat(stack[:1], lack, axis=0)])
    return torch.as_tensor(np.ascontiguousarray(stack))


class Awake:
    """The tower itself; gradients reach it."""

    def __init__(self, network: Network, stores: dict[str, Store]) -> None:
        self._network, self._stores = network, stores

    def look(self, shown: list[Shown]) -> list[Tensor]:
        """Pictures of one grid are looked at together."""
        stacks: dict[tuple[int, ...], list[NDArray[np.uint8]]] = {}
        places: list[tuple[tuple[int, ...], int, int]] = []
        for one in shown:
            frames = pixels(self._stores[one.store], one)
            stack = stacks.setdefault(frames.shape[1:], [])
            first = sum(map(len, stack))
            places.append((frames.shape[1:], first, first + len(frames)))
            stack.append(frames)
        seen = {
            shape: self._network.visual(filled(np.concatenate(stack), FILL))
            for shape, stack in stacks.items()
        }
        return [seen[shape][first:last].flatten(0, 1) for shape, first, last in places]


class AtRest:
    """Tokens of every stored picture, in each way it is shown, kept in bfloat16."""

    def __init__(self, network: Network, stores: dict[str, Store]) -> None:
        self._stores = stores
        self._tokens: dict[Shown, Tensor] = {}
        rounded = Together({"network": network})
        for name, store in stores.items():
            for (rows, columns), members in store.members.items():
                self._look_at(rounded, network, name, members.tolist(), (rows, columns))

    def _look_at(
        self, rounded: Together, network: Network, name: str, members: list[int], grid: Grid
    ) -> None:
        store = self._stores[name]
        every = [shown for index in members for shown in ways(store, name, index)]
        for start in range(0, len(every), STACK):
            some = every[start : start + STACK]
            frames = [pixels(store, shown) for shown in some]
            stack = filled(np.concatenate(frames), STACK)
            with torch.inference_mode():
                seen: Tensor = rounded.in_working_type(partial(network.visual, stack))
            assert seen.shape[1] == grid[0] * grid[1]  # noqa: S101
            first = 0
            for shown, each in zip(some, frames, strict=True):
                tokens = seen[first : first + len(each)].flatten(0, 1)
                self._tokens[shown] = tokens.to(torch.bfloat16, copy=True)
                first += len(each)

    def look(self, shown: list[Shown]) -> list[Tensor]:
        """The kept tokens."""
        return [self._tokens[one] for one in shown]


def ways(store: Store, name: str, index: int) -> list[Shown]:
    """Every way in which this picture or video may be shown; writing is never mirrored."""
    if name == "videos":
        return [Shown(name, index, m, r) for m in (False, True) for r in (False, True)]
    written = any(thing.kind == "text" for thing in store.truths[index].things)
    return [Shown(name, index, mirrored) for mirrored in ((False,) if written else (False, True))]
