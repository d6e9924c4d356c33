"""Pictures in every form, uploads and explanations, against the real application on a socket."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from qwen2vl_client import (
    Answer,
    APIResponseError,
    APIStatusError,
    AsyncClient,
    BadRequestError,
    Client,
    InvalidArgumentError,
    MediaError,
    NotFoundError,
    StoredFile,
    image_part,
    video_part,
)
from qwen2vl_client.checks import server_timings
from qwen2vl_client.pixels import png

from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.profile import load_profile
from tests import stub_server as stub
from tests.served import Served, served

NOISE = np.random.default_rng(7).integers(0, 255, (700, 600, 3), np.uint8)
LARGE = png(NOISE)
SMALL = png(np.zeros((60, 80, 3), np.uint8))


@contextmanager
def serving(*overrides: str, **options: Any) -> Iterator[tuple[Client, Served]]:
    with (
        served(load_profile("demo", overrides), Keys(())) as server,
        Client(f"{server.root}/v1", "", "demo", max_retries=0, **options) as client,
    ):
        yield client, server


def requests_to(server: Served, route: str, status: int = 200) -> int:
    """How many requests to a route were answered so."""
    text = server.request("GET", "/metrics").text
    pattern = rf'requests_total{{code="[^"]*",route="{route}",status="{status}"}} (\S+)'
    return sum(int(float(count)) for count in re.findall(pattern, text))


def addresses(server: Served, number: int = -1) -> list[str]:
    """Where the pictures and videos of a request that reached the engine came from."""
    found = []
    for message in server.engine.requests[number].messages:
        if not isinstance(message.content, str):
            for part in message.content:
                inner = getattr(part, "image_url", None) or getattr(part, "video_url", None)
                found += [inner.address] if inner else []
    return found


def test_a_large_file_is_uploaded_once_and_named_afterwards(tmp_path: Path) -> None:
    """By content: its path, its bytes and the array that it was drawn from are one upload."""
    path = tmp_path / "large.png"
    path.write_bytes(LARGE)
    assert len(LARGE) > 2**20
    with serving() as (client, server):
        for source in (path, str(path), LARGE, NOISE, path.open("rb")):
            assert client.chat("What is it?", images=source).text
        assert {address[:12] for n in range(5) for address in addresses(server, n)} == {
            "upload:file-"
        }
        assert requests_to(server, "/v1/files") == 1
        assert client.explain("What is it?", images=path).fits
        with client.stream("What is it?", images=path) as stream:
            assert "".join(stream)
        assert requests_to(server, "/v1/files") == 1


def test_a_small_file_travels_inline_and_the_threshold_can_be_set() -> None:
    """``upload_above`` 0 uploads 80 × 60 pixels too, None nothing; -1 and True are refused."""
    with serving() as (client, server):
        client.chat("x", images=SMALL)
        assert addresses(server)[0].startswith("data:image/png")
        assert requests_to(server, "/v1/files") == 0
    with serving(upload_above=0) as (client, server):
        client.chat("x", images=SMALL)
        assert addresses(server)[0].startswith("upload:")
    with serving(upload_above=None) as (client, server):
        client.chat("x", images=LARGE)
        assert addresses(server)[0].startswith("data:")
    for wrong in (-1, True):
        with pytest.raises(InvalidArgumentError, match="upload_above"):
            Client(upload_above=wrong)


def test_a_file_that_the_server_has_lost_is_uploaded_again() -> None:
    """As after a restart, or when its time is over; the caller notices nothing."""
    with serving() as (client, server):
        client.chat("x", images=LARGE)
        (kept,) = client.files.list()
        client.files.delete(kept)
        assert client.chat("x", images=LARGE).text
        assert requests_to(server, "/v1/files") == 3  # two uploads and a list
        assert requests_to(server, "/v1/chat/completions", 404) == 1


@pytest.mark.parametrize("wrong", [{"bytes": "many"}, {"created_at": "now"}, {"expires_at": []}])
def test_a_file_object_without_its_numbers_is_a_typed_error(wrong: dict[str, object]) -> None:
    """Another server's answer of another shape is told as that, not as a fault of ``int``."""
    step = stub.answer(200, {"id": "file-" + "a" * 32, "object": "file", **wrong})
    with (
        stub.running(step) as server,
        Client(server.url, "", "m") as client,
        pytest.raises(APIResponseError, match="no file object"),
    ):
        client.files.get("file-a")


