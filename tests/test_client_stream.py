"""Streams: the event reader for any cut of the bytes, and streamed calls over a socket."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import re
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen2vl_client import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    APITimeoutError,
    BadRequestError,
    Client,
    RateLimitError,
    ServerError,
)
from qwen2vl_client.sse import ServerSentEvent, SSEDecoder

from tests import stub_server as stub

PATIENCE = (1.5, 6.0, 24.0)
"""Seconds of a timeout under test: where the machine stands still, the next tells."""


@contextlib.contextmanager
def asking(*script: stub.Step, timeout: float = 60) -> Iterator[tuple[Client, stub.Stub]]:
    with (
        stub.running(*script) as server,
        Client(server.url, "", "stub-model", timeout=timeout, max_retries=0) as client,
    ):
        yield client, server


def decode(stream: bytes, cuts: list[int] | None = None) -> list[ServerSentEvent]:
    """Feed the bytes cut at the given places."""
    decoder = SSEDecoder()
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts or [])})
    pieces = [stream[a:b] for a, b in itertools.pairwise(edges)]
    return [event for piece in pieces for event in decoder.feed(piece)]


LINES = st.text(st.characters(blacklist_characters="\r\n", codec="utf-8"), max_size=12)
LINE_END = st.sampled_from(["\n", "\r", "\r\n"])
NOISE = st.sampled_from([": ping", ":", "id: 7", "retry: 10", "unknown: x", "nocolon"])


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[ServerSentEvent]]:
    """Draw an event stream in the forms the standard allows, and the events it stands for."""
    text, expected = "", []
    for _ in range(draw(st.integers(0, 5))):
        data = draw(st.lists(LINES, max_size=3))
        name = draw(st.none() | st.text("abc", min_size=1, max_size=3))
        # One space after the colon belongs to the form, a second one to the data.
        lines = [f"data: {line}" if line.startswith(" ") else f"data:{line}" for line in data]
        lines += draw(st.lists(NOISE, max_size=2))
        if name is not None:
            lines.insert(draw(st.integers(0, len(lines))), f"event: {name}")
        for line in lines:
            text += line + draw(LINE_END)
        # After a lone CR an LF would belong to the same line end.
        text += draw(st.sampled_from(["\r", "\r\n"]) if text.endswith("\r") else LINE_END)
        if data:
            expected.append(ServerSentEvent("\n".join(data), name or "message"))
    bom = draw(st.sampled_from(["", "\ufeff"]))
    return (bom + text).encode(), expected


class TestSSEDecoder:
    @settings(deadline=None)
    @given(streams(), st.lists(st.integers(0, 10_000), max_size=20))
    def test_the_cut_of_the_stream_makes_no_difference(
        self, drawn: tuple[bytes, list[ServerSentEvent]], cuts: list[int]
    ) -> None:
        """With any line ends, comments and names: cut anywhere or byte by byte, the same events."""
        stream, expected = drawn
        assert decode(stream, cuts) == expected
        assert decode(stream, list(range(len(stream)))) == expected

    @settings(deadline=None)
    @given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=20))
    def test_any_bytes_are_read_alike_however_cut(self, stream: bytes, cuts: list[int]) -> None:
        """Hostile bytes raise nothing and mean the same in one piece or in many."""
        assert decode(stream, cuts) == decode(stream)

    @pytest.mark.parametrize(
        ("stream", "events"),
        [
            (b"data: a\n\n", ["a"]),
            (b"data:a\n\n", ["a"]),
            (b"data:  a\n\n", [" a"]),
            (b"data: a\ndata: b\n\n", ["a\nb"]),
            (b"data\n\n", [""]),
            (b"data:\ndata:\n\n", ["\n"]),
            (b": comment\n\n", []),
            (b"event: x\n\n", []),
            (b"data: a", []),
            (b"data: a\n", []),
            (b"data: a\r\rdata: b\r\n\r\n", ["a", "b"]),
            (b"\xef\xbb\xbfdata: a\n\n", ["a"]),
            (b"\n\n\ndata: a\n\n\n\n", ["a"]),
            ("data: \u2028红\u0085\x0b\n\n".encode(), ["\u2028红\u0085\x0b"]),
            (b"data: \xff\n\n", ["\ufffd"]),
            (b"database: a\n\n", []),
        ],
    )
    def test_the_standard_s_cases(self, stream: bytes, events: list[str]) -> None:
        """A blank line ends an event; comments, other fields and an unended rest are none."""
        for cuts in ([], list(range(len(stream)))):
            assert [event.data for event in decode(stream, cuts)] == events

    def test_a_name_holds_for_one_event(self) -> None:
        """The next event that gives none is a ``message`` again."""
        named, plain = decode(b"event: error\ndata: a\n\ndata: b\n\n")
        assert (named.event, plain.event) == ("error", "message")

    def test_a_long_line_in_many_pieces_is_read_in_linear_time(self) -> None:
        """16 MB without a line end, 40 bytes at a time, take less than 10 seconds of CPU.

        Linear they take under one; copied for each piece they would be terabytes.
        """
        decoder = SSEDecoder()
        started = time.thread_time()
        for _ in range(400):
            for _ in range(1000):
                assert decoder.feed(b"x" * 40) == []
            assert time.thread_time() - started < 10
        (event,) = decoder.feed(b"\ndata: a\n\n")
        assert event.data == "a"


class TestStream:
    def test_text_comes_as_it_is_generated(self) -> None:
        """The first words are here while the server still holds the rest back."""

        def step(handler: stub.Handler) -> None:
            stub.start_events(handler)
            stub.send_piece(handler, stub.chunk("first "))
            assert handler.stub.proceed.wait(60)
            for piece in stub.whole_stream("second"):
                stub.send_piece(handler, piece)
            handler.wfile.write(b"0\r\n\r\n")

        with asking(step) as (client, server):
            pieces = iter(client.stream("x"))
            assert next(pieces) == "first "
            server.proceed.set()
            assert list(pieces) == ["second"]

    @pytest.mark.parametrize("chunked", [True, False])
    def test_the_whole_answer_is_kept(self, chunked: bool) -> None:
        """After the end ``answer`` has text, usage, reason, model and id; usage was asked for."""
        step = stub.events(stub.whole_stream("一个", "红色的圆"), chunked=chunked)
        with asking(step) as (client, server):
            with client.stream("x") as stream:
                assert list(stream) == ["一个", "红色的圆"]
            body = server.requests[0].body
        answer = stream.answer
        assert stream.text == answer.text == "一个红色的圆"
        assert answer.usage is not None
        assert answer.usage.total_tokens == 35
        assert (answer.finish_reason, answer.model) == ("stop", "stub-model")
        assert answer.request_id == stream.request_id == stub.REQUEST_ID
        assert answer.raw["choices"][0]["message"]["content"] == answer.text
        assert body["stream"] is True
        assert body["stream_options"] == {"include_usage": True}

    @pytest.mark.parametrize("chunked", [True, False])
    def test_characters_split_between_packets_come_out_whole(self, chunked: bool) -> None:
        """Sent byte by byte, each piece of text comes once and complete, after a comment too."""
        whole = b": ping\r\n\r\n" + b"".join(stub.whole_stream("红色🔴", "圆"))
        pieces = [bytes([byte]) for byte in whole]
        with asking(stub.events(pieces, chunked=chunked)) as (client, _):
            assert list(client.stream("x")) == ["红色🔴", "圆"]

    def test_close_ends_the_generation(self) -> None:
        """The server sees the client leave; nothing more is read, and there is no ``answer``."""
        with asking(stub.endless_events) as (client, server):
            with client.stream("x") as stream:
                assert next(iter(stream)) == "word "
            assert server.client_left.wait(60)
            assert list(stream) == []
            with pytest.raises(APIResponseError, match="has not ended"):
                _ = stream.answer

    def test_leaving_the_loop_ends_the_generation(self) -> None:
        """Without ``with`` and without ``close``."""
        with asking(stub.endless_events) as (client, server):
            for _ in client.stream("x"):
                break
            gc.collect()
            assert server.client_left.wait(60)

    def test_a_stream_nobody_reads_ends_the_generation(self) -> None:
        """Dropped unread, it closes its connection, and the server does not go on for nobody."""
        with asking(stub.endless_events) as (client, server):
            client.stream("x")
            gc.collect()
            assert server.client_left.wait(60)

    def test_another_thread_can_stop_a_waiting_stream(self) -> None:
        """The loop ends without an error although the server sends nothing."""
        with asking(stub.stalled_events) as (client, _):
            stream = client.stream("x")
            pieces = iter(stream)
            assert next(pieces) == "word"
            threading.Timer(0.3, stream.close).start()
            assert list(pieces) == [], "and no APITimeoutError"

    @pytest.mark.parametrize("chunked", [True, False])
    def test_a_stream_that_breaks_off_is_an_error(self, chunked: bool) -> None:
        """An answer without its [DONE] is never taken for a whole one."""
        step = stub.events([stub.chunk("half")], chunked=chunked, ends=False)
        with asking(step) as (client, server):
            stream = client.stream("x")
            with pytest.raises(APIConnectionError):
                list(stream)
        assert stream.text == "half"
        assert len(server.requests) == 1

    def test_an_ended_body_without_done_is_an_error(self) -> None:
        """An HTTP body that ends as it should is still cut off without its last event."""
        step = stub.events(stub.whole_stream("text")[:-1])
        with asking(step) as (client, _), pytest.raises(APIConnectionError, match="DONE"):
            list(client.stream("x"))

    @pytest.mark.parametrize(
        ("error", "kind", "status"),
        [
            ({"message": "m", "type": "server_error", "code": "engine_unavailable"},
             ServerError, 500),
            ({"message": "m", "type": "BadRequestError", "code": 400}, BadRequestError, 400),
            ({"message": "m", "type": "invalid_request_error"}, BadRequestError, 400),
            ({"message": "m", "code": "429"}, RateLimitError, 429),
            ("just words", ServerError, 500),
            ({}, None, 0),
        ],
    )  # fmt: skip
    def test_an_error_event_is_a_typed_error(
        self, error: object, kind: type[APIStatusError] | None, status: int
    ) -> None:
        """Its numeric code, else its type, is the status, else 500; the text before it is kept."""
        event = f"data: {json.dumps({'error': error})}\n\n".encode()
        with asking(stub.events([stub.chunk("half"), event, stub.DONE])) as (client, _):
            stream = client.stream("x")
            if kind is None:
                assert list(stream) == ["half"]
                return
            with pytest.raises(kind) as caught:
                list(stream)
        assert (caught.value.status, caught.value.request_id) == (status, stub.REQUEST_ID)
        assert stream.text == "half"

    @pytest.mark.parametrize(
        "data",
        [
            "{broken",
            "[" * 100_000,
            "[1]",
            "1",
            '{"choices": 1}',
            '{"choices": [1]}',
            '{"choices": [null]}',
            '{"choices": {"a": 1}}',
            '{"choices": [{"delta": 5}]}',
            '{"choices": [{"delta": {"tool_calls": 5}}]}',
            '{"choices": [{"delta": {"tool_calls": [5]}}]}',
            '{"choices": [{"delta": {"tool_calls": [{"index": "x"}]}}]}',
            '{"choices": [{"delta": {"tool_calls": [{"index": Infinity}]}}]}',
            '{"choices": [{"delta": {"tool_calls": [{"function": "f"}]}}]}',
        ],
        ids=lambda data: data[:60],
    )
    def test_an_event_that_is_no_chunk_is_a_typed_error(self, data: str) -> None:
        """Broken JSON and JSON of another shape show in an ``APIResponseError``; text stays."""
        pieces = [stub.chunk("half"), f"data: {data}\n\n".encode(), stub.DONE]
        with asking(stub.events(pieces)) as (client, _):
            stream = client.stream("x")
            with pytest.raises(APIResponseError, match=re.escape(data[:60])):
                list(stream)
        assert stream.text == "half"

    def test_an_error_before_the_stream_is_raised_by_the_call(self) -> None:
        """A 400 comes with the server's code from ``stream`` itself, before any iteration."""
        with (
            asking(stub.failure(400, "invalid_image")) as (client, _),
            pytest.raises(BadRequestError) as caught,
        ):
            client.stream("x")
        assert caught.value.code == "invalid_image"

    def test_the_timeout_bounds_the_wait_for_each_piece(self) -> None:
        """A long answer may take longer than the timeout; a stalled one may not."""
        for timeout in PATIENCE:
            pieces = stub.whole_stream(*"abcdef")
            slow = stub.events(pieces, pause=timeout / 6)
            with asking(slow, timeout=timeout) as (client, _):
                started = time.monotonic()
                try:
                    found = list(client.stream("x"))
                except APITimeoutError:
                    continue
                assert len(found) == 6
                assert time.monotonic() - started > timeout
                break
        else:
            raise AssertionError("each timeout cut a stream that moved")
        for timeout in PATIENCE:
            words: list[str] = []
            with (
                asking(stub.stalled_events, timeout=timeout) as (client, _),
                pytest.raises(APITimeoutError),
            ):
                words.extend(client.stream("x"))
            if words == ["word"]:
                break
        else:
            raise AssertionError("the first word never came")

    def test_a_connection_left_open_after_the_end_is_not_waited_for(self) -> None:
        """The answer ends with ``[DONE]``; a server that stays silent then is left at once."""

        def step(handler: stub.Handler) -> None:
            stub.start_events(handler)
            for piece in stub.whole_stream("a"):
                stub.send_piece(handler, piece)
            handler.stub.proceed.wait(600)

        with asking(step, timeout=60) as (client, _):
            started = time.monotonic()
            assert list(client.stream("x")) == ["a"], "and no APITimeoutError"
            assert time.monotonic() - started < 30
