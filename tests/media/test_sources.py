"""From an address to bytes: local files stay within their folders, uploads within the store."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl_serve.media.fetch import Fetcher, FetchError, FetchPolicy
from qwen2vl_serve.media.files import FileStore
from qwen2vl_serve.media.sources import DataURLError, Sources, UnknownFileID
from tests.media.test_fetch import freely


def read(address: str, *folders: Path, max_bytes: int = 1000) -> bytes:
    sources = Sources(Fetcher(FetchPolicy(max_bytes=max_bytes)), [str(one) for one in folders])
    return asyncio.run(sources.read(address, freely))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """``open`` may be read from; ``shut`` and its secret may not."""
    for folder in ("open/inner", "open-too", "shut"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "open/a.png").write_bytes(b"a")
    (tmp_path / "open/inner/ü b.png").write_bytes(b"b")
    (tmp_path / "open-too/c").write_bytes(b"secret")
    (tmp_path / "shut/secret").write_bytes(b"secret")
    (tmp_path / "open/link").symlink_to(tmp_path / "shut/secret")
    (tmp_path / "open/folder-link").symlink_to(tmp_path / "shut")
    (tmp_path / "open/good-link").symlink_to("a.png")
    (tmp_path / "open/loop").symlink_to("loop")
    return tmp_path


def test_files_within_a_folder_are_read(tree: Path) -> None:
    """Plain, percent-encoded, with ``localhost``, through a link that stays inside."""
    assert read(f"file://{tree}/open/a.png", tree / "open") == b"a"
    assert read(f"file://localhost{tree}/open/a.png", tree / "open") == b"a"
    assert read(f"FILE://{tree}/open/./inner/../a.png", tree / "open") == b"a"
    assert read(f"file://{quote(str(tree / 'open/inner/ü b.png'))}", tree / "open") == b"b"
    assert read(f"file://{tree}/open/good-link", tree / "shut", tree / "open") == b"a"
    assert read(f"file://{tree}/open/folder-link/secret", tree / "open", tree / "shut")


@pytest.mark.parametrize(
    "path",
    [
        "shut/secret",
        "open/../shut/secret",
        "open/%2e%2e/shut/secret",
        "open/..%2fshut%2fsecret",
        "open/inner/../../shut/secret",
        "open/link",
        "open/folder-link/secret",
        "open/loop",
        "open-too/c",
        "open/missing.png",
        "open/a.png/x",
        "open/a.png%00.png",
        "open/a.png?x",
        "open/a.png#x",
        "open/%ff",
        "open",
        "open/" + "x" * 300,
        "open/" + "x/" * 3000,
        "",
    ],
)
def test_what_is_outside_missing_or_no_file_is_one_error(tree: Path, path: str) -> None:
    """Forbidden and missing are not told apart."""
    with pytest.raises(FetchError) as caught:
        read(f"file://{tree}/{path}", tree / "open")
    assert type(caught.value) is FetchError


@pytest.mark.parametrize(
    "address",
    ["file:a.png", "file:", "file://", "file://host/a", "file://a.png", "file://[x/a", "file:///"],
)
def test_odd_file_addresses_lead_nowhere(
    tree: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """Relative paths, other hosts and halves of addresses, though the folder is all there is."""
    monkeypatch.chdir(tree / "open")
    with pytest.raises(FetchError):
        read(address, Path("/"))


def test_without_folders_there_are_no_local_files(tree: Path) -> None:
    """Off by default."""
    with pytest.raises(FetchError):
        read(f"file://{tree}/open/a.png")


def test_only_regular_files_are_read(tree: Path) -> None:
    """Pipes do not block, devices and sockets are not opened for reading."""
    os.mkfifo(tree / "open/pipe")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(tree / "open/socket"))
        for name in ("pipe", "socket", "inner"):
            with pytest.raises(FetchError):
                read(f"file://{tree}/open/{name}", tree / "open")
    with pytest.raises(FetchError):
        read("file:///dev/zero", Path("/dev"))


def test_a_file_over_the_cap_is_refused(tree: Path) -> None:
    """The same cap as for downloads; a file of exactly that size is read."""
    (tree / "open/big").write_bytes(bytes(1001))
    with pytest.raises(FetchError):
        read(f"file://{tree}/open/big", tree / "open")
    assert len(read(f"file://{tree}/open/big", tree / "open", max_bytes=1001)) == 1001


def test_links_that_change_meanwhile_lead_nowhere(tree: Path) -> None:
    """A folder that is now a folder, now a link out: its own bytes or an error, never others."""
    real, out = tree / "open/real", tree / "open/out"
    real.mkdir()
    (real / "secret").write_bytes(b"mine")
    out.symlink_to(tree / "shut")
    spot = tree / "open/spot"
    real.rename(spot)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            spot.rename(real)
            out.rename(spot)
            spot.rename(out)
            real.rename(spot)

    swapper = threading.Thread(target=swap)
    swapper.start()
    seen = set()
    try:
        begun, reads = time.monotonic(), 0
        while reads < 3000 or (b"mine" not in seen and time.monotonic() < begun + 60):
            reads += 1
            try:
                seen.add(read_again(tree, f"file://{spot}/secret"))
            except FetchError:
                seen.add(b"error")
    finally:
        stop.set()
        swapper.join()
    assert b"secret" not in seen
    assert b"mine" in seen


def read_again(tree: Path, address: str) -> bytes:
    """``read`` without an event loop, which would give the swapper no chance."""
    try:
        with Sources(Fetcher(FetchPolicy()), [str(tree / "open")])._opened(address) as source:
            return source.read()
    except OSError as error:
        raise FetchError from error


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("abc./%2eE5fF\\~:?#@\0 é"), max_size=30))
def test_no_path_leaves_the_folder(tmp_path_factory: pytest.TempPathFactory, path: str) -> None:
    """Whatever is written after the folder's name: a file of the folder or an error."""
    base = tmp_path_factory.getbasetemp() / "any"
    (base / "a").mkdir(parents=True, exist_ok=True)
    (base / "b").write_bytes(b"secret")
    (base / "a/b").write_bytes(b"mine")
    try:
        assert read(f"file://{base}/a/{path}", base / "a") == b"mine"
    except FetchError as error:
        assert type(error) is FetchError


def test_uploads_are_read_by_their_id(tmp_path: Path) -> None:
    """Known ids give their bytes; anything else, and a server without uploads, does not."""
    store = FileStore(tmp_path, max_files=9, max_bytes=999, ttl_seconds=99)
    file = store.add(b"abc", "a", "vision")
    fetcher = Fetcher(FetchPolicy())
    sources = Sources(fetcher, files=store)
    assert asyncio.run(sources.read(f"upload:{file.id}", freely)) == b"abc"
    for other in ("upload:", "upload:../x", f"upload:{file.id}x", "upload:http://127.0.0.1/"):
        with pytest.raises(UnknownFileID):
            asyncio.run(sources.read(other, freely))
    with pytest.raises(UnknownFileID):
        asyncio.run(Sources(fetcher).read(f"upload:{file.id}", freely))
    store.close()


def test_data_urls_are_base64() -> None:
    """Decoded as they are; anything else says what to send."""
    assert read("data:image/png;base64,YWJj") == b"abc"
    assert read("DATA:;base64,") == b""
    for bad in ("data:,abc", "data:x", "data:;base64,a", "data:;base64,YWJj\n"):
        with pytest.raises(DataURLError, match=r"^is "):
            read(bad)
