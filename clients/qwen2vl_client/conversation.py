"""A conversation: the turns so far are sent again with each question."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Unpack

from qwen2vl_client.answer import Answer
from qwen2vl_client.client import Client
from qwen2vl_client.errors import InvalidArgumentError
from qwen2vl_client.media import ImageSource, VideoSource
from qwen2vl_client.request import SYSTEM_PROMPT, Sampling, user_message, with_system
from qwen2vl_client.stream import TextStream


class Conversation:
    """Questions that may refer to earlier ones, pictures included.

    A turn enters the history once its answer is whole: one that fails, or a stream that is
    closed early, leaves the history as it was. ``sampling`` holds for every turn that does not
    say otherwise. Not for several threads at once.
    """

    def __init__(
        self,
        client: Client,
        system: str | None = SYSTEM_PROMPT,
        **sampling: Unpack[Sampling],
    ) -> None:
        self.client = client
        self._sampling = sampling
        self._messages = with_system((), system)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The turns so far in OpenAI's shape, the system message first; a copy."""
        return [dict(message) for message in self._messages]

    def ask(
        self,
        text: str | None = None,
        *,
        images: ImageSource | Sequence[ImageSource] | None = None,
        videos: str | os.PathLike[str] | bytes | Sequence[VideoSource] | None = None,
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Answer:
        """Ask the next question and return the whole answer; raises as ``Client.chat`` does."""
        turn = self._turn(text, images, videos)
        fields: Sampling = {**self._sampling, **sampling}
        answer = self.client.chat(
            messages=[*self._messages, turn], system=None, timeout=timeout, **fields
        )
        self._remember(turn, answer)
        return answer

    def stream(
        self,
        text: str | None = None,
        *,
        images: ImageSource | Sequence[ImageSource] | None = None,
        videos: str | os.PathLike[str] | bytes | Sequence[VideoSource] | None = None,
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> TextStream:
        """Ask the next question and return the answer's text as it is generated."""
        turn = self._turn(text, images, videos)
        fields: Sampling = {**self._sampling, **sampling}
        return self.client.stream(
            messages=[*self._messages, turn],
            system=None,
            timeout=timeout,
            on_complete=lambda answer: self._remember(turn, answer),
            **fields,
        )

    def _turn(self, text: str | None, images: Any, videos: Any) -> dict[str, Any]:
        turn = user_message(text, images, videos)
        if turn is None:
            raise InvalidArgumentError("nothing to ask: give a text, images or videos")
        return turn

    def _remember(self, turn: dict[str, Any], answer: Answer) -> None:
        self._messages += [turn, {"role": "assistant", "content": answer.text}]
