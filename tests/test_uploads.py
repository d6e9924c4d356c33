"""Uploads over real sockets and with OpenAI's own client: sent once, shown by id, gone when due."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import random
import select
import socket
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import openai
import pytest
import requests
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen2vl_serve import uploads
from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.auth.keys_file import KeysFile
from qwen2vl_serve.media.files import FileStore
from qwen2vl_serve.profile import load_profile
from tests.served import drained, served
from tests.test_app import Running, error_of, eventually, running


def png(colour: str = "red", size: tuple[int, int] = (280, 280)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return data.getvalue()


def noise(size: int) -> bytes:
    """A PNG of about ``size`` bytes, at least."""
    side = int((size / 3) ** 0.5) + 1
    data = io.BytesIO()
    Image.frombytes("RGB", (side, side), random.Random(0).randbytes(side * side * 3)).save(
        data, "PNG"
    )
    return data.getvalue()


def server(*overrides: str) -> Any:
    return running(profile=load_profile("demo", overrides))


@pytest.fixture(scope="module")
def api() -> Iterator[Running]:
    # Uploads of videos are told of in test_app_media.
    with server("media.limit_mm_per_prompt.video=0") as one:
        yield one


@pytest.fixture(scope="module")
def client(api: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{api.root}/v1", api_key="none", max_retries=0)


def upload(api: Running, data: bytes, **fields: str) -> requests.Response:
    form = {"purpose": "vision", **fields}
    files = {"file": ("a.png", data)}
    return requests.post(f"{api.root}/v1/files", files=files, data=form, timeout=60)


def raw_upload(api: Running, body: Any, kind: str = "multipart/form-data; boundary=x") -> Any:
    headers = {"content-type": kind}
    return requests.post(f"{api.root}/v1/files", data=body, headers=headers, timeout=60)


def show(api: Running, *parts: dict[str, Any], **fields: Any) -> requests.Response:
    message = {"role": "user", "content": [{"type": "text", "text": "x"}, *parts]}
    return api.chat({"messages": [message], "include_media_info": True, **fields})


def test_the_openai_client_uploads_lists_reads_and_deletes(client: openai.OpenAI) -> None:
    """``client.files`` works as against OpenAI; the object is what its types say."""
    before = int(time.time())
    file = client.files.create(file=("cat.png", png("teal")), purpose="vision")
    assert (file.object, file.filename, file.purpose) == ("file", "cat.png", "vision")
    assert (file.bytes, file.status) == (len(png("teal")), "processed")
    assert before <= file.created_at <= time.time()
    assert file.expires_at == file.created_at + 86400
    assert client.files.retrieve(file.id) == file
    assert file in list(client.files.list())
    deleted = client.files.delete(file.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (file.id, True, "file")
    for ask in (client.files.retrieve, client.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            ask(file.id)
        assert caught.value.code == "file_not_found"


def test_a_files_bytes_are_sent_piece_by_piece(
    api: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However large it is and however slowly it is read, the server holds a piece of it."""
    monkeypatch.setattr(uploads, "PIECE_BYTES", 10_000)
    data = noise(95_000)
    file_id = upload(api, data).json()["id"]
    pieces: list[int] = []
    opened = FileStore.open

    class Watched(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            piece = super().read(size)
            pieces.append(len(piece))
            return piece

    def watched(store: FileStore, *which: str) -> BinaryIO:
        with opened(store, *which) as source:
            return Watched(source.read())

    monkeypatch.setattr(FileStore, "open", watched)
    answer = requests.get(f"{api.root}/v1/files/{file_id}/content", timeout=60)
    assert answer.content == data
    assert answer.headers["content-length"] == str(len(data))
    assert answer.headers["content-type"] == "application/octet-stream"
    assert sum(pieces) == len(data)
    assert max(pieces) <= 10_000


def test_a_client_that_leaves_within_a_file_closes_it(api: Running) -> None:
    """No descriptor is left of a download that nobody reads to its end, even uncollected."""
    file_id = upload(api, noise(8_000_000)).json()["id"]

    def is_open() -> bool:
        return any(file_id in str(one.resolve()) for one in Path("/proc/self/fd").iterdir())

    with socket.create_connection(("127.0.0.1", api.port), timeout=60) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.sendall(f"GET /v1/files/{file_id}/content HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 200")
        eventually(is_open)
        gc.disable()
    try:
        eventually(lambda: not is_open())
    finally:
        gc.enable()


def test_lists_come_in_pages(client: openai.OpenAI) -> None:
    """The client's own paging meets every file once, in either order."""
    made = {client.files.create(file=png(one), purpose="vision").id for one in ("#111", "#222")}
    other = client.files.create(file=png("#333"), purpose="user_data").id
    made.add(other)
    paged = [file.id for file in client.files.list(limit=1)]
    assert len(paged) == len(set(paged))
    assert made <= set(paged)
    assert [file.id for file in client.files.list(limit=2, order="asc")] == paged[::-1]
    theirs = {file.id: file.purpose for file in client.files.list(purpose="user_data")}
    assert other in theirs
    assert set(theirs.values()) == {"user_data"}
    assert list(client.files.list(after="file-unknown")) == []
    for file_id in made:
        client.files.delete(file_id)


def test_a_picture_is_shown_by_its_id_in_every_dialect(api: Running) -> None:
    """The id stands for the bytes: same sizes, same report, same fields as with a URL."""
    file_id = upload(api, png("navy", (640, 480))).json()["id"]
    wish = {"max_pixels": 20 * 784}
    dialects: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"file_id": file_id}, **wish},
        {"type": "image_url", "image_url": {"file_id": file_id, **wish}},
        {"type": "file", "file": {"file_id": file_id}, **wish},
        {"type": "input_image", "file_id": file_id, **wish},
    ]
    reports = []
    for part in dialects:
        answer = show(api, part)
        assert answer.status_code == 200, answer.text
        (report,) = answer.json()["media"]
        reports.append({**report, "cached": None})
    assert reports == [reports[0]] * 4
    assert (reports[0]["width"], reports[0]["height"]) == (640, 480)
    assert reports[0]["visual_tokens"] <= 20
    low = show(api, {"type": "input_image", "file_id": file_id, "detail": "low"})
    assert low.json()["media"][0]["width"] == 640


