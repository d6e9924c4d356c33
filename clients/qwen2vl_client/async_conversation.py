"""``Conversation`` for asyncio."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack, cast

from qwen2vl_client import transcript
from qwen2vl_client.answer import Answer
from qwen2vl_client.async_client import AsyncClient
from qwen2vl_client.async_stream import AsyncTextStream
from qwen2vl_client.dialogue import SUMMARY_TOKENS, Dialogue, Settings
from qwen2vl_client.fitting import Event, Policy
from qwen2vl_client.media import ImageSource, VideoSource
from qwen2vl_client.request import SYSTEM_PROMPT, Sampling


class AsyncConversation:
    """As ``Conversation``, awaited; not for several tasks at once."""

    def __init__(
        self,
        client: AsyncClient,
        system: str | None = SYSTEM_PROMPT,
        *,
        overflow: Policy = "error",
        keep_last: int = 2,
        summary_prompt: str | None = None,
        summary_max_tokens: int = SUMMARY_TOKENS,
        **sampling: Unpack[Sampling],
    ) -> None:
        self.client = client
        self._dialogue = Dialogue(
            client._flows,
            system,
            overflow=overflow,
            keep_last=keep_last,
            summary_prompt=summary_prompt,
            summary_max_tokens=summary_max_tokens,
            sampling=sampling,
        )

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The turns so far in OpenAI's shape, the system message first; a copy."""
        return self._dialogue.messages

    @property
    def events(self) -> list[Event]:
        """What was done so that questions fit, the oldest first; a copy."""
        return list(self._dialogue.events)

    async def ask(
        self,
        text: str | None = None,
        *,
        images: ImageSource | Sequence[ImageSource] | None = None,
        videos: VideoSource | Sequence[VideoSource] | None = None,
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Answer:
        """Ask the next question and return the whole answer; raises as ``Client.chat`` does."""
        turn = self._dialogue.turn(text, images, videos)
        return await self.client._transport.run(self._dialogue.ask(turn, timeout, sampling))

    async def stream(
        self,
        text: str | None = None,
        *,
        images: ImageSource | Sequence[ImageSource] | None = None,
        videos: VideoSource | Sequence[VideoSource] | None = None,
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> AsyncTextStream:
        """Ask the next question and return the answer's text as it is generated."""
        dialogue = self._dialogue
        turn = dialogue.turn(text, images, videos)
        opened = await self.client._transport.run(dialogue.stream(turn, timeout, sampling))
        return AsyncTextStream(
            opened.source, opened.started, lambda answer: dialogue.remember(turn, answer)
        )

    def save(
        self, path: str | os.PathLike[str], *, pictures: transcript.Pictures = "inside"
    ) -> None:
        """Write the conversation as JSON: each picture once, named by its content's hash.

        ``pictures="beside"`` puts them into the folder ``NAME.pictures`` next to the file.
        """
        dialogue = self._dialogue
        transcript.write(Path(path), dialogue.history, dialogue.events, dialogue.settings, pictures)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], client: AsyncClient, **settings: Unpack[Settings]
    ) -> AsyncConversation:
        """Read what ``save`` wrote and go on with it, on any server.

        ``settings`` (``system``, ``overflow``, ``temperature`` …) go before those that were saved.
        ``InvalidArgumentError`` (``MediaError`` of a picture) for what cannot be read.
        """
        history, events, saved = transcript.read(Path(path))
        loaded = cls(client, **cast("Any", {"system": history.system, **saved, **settings}))
        loaded._dialogue.resume(history, events)
        return loaded
