"""The routes of uploaded files, in OpenAI's shapes: send a picture once, name it afterwards.

A file belongs to the key that uploaded it: to any other it is not there. Keys without a name, and
an open server's clients, are one owner.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import Receive, Scope, Send

from qwen2vl_serve.admission import Admission
from qwen2vl_serve.auth.keys import Caller
from qwen2vl_serve.errors import (
    InternalError,
    InvalidType,
    InvalidValue,
    MissingParameter,
    RateLimited,
    RequestTimeout,
    RequestTooLarge,
    RouteNotFound,
    UnknownFile,
    UnsupportedContentType,
)
from qwen2vl_serve.media.files import FileStore, NoSuchFile, StoredFile

logger = logging.getLogger("qwen2vl_serve.requests")

PURPOSES = ("vision", "user_data")
"""What OpenAI's clients say of files that are shown to a model."""

BATCH = "batch"
"""And of files that hold the requests of a batch; these have a store of their own."""

AT_ONCE = 16
"""Most uploads that are received at a time; each may take ``RECEIVE_SECONDS``."""

OF_ONE_KEY = AT_ONCE // 2
"""Most of these that one named key may have: slow ones must not keep all others out."""

RECEIVE_SECONDS = 300.0

FORM_BYTES = 64 * 1024
"""What a form may hold beside its file: boundaries, part headers, fields."""

PIECE_BYTES = 256 * 1024
"""How much of a file is held while it is sent."""

MAX_LIST = 10_000

UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": [*PURPOSES, BATCH]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 1},
                    },
                }
            }
        },
    }
}
"""The upload's body for the OpenAPI document."""