def test_a_file_that_keeps_getting_lost_ends_in_the_server_s_error() -> None:
    """One fresh upload, one retry, and no more."""
    stored = stub.answer(200, {"id": "file-" + "a" * 32, "object": "file", "bytes": 1})
    script = [stored, stub.failure(404, "file_not_found")] * 2
    with (
        stub.running(*script, stub.completion()) as server,
        Client(server.url, "", "m") as client,
        pytest.raises(NotFoundError),
    ):
        client.chat("x", images=LARGE)
    assert [request.path for request in server.requests] == [
        "/v1/files",
        "/v1/chat/completions",
    ] * 2


def test_an_id_of_the_caller_s_own_is_not_replaced() -> None:
    """The client has no bytes for it: ``file_not_found`` is raised after one request."""
    with serving() as (client, server):
        with pytest.raises(NotFoundError) as caught:
            client.chat("x", images="file-" + "0" * 64)
        assert requests_to(server, "/v1/chat/completions", 404) == 1
    assert caught.value.code == "file_not_found"


def test_a_server_that_keeps_no_files_gets_them_inline() -> None:
    """It is asked once; and a single file that it does not keep goes inline as well."""
    with serving("files.max_files=0") as (client, server):
        for _ in range(2):
            client.chat("x", images=LARGE)
            assert addresses(server)[0].startswith("data:image/png")
        assert requests_to(server, "/v1/files", 404) == 1
    with serving("files.max_file_bytes=1000") as (client, server):
        client.chat("x", images=LARGE)
        assert addresses(server)[0].startswith("data:image/png")


@pytest.mark.parametrize("status", [403, 408, 500, 507])
def test_an_upload_that_fails_is_sent_inline(status: int) -> None:
    """The chat is what matters; where it fails as well its own error says why."""
    script = [stub.failure(status), stub.completion("yes")]
    with (
        stub.running(*script) as server,
        Client(server.url, "", "m", max_retries=0) as client,
    ):
        assert client.chat("x", images=LARGE).text == "yes"
    part = server.requests[-1].body["messages"][-1]["content"][0]
    assert part["image_url"]["url"].startswith("data:image/png")


@pytest.mark.parametrize("status", [401, 429])
def test_a_fault_that_the_chat_would_meet_too_ends_it(status: int) -> None:
    """A wrong key or a spent limit is raised from the upload; the chat is not sent after it."""
    with (
        stub.running(stub.failure(status)) as server,
        Client(server.url, "", "m", max_retries=0) as client,
        pytest.raises(APIStatusError),
    ):
        client.chat("x", images=LARGE)
    assert [request.path for request in server.requests] == ["/v1/files"]


def test_many_threads_with_one_new_picture_upload_it_once() -> None:
    """All sixteen chats are answered; seven of eight threads wait for the first one's upload."""
    with serving() as (client, server):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: client.chat("x", images=LARGE), range(16)))
        assert requests_to(server, "/v1/files") == 1
        assert requests_to(server, "/v1/chat/completions") == 16


def test_the_asynchronous_client_uploads_once_too() -> None:
    """Eight chats at once share one upload; what was deleted is uploaded again when needed."""

    async def ask(url: str) -> list[Answer]:
        async with AsyncClient(url, "", "demo") as client:
            answers = await asyncio.gather(*(client.chat("x", images=LARGE) for _ in range(8)))
            (kept,) = await client.files.list()
            assert (await client.files.get(kept.id)).bytes == len(LARGE)
            await client.files.delete(kept)
            assert (await client.explain("x", images=LARGE)).visual_tokens > 0
            return answers

    with serving() as (_, server):
        assert len(asyncio.run(ask(f"{server.root}/v1"))) == 8
        assert requests_to(server, "/v1/files") == 3  # two uploads and a list


