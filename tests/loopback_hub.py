"""A hub on loopback that serves a folder as a repository, in Hugging Face's and ModelScope's words.

It misbehaves on demand: cuts connections, changes bytes, refuses, and knows what it was asked.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

NAME = "owner/tiny-vl"
COMMIT = "c0ffee" + "0" * 34
LARGE = 100_000
"""Files of as many bytes are stored as LFS objects, known by their SHA-256."""


@dataclass
class LoopbackHub:
    """One repository. ``faults`` are taken one a download of that path: see ``_send``.

    ``requests`` has every path that was called, ``asked`` the files: method, path and range.
    """

    folder: Path
    name: str = NAME
    token: str | None = None
    gated: bool = False
    commit: str = COMMIT
    faults: dict[str, list[Any]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""
    released: threading.Event = field(default_factory=threading.Event)

    def files(self) -> dict[str, bytes]:
        return {
            path.relative_to(self.folder).as_posix(): path.read_bytes()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }

    def fetched(self) -> list[str]:
        """Paths that were downloaded, in turn; a continued one stands twice."""
        return [path for method, path, _ in self.asked if method == "GET"]

    def siblings(self) -> list[dict[str, Any]]:
        found = []
        for path, data in self.files().items():
            one: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": git_name(data)}
            if len(data) >= LARGE:
                sha = hashlib.sha256(data).hexdigest()
                one["lfs"] = {"sha256": sha, "size": len(data), "pointerSize": 130}
            found.append(one)
        return found

    def listing(self) -> list[dict[str, Any]]:
        return [
            {
                "Name": Path(path).name, "Path": path, "Size": len(data), "Type": "blob",
                "Sha256": hashlib.sha256(data).hexdigest(), "Revision": COMMIT, "Mode": "33188",
                "IsLFS": len(data) >= LARGE, "CommittedDate": 1724900000,
            }
            for path, data in self.files().items()
        ]  # fmt: skip


def git_name(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@contextmanager
def loopback_hub(folder: Path, **options: Any) -> Iterator[LoopbackHub]:
    hub = LoopbackHub(folder, **options)

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    served: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, url = self.served, urlsplit(self.path)
        hub.requests.append(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        name = re.escape(hub.name)
        if found := re.fullmatch(rf"/api/models/{name}(?:/revision/(.+))?", path):
            if self._admitted(found[1]):
                data = {"id": hub.name, "sha": hub.commit, "siblings": hub.siblings(), "tags": []}
                self._json(data)
        elif found := re.fullmatch(rf"/{name}/resolve/([^/]+)/(.+)", path):
            if self._admitted(found[1]):
                self._file(found[2])
        elif re.fullmatch(rf"/api/v1/models/{name}/repo/files", path):
            self._json({"Code": 200, "Success": True, "Data": {"Files": hub.listing()}})
        elif re.fullmatch(rf"/api/v1/models/{name}/repo", path):
            self._file(query["FilePath"][0])
        elif path.startswith("/api/v1/"):
            self._json({"Code": 10010205001, "Success": False, "Message": "not found"}, 404)
        else:
            self._refuse(404, "RepoNotFound")

    def _admitted(self, revision: str | None) -> bool:
        hub = self.served
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._refuse(401, "GatedRepo" if hub.gated else "RepoNotFound")
            return False
        if revision not in (None, "main", hub.commit):
            self._refuse(404, "RevisionNotFound")
            return False
        return True

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _json(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _file(self, path: str) -> None:
        hub = self.served
        data = hub.files().get(path)
        if data is None:
            self._refuse(404, "EntryNotFound")
            return
        wanted = self.headers.get("Range")
        hub.asked.append((self.command, path, wanted))
        waiting = hub.faults.get(path, [])
        fault = waiting.pop(0) if self.command == "GET" and waiting else None
        self._send(data, wanted, fault)

    def _send(self, data: bytes, wanted: str | None, fault: Any) -> None:
        """Send a file.

        A ``fault`` is a status, a number of bytes to cut after, "corrupt", or "stuck": half of it,
        and the rest when the hub is ``released``.
        """
        etag = hashlib.sha256(data).hexdigest() if len(data) >= LARGE else git_name(data)
        if isinstance(fault, int) and fault >= 400 and fault < 600:
            self._refuse(fault, "")
            return
        if fault == "corrupt":
            data = data[: len(data) // 2] + b"\0corrupt\0" + data[len(data) // 2 + 9 :]
        begin, total = 0, len(data)
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
        if found:
            begin = int(found[1])
            end = int(found[2]) + 1 if found[2] else total
            data = data[begin:end]
        self.send_response(206 if found else 200)
        if found:
            self.send_header("Content-Range", f"bytes {begin}-{begin + len(data) - 1}/{total}")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("X-Repo-Commit", self.served.commit)
        self.send_header("ETag", f'"{etag}"')
        self.end_headers()
        if self.command == "HEAD":
            return
        if isinstance(fault, int):
            self.wfile.write(data[:fault])
            self.wfile.flush()
            self.close_connection = True
            return
        if fault == "stuck":
            half = len(data) // 2
            self.wfile.write(data[:half])
            self.wfile.flush()
            self.served.released.wait(60)
            data = data[half:]
        with suppress(ConnectionError):  # of a client that was ended
            self.wfile.write(data)
