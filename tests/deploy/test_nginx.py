"""``deploy/nginx`` in front of the server: Debian's nginx, real sockets, a scripted engine."""

from __future__ import annotations

import datetime
import json
import re
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.profile import Profile, load_profile
from tests.deploy.debian import program
from tests.fake_engine import FakeEngine
from tests.markdown import ROOT
from tests.ports import quiet_port
from tests.served import HELLO, Served, eventually, served

CONF = ROOT / "deploy" / "nginx" / "qwen2vl-serve.conf"
NAME = "chat.example.com"
MAIN = """
daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;
events {{}}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
    include {folder}/default.conf;
}}
"""
DEFAULT = """
server {
    listen 80 default_server;
    listen [::]:80 default_server;
    root /var/www/html;
    index index.html index.htm index.nginx-debian.html;
    server_name _;
    location / { try_files $uri $uri/ =404; }
}
"""
"""What Debian's nginx-common puts into sites-enabled, which is read after conf.d."""


def directive(name: str) -> str:
    """The value of a directive that stands once in the file."""
    (value,) = re.findall(rf"^\s*{name} ([^;]+);", CONF.read_text("utf-8"), re.MULTILINE)
    return str(value)


def write_certificate(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(encoding, form, plain))
    (folder / "fullchain.pem").write_bytes(certificate.public_bytes(encoding))


@dataclass
class Proxy:
    """nginx with our file, but for ports and paths, beside the site that Debian enables."""

    port: int
    plain_port: int
    folder: Path
    behind: Served

    def connect(self, name: str = NAME) -> ssl.SSLSocket:
        raw = socket.create_connection(("127.0.0.1", self.port), 60)
        return self.trust.wrap_socket(raw, server_hostname=name)

    def send(self, head: str, body: bytes = b"") -> ssl.SSLSocket:
        client = self.connect()
        client.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        return client

    @property
    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.folder / "fullchain.pem"))

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=f"https://127.0.0.1:{self.port}", verify=self.trust)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.request(method, path, **self._named(options))

    def stream(self, method: str, path: str, **options: Any) -> Iterator[str]:
        with self.client() as client, client.stream(method, path, **self._named(options)) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            yield from answer.iter_lines()

    def _named(self, options: dict[str, Any]) -> dict[str, Any]:
        headers = {"Host": NAME, **options.pop("headers", {})}
        return {"headers": headers, "extensions": {"sni_hostname": NAME}, "timeout": 60, **options}


@pytest.fixture(scope="module")
def nginx() -> Path:
    return program("nginx", "nginx")


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Profile:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return load_profile("demo")


@pytest.fixture
def proxy(nginx: Path, profile: Profile, tmp_path: Path) -> Iterator[Proxy]:
    engine = FakeEngine(words=["word "] * 40, pause=0.05)
    with served(profile, Keys(()), engine) as behind:
        port, plain = quiet_port(), quiet_port()
        here = {
            r"^ *listen \[::\].*\n": "",
            "listen 443": f"listen 127.0.0.1:{port}",
            "listen 80": f"listen 127.0.0.1:{plain}",
            r"127\.0\.0\.1:8000": f"127.0.0.1:{behind.port}",
            "/etc/ssl/qwen2vl-serve": str(tmp_path),
        }
        sites = {"site.conf": CONF.read_text("utf-8"), "default.conf": DEFAULT}
        for there, ours in here.items():
            sites = {
                name: re.sub(there, ours, text, flags=re.MULTILINE) for name, text in sites.items()
            }
        for name, text in sites.items():
            (tmp_path / name).write_text(text)
        (tmp_path / "nginx.conf").write_text(MAIN.format(folder=tmp_path))
        write_certificate(tmp_path)
        words = [nginx, "-p", tmp_path, "-e", tmp_path / "error.log", "-c", tmp_path / "nginx.conf"]
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        try:
            eventually(lambda: _listens(port) or process.poll() is not None)
            assert process.poll() is None, process.stderr and process.stderr.read()
            yield Proxy(port, plain, tmp_path, behind)
        finally:
            process.terminate()
            process.wait(60)


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_limits_are_those_of_the_profile() -> None:
    """A body that the server takes passes nginx, and the times are the server's own."""
    limits = Profile.model_validate({"model": {"model": "demo"}}).limits
    assert int(directive("client_max_body_size")) == limits.max_body_bytes
    assert str(limits.max_body_bytes) in CONF.read_text("utf-8").partition("@too_large {")[2]
    assert directive("client_header_timeout") == f"{limits.header_seconds:g}s"
    assert directive("send_timeout") == f"{limits.reader_seconds:g}s"
    assert directive("proxy_send_timeout") == f"{limits.body_seconds:g}s"


def test_idle_connections_are_given_up_before_the_server_closes_them(profile: Profile) -> None:
    """A request on its way into the server's closing would be lost: nginx sends no POST twice."""
    kept = float(directive("keepalive_timeout").removesuffix("s"))
    with (
        served(profile, Keys(()), FakeEngine()) as behind,
        socket.create_connection(("127.0.0.1", behind.port), 60) as client,
    ):
        client.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        answered = time.monotonic()
        while client.recv(65536):
            pass
        assert time.monotonic() - answered > kept