class FilesAPI:
    """The routes under ``/v1/files``, over a store; without one they say that uploads are off.

    ``inspect`` raises an ``APIError`` for bytes that are not to be kept, ``admit`` one while
    nothing new is taken; ``admission`` has the places for uploads being received. ``batches`` keeps
    what batches read and write, each file of at most ``max_batch_bytes``; without it they are off.
    """

    def __init__(
        self,
        store: FileStore | None,
        inspect: Callable[[bytes, str], object],
        max_file_bytes: int,
        admit: Callable[[], None],
        admission: Admission,
        *,
        batches: FileStore | None = None,
        max_batch_bytes: int = 0,
    ) -> None:
        self.store = store
        self.batches = batches
        self.max_batch_bytes = max_batch_bytes
        self.inspect = inspect
        self.max_file_bytes = max_file_bytes
        self.admit = admit
        self.admission = admission
        self._receiving: Counter[str] = Counter()
        # Few threads: each holds a whole file while it is looked at and written.
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="upload")

    async def create(self, request: Request) -> JSONResponse:
        """Take a file and keep it for a while; the same bytes have the same id."""
        self.admit()
        self._stores()
        _check_kind(request.headers)
        with self._one_more(_owner(request)):
            place = await self.admission.place(_owner(request))
            try:
                with _disk():
                    form = await self._receive(request)
            finally:
                place.leave()
        try:
            upload = _file(form)
            purpose = _purpose(form, batches=self.batches is not None)
            store = self._store(purpose)
            section = "batches" if purpose == BATCH else "files"
            seconds = _seconds(form, store.ttl_seconds, section)
            with _disk():
                file = await asyncio.get_running_loop().run_in_executor(
                    self._pool, self._keep, store, upload, purpose, seconds, _owner(request)
                )
        finally:
            await form.close()
        return JSONResponse(_object(file))

    async def list(self, request: Request) -> JSONResponse:
        """List the files that are kept."""
        query = request.query_params
        limit = _limit(query.get("limit"))
        order = _one_of(query.get("order", "desc"), ("asc", "desc"), "order")
        files = [
            file
            for store in self._stores()
            for file in store.listing(_owner(request))
            if query.get("purpose") in (None, file.purpose)
        ]
        files.sort(key=lambda file: -file.created_at)
        if order == "asc":
            files.reverse()
        if (after := query.get("after")) is not None:
            place = next((n for n, file in enumerate(files, 1) if file.id == after), len(files))
            files = files[place:]
        page = files[:limit]
        return JSONResponse(
            {
                "object": "list",
                "data": [_object(file) for file in page],
                "first_id": page[0].id if page else None,
                "last_id": page[-1].id if page else None,
                "has_more": len(files) > limit,
            }
        )

    async def retrieve(self, file_id: str, request: Request) -> JSONResponse:
        """Describe one file."""
        return JSONResponse(_object(self._find(file_id, request)[1]))

    async def content(self, file_id: str, request: Request) -> StreamingResponse:
        """Return a file's bytes."""
        store, file = self._find(file_id, request)
        kind = "application/jsonl" if store is self.batches else "application/octet-stream"
        try:
            source = await asyncio.to_thread(store.open, file.id, file.owner)
        except NoSuchFile:
            raise _unknown(file_id) from None
        return _FileResponse(source, file.bytes, kind)

    async def delete(self, file_id: str, request: Request) -> JSONResponse:
        """Delete one file."""
        store, file = self._find(file_id, request)
        try:
            await asyncio.to_thread(store.delete, file.id, file.owner)
        except NoSuchFile:
            raise _unknown(file_id) from None
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    def _find(self, file_id: str, request: Request) -> tuple[FileStore, StoredFile]:
        for store in self._stores():
            with contextlib.suppress(NoSuchFile):
                return store, store.find(file_id, _owner(request))
        raise _unknown(file_id)

    def _stores(self) -> Sequence[FileStore]:
        stores = [store for store in (self.store, self.batches) if store is not None]
        if not stores:
            raise RouteNotFound("Uploads are off: files.max_files is 0 in the server's profile.")
        return stores

    def _store(self, purpose: str) -> FileStore:
        store = self.batches if purpose == BATCH else self.store
        if store is None:
            raise RouteNotFound("Uploads are off: files.max_files is 0 in the server's profile.")
        return store

    @contextlib.contextmanager
    def _one_more(self, owner: str) -> Iterator[None]:
        """Count an upload of a key; raises ``RateLimited`` where a named one has too many."""
        if owner and self._receiving[owner] >= OF_ONE_KEY:
            raise RateLimited(
                f"This key sends {OF_ONE_KEY} uploads already, as many as one may at a time; wait "
                "for one.",
                retry_after=1,
            )
        self._receiving[owner] += 1
        try:
            yield
        finally:
            self._receiving[owner] -= 1
            if not self._receiving[owner]:
                del self._receiving[owner]

    async def _receive(self, request: Request) -> FormData:
        """Read the form; what exceeds a small part of it waits on disk, not in memory."""
        parser = MultiPartParser(
            request.headers,
            self._capped(request),
            max_files=1,
            max_fields=16,
            max_part_size=4096,
        )
        try:
            async with asyncio.timeout(RECEIVE_SECONDS):
                return await parser.parse()
        except TimeoutError:
            raise RequestTimeout(
                f"The upload took more than {RECEIVE_SECONDS:.0f} seconds; send a smaller file."
            ) from None
        except MultiPartException:
            raise InvalidValue(
                "The body is not a form of one file and a few short fields: send it as "
                "multipart/form-data with file and purpose."
            ) from None

    async def _capped(self, request: Request) -> AsyncGenerator[bytes, None]:
        limit = max(self.max_file_bytes, self.max_batch_bytes) + FORM_BYTES
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and len(declared) < 20 and int(declared) > limit:
            raise self._too_large(int(declared))
        size = 0
        async for piece in request.stream():
            size += len(piece)
            if size > limit:
                raise self._too_large(size)
            yield piece

    def _keep(
        self,
        store: FileStore,
        upload: UploadFile,
        purpose: str,
        seconds: float | None,
        owner: str,
    ) -> StoredFile:
        data = upload.file.read()
        batch = purpose == BATCH
        if len(data) > (self.max_batch_bytes if batch else self.max_file_bytes):
            raise self._too_large(len(data), batch=batch)
        if not batch:
            self.inspect(data, "file")
        return store.add(data, _plain_name(upload.filename or ""), purpose, seconds, owner)

    def _too_large(self, size: int, *, batch: bool = False) -> RequestTooLarge:
        most = self.max_batch_bytes if batch else self.max_file_bytes
        return RequestTooLarge(
            f"file holds {size} bytes or more; at most {most} are taken: send it smaller, or raise "
            f"{'batches' if batch else 'files'}.max_file_bytes in the server's profile.",
            param="file",
        )


