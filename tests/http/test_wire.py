"""HTTP on the wire, byte by byte: bounds of the head, deadlines, requests made to smuggle."""

from __future__ import annotations

import json
import logging
import re
import socket
import time
from collections.abc import Iterator

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.profile import load_profile
from tests.fake_engine import FakeEngine
from tests.served import HELLO, Served, drained, eventually, served

BODY = json.dumps(HELLO).encode()
CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
GET = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
def api() -> Iterator[Served]:
    limits = [
        "limits.max_header_bytes=4096",
        "limits.header_seconds=0.6",
        "limits.body_seconds=0.8",
    ]
    with served(load_profile("demo", limits), Keys()) as one:
        yield one
        # Whatever was sent: the next good request is served.
        eventually(lambda: answered(one))


@pytest.fixture
def patient() -> Iterator[Served]:
    """With the profile's own times: for what is not to be cut, however slow this machine is."""
    with served(load_profile("demo", ["limits.max_header_bytes=4096"]), Keys()) as one:
        yield one


def answered(one: Served) -> bool:
    """Whether a good request is; it is cut where this process stands still in the middle of it."""
    try:
        status = one.chat().status_code
    except requests.RequestException:
        return False
    assert status in (200, 408)
    return status == 200


def refused(answer: bytes) -> tuple[int, str]:
    """Status and code of a single refusal that closes the connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/1\.1 (\d+) ", head)
    assert status is not None, answer
    assert b"connection: close" in head.lower()
    error = json.loads(body)["error"]  # fails if anything follows
    assert set(error) == {"message", "type", "param", "code"}
    return int(status[1]), error["code"]


SMUGGLING = [
    b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
    b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    b"Content-Length: 5, 6\r\n\r\nabcdef",
    b"Content-Length: +5\r\n\r\nabcde",
    b"Content-Length: -5\r\n\r\nabcde",
    b"Content-Length: 0x5\r\n\r\nabcde",
    b"Content-Length : 5\r\n\r\nabcde",
    b"Content-Length: 5 5\r\n\r\nabcde",
    b"Content-Length: 99999999999999999999999\r\n\r\nabcde",
    b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    b" folded: x\r\n\r\n",
    b"no colon\r\n\r\n",
    b"X\x00Y: 1\r\n\r\n",
    b"X: a\x00b\r\n\r\n",
    b"X: a\rb\r\n\r\n",
]


@pytest.mark.parametrize("rest", SMUGGLING)
def test_what_ends_in_two_ways_is_refused_whole(api: Served, rest: bytes) -> None:
    """One 400 in OpenAI's shape, then the end: nothing behind it is taken for a request."""
    assert refused(api.raw(CHAT + rest)) == (400, "malformed_request")
    assert api.engine.requests == []


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50,
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_what_is_not_our_http_is_refused(api: Served, data: bytes) -> None:
    """TLS on a plain port, HTTP/2, other words: 400, never a traceback or silence."""
    assert refused(api.raw(data)) == (400, "malformed_request")


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"GARBAGE\r\n\r\n", 400, "malformed_request"),
        (GET + b"X: " + b"a" * 9000, 431, "request_head_too_large"),
        (GET, 408, "request_timeout"),
        (CHAT + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n", 400, "malformed_request"),
    ],
)
def test_what_is_refused_unread_has_an_id_and_is_counted(
    api: Served, data: bytes, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By its error code, with a line in the log under the id that the client got."""
    caplog.set_level(logging.INFO, "qwen2vl_serve.requests")
    found = re.search(rb"\r\nx-request-id: ([0-9a-f]{32})\r\n", api.raw(data))
    assert found is not None
    counted = f'qwen2vl_requests_total{{code="{code}",route="other",status="{status}"}} 1.0\n'
    assert counted in api.request("GET", "/metrics").text
    told = [getattr(record, "request", {}) for record in caplog.records]
    (one,) = [line for line in told if line.get("id") == found[1].decode()]
    assert (one["status"], one["code"]) == (status, code)


@pytest.mark.parametrize(
    "rest",
    [
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n-1\r\nabc\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcX\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\nabc\r\n",
    ],
)
def test_a_broken_chunk_ends_the_connection(api: Served, rest: bytes) -> None:
    """The body that was promised never comes; the route is not run on half of it."""
    assert refused(api.raw(CHAT + rest)) == (400, "malformed_request")
    assert api.engine.requests == []


def test_what_trails_a_chunked_body_is_no_header(api: Served) -> None:
    """Trailers cannot bring a key or a content type along."""
    head = CHAT.replace(b"Content-Type: application/json\r\n", b"")
    rest = b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    body = b"%x\r\n%s\r\n0\r\nContent-Type: application/json\r\n\r\n" % (len(BODY), BODY)
    assert api.raw(head + rest + body).startswith(b"HTTP/1.1 415 ")


@pytest.mark.parametrize(
    "pieces",
    [
        [GET + b"X: " + b"a" * 200_000 + b"\r\n\r\n"],
        [GET, *[b"X-%d: %s\r\n" % (n, b"a" * 90) for n in range(100)], b"\r\n"],
        [GET + b"X: ", *[b"a" * 1000] * 8],
        [b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"],
        [GET + b"a" * 9000],
        [b"\r\n" * 9000],
    ],
    ids=["one header", "many headers", "unfinished header", "path", "unfinished name", "line ends"],
)
def test_a_head_beyond_its_bound_is_431(api: Served, pieces: list[bytes]) -> None:
    """Refused as soon as it is too long, finished or not, in one piece or many."""
    answer = b""
    with socket.create_connection(("127.0.0.1", api.port), 60) as client:
        try:
            for piece in pieces:
                client.sendall(piece)
                time.sleep(0.002)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = drained(client)
    # A reset may overtake it where the client goes on sending behind it.
    if answer or (len(pieces) == 1 and len(pieces[0]) < 2**15):
        assert refused(answer) == (431, "request_head_too_large")


def test_a_head_within_its_bound_is_served(api: Served) -> None:
    """3.5 KiB of headers under a bound of 4."""
    head = GET + b"X: " + b"a" * 3500 + b"\r\nConnection: close\r\n\r\n"
    assert api.raw(head).startswith(b"HTTP/1.1 200 ")


def test_a_large_body_behind_a_small_head_is_not_its_head(patient: Served) -> None:
    """Only what stands before the empty line is counted, also where both come at once."""
    text = json.dumps({"messages": [{"role": "user", "content": "x" * 100_000}]}).encode()
    head = CHAT + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(text)
    assert patient.raw(head + text).startswith(b"HTTP/1.1 200 ")
    assert patient.raw(head, text[:50_000], text[50_000:]).startswith(b"HTTP/1.1 200 ")


def dripped(api: Served, first: bytes, drip: bytes) -> bytes:
    """Send ``drip`` every 50 ms until the server ends it, which it does; return the answer."""
    ends = time.monotonic() + 60
    answer = b""
    with socket.create_connection(("127.0.0.1", api.port), 60) as client:
        client.sendall(first)
        client.settimeout(0.05)
        while time.monotonic() < ends:
            try:
                piece = client.recv(65536)
                if not piece:
                    return answer
                answer += piece
            except TimeoutError:
                try:
                    client.sendall(drip)
                except OSError:
                    return answer
            except ConnectionResetError:
                return answer
    raise AssertionError(f"still connected after a minute: {answer!r}")


def test_slow_headers_are_cut(api: Served) -> None:
    """A header every now and then does not hold a connection beyond its time."""
    answer = dripped(api, GET, b"X: y\r\n")
    assert refused(answer) == (408, "request_timeout")


@pytest.mark.parametrize("drip", [b"", b"\r\n"], ids=["silence", "line ends"])
def test_a_connection_that_asks_nothing_is_closed(api: Served, drip: bytes) -> None:
    """Nothing, or line ends that begin no request: closed after the same time."""
    assert b"HTTP/1.1 200" not in dripped(api, b"", drip)


def test_a_second_request_has_the_same_time(api: Served) -> None:
    """A connection that is kept alive gives its next head no longer than its first."""
    answer = dripped(api, GET + b"\r\n" + GET, b"X: y\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"HTTP/1.1 408 " in answer


def test_a_slow_body_is_cut(api: Served) -> None:
    """408 when the body's time is over, and the connection ends however long the drip goes on."""
    answer = dripped(api, CHAT + b"Content-Length: 100000\r\n\r\n", b" ")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"request_timeout"' in answer
    assert api.engine.requests == []


def test_a_long_answer_outlives_the_time_of_heads() -> None:
    """Deadlines end with the head; a line end behind the body, or a next head, changes nothing."""
    profile = load_profile("demo", ["limits.header_seconds=1.5"])
    engine = FakeEngine(words=["word "] * 8, pause=0.3)
    with served(profile, Keys(), engine) as api:
        for behind in (b"", b"\r\n", b"GET /v1"):
            with socket.create_connection(("127.0.0.1", api.port), 60) as client:
                client.sendall(CHAT + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY + behind)
                answer = drained(client)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert answer.count(b"word ") == 8


def test_a_client_that_does_not_read_is_cut_off() -> None:
    """Its generation ends with it; one that reads slowly is waited for."""
    profile = load_profile("demo", ["limits.reader_seconds=0.5"])
    engine = FakeEngine(words=["x" * 60_000] * 1000)
    request = json.dumps({**HELLO, "stream": True}).encode()
    with (
        served(profile, Keys(), engine) as api,
        socket.create_connection(("127.0.0.1", api.port), 60) as client,
    ):
        client.sendall(CHAT + b"Content-Length: %d\r\n\r\n" % len(request) + request)
        eventually(lambda: engine.aborted == 1)
        assert engine.running == 0
        assert b"[DONE]" not in drained(client)
    engine.words = ["x" * 60_000] * 100
    # With the patience of a profile, so that it does not end where the machine stands still.
    with (
        served(load_profile("demo"), Keys(), engine) as api,
        socket.create_connection(("127.0.0.1", api.port), 60) as client,
    ):
        client.sendall(
            CHAT + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(request) + request
        )
        answer = b""
        while piece := client.recv(400_000):
            answer += piece
            time.sleep(0.01)
    assert b"[DONE]" in answer


bits = st.sampled_from(
    [
        b"GET ", b"POST ", b"/v1/models", b"/v1/chat/completions", b" HTTP/1.1", b" HTTP/1.0",
        b"\r\n", b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"Host: x", b"Content-Length: 5",
        b"Content-Length: 0", b"Transfer-Encoding: chunked", b"Connection: close",
        b"Connection: upgrade", b"Upgrade: h2c", b"Expect: 100-continue",
        b"5\r\nhello\r\n0\r\n\r\n", b"hello", b"\x00", b"\xff", b": ", b" ", b"X-Y: z",
        b"Content-Type: application/json", BODY,
    ]
)  # fmt: skip


@pytest.fixture(scope="module")
def lasting() -> Iterator[Served]:
    """One server for all examples."""
    bounds = ["limits.header_seconds=0.3", "limits.body_seconds=0.3"]
    with served(load_profile("demo", bounds), Keys()) as one:
        yield one
        eventually(lambda: answered(one))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(bits, max_size=12).map(b"".join), min_size=1, max_size=3))
