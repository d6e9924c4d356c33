"""The routes under ``/v1/batches``, in OpenAI's shapes. A batch belongs to the key that made it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from qwen2vl_serve.auth.keys import Caller
from qwen2vl_serve.batches.lines import ENDPOINT
from qwen2vl_serve.batches.runner import Runner
from qwen2vl_serve.batches.store import Batch, NoSuchBatch
from qwen2vl_serve.errors import (
    InternalError,
    InvalidValue,
    RateLimited,
    RouteNotFound,
    UnknownBatch,
    UnknownFile,
)
from qwen2vl_serve.media.files import NoSuchFile
from qwen2vl_serve.protocol.validation import as_request_error, parse_json

PURPOSE = "batch"
"""What an input file was uploaded for."""

MOST_LISTED = 100
LISTED = 20

_TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
"""Statuses whose times OpenAI's object tells, as ``in_progress_at``."""


class BatchRequest(BaseModel):
    """Body of ``POST /v1/batches``."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    input_file_id: str
    endpoint: Literal["/v1/chat/completions"]
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = None

    @field_validator("metadata")
    @classmethod
    def _short(cls, given: dict[str, str] | None) -> dict[str, str] | None:
        pairs = given or {}
        if len(pairs) > 16 or any(len(k) > 64 or len(v) > 512 for k, v in pairs.items()):
            raise PydanticCustomError(
                "metadata", "at most 16 pairs, of at most 64 and 512 characters, are kept"
            )
        return given


class BatchesAPI:
    """The routes over a runner; without one they say that batches are off.

    ``read`` returns a request's body, ``admit`` raises while nothing new is taken.
    """

    def __init__(
        self,
        runner: Runner | None,
        most_unfinished: int,
        read: Callable[[Request], Awaitable[bytes]],
        admit: Callable[[], None],
    ) -> None:
        self.runner = runner
        self.most_unfinished = most_unfinished
        self._read = read
        self._admit = admit
        self._creating = asyncio.Lock()  # so that each counts those before it

    async def create(self, request: Request) -> JSONResponse:
        """Take a batch over an uploaded file of requests."""
        runner = self._runner()
        self._admit()
        data = parse_json(await self._read(request))
        try:
            asked = BatchRequest.model_validate(data)
        except ValidationError as error:
            raise as_request_error(error.errors(include_url=False)[0]) from None
        async with self._creating:
            batch = await self._create(runner, asked, _owner(request))
        return JSONResponse(_object(batch))

    async def _create(self, runner: Runner, asked: BatchRequest, owner: str) -> Batch:
        if len(runner.store.unfinished()) >= self.most_unfinished:
            raise RateLimited(
                f"{self.most_unfinished} batches are not yet finished, as many as the server "
                "takes; wait for one.",
            )
        try:
            file = runner.store.files.find(asked.input_file_id, owner)
            if file.purpose != PURPOSE:
                raise InvalidValue(
                    f"input_file_id is a file of the purpose {file.purpose!r}; upload the "
                    f"requests with purpose {PURPOSE!r}.",
                    param="input_file_id",
                )
            content = await asyncio.to_thread(runner.store.files.read, file.id, owner)
        except NoSuchFile:
            raise UnknownFile(
                f"No file {asked.input_file_id[:80]!r} is here; upload the requests with purpose "
                f"{PURPOSE!r}.",
                param="input_file_id",
            ) from None
        try:
            add = runner.store.add
            batch = await asyncio.to_thread(add, owner, file.id, content, asked.metadata)
        except OSError as error:
            raise InternalError(f"The batch cannot be kept: {error.strerror}.") from None
        runner.take(batch)
        return batch

    async def list(self, request: Request) -> JSONResponse:
        """List the caller's batches, the newest first."""
        query = request.query_params
        limit = _limit(query.get("limit"))
        batches = self._runner().store.listing(_owner(request))
        if (after := query.get("after")) is not None:
            places = (place for place, batch in enumerate(batches, 1) if batch.id == after)
            batches = batches[next(places, len(batches)) :]
        page = batches[:limit]
        return JSONResponse(
            {
                "object": "list",
                "data": [_object(batch) for batch in page],
                "first_id": page[0].id if page else None,
                "last_id": page[-1].id if page else None,
                "has_more": len(batches) > limit,
            }
        )

    async def retrieve(self, batch_id: str, request: Request) -> JSONResponse:
        """Describe one batch."""
        return JSONResponse(_object(self._find(batch_id, request)))

    async def cancel(self, batch_id: str, request: Request) -> JSONResponse:
        """Ask nothing more of a batch; what is being answered still comes."""
        batch = self._find(batch_id, request)
        if not batch.unfinished:
            raise InvalidValue(
                f"The batch is {batch.status} already; only one that is not finished can be "
                "cancelled.",
                param="batch_id",
            )
        await self._runner().cancel(batch)
        return JSONResponse(_object(batch))

    def _find(self, batch_id: str, request: Request) -> Batch:
        try:
            return self._runner().store.find(batch_id, _owner(request))
        except NoSuchBatch:
            raise UnknownBatch(
                f"No batch {batch_id[:60]!r} is here: it never was, or finished long ago.",
                param="batch_id",
            ) from None

    def _runner(self) -> Runner:
        if self.runner is None:
            raise RouteNotFound("Batches are off: batches.enabled is false in the profile.")
        self.runner.start()
        return self.runner


def _owner(request: Request) -> str:
    caller: Caller = request.state.caller
    return caller.name


def _limit(text: str | None) -> int:
    if text is None:
        return LISTED
    if not (text.isascii() and text.isdigit() and len(text) < 4 and 1 <= int(text) <= MOST_LISTED):
        raise InvalidValue(
            f"limit is {text[:40]!r}; it must be a number from 1 to {MOST_LISTED}.", param="limit"
        )
    return int(text)


def _object(batch: Batch) -> dict[str, Any]:
    """Return OpenAI's batch object."""
    faults = {"object": "list", "data": [fault.told() for fault in batch.faults]}
    counts = {"total": batch.total, "completed": batch.completed, "failed": batch.failed}
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": ENDPOINT,
        "errors": faults if batch.faults else None,
        "input_file_id": batch.input_file_id,
        "completion_window": "24h",
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": batch.created_at,
        "expires_at": batch.expires_at,
        **{f"{status}_at": batch.reached.get(status) for status in _TIMES},
        "request_counts": counts,
        "metadata": batch.metadata,
    }