def test_an_upload_and_the_same_bytes_inline_are_one_picture(api: Running) -> None:
    """By id or as data URL, the second time nothing is decoded: the key is the content's."""
    import base64

    data = png("olive")
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    inline = show(api, {"type": "image_url", "image_url": {"url": url}}).json()["media"][0]
    file_id = upload(api, data).json()["id"]
    by_id = show(api, {"type": "file", "file": {"file_id": file_id}}).json()["media"][0]
    assert (inline["cached"], by_id["cached"]) == (False, True)


@pytest.mark.parametrize(
    "file_id",
    ["file-" + "0" * 64, "file-abc", "../etc/passwd", "http://127.0.0.1/", "data:;base64,AAAA"],
)
def test_an_unknown_id_has_an_error_of_its_own(api: Running, file_id: str) -> None:
    """404 ``file_not_found`` names the part; an id is never taken for another address."""
    answer = show(api, {"type": "input_image", "file_id": file_id})
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (404, "file_not_found")
    assert error["param"] == "messages[0].content[1].file_id"
    assert file_id not in answer.text


@pytest.mark.parametrize("of", [(FileStore, "add"), (uploads.MultiPartParser, "parse")])
def test_a_full_disk_is_told(
    api: Running, monkeypatch: pytest.MonkeyPatch, of: tuple[type, str]
) -> None:
    """While the form is received, or the file kept; the next upload finds room again."""

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(*of, full)
        refused = upload(api, png())
    assert refused.status_code == 500
    assert error_of(refused)["message"] == "The file cannot be kept: No space left on device."
    assert upload(api, png()).status_code == 200


def test_the_same_bytes_have_the_same_id(api: Running) -> None:
    """Sent again, whatever the name, there is one file; other bytes are another."""
    first, again = upload(api, png("pink")), upload(api, png("pink"))
    assert first.json()["id"] == again.json()["id"]
    assert upload(api, png("gold")).json()["id"] != first.json()["id"]