def test_no_bytes_bring_the_server_down(lasting: Served, pieces: list[bytes]) -> None:
    """Whatever is sent: only answers below 500, each well formed, and the connection ends."""
    with socket.create_connection(("127.0.0.1", lasting.port), 60) as client:
        try:
            for piece in pieces:
                client.sendall(piece)
            client.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        answer = drained(client)
    statuses = [int(one) for one in re.findall(rb"HTTP/1\.1 (\d+) ", answer)]
    assert all(status < 500 for status in statuses), answer
    assert b"Traceback" not in answer
    assert not answer or statuses


def test_pipelined_requests_are_answered_in_order(api: Served) -> None:
    """Two requests in one packet are two answers."""
    last = GET.replace(b"models", b"models/none") + b"Connection: close\r\n\r\n"
    answer = api.raw(GET + b"\r\n" + last)
    assert [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", answer)] == [200, 404]


def test_hundreds_of_slow_connections_do_not_stop_a_good_one() -> None:
    """While they hold their sockets, and after they have lost them."""
    with served(load_profile("demo", ["limits.header_seconds=5"]), Keys()) as api:
        clients = [socket.create_connection(("127.0.0.1", api.port), 60) for _ in range(400)]
        for client in clients:
            client.sendall(GET)
        assert api.chat().status_code == 200
        for client in clients:
            drained(client)
            client.close()
        eventually(lambda: answered(api))


def test_no_websocket_is_opened(api: Served) -> None:
    """An upgrade is no way around the door: it is an ordinary request for an unknown path."""
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    key = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    request = b"GET /v1/realtime HTTP/1.1\r\nHost: x\r\n" + upgrade + key
    with (
        served(load_profile("demo"), Keys(["k"])) as closed,
        socket.create_connection(("127.0.0.1", closed.port), 60) as client,
    ):
        client.sendall(request)
        assert client.recv(65536).startswith(b"HTTP/1.1 401 ")


H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAA\r\n"
WEBSOCKET = b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"
WHOLE = b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)


