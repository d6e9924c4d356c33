"""Every call of a client, step by step and without I/O: what ``Client`` and ``AsyncClient`` share.

Each method returns a ``Flow``; the client's transport performs its steps.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any
from urllib.parse import quote

from qwen2vl_client.answer import Answer, Explanation, Model, StoredFile
from qwen2vl_client.checks import server_timings
from qwen2vl_client.errors import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    APITimeoutError,
    InvalidArgumentError,
    NotFoundError,
    RequestTooLargeError,
    ServerError,
)
from qwen2vl_client.media import file_content
from qwen2vl_client.request import (
    Message,
    chat_messages,
    encode,
    sampling_fields,
    user_message,
)
from qwen2vl_client.retry import RetryPolicy
from qwen2vl_client.steps import Alone, Call, Flow, Reply
from qwen2vl_client.uploads import PURPOSE, Uploads, files_of, list_call, upload_call

DEFAULT_BASE_URL = "http://127.0.0.1:8000/v1"
DEFAULT_TIMEOUT = 600.0
_CHAT = "/chat/completions"


def chosen_base_url(base_url: str | None) -> str:
    """Return the address given, the environment's, or the default."""
    return base_url or os.environ.get("QWEN2VL_BASE_URL") or DEFAULT_BASE_URL


def chosen_api_key(api_key: str | None) -> str | None:
    """Return the key given, or the environment's."""
    return os.environ.get("QWEN2VL_API_KEY") if api_key is None else api_key


@dataclass(frozen=True)
class Question:
    """What a call asks, as its caller gave it."""

    text: str | None = None
    images: Any = None
    videos: Any = None
    system: str | None = None
    messages: Sequence[Message] = ()

    def turns(self) -> list[dict[str, Any]]:
        """Return the messages; ``InvalidArgumentError`` for what cannot be sent."""
        turn = user_message(self.text, self.images, self.videos)
        return chat_messages(self.messages, turn, self.system)


@dataclass(frozen=True)
class Opened:
    """A stream that has begun; ``source`` is the transport's, ``started`` the call's beginning."""

    source: Any
    started: float


