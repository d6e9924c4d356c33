"""What a hub holds of a checkpoint, and which of it serving needs."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from qwen2vl_serve.checkpoints import hubs
from qwen2vl_serve.errors import PreflightError

Source = Literal["auto", "hf", "modelscope"]
SOURCES: tuple[Source, ...] = ("auto", "hf", "modelscope")


class Advance(Protocol):
    """Is told of bytes that are here; a negative count takes some back."""

    def __call__(self, count: int, *, fetched: bool = True) -> None:
        """Those that were here before are not ``fetched``."""
        ...


_ADDRESS = re.compile(r"https?://\S+")
_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
# Of a published repository: configuration, tokenizer, processor and template at its top, the
# weights as safetensors. Pickles (*.bin, *.pth), ONNX, GGUF and pictures of its page are not.
_WANTED = re.compile(
    r"[^/.][^/]*\.(safetensors|json|jinja|tiktoken|txt|model)|"
    r"LICENSE[\w -]*(\.(txt|md))?|README\.md|"
    r"additional_chat_templates/[^/]+\.jinja"
)
_ELSEWHERE = re.compile(r"(consolidated|.*\.onnx).*")


@dataclass(frozen=True, slots=True)
class RepoFile:
    """A file of a repository: bytes, and the hash that the hub gives for it.

    ``sha256`` is of the content; ``git`` is git's name of it (SHA-1), where the hub has no other.
    """

    path: str
    size: int
    sha256: str | None = None
    git: str | None = None

    def fault(self, path: Path) -> str | None:
        """Say what is wrong with ``path`` as this file's content; None when it is whole."""
        size = path.stat().st_size
        if size != self.size:
            return f"has {size} bytes of {self.size}"
        if self.sha256 is None and self.git is None:
            return None
        digest = hashlib.sha256()
        if self.sha256 is None:
            digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with path.open("rb") as file:
            while piece := file.read(2**22):
                digest.update(piece)
        found, wanted = digest.hexdigest(), self.sha256 or self.git
        return None if found == wanted else f"has the hash {found[:12]}…, the hub says {wanted}"


@dataclass(frozen=True, slots=True)
class Listing:
    """A checkpoint on a hub; ``commit`` is None where the hub names none."""

    name: str
    revision: str
    commit: str | None
    files: tuple[RepoFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


class Hub(Protocol):
    """One of the two hubs."""

    title: str

    def listing(self, name: str, revision: str | None) -> Listing:
        """Ask for the files of a repository.

        Raises:
            PreflightError: there is none, or not for this user, or asking is forbidden.
            HubUnreachable: no answer.
        """
        ...

    def place(self, listing: Listing, to: Path | None) -> Path:
        """Return the folder that the files go into."""
        ...

    def fetch(self, listing: Listing, file: RepoFile, to: Path | None, advance: Advance) -> Path:
        """Fetch a file, or what is still missing of it; return its path.

        Raises:
            DownloadError: it did not come whole.
        """
        ...

    def finish(self, listing: Listing, to: Path | None) -> None:
        """Take note that every file is here."""
        ...


def check_name(name: str) -> None:
    """Raise ``PreflightError`` for what cannot be a repository's name."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise PreflightError(
            f"{name[:100]}: is no model's name on a hub; give owner/name, as "
            "Qwen/Qwen2-VL-7B-Instruct"
        )


def endpoint(variable: str) -> str | None:
    """Return the address that a variable gives a hub, None where it gives none.

    Raises:
        PreflightError: it is no address.
    """
    value = os.environ.get(variable) or None
    if value is not None and not _ADDRESS.fullmatch(value):
        raise PreflightError(
            f"{variable} is {value[:100]!r}, which is no address; write it as https://HOST"
        )
    return value


def needed(files: Sequence[RepoFile], name: str) -> tuple[RepoFile, ...]:
    """Return the files that serving needs.

    Raises:
        PreflightError: among them are no weights as safetensors.
    """
    kept = tuple(
        file
        for file in files
        if _WANTED.fullmatch(file.path) and not _ELSEWHERE.fullmatch(file.path)
    )
    if not any(file.path.endswith(".safetensors") for file in kept):
        raise PreflightError(
            f"{name}: has no weights as safetensors, and others (pickles) may run code when they "
            "are loaded; take another repository"
        )
    return kept


def check_online(name: str) -> None:
    """Raise ``PreflightError`` where a variable forbids to ask a hub."""
    if (variable := hubs.forbidden()) is not None:
        raise PreflightError(
            f"{name}: would have to be asked of a hub, which {variable} forbids; unset the "
            "variable, or give the path of its folder"
        )