def test_files_are_uploaded_listed_got_shown_and_deleted(tmp_path: Path) -> None:
    """Name, purpose and time are the caller's; a deleted one is ``NotFoundError`` afterwards."""
    path = tmp_path / "格子.png"
    path.write_bytes(SMALL)
    with serving() as (client, server):
        assert client.files.list() == []
        stored = client.files.upload(path, expires_after=60)
        assert (stored.filename, stored.bytes, stored.purpose) == ("格子.png", len(SMALL), "vision")
        assert stored.expires_at == stored.created_at + 60
        other = client.files.upload(io.BytesIO(LARGE), purpose="user_data", filename="b.png")
        assert {file.id for file in client.files.list()} == {stored.id, other.id}
        assert [file.id for file in client.files.list(purpose="vision")] == [stored.id]
        assert len(client.files.list(limit=1)) == 1
        assert client.files.get(str(other)) == other
        for named in (stored, stored.id):
            assert client.chat("x", images=named).text
            assert addresses(server) == [f"upload:{stored.id}"]
        client.files.delete(stored)
        for gone in (client.files.get, client.files.delete):
            with pytest.raises(NotFoundError):
                gone(stored)
        with pytest.raises(BadRequestError) as caught:
            client.files.upload(b"not a picture")
        assert caught.value.code == "invalid_image"


def test_a_video_is_uploaded_and_named_like_a_picture() -> None:
    """Above 1 MiB a film goes as a file, and its part is a ``video_url`` with the file's id."""
    part = video_part("file-" + "0" * 64)
    assert part == {"type": "video_url", "video_url": {"file_id": "file-" + "0" * 64}}
    film = b"\x00\x00\x00\x18ftypmp42" + bytes(2**20)
    stored = stub.answer(200, {"id": "file-" + "a" * 32, "object": "file", "bytes": 1})
    with (
        stub.running(stored, stub.completion()) as server,
        Client(server.url, "", "m") as client,
    ):
        client.chat("x", videos=film)
    shown = server.requests[-1].body["messages"][-1]["content"][0]
    assert shown == {"type": "video_url", "video_url": {"file_id": "file-" + "a" * 32}}


def test_frames_travel_inline_however_large() -> None:
    """A list of frames is no file."""
    with stub.running(stub.completion()) as server, Client(server.url, "", "m") as client:
        client.chat("x", videos=[np.stack([NOISE, NOISE])])
    (request,) = server.requests
    url = request.body["messages"][-1]["content"][0]["video_url"]["url"]
    assert url.startswith("data:video/jpeg;base64,")
    assert url.count(",") == 2


def test_an_answer_tells_what_the_model_saw_and_how_long_it_took() -> None:
    """The media report is asked for where something is shown, and only there."""
    with serving() as (client, server):
        answer = client.chat("x", images=[SMALL, LARGE])
        sides = [(one.width, one.height) for one in answer.media]
        assert sides == [(80, 60), (600, 700)]
        for one in answer.media:
            assert one.resized_width is not None
            assert one.resized_height is not None
            assert one.visual_tokens == one.resized_width * one.resized_height // 784
        assert answer.timings.total == answer.seconds > 0
        assert answer.timings.first_token is None
        with client.stream("x", images=SMALL) as stream:
            list(stream)
        assert stream.answer.media == (replace(answer.media[0], cached=True),)
        assert client.chat("x").media == ()
        assert server.engine.requests[-1].include_media_info is None
        client.chat("x", images=SMALL, include_media_info=None)
        assert server.engine.requests[-1].include_media_info is None


def test_an_explanation_is_what_the_chat_would_cost() -> None:
    """Text and visual tokens add up, and no engine is asked; a foreign answer is an error."""
    with serving() as (client, server):
        told = client.explain("one two three", images=SMALL, max_tokens=10, system=None)
        assert (told.text_tokens, told.max_model_len, told.fits) == (3, 4096, True)
        assert told.prompt_tokens == told.visual_tokens + 3
        assert told.context_left == 4096 - told.prompt_tokens
        assert told.media[0].visual_tokens == told.visual_tokens
        large = client.explain("x", images=SMALL, max_tokens=4090)
        assert (large.fits, large.largest_max_pixels) == (False, None)
        assert server.engine.requests == []
    with (
        stub.running(stub.answer(200, {"object": "x"})) as server,
        Client(server.url, "", "m") as client,
        pytest.raises(APIResponseError, match="lacks a field"),
    ):
        client.explain("x")


def test_health_and_readiness() -> None:
    """A dead engine ends readiness alone; where nothing listens there is no exception."""
    with serving() as (client, server):
        assert client.health()
        assert client.ready()
        server.engine.dead = True
        assert client.health()
        assert not client.ready()
    assert not client.health()


def test_arguments_that_come_as_an_object_are_json_all_the_same() -> None:
    """Some servers send no text; ``arguments`` and ``values`` are what they are elsewhere."""
    call = {"id": "c", "function": {"name": "add", "arguments": {"名": 1}}}
    raw = {"choices": [{"message": {"content": None, "tool_calls": [call]}}]}
    (made,) = Answer.from_raw(raw, None, 0.1).tool_calls
    assert (made.arguments, made.values) == ('{"名": 1}', {"名": 1})


