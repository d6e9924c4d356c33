"""Keys, addresses, errors, retries and timeouts against a server on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import importlib
import inspect
import json
import pickle
import pkgutil
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import qwen2vl_client
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen2vl_client import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    APITimeoutError,
    AsyncClient,
    AuthenticationError,
    BadRequestError,
    Client,
    ClientError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestTooLargeError,
    ServerError,
    ServerNotReachedError,
    checks,
    transport,
)
from qwen2vl_client.cli import main
from qwen2vl_client.retry import RetryPolicy, parse_retry_after

from tests import stub_server as stub

CLIENTS = Path(qwen2vl_client.__file__).parents[1]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    proxies = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
    for name in ("QWEN2VL_BASE_URL", "QWEN2VL_API_KEY", *proxies):
        monkeypatch.delenv(name, raising=False)


@contextlib.contextmanager
def asking(
    *script: stub.Step, timeout: float = 60, max_retries: int = 2, api_key: str | None = None
) -> Iterator[tuple[Client, stub.Stub]]:
    with (
        stub.running(*script) as server,
        Client(
            server.url, api_key, "stub-model", timeout=timeout, max_retries=max_retries
        ) as client,
    ):
        yield client, server


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def error_kinds(root: type[ClientError] = ClientError) -> list[type[ClientError]]:
    """The class and all below it, wherever in the package they are."""
    for module in pkgutil.walk_packages(qwen2vl_client.__path__, "qwen2vl_client."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    below = [error for kind in root.__subclasses__() for error in error_kinds(kind)]
    return list(dict.fromkeys([root, *below]))


def both(
    awaiting: bool, url: str, model: str | None = None, text: str = "x", **options: Any
) -> None:
    """Ask something by the one client or by the other."""

    async def ask() -> None:
        async with AsyncClient(url, "", model, **options) as client:
            await client.chat(text)

    if awaiting:
        asyncio.run(ask())
    else:
        with Client(url, "", model, **options) as client:
            client.chat(text)


class TestKeysAndAddresses:
    def test_the_key_travels_as_bearer(self) -> None:
        """It goes into the ``Authorization`` header; what ``repr`` shows of a client hides it."""
        with asking(stub.completion(), api_key="sk-1") as (client, server):
            client.chat("x")
        assert server.requests[0].headers["authorization"] == "Bearer sk-1"
        assert "sk-1" not in repr(client)

    def test_the_environment_names_server_and_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Both stand in for arguments left out; an empty key that is given still sends none."""
        with stub.running(stub.completion()) as server:
            monkeypatch.setenv("QWEN2VL_BASE_URL", server.url)
            monkeypatch.setenv("QWEN2VL_API_KEY", "sk-env")
            with Client() as client:
                client.chat("x")
            with Client(api_key="") as client:
                client.chat("x")
        assert server.requests[0].headers["authorization"] == "Bearer sk-env"
        assert "authorization" not in server.requests[-1].headers

    def test_a_password_file_is_not_consulted(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """requests would put ~/.netrc's password in place of our key."""
        netrc = tmp_path / "netrc"
        netrc.write_text("machine 127.0.0.1 login u password p\n")
        monkeypatch.setenv("NETRC", str(netrc))
        with asking(stub.completion(), api_key="sk-1") as (client, server):
            client.chat("x")
        with asking(stub.completion()) as (client, other):
            client.chat("x")
        assert server.requests[0].headers["authorization"] == "Bearer sk-1"
        assert "authorization" not in other.requests[0].headers

    def test_a_proxy_of_the_environment_is_not_used_for_loopback(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With ``HTTP_PROXY`` set and no ``NO_PROXY``, this machine is asked directly."""
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        with asking(stub.completion("direct")) as (client, _):
            assert client.chat("x").text == "direct"

    @pytest.mark.parametrize("status", [301, 302, 307, 308])
    def test_redirects_are_not_followed(self, status: int) -> None:
        """The key and the pictures stay with the host that was named."""
        with stub.running(stub.completion()) as other:
            moved = stub.answer(status, b"", location=f"{other.url}/chat/completions")
            with (
                asking(moved, api_key="sk-1") as (client, _),
                pytest.raises(APIStatusError) as caught,
            ):
                client.chat("x")
        assert other.requests == []
        assert caught.value.status == status
        assert other.url in str(caught.value)

    @pytest.mark.parametrize(
        ("given_url", "used"),
        [
            ("http://h:8000", "http://h:8000/v1"),
            ("http://h:8000/", "http://h:8000/v1"),
            ("https://h/v1/", "https://h/v1"),
            (" http://h/api/v3 ", "http://h/api/v3"),
            ("http://[::1]:9/v1", "http://[::1]:9/v1"),
        ],
    )
    def test_the_address_is_completed(self, given_url: str, used: str) -> None:
        """Where there is no path it gets ``/v1``; blanks around it and a final slash go."""
        assert Client(given_url).base_url == used

    @pytest.mark.parametrize(
        "address",
        ["localhost:8000", "ftp://h/v1", "http://", "http://h:x/v1", "http://h:0/v1",
         "http://h/v1?k=1", "http://h/v1#a", "http://user:pw@h/v1", "http://[::1/v1"],
    )  # fmt: skip
    def test_an_address_that_cannot_be_used_is_refused(self, address: str) -> None:
        """No http(s), no host, a bad port, a query, a fragment or a password: no client is made."""
        with pytest.raises(InvalidArgumentError):
            Client(address)

    @pytest.mark.parametrize("key", ["sk 1", "sk\n", "ключ", "a\r\nX-Evil: 1"])
    def test_a_key_that_cannot_be_sent_is_refused_unrepeated(self, key: str) -> None:
        """Blanks, line ends and letters outside ASCII fail at once, and the error hides the key."""
        with pytest.raises(InvalidArgumentError) as caught:
            Client(api_key=key)
        assert key not in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("timeout", -1),
            ("timeout", "5"),
            ("max_retries", -1),
            ("max_retries", "2"),
            ("max_retries", 1.5),
            ("max_retries", True),
            ("max_retries", None),
            ("upload_above", "1"),
            ("upload_above", -1),
            ("upload_above", True),
        ],
    )
    def test_options_that_make_no_sense_are_refused(self, name: str, value: Any) -> None:
        """A timeout or retries below 0 or of another type: the error shows name and value."""
        with pytest.raises(InvalidArgumentError, match=f"{name}={value!r} must be"):
            Client(**{name: value})

    @pytest.mark.parametrize(
        ("name", "value"),
        [("api_key", b"sk-secret"), ("api_key", 5), ("base_url", 5), ("base_url", b"http://h")],
    )
    def test_a_key_or_address_of_another_type_is_named(self, name: str, value: Any) -> None:
        """With its type; a key is not repeated."""
        with pytest.raises(InvalidArgumentError, match=f"{name}.*must be a string") as caught:
            Client(**{name: value})
        assert type(value).__name__ in str(caught.value)
        assert "secret" not in str(caught.value)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that no authority of this machine has signed."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("makes its certificate with the openssl command")
    path = tmp_path_factory.mktemp("tls") / "own.pem"
    files = ["-keyout", str(path), "-out", f"{path}.crt", "-days", "2"]
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject, *files],
        check=True,
        capture_output=True,
    )
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    """What a server with that certificate is given."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


class TestHTTPS:
    def test_an_authority_of_one_s_own_can_be_named(
        self, certificate: Path, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also where the environment names another one."""
        unrelated = certificate.with_name("unrelated.pem")
        unrelated.write_text("")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(unrelated))
        script = [stub.completion("ok"), stub.events(stub.whole_stream("a", "b"))]
        with (
            stub.running(*script, tls=tls) as server,
            Client(server.url, verify=str(certificate)) as client,
        ):
            assert client.chat("x").text == "ok"
            assert list(client.stream("x")) == ["a", "b"]

    def test_an_unknown_certificate_is_refused_with_advice(self, tls: ssl.SSLContext) -> None:
        """The error names ``verify=`` and is not worth a retry; the server sees no request."""
        with (
            stub.running(stub.completion(), tls=tls) as server,
            Client(server.url) as client,
            pytest.raises(APIConnectionError, match="verify=") as caught,
        ):
            client.chat("x")
        assert not caught.value.retryable
        assert server.requests == []

    def test_the_command_line_takes_an_authority_too(
        self, certificate: Path, tls: ssl.SSLContext, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """``--verify FILE`` is trusted; without it the advice names it, and a bad file is told."""
        with stub.running(stub.completion(), tls=tls) as server:
            words = ["ask", "--url", server.url, "--model", "m", "--no-stream", "x"]
            assert main([*words, "--verify", str(certificate)]) == 0
            assert main(words) == 1
            assert "--verify" in capsys.readouterr().err
            assert main([*words, "--verify", "none.pem"]) == 2
            assert "none.pem" in capsys.readouterr().err

    def test_another_thread_can_stop_a_waiting_stream(
        self, certificate: Path, tls: ssl.SSLContext
    ) -> None:
        """Over TLS too, ``close`` ends the wait for the next piece, and no error is raised."""
        with (
            stub.running(stub.stalled_events, tls=tls) as server,
            Client(server.url, verify=str(certificate)) as client,
        ):
            stream = client.stream("x")
            pieces = iter(stream)
            assert next(pieces) == "word"
            threading.Timer(0.3, stream.close).start()
            assert list(pieces) == [], "and no APITimeoutError"


class TestErrors:
    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (400, BadRequestError),
            (401, AuthenticationError),
            (403, PermissionDeniedError),
            (404, NotFoundError),
            (413, RequestTooLargeError),
            (415, APIStatusError),
            (429, RateLimitError),
            (500, ServerError),
            (503, ServerError),
        ],
    )
    def test_each_status_has_its_type_and_fields(
        self, status: int, kind: type[APIStatusError]
    ) -> None:
        """Code, type, param, message and request id are the server's; ``str`` joins most of it."""
        with (
            asking(stub.failure(status), max_retries=0) as (client, _),
            pytest.raises(APIStatusError) as caught,
        ):
            client.chat("x")
        error = caught.value
        assert type(error) is kind
        assert (error.status, error.code, error.type, error.param) == (
            status,
            "some_code",
            "some_type",
            "messages",
        )
        assert (error.message, error.request_id) == ("it failed", stub.REQUEST_ID)
        assert str(error) == f"HTTP {status} some_code: it failed (request id req-7)"

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            (b"<html>Bad\n gateway</html>", "<html>Bad gateway</html>"),
            (b"", "Bad Gateway"),
            (b'{"detail": "nope"}', "nope"),
            (b'{"error": "plain"}', "plain"),
            (b"[1]", "[1]"),
            (b"\xff\xfe", "\ufffd\ufffd"),
        ],
    )
    def test_an_error_of_another_shape_is_still_told(self, body: bytes, message: str) -> None:
        """A proxy in between answers in its own words."""
        with (
            asking(stub.answer(502, body), max_retries=0) as (client, _),
            pytest.raises(ServerError) as caught,
        ):
            client.chat("x")
        assert caught.value.message == message
        assert caught.value.code is None

    @pytest.mark.parametrize("body", [b"<html>", b"[]", b"", b'{"choices": []}', b"{}"])
    def test_an_answer_that_is_none_is_a_typed_error(self, body: bytes) -> None:
        """A 200 with a page, with no JSON object or without choices is ``APIResponseError``."""
        with asking(stub.answer(200, body)) as (client, _), pytest.raises(APIResponseError):
            client.chat("x")

    def test_nothing_listening_is_told_in_plain_words(self) -> None:
        """The address and the system's reason alone, without the HTTP library's own wrapping."""
        port = free_port()
        with (
            Client(f"http://127.0.0.1:{port}/v1", max_retries=0) as client,
            pytest.raises(ServerNotReachedError) as caught,
        ):
            client.chat("x")
        assert str(caught.value) == (f"cannot reach http://127.0.0.1:{port}/v1: Connection refused")

    def test_an_unknown_host_is_told(self) -> None:
        """A name without an address is ``ServerNotReachedError``: nothing was sent."""
        with (
            Client("http://no-such-host.invalid/v1", max_retries=0) as client,
            pytest.raises(ServerNotReachedError),
        ):
            client.chat("x")

    def test_an_error_being_handled_does_not_colour_the_next(self) -> None:
        """A call from within an ``except`` block tells its own cause."""
        with asking(stub.silent(30), timeout=0.2, max_retries=0) as (client, _):
            try:
                client.chat("x")
                pytest.fail("the silent server was not given up")
            except APITimeoutError:
                other = Client(f"http://127.0.0.1:{free_port()}", max_retries=0)
                with pytest.raises(ServerNotReachedError):
                    other.models()

    def test_tls_to_a_server_of_plain_http_is_not_retried(self) -> None:
        """One connection is made; the error is marked as not worth a retry."""
        with (
            stub.running(stub.completion()) as server,
            Client(server.url.replace("http:", "https:"), max_retries=2) as client,
            pytest.raises(APIConnectionError) as caught,
        ):
            client.models()
        assert not caught.value.retryable
        assert server.connections == 1

    @pytest.mark.parametrize("kind", error_kinds(), ids=lambda kind: kind.__name__)
    def test_errors_survive_pickling(self, kind: type[ClientError]) -> None:
        """Of every class, with all that it carries: worker processes hand them back whole."""
        names = [*inspect.signature(kind.__init__).parameters][2:]
        carried = {name: f"the {name}" for name in names if name not in ("args", "kwargs")}
        error = kind("m", **carried)
        for copied in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            assert type(copied) is kind
            assert vars(copied) == vars(error)
            assert carried.items() <= vars(copied).items()
            assert str(copied) == str(error)

    @pytest.mark.parametrize(("status", "kind"), [(200, APIResponseError), (500, ServerError)])
    @pytest.mark.parametrize("awaiting", [False, True], ids=["Client", "AsyncClient"])
    def test_json_that_is_too_deep_is_a_typed_error(
        self, status: int, kind: type[ClientError], awaiting: bool
    ) -> None:
        """As any other answer that is none, and of an error its status is told all the same."""
        body = b'{"error":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
        with stub.running(stub.answer(status, body)) as server, pytest.raises(kind):
            both(awaiting, server.url, "m", max_retries=0)

    @pytest.mark.parametrize("awaiting", [False, True], ids=["Client", "AsyncClient"])
    @pytest.mark.parametrize("verify", ["/missing.pem", "", __file__, "a\0b"])
    def test_certificates_that_cannot_be_read_are_told(self, verify: str, awaiting: bool) -> None:
        """Before anything is sent: no file, no name, or one that holds no certificate."""
        with pytest.raises(InvalidArgumentError, match=r"verify=.* is no file of certificates"):
            both(awaiting, "https://127.0.0.1:9", verify=verify)


class TestProbes:
    """``while not client.ready(): sleep(1)`` goes on whatever stands before the server."""

    @pytest.mark.parametrize("step", [stub.drop, stub.silent(30), stub.failure(503)])
    def test_what_is_not_there_yet_is_no_error(self, step: stub.Step) -> None:
        """Docker's published ports take a connection and close it."""
        with asking(step) as (client, _):
            assert client.ready(timeout=0.3) is False
            assert client.health(timeout=0.3) is False

    def test_a_certificate_that_is_refused_is(self, tls: ssl.SSLContext) -> None:
        """Here ``ready`` raises in place of False: a loop that waits for True would never end."""
        with (
            stub.running(stub.completion(), tls=tls) as server,
            Client(server.url) as client,
            pytest.raises(APIConnectionError, match="safely"),
        ):
            client.ready()


class TestRetries:
    @pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503])
    def test_a_passing_fault_is_tried_again(self, status: int) -> None:
        """After 408, 409, 429 and 5xx the same body is sent once more, and the answer comes."""
        with asking(stub.failure(status, retry_after="0"), stub.completion("ok")) as (client, got):
            assert client.chat("x").text == "ok"
        assert len(got.requests) == 2
        assert got.requests[0].body == got.requests[1].body

    @pytest.mark.parametrize("status", [400, 401, 403, 404, 413])
    def test_a_lasting_fault_is_not(self, status: int) -> None:
        """After 400, 401, 403, 404 and 413 no second request is sent; it would fare no better."""
        with (
            asking(stub.failure(status), stub.completion()) as (client, server),
            pytest.raises(APIStatusError),
        ):
            client.chat("x")
        assert len(server.requests) == 1

    @pytest.mark.parametrize("broken", [stub.drop, stub.cut_body])
    def test_a_broken_connection_is_tried_again(self, broken: stub.Step) -> None:
        """Also one that breaks off in the middle of the answer."""
        with asking(broken, stub.completion("ok")) as (client, server):
            assert client.chat("x").text == "ok"
        assert len(server.requests) == 2

    def test_retries_end_with_the_last_error(self) -> None:
        """With ``max_retries=2`` the third refusal is raised, with its code and ``retry_after``."""
        codes = ("first", "second", "third", "fourth")
        script = [stub.failure(503, code, retry_after="0") for code in codes]
        with (
            asking(*script, max_retries=2) as (client, server),
            pytest.raises(ServerError) as caught,
        ):
            client.chat("x")
        assert len(server.requests) == 3
        assert (caught.value.code, caught.value.retry_after) == ("third", 0)

    def test_a_cut_connection_ends_as_a_connection_error(self) -> None:
        """Once retries are used up; not as ``ServerNotReachedError``, for a server was there."""
        with (
            asking(stub.drop, max_retries=1) as (client, server),
            pytest.raises(APIConnectionError) as caught,
        ):
            client.chat("x")
        assert len(server.requests) == 2
        assert not isinstance(caught.value, ServerNotReachedError)

    def test_retry_after_in_seconds_is_waited_for(self) -> None:
        """With ``Retry-After: 1`` the retry waits a whole second; the client's own wait is less."""
        with asking(stub.failure(429, retry_after="1"), stub.completion()) as (client, server):
            client.chat("x")
        first, second = server.requests
        assert 1.0 <= second.at - first.at < 20

    @pytest.mark.parametrize(
        ("milliseconds", "seconds"),
        [("1500", 1.5), ("0", 0.0), ("12.5", 0.0125), ("soon", 7.0), ("-1", 7.0), ("", 7.0)],
    )
    def test_milliseconds_to_wait_go_before_seconds(
        self, milliseconds: str, seconds: float
    ) -> None:
        """``retry-after-ms``, as OpenAI's servers and Azure's send it; one that cannot be read
        leaves ``Retry-After`` to hold."""
        headers = {"retry_after": "7", "retry_after_ms": milliseconds}
        with (
            asking(stub.failure(429, **headers), max_retries=0) as (client, _),
            pytest.raises(RateLimitError) as caught,
        ):
            client.chat("x")
        assert caught.value.retry_after == seconds

    def test_retry_after_as_a_date_is_waited_for(self) -> None:
        """Measured by the server's clock, here an hour ahead of ours."""
        ahead = datetime.now(UTC) + timedelta(hours=1)
        until = format_datetime(ahead + timedelta(seconds=2), usegmt=True)

        def step(handler: stub.Handler) -> None:
            handler.date_time_string = (  # type: ignore[method-assign]
                lambda timestamp=None: format_datetime(ahead, usegmt=True)
            )
            stub.failure(503, retry_after=until)(handler)

        with asking(step, stub.completion()) as (client, server):
            client.chat("x")
        first, second = server.requests
        assert 2.0 <= second.at - first.at < 20

    def test_an_unreadable_retry_after_does_not_hide_the_error(self) -> None:
        """With ``Retry-After: soon``, which counts as none, a 503 is tried again all the same."""
        with asking(stub.failure(503, retry_after="soon"), stub.completion()) as (client, _):
            assert client.chat("x").text

    def test_a_long_retry_after_is_handed_to_the_caller(self) -> None:
        """An hour is not waited for in silence."""
        with (
            asking(stub.failure(429, retry_after="3600"), stub.completion()) as (client, server),
            pytest.raises(RateLimitError) as caught,
        ):
            client.chat("x")
        assert caught.value.retry_after == 3600
        assert len(server.requests) == 1

    def test_streams_are_retried_until_they_begin(self) -> None:
        """A dropped connection and a 503 before the first piece cost two retries and no text."""
        script = [
            stub.drop,
            stub.failure(503, retry_after="0"),
            stub.events(stub.whole_stream("ok")),
        ]
        with asking(*script) as (client, server):
            assert list(client.stream("x")) == ["ok"]
        assert len(server.requests) == 3

    @settings(deadline=None)
    @given(
        retries=st.integers(0, 40),
        first=st.floats(0.01, 10),
        longest=st.floats(0.01, 100),
        asked=st.none() | st.floats(0, 1000),
    )
    def test_waits_stay_within_their_bounds(
        self, retries: int, first: float, longest: float, asked: float | None
    ) -> None:
        """Never below what the server asked, never above the policy's longest wait."""
        policy = RetryPolicy(41, first, longest, longest_retry_after=60)
        wait = policy.wait(ServerError("m", status=503, retry_after=asked), retries)
        if asked is not None and asked > 60:
            assert wait is None
        elif asked is not None:
            assert wait is not None
            assert asked <= wait <= asked * 1.1
        else:
            assert wait is not None
            due = min(first * 2**retries, longest)
            assert due / 2 <= wait <= due

    @settings(deadline=None)
    @given(st.text(max_size=40))
    def test_any_retry_after_is_read_or_ignored(self, value: str) -> None:
        """Whatever the header holds gives None or seconds from 0 on, never an exception."""
        seconds = parse_retry_after(value)
        assert seconds is None or seconds >= 0

    @pytest.mark.parametrize(
        ("value", "seconds"),
        [("0", 0), (" 12 ", 12), ("1.5", 1.5), ("Thu, 01 Jan 1970 00:00:00 GMT", 0), ("-3", None),
         ("", None), ("٣", None), ("1.", None), ("1e3", None), ("nan", None), (None, None)],
    )  # fmt: skip
    def test_retry_after_is_read_as_the_rfc_says(
        self, value: str | None, seconds: float | None
    ) -> None:
        """It is ASCII digits or an HTTP date, of which a past one is 0; all else counts as none.

        Only a fraction goes beyond the RFC: servers send it, and to come earlier would be wrong.
        """
        assert parse_retry_after(value) == seconds

    @pytest.mark.skipif(not hasattr(time, "tzset"), reason="the time zone cannot be set")
    @pytest.mark.parametrize(
        "date", ["Sun Nov  6 08:49:37 1994", "Sun, 06 Nov 1994 08:49:37 -0000"]
    )
    def test_a_date_without_a_zone_is_utc(self, date: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The asctime form and ``-0000`` mean UTC, wherever this machine stands."""
        try:
            with monkeypatch.context() as shanghai:
                shanghai.setenv("TZ", "Asia/Shanghai")
                time.tzset()
                asked = parse_retry_after(date, "Sun, 06 Nov 1994 08:49:00 GMT")
        finally:
            time.tzset()
        assert asked == 37


@contextlib.contextmanager
def reading_late(pause: float) -> Iterator[str]:
    """A server that takes connections, reads nothing for a while, then everything, and answers."""
    answer = json.dumps({"choices": [{"message": {"content": "late"}}]}).encode()

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            time.sleep(pause)
            file = connection.makefile("rb")
            head = iter(file.readline, b"\r\n")
            (length,) = (int(line[15:]) for line in head if line.lower().startswith(b"content-len"))
            file.read(length)
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(answer))
            connection.sendall(answer)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=listener.accept()[:1], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


LONG = "x" * 2**25
"""More than the buffers between two sockets hold."""


class TestTimeouts:
    def test_sending_may_take_longer_than_connecting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A large picture on a slow line, or to a server that is busy, has the whole timeout."""
        monkeypatch.setattr(transport, "CONNECT_TIMEOUT", 0.2)
        with reading_late(1.0) as url, Client(url, "", "m", max_retries=0, timeout=60) as client:
            assert client.chat(LONG).text == "late"

    @pytest.mark.parametrize("awaiting", [False, True])
    def test_a_body_that_is_not_taken_in_time_is_a_timeout(self, awaiting: bool) -> None:
        """And not a connection that broke, after which it would be sent again."""
        with reading_late(30) as url, pytest.raises(APITimeoutError, match=r"timeout=0\.5 s"):
            both(awaiting, url, "m", timeout=0.5, text=LONG)

    def test_tls_that_does_not_come_about_is_no_answer_that_is_late(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The time that is named is that for connecting, which it was."""
        monkeypatch.setattr(checks, "CONNECT_TIMEOUT", 0.2)
        monkeypatch.setattr(transport, "CONNECT_TIMEOUT", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"https://127.0.0.1:{listener.getsockname()[1]}/v1"
            with (
                Client(url, "", "m", max_retries=0, timeout=60) as client,
                pytest.raises(ServerNotReachedError, match=r"no connection within 0\.2 s"),
            ):
                client.chat("x")

    def test_a_silent_server_ends_in_a_timeout_and_is_not_asked_again(self) -> None:
        """A second copy of a request that is being worked on would slow both down."""
        with (
            asking(stub.silent(600), timeout=0.3) as (client, server),
            pytest.raises(APITimeoutError, match=r"timeout=0\.3 s"),
        ):
            client.chat("x")
        assert len(server.requests) <= 1, "none where the machine stood still"

    def test_a_dripping_server_cannot_stretch_the_timeout(self) -> None:
        """The timeout bounds the whole answer, not each byte of it."""
        with asking(stub.dripping(0.05), timeout=0.5) as (client, server):
            with pytest.raises(APITimeoutError):
                client.chat("x")
            assert not server.requests or server.client_left.wait(60)

    def test_there_may_be_none(self) -> None:
        """Infinity and 1e10 seconds are accepted, though no socket's clock can hold them."""
        with asking(stub.completion("late"), timeout=float("inf")) as (client, _):
            assert client.chat("x", timeout=1e10).text == "late"

    def test_a_call_may_have_its_own_timeout(self) -> None:
        """The call's 0.2 s go before the client's 60 s, and the error names them."""
        with (
            asking(stub.silent(30)) as (client, _),
            pytest.raises(APITimeoutError, match=r"=0\.2 s"),
        ):
            client.chat("x", timeout=0.2)

    def test_an_error_status_is_told_although_its_body_is_cut(self) -> None:
        """A 400 whose body breaks off is ``BadRequestError`` and shows the part that arrived."""

        def step(handler: stub.Handler) -> None:
            handler.send_response(400)
            handler.send_header("content-length", "100")
            handler.end_headers()
            handler.wfile.write(b'{"er')
            handler.close_connection = True

        with asking(step) as (client, _), pytest.raises(BadRequestError) as caught:
            client.chat("x")
        assert caught.value.message == '{"er'
