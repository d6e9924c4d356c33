"""A conversation without I/O: what ``Conversation`` and ``AsyncConversation`` share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any

from qwen2vl_client.answer import Answer, Explanation, Model
from qwen2vl_client.errors import (
    APIResponseError,
    APIStatusError,
    BadRequestError,
    InvalidArgumentError,
    NotFoundError,
)
from qwen2vl_client.fitting import POLICIES, Event, Fitting, Policy
from qwen2vl_client.flows import Flows, Opened, Question
from qwen2vl_client.history import MARKERS, History, Kind, Message, count_of, text_of
from qwen2vl_client.request import (
    DEFAULT_SAMPLING,
    Sampling,
    check_fields,
    user_message,
)
from qwen2vl_client.steps import Flow
from qwen2vl_client.wording import Wording, wording_for

SUMMARY_TOKENS = 256
KINDS: tuple[Kind, ...] = ("image", "video")


class Settings(Sampling, total=False):
    """What a conversation is made with, but for its client."""

    system: str | None
    overflow: Policy
    keep_last: int
    summary_prompt: str | None
    summary_max_tokens: int


class Dialogue:
    """The turns so far, and what is done so that the next one fits; see ``Conversation``."""

    def __init__(
        self,
        flows: Flows,
        system: str | None,
        *,
        overflow: Policy,
        keep_last: int,
        summary_prompt: str | None,
        summary_max_tokens: int,
        sampling: Sampling,
    ) -> None:
        if overflow not in POLICIES:
            raise InvalidArgumentError(
                f"overflow={overflow!r} is none of {', '.join(map(repr, POLICIES))}"
            )
        for name, value, least in (
            ("keep_last", keep_last, 0),
            ("summary_max_tokens", summary_max_tokens, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise InvalidArgumentError(f"{name}={value!r} must be {least} or more")
        if not isinstance(system, str | None):
            raise InvalidArgumentError(f"system={system!r:.80} must be a text or None")
        if not isinstance(summary_prompt, str | None):
            raise InvalidArgumentError(f"summary_prompt={summary_prompt!r} must be a text or None")
        check_fields(sampling)
        self.flows = flows
        self.overflow: Policy = overflow
        self.keep_last = int(keep_last)
        self.summary_prompt = summary_prompt
        self.summary_max_tokens = int(summary_max_tokens)
        self.sampling = sampling
        self.history = History(system)
        self.events: list[Event] = []

    @property
    def messages(self) -> list[Message]:
        """The messages that the next question will follow; a copy."""
        return self.history.messages(self._wording({}))

    @property
    def settings(self) -> dict[str, Any]:
        """What the conversation was made with, but for its client and system message."""
        return {
            "overflow": self.overflow,
            "keep_last": self.keep_last,
            "summary_prompt": self.summary_prompt,
            "summary_max_tokens": self.summary_max_tokens,
            **self.sampling,
        }

    def resume(self, history: History, events: list[Event]) -> None:
        """Go on from where a saved conversation was, under this one's system message."""
        if history.system != self.history.system:
            history = replace(history, system=self.history.system, known=None)
        self.history, self.events = history, events

    def turn(self, text: str | None, images: Any, videos: Any) -> Message:
        """Return the next question as a message."""
        turn = user_message(text, images, videos)
        if turn is None:
            raise InvalidArgumentError("nothing to ask: give a text, images or videos")
        return turn

    def ask(self, turn: Message, timeout: float | None, given: Sampling) -> Flow[Answer]:
        """Ask, and remember the turn once its answer is whole."""
        answer: Answer = yield from self._sent(turn, timeout, given, streamed=False)
        self.remember(turn, answer)
        return answer

    def stream(self, turn: Message, timeout: float | None, given: Sampling) -> Flow[Opened]:
        """Ask, and return the answer's bytes; ``remember`` takes the turn when it is whole."""
        opened: Opened = yield from self._sent(turn, timeout, given, streamed=True)
        return opened

    def remember(self, turn: Message, answer: Answer) -> None:
        """Take a turn into the history, with what it costs as far as the server has told."""
        wording = self._wording(turn)
        sent = [*self.history.messages(wording), turn]
        self.history = self.history.learnt(sent, answer.media)
        usage = answer.usage
        tokens = None
        if usage is not None and usage.prompt_tokens and answer.overflow is None:
            tokens = usage.prompt_tokens + usage.completion_tokens + MARKERS
        self.history = self.history.grown(turn, answer.message, tokens, wording)

    def _sent(
        self, turn: Message, timeout: float | None, given: Sampling, *, streamed: bool
    ) -> Flow[Any]:
        """Make room and ask; where the server still finds it too long, make more room."""
        fields: Mapping[str, Any] = {**self.sampling, **given}
        wording = self._wording(turn)
        work = Fitting(self.history, turn, 0, 0, self.keep_last, wording, [])
        if self.overflow != "error":
            yield from self._prepare(work, fields, timeout)
        call = self.flows.stream if streamed else self.flows.chat
        while True:
            question = Question(messages=self._messages(work))
            try:
                answer = yield from call(question, None, timeout, fields)
            except BadRequestError as error:
                if not (yield from self._recovered(error, work, fields, timeout)):
                    raise
                continue
            self.history = work.history
            self.events += work.events
            return answer

    def _prepare(
        self, work: Fitting, fields: Mapping[str, Any], timeout: float | None
    ) -> Flow[None]:
        """Make the room that is known to be needed; asks the server only where it may be."""
        model = yield from self._served()
        if model is None or not model.max_model_len:
            return
        work.window = model.max_model_len
        room = work.window - _answer_tokens(fields)
        if room <= 0:
            return  # nothing would fit: the server says so best
        limits = model.raw.get("limit_mm_per_prompt")
        for kind in KINDS:
            limit = limits.get(kind) if isinstance(limits, dict) else None
            if isinstance(limit, int):
                rest = limit - count_of(work.question, kind)
                while (excess := work.history.count(kind) - rest) > 0:
                    if not (yield from self._fewer(kind, work, excess, timeout)):
                        break
        before = work.history.total(work.wording)
        more = work.history.bound(work.question)
        if before is not None and more is not None and before + more <= room:
            return
        yield from self._measured(work, fields, room, timeout)

    def _measured(
        self, work: Fitting, fields: Mapping[str, Any], room: int, timeout: float | None
    ) -> Flow[None]:
        """Have the server count the request, and make as much room as is needed."""
        told = yield from self._explained(work, fields, timeout)
        if told is not None:
            work.excess = told.prompt_tokens - room
        else:
            before = work.history.total(work.wording)
            more = work.history.bound(work.question)
            work.excess = 0 if before is None or more is None else before + more - room
        while work.excess > 0 and (yield from self._act(work, timeout)):
            pass

    def _recovered(
        self,
        error: BadRequestError,
        work: Fitting,
        fields: Mapping[str, Any],
        timeout: float | None,
    ) -> Flow[bool]:
        """Make more room after a refusal; False where there is nothing left to give up."""
        if self.overflow == "error" or not work.window:
            return False
        if error.code == "too_many_items":
            # Nobody tells of which: of what the question shows, for its history was taken.
            for kind in sorted(KINDS, key=lambda kind: not count_of(work.question, kind)):
                if (yield from self._fewer(kind, work, 1, timeout)):
                    return True
            return False
        if error.code != "context_length_exceeded":
            return False
        room = work.window - _answer_tokens(fields)
        told = yield from self._explained(work, fields, timeout)
        work.excess = max(told.prompt_tokens - room if told else work.window // 8, 1)
        return (yield from self._act(work, timeout))

    def _act(self, work: Fitting, timeout: float | None) -> Flow[bool]:
        """Do once what the policy says; False where there is nothing left to give up."""
        if self.overflow == "summarise" and work.history.turns:
            return (yield from self._summarised(work, timeout))
        if self.overflow == "drop_oldest_images" and work.drop_images():
            return True
        return work.drop_turns()

    def _fewer(self, kind: Kind, work: Fitting, excess: int, timeout: float | None) -> Flow[bool]:
        """Send fewer pictures or videos, as the policy says; False where none is left."""
        if not work.history.count(kind):
            return False
        if self.overflow == "drop_oldest_turns":
            work.excess = max(work.excess, 1)
            return work.drop_turns()
        if self.overflow == "summarise" and len(work.history.turns) > self.keep_last:
            return (yield from self._summarised(work, timeout))
        return work.drop_images(excess) if kind == "image" else work.drop_videos(excess)

    def _summarised(self, work: Fitting, timeout: float | None) -> Flow[bool]:
        def ask(messages: list[Message], most_tokens: int) -> Flow[Answer]:
            fields = {**self.sampling, "max_tokens": most_tokens, "temperature": 0.0}
            kept = {name: fields[name] for name in _OF_A_SUMMARY if name in fields}
            answer = yield from self.flows.chat(Question(messages=messages), None, timeout, kept)
            return answer

        instruction = self.summary_prompt or work.wording.instruction
        return (yield from work.summarise(ask, instruction, self.summary_max_tokens))

    def _explained(
        self, work: Fitting, fields: Mapping[str, Any], timeout: float | None
    ) -> Flow[Explanation | None]:
        """Return what the request costs; None of a server that does not tell."""
        messages = self._messages(work)
        question = Question(messages=messages)
        try:
            told = yield from self.flows.explain(question, None, timeout, fields)
        except NotFoundError as error:
            if error.code in ("file_not_found", "model_not_found"):
                raise
            return None
        except APIStatusError as error:
            if error.status not in (400, 405, 501):
                raise
            return None
        work.history = work.history.learnt(messages, told.media)
        return told

    def _served(self) -> Flow[Model | None]:
        """Return what the server says of its model; None where it keeps no list."""
        try:
            name = yield from self.flows.model()
            offered = yield from self.flows.offered()
        except (NotFoundError, APIResponseError):
            return None
        return next((one for one in offered if one.id == name), None)

    def _messages(self, work: Fitting) -> list[Message]:
        history, wording = work.history, work.wording
        if not (history.turns or history.note):
            # Alone it is sent as it was asked: a label might be what no longer fits.
            return [*history.messages(wording), dict(work.question)]
        numbers = history.numbers_of(work.question)
        asked = history.shown(work.question, numbers, wording)
        return [*history.messages(wording), asked]

    def _wording(self, turn: Mapping[str, Any]) -> Wording:
        said = [text_of(one.user) for one in self.history.turns[-8:]]
        return wording_for([*said, text_of(turn)])


_OF_A_SUMMARY = (
    "max_tokens", "temperature", "mm_processor_kwargs", "vl_high_resolution_images",
    "media_io_kwargs",
)  # fmt: skip
"""Of a conversation's sampling fields, those that also hold for its summaries."""


def _answer_tokens(fields: Mapping[str, Any]) -> int:
    """Return how much of the window an answer may take."""
    newer = fields.get("max_completion_tokens")
    name = "max_tokens" if newer is None else "max_completion_tokens"
    given = fields.get(name, DEFAULT_SAMPLING["max_tokens"])
    try:
        return 1 if given is None else int(given)
    except (TypeError, ValueError, OverflowError):
        raise InvalidArgumentError(f"{name}={given!r} must be a whole number of tokens") from None