def test_tool_calls_are_read_whole_and_streamed() -> None:
    """Arguments come in pieces in a stream; their JSON is parsed on demand."""
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    choices = [{"index": 0, "message": message, "finish_reason": "tool_calls"}]
    pieces = [
        {"index": 0, "id": "c1", "type": "function", "function": {"name": "add"}},
        {"index": 0, "function": {"arguments": '{"a"'}},
        {"index": 0, "function": {"arguments": ": 1}"}},
    ]
    chunks = [
        stub.chunk(choices=[{"index": 0, "delta": {"tool_calls": [one]}, "finish_reason": None}])
        for one in pieces
    ]
    events = [*chunks, stub.chunk(finish="tool_calls"), stub.DONE]
    script = [stub.completion(choices=choices), stub.events(events)]
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    with stub.running(*script) as server, Client(server.url, "", "m") as client:
        whole = client.chat("x", tools=[tool], tool_choice="auto")
        stream = client.stream("x", tools=[tool])
        assert list(stream) == []
    for answer in (whole, stream.answer):
        (made,) = answer.tool_calls
        assert (made.id, made.name, made.values) == ("c1", "add", {"a": 1})
        assert answer.finish_reason == "tool_calls"
        assert answer.message["tool_calls"][0]["function"]["name"] == "add"
    assert server.requests[0].body["tools"] == [tool]


def test_several_answers_are_all_there() -> None:
    """``n`` reaches the server; ``texts`` has one for each choice, in the order of the reply."""
    choices = [
        {"index": n, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        for n, text in enumerate(("a", "b"))
    ]
    with (
        stub.running(stub.completion(choices=choices)) as server,
        Client(server.url, "", "m") as client,
    ):
        assert client.chat("x", n=2).texts == ["a", "b"]
    assert server.requests[-1].body["n"] == 2


@pytest.mark.parametrize(
    ("header", "times"),
    [
        ("", {}),
        ("db;dur=53, app;dur=47.2", {"db": 0.053, "app": 0.0472}),
        ('total;desc="all";dur="1.5"', {"total": 0.0015}),
        ("cache;desc=hit, odd;dur=soon", {}),
    ],
)
def test_the_server_s_own_timings_are_told(header: str, times: dict[str, float]) -> None:
    """Milliseconds of ``Server-Timing`` in seconds; what has no readable ``dur`` is left out."""
    assert server_timings({"server-timing": header}) == pytest.approx(times)


SHAPES = st.one_of(
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.tuples(st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 3, 4])),
)


@settings(deadline=None)
@given(SHAPES, st.integers(0, 2**32 - 1), st.booleans())
def test_an_array_becomes_a_png_of_its_pixels(
    shape: tuple[int, ...], seed: int, flipped: bool
) -> None:
    """Grey, RGB and RGBA, also where the array is a view; Pillow reads the same pixels back."""
    array = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    if flipped:
        array = array[::-1, ::-1]
    read = np.asarray(Image.open(io.BytesIO(png(array))))
    assert (read.reshape(array.shape) == array).all()


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 4, 3)), "float64"),
        (np.zeros((4, 4, 2), np.uint8), r"\[4, 4, 2\]"),
        (np.zeros((0, 4), np.uint8), r"\[0, 4\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), "videos="),
    ],
)
def test_an_array_that_is_no_picture_is_refused(array: Any, words: str) -> None:
    """The error tells the type or shape that is wrong; frames are sent to ``videos=``."""
    with pytest.raises(MediaError, match=words):
        image_part(array)


def test_an_array_that_is_no_video_is_refused() -> None:
    """One picture's three dimensions are no frames: a ``MediaError`` before anything is sent."""
    with pytest.raises(MediaError, match="no video"):
        video_part(np.zeros((4, 4, 3), np.uint8))


def test_an_uploaded_file_stands_wherever_a_picture_does() -> None:
    """A ``StoredFile`` goes as its id alone, into a picture's part or a video's."""
    stored = StoredFile("file-" + "b" * 64, "a", "vision", 1, 0, None, {})
    inner = {"file_id": stored.id}
    assert image_part(stored) == {"type": "image_url", "image_url": inner}
    assert video_part(stored) == {"type": "video_url", "video_url": inner}