class Flows:
    """The calls to one server: its model, its retries, its uploads."""

    def __init__(
        self, base_url: str, model: str | None, max_retries: int, upload_above: int | None
    ) -> None:
        whole = isinstance(max_retries, Integral) and not isinstance(max_retries, bool)
        if not whole or max_retries < 0:
            raise InvalidArgumentError(
                f"max_retries={max_retries!r} must be a whole number, 0 or more"
            )
        self.base_url = base_url
        self.given_model = model
        self._offered: list[Model] | None = None
        self._retry = RetryPolicy(int(max_retries))
        self._uploads = Uploads(upload_above, self._retry.attempts)

    def chat(
        self,
        question: Question,
        model: str | None,
        timeout: float | None,
        fields: Mapping[str, Any],
    ) -> Flow[Answer]:
        """Ask, and return the whole answer."""
        started = time.monotonic()
        turns = question.turns()
        body = sampling_fields(fields, turns, stream=False)
        reply: Reply = yield from self._asked(_CHAT, turns, model, timeout, body)
        seconds = time.monotonic() - started
        server = server_timings(reply.headers)
        return Answer.from_raw(reply.json, reply.request_id, seconds, server=server)

    def stream(
        self,
        question: Question,
        model: str | None,
        timeout: float | None,
        fields: Mapping[str, Any],
    ) -> Flow[Opened]:
        """Ask, and return the bytes of the answer as they come.

        Retries end here: once the answer has begun nothing is sent again.
        """
        started = time.monotonic()
        turns = question.turns()
        body = sampling_fields(fields, turns, stream=True)
        source = yield from self._asked(_CHAT, turns, model, timeout, body, streamed=True)
        return Opened(source, started)

    def explain(
        self,
        question: Question,
        model: str | None,
        timeout: float | None,
        fields: Mapping[str, Any],
    ) -> Flow[Explanation]:
        """Ask what a request costs, without an answer."""
        turns = question.turns()
        body = sampling_fields(fields, turns, stream=False)
        reply = yield from self._asked(f"{_CHAT}/explain", turns, model, timeout, body)
        return Explanation.from_raw(reply.json)

    def models(self, timeout: float | None = None) -> Flow[list[Model]]:
        """List the models that the server offers."""
        reply = yield from self._retry.attempts(Call("GET", "/models", timeout=timeout))
        listed = reply.json.get("data")
        if not isinstance(listed, list) or not all(
            isinstance(entry, dict) and "id" in entry for entry in listed
        ):
            raise APIResponseError(f"{self.base_url}/models answered without a list of models")
        return [Model.from_raw(one) for one in listed]

    def model(self, given: str | None = None) -> Flow[str]:
        """Return the name of the model to ask, which the server is asked for once."""
        if given or self.given_model:
            return given or self.given_model or ""
        offered = yield from self.offered()
        if not offered:
            raise APIResponseError(f"{self.base_url} offers no model")
        return offered[0].id

    def offered(self) -> Flow[list[Model]]:
        """Return the models as they were when first asked for."""
        if (offered := self._offered) is None:
            offered = yield Alone("models", self._ask_models())
        return offered

    def _ask_models(self) -> Flow[list[Model]]:
        if (offered := self._offered) is None:
            offered = self._offered = yield from self.models()
        return offered

    def _forget_model(self, name: str) -> None:
        """Ask for the models again; unless another call has done so since ``name`` was told."""
        if self._offered and self._offered[0].id == name:
            self._offered = None

    def probe(self, path: str, timeout: float | None) -> Flow[bool]:
        """Tell whether a health route answers 200; asked once, without retries.

        False too where nothing listens, nothing comes, or a port that is published in front of a
        server breaks off; a certificate that is refused is an error.
        """
        try:
            yield Call("GET", path, timeout=timeout, from_root=True)
        except (APITimeoutError, ServerError):
            return False
        except APIConnectionError as error:
            if not error.retryable:
                raise
            return False
        return True

    def upload(
        self,
        source: Any,
        purpose: str = PURPOSE,
        filename: str | None = None,
        expires_after: int | None = None,
        timeout: float | None = None,
    ) -> Flow[StoredFile]:
        """Have the server keep a file."""
        data, name = file_content(source)
        call = upload_call(data, filename or name, purpose, expires_after, timeout)
        reply = yield from self._retry.attempts(call)
        return StoredFile.from_raw(reply.json)

    def files(
        self,
        purpose: str | None = None,
        limit: int | None = None,
        after: str | None = None,
        timeout: float | None = None,
    ) -> Flow[list[StoredFile]]:
        """List the files that the server keeps."""
        return files_of(
            (yield from self._retry.attempts(list_call(purpose, limit, after, timeout)))
        )

    def file(self, file_id: str | StoredFile, timeout: float | None = None) -> Flow[StoredFile]:
        """Describe one file."""
        reply = yield from self._retry.attempts(Call("GET", _path(file_id), timeout=timeout))
        return StoredFile.from_raw(reply.json)

    def delete(self, file_id: str | StoredFile, timeout: float | None = None) -> Flow[None]:
        """Delete one file."""
        yield from self._retry.attempts(Call("DELETE", _path(file_id), timeout=timeout))

    def _asked(
        self,
        path: str,
        turns: Sequence[Message],
        model: str | None,
        timeout: float | None,
        fields: Mapping[str, Any],
        *,
        streamed: bool = False,
    ) -> Flow[Any]:
        """Send messages; what the server has lost since (a file, the model) is seen to, once.

        Where it may know no ids, once more with all inline; if that is too much, it is the first
        refusal that is raised.
        """
        encode(fields)  # what cannot be written is told before anything is uploaded
        asked_for = model or self.given_model
        lost: set[str | None] = set()
        refused: APIStatusError | None = None
        while True:
            name = yield from self.model(model)
            inline = refused is not None
            placed = yield from self._uploads.placed(turns, timeout, inline=inline)
            body = encode({"model": name, "messages": placed.messages, **fields})
            call = Call("POST", path, body, timeout=timeout, streamed=streamed)
            try:
                answer = yield from self._retry.attempts(call)
            except NotFoundError as error:
                if error.code in lost:
                    raise
                lost.add(error.code)
                if error.code == "file_not_found" and placed.keys:
                    self._uploads.forget(placed.keys)
                elif error.code == "model_not_found" and not asked_for:
                    self._forget_model(name)
                else:
                    raise
            except (RequestTooLargeError, APIConnectionError) as error:
                if refused is not None:
                    raise refused from error
                raise
            except APIStatusError as error:
                if inline or not self._uploads.doubts(placed, error):
                    raise
                refused = error
            else:
                self._uploads.learn(placed, refused=inline)
                return answer


def _path(file_id: str | StoredFile) -> str:
    return f"/files/{quote(str(file_id), safe='')}"