class _FileResponse(StreamingResponse):
    """The rest of an open file, which is closed however the sending ends."""

    def __init__(self, source: BinaryIO, size: int, kind: str) -> None:
        length = {"content-length": str(size)}
        super().__init__(self._pieces(), media_type=kind, headers=length)
        self.source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.source:
            await super().__call__(scope, receive, send)

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        while piece := await asyncio.to_thread(self.source.read, PIECE_BYTES):
            yield piece


@contextlib.contextmanager
def _disk() -> Iterator[None]:
    """Tell a client why its upload has no room."""
    try:
        yield
    except OSError as error:
        logger.error("an upload: %s", error)
        raise InternalError(f"The file cannot be kept: {error.strerror or error}.") from None


def _owner(request: Request) -> str:
    caller: Caller = request.state.caller
    return caller.name


def _check_kind(headers: Headers) -> None:
    encoding = headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise UnsupportedContentType(
            f"The body is encoded as {encoding[:60]!r}; send it uncompressed."
        )
    kind = headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "multipart/form-data":
        raise UnsupportedContentType(
            f"The content type is {kind[:60]!r}; send multipart/form-data with file and purpose."
        )


def _file(form: FormData) -> UploadFile:
    upload = form.get("file")
    if upload is None:
        raise MissingParameter("file is required.", param="file")
    if not isinstance(upload, UploadFile):
        raise InvalidType("file must be a file with a name, not a plain field.", param="file")
    return upload


def _purpose(form: FormData, *, batches: bool) -> str:
    served = (*PURPOSES, BATCH) if batches else PURPOSES
    if "purpose" not in form:
        raise MissingParameter(f"purpose is required: {' or '.join(served)}.", param="purpose")
    return _one_of(form["purpose"], served, "purpose")


def _seconds(form: FormData, ttl_seconds: float, section: str) -> float | None:
    """Return the seconds that ``expires_after`` asks for, at most those of ``section``."""
    anchor, text = (form.get(f"expires_after[{key}]") for key in ("anchor", "seconds"))
    if anchor is None and text is None:
        return None
    _one_of(anchor, ("created_at",), "expires_after[anchor]")
    most = int(ttl_seconds)
    digits = isinstance(text, str) and re.fullmatch(r"[0-9]{1,12}", text) is not None
    if not digits or not 1 <= int(str(text)) <= most:
        raise InvalidValue(
            f"expires_after[seconds] is {str(text)[:40]!r}; it must be a number from 1 to {most} "
            f"({section}.ttl_seconds in the server's profile).",
            param="expires_after[seconds]",
        )
    return float(str(text))


def _one_of(given: object, choices: tuple[str, ...], name: str) -> str:
    if given not in choices:
        raise InvalidValue(
            f"{name} is {str(given)[:40]!r}; served: {', '.join(choices)}.", param=name
        )
    return str(given)


def _limit(text: str | None) -> int:
    if text is None:
        return MAX_LIST
    if re.fullmatch(r"[0-9]{1,5}", text) is None or not 1 <= int(text) <= MAX_LIST:
        raise InvalidValue(
            f"limit is {text[:40]!r}; it must be a number from 1 to {MAX_LIST}.", param="limit"
        )
    return int(text)


def _plain_name(name: str) -> str:
    """Return the last part of a name or path, without control characters, cut to 255."""
    last = re.split(r"[/\\]", name)[-1]
    return "".join(letter for letter in last if letter.isprintable())[:255] or "file"


def _unknown(file_id: str) -> UnknownFile:
    return UnknownFile(
        f"No file {file_id[:80]!r} is here: it was never uploaded, was deleted, has expired or "
        "made room for others.",
        param="file_id",
    )


def _object(file: StoredFile) -> dict[str, Any]:
    return {"object": "file", **file.model_dump(exclude={"owner"}), "status": "processed"}