def test_a_file_expires_when_it_was_asked_to() -> None:
    """``expires_after`` shortens the profile's time, and is refused where it would exceed it."""
    with server("files.ttl_seconds=3600") as api:
        anchor = {"expires_after[anchor]": "created_at"}
        file = upload(api, png(), **anchor, **{"expires_after[seconds]": "1"}).json()
        assert file["expires_at"] == file["created_at"] + 1
        part = {"type": "file", "file": {"file_id": file["id"]}}
        eventually(lambda: show(api, part).status_code == 404)
        for seconds in ("3601", "0", "-1", "x", "1.5", "9" * 30):
            refused = upload(api, png(), **anchor, **{"expires_after[seconds]": seconds})
            error = error_of(refused)
            assert (refused.status_code, error["code"]) == (400, "invalid_value")
            assert "3600" in error["message"]
        assert upload(api, png(), **{"expires_after[seconds]": "5"}).status_code == 400


def test_the_longest_unused_makes_room_for_new_files() -> None:
    """Over the quota nobody is refused; the id that nobody used is unknown."""
    with server("files.max_files=2") as api:
        ids = [upload(api, png(one)).json()["id"] for one in ("red", "lime")]
        assert show(api, {"type": "file", "file": {"file_id": ids[0]}}).status_code == 200
        ids.append(upload(api, png("blue")).json()["id"])
        listed = requests.get(f"{api.root}/v1/files", timeout=60).json()
        assert {file["id"] for file in listed["data"]} == {ids[0], ids[2]}
        size = sum(file["bytes"] for file in listed["data"])
        assert "qwen2vl_files 2.0\n" in api.metrics()
        assert f"qwen2vl_files_bytes {size:.1f}\n" in api.metrics()
        assert show(api, {"type": "file", "file": {"file_id": ids[1]}}).status_code == 404


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no picture"),
        (b"hello", "no picture"),
        (b"%PDF-1.7 x", "PDF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"8BPS" + bytes(99), "PSD"),
        (b"\0\0\0\x18ftypmp42" + bytes(99), "MP4"),
        (png()[:20], "damaged"),
    ],
)
def test_only_pictures_are_kept(api: Running, data: bytes, words: str) -> None:
    """Anything else is refused by name, and leaves nothing behind."""
    before = requests.get(f"{api.root}/v1/files", timeout=60).json()["data"]
    answer = upload(api, data)
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_image", "file")
    assert words in error["message"]
    assert requests.get(f"{api.root}/v1/files", timeout=60).json()["data"] == before


def test_a_picture_of_too_many_pixels_is_refused() -> None:
    """The header is judged before the file is kept."""
    with server("media.max_image_pixels=1000") as api:
        answer = upload(api, png())
        assert (answer.status_code, error_of(answer)["code"]) == (400, "image_too_large")


@pytest.mark.parametrize("how", ["declared", "chunked", "the file alone"])
def test_a_file_over_the_cap_is_cut(how: str) -> None:
    """413 names the limit; a declared length is refused before a byte of the body is read."""
    with server("files.max_file_bytes=100000") as api:
        data = noise(110_000 if how == "the file alone" else 400_000)
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        body = head + data + b'\r\n--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n'
        body += b"vision\r\n--x--\r\n"
        pieces = (body[at : at + 999] for at in range(0, len(body), 999))
        answer = raw_upload(api, pieces if how == "chunked" else body)
        error = error_of(answer)
        assert (answer.status_code, error["code"]) == (413, "request_too_large")
        assert "100000" in error["message"]
        assert upload(api, noise(60_000)).status_code == 200


def test_an_endless_upload_is_cut_while_it_streams() -> None:
    """The server answers long before the client is done, and keeps nothing of what follows."""
    with (
        server("files.max_file_bytes=100000") as api,
        socket.create_connection(("127.0.0.1", api.port), timeout=60) as raw,
    ):
        raw.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        )
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        raw.sendall(b"%x\r\n%b\r\n" % (len(head), head))
        for _ in range(5000):
            raw.sendall(b"2710\r\n" + bytes(10_000) + b"\r\n")
            if select.select([raw], [], [], 0)[0]:
                break
        assert raw.recv(65536).startswith(b"HTTP/1.1 413")
        eventually(lambda: "qwen2vl_requests_in_flight 0.0" in api.metrics())
        assert 'code="request_too_large",route="/v1/files",status="413"' in api.metrics()