@pytest.mark.parametrize("offer", [H2C, WEBSOCKET], ids=["h2c", "websocket"])
@pytest.mark.parametrize("body", [WHOLE, CHUNKED], ids=["whole", "chunked"])
@pytest.mark.parametrize("packets", ["one", "two", "many"])
def test_an_offer_of_another_protocol_is_ignored(
    patient: Served, offer: bytes, body: bytes, packets: str
) -> None:
    """Java's client offers HTTP/2 with its first request: it is served, and so is the next."""
    request = CHAT + offer + body
    head = request.index(b"\r\n\r\n") + 4
    pieces = {
        "one": [request],
        "two": [request[:head], request[head:]],
        "many": [request[at : at + 7] for at in range(0, len(request), 7)],
    }[packets]
    with socket.create_connection(("127.0.0.1", patient.port), 60) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            client.sendall(piece)
            time.sleep(0.001)
        client.sendall(GET + b"Connection: close\r\n\r\n")
        answer = drained(client)
    assert re.findall(rb"HTTP/1\.1 (\d+) ", answer) == [b"200", b"200"]
    (asked,) = patient.engine.requests
    assert [message.content for message in asked.messages] == ["Hello"]


def test_pipelined_offers_are_answered_in_order(api: Served) -> None:
    """Many in one packet, with bodies and without, the last one of the connection too."""
    last = (
        GET.replace(b"models", b"models/none")
        + b"Connection: close, Upgrade\r\nUpgrade: h2c\r\n\r\n"
    )
    answer = api.raw((GET + H2C + b"\r\n" + CHAT + H2C + WHOLE) * 3 + last)
    assert re.findall(rb"HTTP/1\.1 (\d+) ", answer) == [b"200"] * 6 + [b"404"]


def test_an_offer_does_not_lift_the_bounds_of_a_head(api: Served) -> None:
    """Neither its bytes nor what ends in two ways."""
    assert refused(api.raw(GET + H2C + b"X: " + b"a" * 9000)) == (431, "request_head_too_large")
    assert refused(api.raw(CHAT + H2C + SMUGGLING[0])) == (400, "malformed_request")
    assert api.engine.requests == []


@pytest.mark.parametrize("target", [b"x:1", b"/v1/models"])
def test_no_tunnel_is_opened(api: Served, target: bytes) -> None:
    """CONNECT asks for a proxy; what follows it is not read as requests."""
    request = b"CONNECT " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n"
    assert refused(api.raw(request + GET + b"\r\n")) == (400, "malformed_request")
