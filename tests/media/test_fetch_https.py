"""Fetching by HTTPS: the certificate has to be the name's own, wherever the name leads."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import socketserver
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp.connector
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from qwen2vl_serve.media.fetch import Fetcher, FetchError, FetchPolicy, FetchTimeout
from tests.media.test_fetch import LOOPBACK, Names, freely, http


@dataclass
class Secure:
    """A site on loopback with a certificate for ``site.test`` and ``xn--bcher-kva.test``."""

    port: int
    certificate: Path
    asked: list[str | None] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)

    def fetch(self, host: str, **policy: Any) -> bytes:
        """Fetch from the site under a host's name; every name leads to it."""
        settings = {"allowed_networks": LOOPBACK, "ports": frozenset({self.port}), **policy}
        names = {host.lower().encode("idna").decode().split(".")[0]: ["127.0.0.1"]}

        async def run() -> bytes:
            fetcher = Fetcher(FetchPolicy(**settings), Names(**names))
            try:
                return await fetcher.fetch(f"https://{host}:{self.port}/", freely)
            finally:
                await fetcher.close()

        return asyncio.run(run())


def certificate(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test")])
    hosts = [x509.DNSName("site.test"), x509.DNSName("xn--bcher-kva.test")]
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "cert.pem").write_bytes(made.public_bytes(pem))
    (folder / "key.pem").write_bytes(key.private_bytes(pem, *plain))
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[Secure]:
    chain, key = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with (
                contextlib.suppress(OSError),
                context.wrap_socket(self.request, server_side=True) as connection,
            ):
                site.heads.append(connection.recv(65536).decode())
                connection.sendall(http("200 OK", b"whole"))

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        site = Secure(server.server_address[1], chain)
        context.sni_callback = lambda _socket, name, _context: site.asked.append(name)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield site
        server.shutdown()


@pytest.fixture
def trusted(secure: Secure, monkeypatch: pytest.MonkeyPatch) -> Secure:
    """The site, by a certificate that this process trusts.

    aiohttp reads the system's own once, when it is imported.
    """
    context = ssl.create_default_context(cafile=str(secure.certificate))
    monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", context)
    return secure


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("site.test", "site.test"),
        ("SITE.test", "site.test"),
        ("b\u00fccher.test", "xn--bcher-kva.test"),
    ],
)
def test_a_name_is_asked_for_and_verified_as_itself(trusted: Secure, host: str, name: str) -> None:
    """SNI, certificate and Host are the URL's name, while the connection goes to its address."""
    assert trusted.fetch(host) == b"whole"
    assert trusted.asked == [name]
    assert f"host: {name}:{trusted.port}" in trusted.heads[0].lower()


@pytest.mark.parametrize("host", ["other.test", "sub.site.test"])
def test_a_certificate_of_another_name_is_refused(trusted: Secure, host: str) -> None:
    """Trusted as it is, it is not this name's; nothing is sent that a stranger could read."""
    with pytest.raises(FetchError) as caught:
        trusted.fetch(host)
    assert not isinstance(caught.value, FetchTimeout)
    assert trusted.asked == [host]
    assert "".join(trusted.heads) == ""


def test_a_certificate_of_an_unknown_issuer_is_refused(secure: Secure) -> None:
    """Of the right name, but by nobody whom the system trusts."""
    with pytest.raises(FetchError):
        secure.fetch("site.test")
    assert "".join(secure.heads) == ""


def test_a_name_that_leads_inward_is_refused_by_https_too(trusted: Secure) -> None:
    """Before a handshake."""
    with pytest.raises(FetchError):
        trusted.fetch("site.test", allowed_networks=())
    assert trusted.asked == []