def part(name: str, data: bytes = b"vision", filename: str | None = None) -> bytes:
    ending = f'; filename="{filename}"' if filename is not None else ""
    head = f'--x\r\nContent-Disposition: form-data; name="{name}"{ending}\r\n\r\n'
    return head.encode() + data + b"\r\n"


PURPOSE, FILE, END = part("purpose"), part("file", png(), "a.png"), b"--x--\r\n"


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (FILE + END, "missing_required_parameter", "purpose"),
        (PURPOSE + END, "missing_required_parameter", "file"),
        (PURPOSE + part("file", b"text") + END, "invalid_type", "file"),
        (PURPOSE + part("picture", png(), "a.png") + END, "missing_required_parameter", "file"),
        (FILE + part("purpose", b"fine-tune") + END, "invalid_value", "purpose"),
        (FILE + part("purpose", png(), "p") + END, "invalid_value", None),
        (PURPOSE + FILE + FILE + END, "invalid_value", None),
        (PURPOSE + part("x", bytes(5000)) + FILE + END, "invalid_value", None),
        (b"".join(part(f"x{n}") for n in range(20)) + FILE + END, "invalid_value", None),
        (b"--x\r\nX: y\r\n\r\nz\r\n--x--\r\n", "invalid_value", None),
        (b"not a form", "invalid_value", None),
        (b"\r\n" * 500, "missing_required_parameter", "file"),
        (b"--x\r\n" + b"A" * 50_000, "invalid_value", None),
        (b"", "missing_required_parameter", "file"),
    ],
)
def test_a_malformed_form_is_refused(
    api: Running, body: bytes, code: str, param: str | None
) -> None:
    """400 with a field, or with what to send; none of the parser's words."""
    answer = raw_upload(api, body)
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param)
    assert upload(api, png()).status_code == 200


@pytest.mark.parametrize(
    "kind", ["application/json", "", "multipart/form-datax; boundary=x", "text/plain"]
)
def test_only_forms_are_read(api: Running, kind: str) -> None:
    """Anything else is 415."""
    answer = raw_upload(api, b"{}", kind)
    assert (answer.status_code, error_of(answer)["code"]) == (415, "unsupported_content_type")


def test_a_compressed_form_is_refused(api: Running) -> None:
    """It could unpack to anything."""
    headers = {"content-type": "multipart/form-data; boundary=x", "content-encoding": "gzip"}
    answer = requests.post(f"{api.root}/v1/files", data=b"x", headers=headers, timeout=60)
    assert (answer.status_code, error_of(answer)["code"]) == (415, "unsupported_content_type")


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 30))
@example(7125, 1)  # nothing is left of it
def test_a_mutated_form_is_kept_or_refused(api: Running, seed: int, count: int) -> None:
    """Bytes changed, cut or doubled: a file or a 4xx in the error shape, never a 5xx."""
    dice = random.Random(seed)
    body = bytearray(PURPOSE + FILE + part("expires_after[seconds]", b"60") + END)
    for _ in range(count):
        body[dice.randrange(len(body))] = dice.randrange(256)
    if seed % 3 == 0:
        del body[dice.randrange(len(body)) :]
    if seed % 5 == 0:
        body += body[dice.randrange(len(body) + 1) :]
    answer = raw_upload(api, bytes(body))
    if answer.status_code != 200:
        assert 400 <= answer.status_code < 500
        error_of(answer)


@pytest.mark.parametrize("boundary", ["", "; boundary=", "; boundary=" + "x" * 999])
def test_a_form_needs_a_boundary(api: Running, boundary: str) -> None:
    """Without one that can be used, 400."""
    answer = raw_upload(api, PURPOSE + FILE + END, "multipart/form-data" + boundary)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_value")


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=x", "limit"), ("limit=10001", "limit"), ("order=up", "order")],
)
def test_a_lists_parameters_are_checked(api: Running, query: str, param: str) -> None:
    """Out of bounds or unknown is refused, not ignored."""
    answer = requests.get(f"{api.root}/v1/files?{query}", timeout=60)
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_value", param)


