"""A conversation: the turns so far are sent again with each question, and always fit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack, cast

from qwen2vl_client import transcript
from qwen2vl_client.answer import Answer
from qwen2vl_client.client import Client
from qwen2vl_client.dialogue import SUMMARY_TOKENS, Dialogue, Settings
from qwen2vl_client.fitting import Event, Policy
from qwen2vl_client.media import ImageSource, VideoSource
from qwen2vl_client.request import SYSTEM_PROMPT, Sampling
from qwen2vl_client.stream import TextStream


class Conversation:
    """Questions that may refer to earlier ones, pictures included.

    ``overflow`` says what is done **before** a question would no longer fit into the server's
    window, ``max_tokens`` included: ``error`` nothing (the server refuses it); ``summarise`` has
    the model sum up the oldest turns and puts the summary in their place;
    ``drop_oldest_images`` puts words in place of the oldest pictures, and leaves out turns when
    none is left; ``drop_oldest_turns`` leaves out the oldest turns. The system message and the
    question are always sent, and the last ``keep_last`` turns unless there is no other way.
    Pictures of turns that go stay where they are still referred to: named with their number
    ("picture 3", 第3张图) or as the last one, in the question or in one of the last ``keep_last``
    turns.
    ``events`` tells what was done.

    A turn enters the history once its answer is whole: one that fails, or a stream that is
    closed early, adds nothing to it. ``sampling`` holds for every turn that does not
    say otherwise. Not for several threads at once.
    """

    def __init__(
        self,
        client: Client,
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

    def ask(
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
        return self.client._transport.run(self._dialogue.ask(turn, timeout, sampling))

    def stream(
        self,
        text: str | None = None,
        *,
        images: ImageSource | Sequence[ImageSource] | None = None,
        videos: VideoSource | Sequence[VideoSource] | None = None,
        timeout: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> TextStream:
        """Ask the next question and return the answer's text as it is generated."""
        dialogue = self._dialogue
        turn = dialogue.turn(text, images, videos)
        opened = self.client._transport.run(dialogue.stream(turn, timeout, sampling))
        return TextStream(
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
        cls, path: str | os.PathLike[str], client: Client, **settings: Unpack[Settings]
    ) -> Conversation:
        """Read what ``save`` wrote and go on with it, on any server.

        ``settings`` (``system``, ``overflow``, ``temperature`` …) go before those that were saved.
        ``InvalidArgumentError`` (``MediaError`` of a picture) for what cannot be read.
        """
        history, events, saved = transcript.read(Path(path))
        loaded = cls(client, **cast("Any", {"system": history.system, **saved, **settings}))
        loaded._dialogue.resume(history, events)
        return loaded
