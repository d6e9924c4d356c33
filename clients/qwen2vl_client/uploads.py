"""Large local pictures and videos: sent once as files, named by their id afterwards."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any
from urllib.parse import urlencode

from urllib3.filepost import encode_multipart_formdata

from qwen2vl_client.answer import StoredFile
from qwen2vl_client.errors import APIResponseError, APIStatusError, InvalidArgumentError
from qwen2vl_client.request import Message
from qwen2vl_client.steps import Alone, Call, Flow, Reply

UPLOAD_ABOVE = 2**20
"""Bytes of a local file from which it is uploaded, unless the client says otherwise."""

PURPOSE = "vision"
_REMEMBERED = 4096
_NO_FILES = frozenset({404, 405, 501})
"""Statuses by which a server says that it keeps no files at all."""
_OF_EVERY_CALL = frozenset({401, 429})
"""Statuses that the chat would get as well; with any other it may be answered with what is inline,
or says itself what is wrong with it."""
_UNDERSTOOD = frozenset(
    {
        "context_length_exceeded", "image_download_timeout", "image_too_large", "invalid_image",
        "invalid_image_url", "invalid_video", "media_too_large", "reserved_token",
        "too_many_items", "video_too_large",
    }
)  # fmt: skip
"""Codes of refusals by a server that has understood what it was shown."""
_DATA_URL = re.compile(r"data:([a-z]+/[a-z0-9.+-]+);base64,")


@dataclass
class Placed:
    """Messages as they are sent; ``keys`` are the contents that a file's id stands for."""

    messages: list[dict[str, Any]]
    keys: set[str] = field(default_factory=set)


class Uploads:
    """Which contents the server keeps, and under what id; for all calls of one client.

    ``above`` is the size in bytes above which a local file is uploaded; None: never.
    """

    def __init__(self, above: int | None, ask: Callable[[Call], Flow[Reply]]) -> None:
        number = isinstance(above, Real) and not isinstance(above, bool)
        if above is not None and not (number and above >= 0):
            raise InvalidArgumentError(f"upload_above={above!r} must be 0 or more bytes, or None")
        self._above = above
        self._ask = ask
        self._ids: OrderedDict[str, str] = OrderedDict()
        self._understood = False

    def placed(
        self, messages: Sequence[Message], timeout: float | None, *, inline: bool = False
    ) -> Flow[Placed]:
        """Return the messages with ids in place of what is large; uploads what is not there.

        With ``inline`` they are returned as they are.
        """
        placed = Placed([])
        for message in messages:
            sent = dict(message)
            content = message.get("content")
            if isinstance(content, list) and self._above is not None and not inline:
                parts: list[Any] = []
                for part in content:
                    there = yield from self._place(part, placed.keys, timeout)
                    parts.append(there)
                sent["content"] = parts
            placed.messages.append(sent)
        return placed

    def forget(self, keys: set[str]) -> None:
        """Upload these contents again when they are needed: the server has lost them."""
        for key in keys:
            self._ids.pop(key, None)

    def doubts(self, placed: Placed, refusal: APIStatusError) -> bool:
        """Tell whether a refusal may be that of a server that knows no ids in messages."""
        return (
            bool(placed.keys)
            and not self._understood
            and refusal.status in (400, 422)
            and refusal.code not in _UNDERSTOOD
            and (refusal.param is None or "messages" in refusal.param)
        )

    def learn(self, placed: Placed, *, refused: bool) -> None:
        """Take note of an answer; ``refused``: with ids the same messages were not answered."""
        if placed.keys:
            self._understood = True
        elif refused:
            self._above = None

    def _place(self, part: Any, keys: set[str], timeout: float | None) -> Flow[Any]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        inner = part.get(kind) if kind in ("image_url", "video_url") else None
        if not isinstance(inner, Mapping):
            return part
        url = inner.get("url")
        if not isinstance(url, str) or not self._is_large(url):
            return part
        key = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
        if key not in self._ids:
            # Alone: several calls with one new picture upload it once.
            yield Alone(f"upload {key}", self._upload(key, url, timeout))
        file_id = self._ids.get(key)
        if file_id is None:
            return part
        keys.add(key)
        rest = {name: value for name, value in inner.items() if name != "url"}
        return {**part, kind: {"file_id": file_id, **rest}}

    def _is_large(self, url: str) -> bool:
        above = self._above
        if above is None or len(url) * 3 // 4 <= above or url[:5].lower() != "data:":
            return False
        return "," not in url[url.find(",") + 1 :]  # not the frames of a video

    def _upload(self, key: str, url: str, timeout: float | None) -> Flow[None]:
        if key in self._ids or self._above is None:
            return
        head = _DATA_URL.match(url)
        try:
            data = base64.b64decode(url[head.end() :], validate=True) if head else None
        except binascii.Error:
            data = None
        if head is None or data is None or len(data) <= self._above:
            return
        name = f"{head[1].partition('/')[0]}.{head[1].rpartition('/')[2]}"
        try:
            reply = yield from self._ask(upload_call(data, name, PURPOSE, None, timeout))
            stored = StoredFile.from_raw(reply.json)
        except APIResponseError:
            self._above = None
            return
        except APIStatusError as error:
            if error.status in _NO_FILES:
                self._above = None
            elif error.status in _OF_EVERY_CALL:
                raise
            return
        self._ids[key] = stored.id
        while len(self._ids) > _REMEMBERED:
            self._ids.popitem(last=False)


def upload_call(
    data: bytes, name: str, purpose: str, expires_after: int | None, timeout: float | None
) -> Call:
    """Return the request that uploads a file, as a form."""
    fields: dict[str, Any] = {"purpose": purpose}
    if expires_after is not None:
        fields["expires_after[anchor]"] = "created_at"
        fields["expires_after[seconds]"] = str(expires_after)
    sent = name.encode("utf-8", "replace").decode("utf-8")  # file names need not be UTF-8
    fields["file"] = (sent, data, "application/octet-stream")
    body, content_type = encode_multipart_formdata(fields)
    return Call("POST", "/files", body, content_type, timeout)


def list_call(
    purpose: str | None, limit: int | None, after: str | None, timeout: float | None
) -> Call:
    """Return the request that lists files, the newest first."""
    given = {"purpose": purpose, "limit": limit, "after": after}
    query = urlencode({name: value for name, value in given.items() if value is not None})
    return Call("GET", f"/files?{query}" if query else "/files", timeout=timeout)


def files_of(reply: Reply) -> list[StoredFile]:
    """Read a list of files; ``APIResponseError`` where it is none."""
    listed = reply.json.get("data")
    if not isinstance(listed, list):
        raise APIResponseError("/files answered without a list of files")
    return [StoredFile.from_raw(one) for one in listed]