def test_a_name_is_only_a_name(api: Running) -> None:
    """Folders and control characters are dropped; the name leads nowhere."""
    for name, kept in (
        ("../../etc/passwd", "passwd"),
        ("C:\\x\\b.png", "b.png"),
        ("a\x01\u202eb.png", "ab.png"),
        ("ü" * 400, "ü" * 255),
        ("..", ".."),
        ("/", "file"),
    ):
        head = f'--x\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
        body = head.encode() + png("plum") + b"\r\n" + PURPOSE + END
        assert raw_upload(api, body).json()["filename"].strip("\\") == kept


def test_a_pdf_is_uploaded_and_its_pages_shown(api: Running) -> None:
    """OpenAI's own way with documents; the pages stand in the report, and too many are refused."""
    pytest.importorskip("pypdfium2")
    data = io.BytesIO()
    pages = [Image.new("RGB", (300, 200), colour) for colour in ("red", "lime", "blue", "black")]
    pages[0].save(data, "PDF", save_all=True, append_images=[*pages[1:], pages[0]])
    document = {"type": "file", "file": {"file_id": upload(api, data.getvalue()).json()["id"]}}
    answer = show(api, {**document, "pages": "2-3"}, {**document, "pages": "1"})
    assert answer.status_code == 200, answer.text
    assert [one["type"] for one in answer.json()["media"]] == ["image"] * 3
    shown = api.engine.requests[-1].messages[0].content
    assert [one.type for one in shown] == ["text", *["image_url"] * 3]
    body = {"messages": [{"role": "user", "content": [{**document, "pages": "1-3"}]}]}
    told = requests.post(f"{api.root}/v1/chat/completions/explain", json=body, timeout=60).json()
    assert len(told["media"]) == 3
    refused = show(api, document)
    assert (refused.status_code, error_of(refused)["code"]) == (400, "too_many_items")
    wrong = show(api, {**document, "pages": "one"})
    assert error_of(wrong)["param"] == "messages[0].content[1].pages"


def test_uploads_can_be_off() -> None:
    """With ``files.max_files: 0`` the routes say so, and an id is unknown."""
    with server("files.max_files=0") as api:
        for answer in (upload(api, png()), requests.get(f"{api.root}/v1/files", timeout=60)):
            error = error_of(answer)
            assert (answer.status_code, error["code"]) == (404, "not_found")
            assert "files.max_files" in error["message"]
        assert show(api, {"type": "file", "file": {"file_id": "file-1"}}).status_code == 404


def test_a_slow_upload_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A form that does not come to its end is given up with 408."""
    monkeypatch.setattr(uploads, "RECEIVE_SECONDS", 0.3)
    with server() as api, socket.create_connection(("127.0.0.1", api.port), timeout=60) as raw:
        raw.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
        )
        answer = drained(raw)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"request_timeout" in answer


def test_more_uploads_than_are_received_at_once_wait_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """503 with Retry-After while all places are taken; a client that leaves frees its own."""
    monkeypatch.setattr(uploads, "AT_ONCE", 1)
    with server() as api:
        with socket.create_connection(("127.0.0.1", api.port)) as raw:
            raw.sendall(
                b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n"
                b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
            )
            eventually(lambda: upload(api, png()).status_code == 503)
            refused = upload(api, png())
            assert error_of(refused)["code"] == "overloaded"
            assert refused.headers["retry-after"]
        eventually(lambda: upload(api, png()).status_code == 200)


def test_slow_uploads_of_one_key_keep_no_other_out(tmp_path: Path) -> None:
    """Half of the places are the most that one key gets; another's upload is received at once."""
    file = KeysFile(tmp_path / "keys.json")
    alice, bob = file.add("alice"), file.add("bob")
    form = {"file": ("a.png", png()), "purpose": (None, "vision")}
    with served(load_profile("demo"), Keys(file=file)) as api:
        with ExitStack() as stack:
            for _ in range(uploads.OF_ONE_KEY):
                stack.enter_context(begun_upload(api.port, alice))
            held = api.app.state.api.uploads.places
            eventually(lambda: held.held == uploads.OF_ONE_KEY)
            refused = api.request("POST", "/v1/files", alice, files=form)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert error_of(refused)["code"] == "rate_limit_exceeded"
            assert api.request("POST", "/v1/files", bob, files=form).status_code == 200
        eventually(lambda: api.request("POST", "/v1/files", alice, files=form).status_code == 200)


