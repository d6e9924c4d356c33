"""What the app asks of an engine; nothing here knows vLLM."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from qwen2vl_serve.protocol.chat import ChatRequest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One name that clients may put into ``model``.

    ``max_model_len`` is in tokens, ``created`` in seconds since the epoch. ``parent`` is the model
    that an adapter changes, None for a model itself.
    """

    id: str
    created: int
    max_model_len: int
    parent: str | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter that has been read and found sound.

    ``rank`` is the largest of its parts, ``base`` the model it says it was trained on. Of its
    ``parts``, each a linear layer, ``vision_parts`` belong to the vision tower. ``digest`` stands
    for the content of its files.
    """

    folder: Path
    rank: int
    base: str | None
    parts: int
    vision_parts: int
    digest: str


@dataclass(slots=True)
class Usage:
    """Tokens of one request, as far as the engine has told.

    ``summary_tokens`` are those of summaries that were made before its answer.
    """

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    summary_tokens: int = 0


class Item(Protocol):
    """What pictures and videos have in common."""

    @property
    def visual_tokens(self) -> int:
        """Tokens in the prompt, without the two markers."""
        ...

    @property
    def param(self) -> str:
        """Where it stands in the request, for messages."""
        ...


class Picture(Item, Protocol):
    """A picture as an engine takes it: pixels on demand, known by its content."""

    @property
    def key(self) -> str:
        """Stands for the pixels: equal keys have equal pixels."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of ``pixels``, known without decoding."""
        ...

    def pixels(self) -> NDArray[np.uint8]:
        """Return RGB at the model's size, uint8 [height, width, 3]."""
        ...


class Video(Item, Protocol):
    """A video as an engine takes it: frames on demand, known by its content."""

    @property
    def key(self) -> str:
        """Stands for the frames and their rate: equal keys have equal ones."""
        ...

    @property
    def frames_taken(self) -> int:
        """How many frames there are, an even number; known before they are decoded."""
        ...

    @property
    def sampled_fps(self) -> float:
        """Frames a second of the video that were taken: Qwen2.5-VL counts its time by them."""
        ...

    def frames(self) -> NDArray[np.uint8]:
        """Return RGB at the model's size, uint8 [frames, height, width, 3], of even length."""
        ...


Medium = Picture | Video

EngineState = Literal["serving", "hung", "starting"]
"""``starting`` is also one that was lost and is being started anew."""


class Engine(Protocol):
    """An engine that is up; its errors are ``APIError`` of ``qwen2vl_serve.errors``.

    ``media`` are the pictures and videos of the request's parts, in their order.
    """

    @property
    def models(self) -> Sequence[ServedModel]:
        """The served names: the profile's, its first name first, then adapters."""
        ...

    @property
    def version(self) -> str:
        """Name and version of the engine, as ``vllm 0.32.0``."""
        ...

    @property
    def max_item_tokens(self) -> int:
        """Most visual tokens that are computed of a single picture or video."""
        ...

    @property
    def max_video_seconds(self) -> float:
        """Most seconds that all videos of a request span; infinite for a model without time."""
        ...

    @property
    def progress(self) -> int:
        """A number that grows with every step that brings some request forward."""
        ...

    @property
    def pending(self) -> int:
        """How many requests have been started and not ended."""
        ...

    @property
    def states(self) -> Sequence[EngineState]:
        """What each engine behind this one does; a single engine has one."""
        ...

    async def complete(
        self, request: ChatRequest, media: Sequence[Medium], request_id: str, usage: Usage
    ) -> bytes:
        """Answer at once: a ``chat.completion`` object as JSON.

        Cancelling the call aborts the generation. ``usage`` is filled in as it becomes known.
        """
        ...

    def stream(
        self, request: ChatRequest, media: Sequence[Medium], request_id: str, usage: Usage
    ) -> AsyncGenerator[str, None]:
        """Answer token by token: each value is the JSON of one ``chat.completion.chunk``.

        ``usage`` is filled in as it becomes known: exactly at the end, before that with the least
        that it can be. An ``APIError`` before the first value means that nothing was generated;
        after it, that the answer is cut short. Closing the iterator aborts the generation.
        """
        ...

    async def load_adapter(self, name: str, adapter: Adapter) -> ServedModel:
        """Load an adapter under a name, or another one in its place.

        Raises:
            TooManyItems: as many are held as there is room for.
            InvalidValue: the engine refuses it.
        """
        ...

    async def unload_adapter(self, name: str) -> None:
        """Take an adapter away; answers that use it end as they would have.

        Raises:
            ModelNotFound: there is none of this name.
        """
        ...

    def count_tokens(self, request: ChatRequest) -> int:
        """Return the prompt's tokens, each picture and video as one; the engine is not asked."""
        ...

    async def probe(self) -> None:
        """Generate one token of nothing in particular; raise ``EngineUnavailable`` if it cannot."""
        ...

    async def check(self) -> None:
        """Return when the engine answers; raise ``EngineUnavailable`` when it does not."""
        ...