def test_a_stream_arrives_piece_by_piece(proxy: Proxy) -> None:
    """No event waits for the next: each comes while the engine still works."""
    lines = proxy.stream("POST", "/v1/chat/completions", json={**HELLO, "stream": True})
    events = [(line, time.monotonic()) for line in lines if line.startswith("data: ")]
    times = [when for _, when in events]
    assert len(events) == 41
    assert events[-1][0] == "data: [DONE]"
    gaps = [later - earlier for earlier, later in pairwise(times)]
    # 40 words, one in 50 ms: were they held back, all would come within one.
    assert sorted(gaps)[len(gaps) // 2] > 0.03
    assert times[-1] - times[0] > 1.5


def test_a_client_that_leaves_ends_the_generation(proxy: Proxy) -> None:
    """nginx closes the connection behind it, and the engine is told to stop."""
    proxy.behind.engine.words = ["word "] * 100_000
    body = b'{"stream": true, "messages": [{"role": "user", "content": "x"}]}'
    client = proxy.send(
        f"POST /v1/chat/completions HTTP/1.1\nHost: {NAME}\n"
        f"Content-Type: application/json\nContent-Length: {len(body)}",
        body,
    )
    assert b"200 OK" in client.recv(4096)
    assert proxy.behind.engine.running == 1
    client.close()
    eventually(lambda: proxy.behind.engine.running == 0)
    assert proxy.behind.engine.aborted == 1


def test_a_body_too_large_for_both_is_refused_as_the_server_refuses_it(proxy: Proxy) -> None:
    """By nginx before a byte of it is sent on, in OpenAI's shape."""
    size = int(directive("client_max_body_size")) + 1
    client = proxy.send(
        f"POST /v1/chat/completions HTTP/1.1\nHost: {NAME}\nConnection: close\n"
        f"Content-Type: application/json\nContent-Length: {size}"
    )
    said = b""
    while not said.endswith(b"}}"):  # then nginx lingers, for what may still come
        said += client.recv(65536)
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413")
    assert b"application/json" in head
    error = json.loads(body)["error"]
    assert error["code"] == "request_too_large"
    assert set(error) == {"message", "type", "param", "code"}


def test_the_servers_own_refusals_pass(proxy: Proxy) -> None:
    """413 for an upload that the profile does not take, 404, 400: bodies are the server's own."""
    limit = load_profile("demo").files.max_file_bytes
    big = proxy.request(
        "POST",
        "/v1/files",
        data={"purpose": "vision"},
        files={"file": ("big.png", bytes(limit + 100_000))},
    )
    assert big.status_code == 413
    assert big.json()["error"]["code"] == "request_too_large"
    assert "files.max_file_bytes" in big.json()["error"]["message"]
    assert proxy.request("GET", "/nowhere").json()["error"]["code"] == "not_found"
    bad = proxy.request("POST", "/v1/chat/completions", json={"messages": "x"})
    assert (bad.status_code, bad.json()["error"]["code"]) == (400, "invalid_type")
    assert "x-request-id" in bad.headers


def test_a_server_that_is_away_is_503_with_a_time(proxy: Proxy) -> None:
    """While it starts, clients are told to come back, in the shape that they parse."""
    text = (proxy.folder / "site.conf").read_text()
    (proxy.folder / "site.conf").write_text(
        text.replace(f"127.0.0.1:{proxy.behind.port}", f"127.0.0.1:{quiet_port()}")
    )
    pid = int((proxy.folder / "pid").read_text())
    subprocess.run(["kill", "-HUP", str(pid)], check=True)
    answers: list[httpx.Response] = []

    def away() -> bool:
        # A worker of before may still take the one or other connection.
        answers.append(proxy.request("GET", "/v1/models"))
        return answers[-1].status_code == 503

    eventually(away)
    answer = answers[-1]
    assert answer.json()["error"]["code"] == "engine_unavailable"
    assert int(answer.headers["retry-after"]) > 0


def test_other_names_and_plain_http(proxy: Proxy) -> None:
    """A name that is not served gets no handshake; plain HTTP is sent to HTTPS, methods kept.

    Plain HTTP under other names is another site's.
    """
    with pytest.raises(ssl.SSLError):
        proxy.connect("other.example.com")
    plain = f"http://127.0.0.1:{proxy.plain_port}/v1/models"
    moved = httpx.post(plain, headers={"Host": NAME})
    assert moved.status_code == 308
    assert moved.headers["location"] == f"https://{NAME}/v1/models"
    assert httpx.get(plain).status_code == 404


def test_probes_and_metrics_pass(proxy: Proxy) -> None:
    """The probes answer through nginx, and metrics do to this machine."""
    assert proxy.request("GET", "/health/live").status_code == 200
    forged = proxy.request("GET", "/metrics", headers={"X-Forwarded-For": "192.0.2.7"})
    assert forged.status_code == 200
    assert "qwen2vl_requests_total" in forged.text