def test_uploads_that_wait_take_turns_by_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of two keys that wait for one place the one that came later has the second turn."""
    monkeypatch.setattr(uploads, "AT_ONCE", 1)
    file = KeysFile(tmp_path / "keys.json")
    alice, bob = file.add("alice"), file.add("bob")
    with served(load_profile("demo"), Keys(file=file)) as api, ExitStack() as stack:
        line = api.app.state.api.uploads
        line.resize(1, 1, 8, 600.0)
        seen: list[str] = []
        enter = line.place

        async def watched(key: str, answers: int = 1) -> Any:
            place = await enter(key, answers)
            seen.append(key)
            return place

        monkeypatch.setattr(line, "place", watched)
        held = stack.enter_context(begun_upload(api.port, alice))
        eventually(lambda: line.places.held == 1)
        form = {"file": ("a.png", png()), "purpose": (None, "vision")}
        pool = stack.enter_context(ThreadPoolExecutor(4))
        sent = []
        for number, key in enumerate((alice, alice, alice, bob), 1):
            sent.append(pool.submit(api.request, "POST", "/v1/files", key, files=form))
            eventually(lambda number=number: line.places.waiting == number)  # type: ignore[misc]
        held.close()
        eventually(lambda: len(seen) == 5)
        assert seen == ["alice", "alice", "bob", "alice", "alice"]
        assert [one.result(60).status_code for one in sent] == [200] * 4


def begun_upload(port: int, key: str) -> socket.socket:
    """Send the beginning of an upload and no more."""
    line = socket.create_connection(("127.0.0.1", port), timeout=60)
    line.sendall(
        f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        "Content-Length: 5000\r\nContent-Type: multipart/form-data; boundary=x\r\n\r\n"
        "--x\r\n".encode()
    )
    return line


def test_an_upload_that_breaks_off_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a file nor an unfinished one, in the folder or the temporary one."""
    folder, spool = tmp_path / "files", tmp_path / "spool"
    spool.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spool))
    with server(f"files.folder={folder}") as api:
        with socket.create_connection(("127.0.0.1", api.port)) as raw:
            body = PURPOSE + FILE[:-2] + bytes(3_000_000)
            raw.sendall(
                b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n"
                b"Content-Type: multipart/form-data; boundary=x\r\n\r\n" + body
            )
            eventually(lambda: "qwen2vl_requests_in_flight 1.0" in api.metrics())
            eventually(lambda: spooled(spool) != [])
        eventually(lambda: "qwen2vl_requests_in_flight 0.0" in api.metrics())
        assert list(folder.iterdir()) == []
        assert list(spool.iterdir()) == []
        eventually(lambda: spooled(spool) == [])


def spooled(folder: Path) -> list[str]:
    """Files of a folder that this process has open, also those without a name."""
    found = []
    for one in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(one.readlink()))
    return [one for one in found if one.startswith(str(folder))]


def test_files_need_a_key_like_everything_else() -> None:
    """With keys set, no route of files is open; each key sees the same files."""
    with running(keys=("sk-one", "sk-two")) as api:
        assert upload(api, png()).status_code == 401
        assert requests.get(f"{api.root}/v1/files", timeout=60).status_code == 401
        ours, theirs = (
            openai.OpenAI(base_url=f"{api.root}/v1", api_key=key, max_retries=0)
            for key in ("sk-one", "sk-two")
        )
        file = ours.files.create(file=png(), purpose="vision")
        assert theirs.files.retrieve(file.id) == file


def test_the_openapi_document_describes_the_form(api: Running) -> None:
    """What clients are generated from names the fields of an upload."""
    document = requests.get(f"{api.root}/openapi.json", timeout=60).json()
    body = json.dumps(document["paths"]["/v1/files"]["post"]["requestBody"])
    assert '"file"' in body
    assert '"purpose"' in body
    assert {"FilePart", "InputImagePart"} <= document["components"]["schemas"].keys()
