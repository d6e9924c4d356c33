"""Where the bytes of media come from: one address, whatever its kind, to bytes."""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

import pybase64

from qwen2vl_serve.media.fetch import Fetcher, FetchError, Take
from qwen2vl_serve.media.files import FileStore, NoSuchFile
from qwen2vl_serve.protocol.content import UPLOAD


class DataURLError(FetchError):
    """A ``data:`` URL that cannot be read; the text completes a sentence for the client."""


class UnknownFileID(FetchError):
    """The address is a file's id, and no such file is kept."""


class Sources:
    """Reads addresses: base64 ``data:``, ``http(s)``, ``file:`` and ``upload:`` with a file's id.

    ``folders`` are those that ``file:`` may lead into; none at all turns it off.
    """

    def __init__(
        self, fetcher: Fetcher, folders: Sequence[str] = (), files: FileStore | None = None
    ) -> None:
        self.fetcher = fetcher
        self.files = files
        self._folders = tuple(Path(folder).expanduser().resolve() for folder in folders)

    async def read(self, address: str, take: Take, owner: str = "") -> bytes:
        """Return the bytes at ``address``, at most ``fetcher.policy.max_bytes`` of a file or URL.

        They are asked of ``take`` before they are held, those of a URL as they come. Of uploads
        only those of ``owner`` are there.

        Raises:
            DataURLError: a malformed ``data:`` URL.
            UnknownFileID: no such upload.
            FetchTimeout: the other side was too slow.
            FetchError: the rest; blocked, missing and unreachable are not told apart.
        """
        scheme = address[:5].lower()
        if scheme == "data:":
            text = _base64_of(address)
            await take(len(text) // 4 * 3)
            return _decoded(text)
        if scheme == "file:":
            return await self._local(address, take)
        if address.startswith(UPLOAD):
            return await self._uploaded(address.removeprefix(UPLOAD), take, owner)
        return await self.fetcher.fetch(address, take)

    async def close(self) -> None:
        """Close connections; temporary uploads go."""
        await self.fetcher.close()
        if self.files is not None:
            self.files.close()

    async def _uploaded(self, file_id: str, take: Take, owner: str) -> bytes:
        if self.files is None:
            raise UnknownFileID("uploads are off")
        try:
            await take(self.files.look_up(file_id, owner).bytes)
            return await asyncio.to_thread(self.files.read, file_id, owner)
        except NoSuchFile:
            raise UnknownFileID(file_id) from None

    async def _local(self, url: str, take: Take) -> bytes:
        try:
            source = await asyncio.to_thread(self._opened, url)
            with source:
                limit = self.fetcher.policy.max_bytes
                size = os.fstat(source.fileno()).st_size
                if size > limit:
                    raise FetchError(f"more than {limit} bytes")
                await take(size)
                # No more than was taken, should it grow meanwhile.
                return await asyncio.to_thread(source.read, size)
        except (OSError, RuntimeError, ValueError) as error:
            # Without the path, which is the client's own words.
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise FetchError(f"a file: {reason}") from None

    def _opened(self, url: str) -> BinaryIO:
        path = _local_path(url).resolve(strict=True)
        if not self._admits(path):
            raise FetchError("outside of the allowed folders")
        # A pipe must not block, and the last step not follow a link put there meanwhile.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        with contextlib.ExitStack() as stack:
            # An open descriptor, not a path.
            source = stack.enter_context(open(os.open(path, flags), "rb"))  # noqa: PTH123
            # Of what is open now, not of what the path named a moment ago.
            real = Path(f"/proc/self/fd/{source.fileno()}").resolve()
            if not self._admits(real):
                raise FetchError("moved out of the allowed folders")
            if not stat.S_ISREG(os.fstat(source.fileno()).st_mode):
                raise FetchError("not a regular file")
            stack.pop_all()
            return source

    def _admits(self, path: Path) -> bool:
        return any(path.is_relative_to(folder) for folder in self._folders)


def _local_path(url: str) -> Path:
    parsed = urlsplit(url)
    if parsed.netloc not in ("", "localhost") or parsed.query or parsed.fragment:
        raise FetchError("not a plain file URL of this machine")
    path = unquote(parsed.path, errors="strict")
    if not path.startswith("/"):
        raise FetchError("not an absolute path")
    return Path(path)


def _base64_of(url: str) -> str:
    head, comma, text = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise DataURLError("is a data URL without base64; send data:image/jpeg;base64,….")
    return text


def _decoded(text: str) -> bytes:
    try:
        return pybase64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise DataURLError(
            "is not valid base64; encode the file with the standard alphabet (+ and /), padded, "
            "without line breaks."
        ) from None
