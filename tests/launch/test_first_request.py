"""The address that is told, and the command that runs; ``test_serve`` copies the one it prints."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from qwen2vl_serve.launch.first_request import curl, server_url
from qwen2vl_serve.profile import load_profile
from tests import stub_server as stub


def test_the_address_is_one_that_a_client_can_use() -> None:
    """Listening everywhere is told as this machine's own address; IPv6 stands in brackets."""
    everywhere, six = ["host=0.0.0.0", "port=80"], ["host=::1", "port=80"]
    assert server_url(load_profile("demo", everywhere)) == "http://127.0.0.1:80"
    assert server_url(load_profile("demo", six)) == "http://[::1]:80"


@pytest.mark.skipif(not shutil.which("curl") or not shutil.which("openssl"), reason="runs them")
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize(
    "names", ["IP:127.0.0.1", "DNS:llm.example.org", "DNS:*.example.org", "IP:10.1.2.3", ""]
)
def test_the_command_runs_under_a_certificate_of_ones_own(
    names: str, host: str, tmp_path: Path
) -> None:
    """It trusts the server's certificate, and asks this machine by the name that stands there."""
    chain, key = tmp_path / "own chain.pem", tmp_path / "key.pem"
    named = ["-addext", f"subjectAltName={names}"] if names else []
    files = ["-keyout", key, "-out", chain, "-subj", "/CN=common.example", *named]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *files],
        check=True,
        capture_output=True,
    )
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(chain, key)
    with stub.running(stub.completion(), tls=tls) as server:
        port = server.url.removesuffix("/v1").rpartition(":")[2]
        given = [
            f"host={host}",
            f"port={port}",
            f"server.ssl_certfile={chain}",
            f"server.ssl_keyfile={key}",
        ]
        command = curl(load_profile("demo", given), with_key=True)
        done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=60)
    assert "--insecure" not in command
    assert json.loads(done.stdout or b"{}").get("object") == "chat.completion", done.stderr


def test_a_certificate_that_says_nothing_is_named_all_the_same(tmp_path: Path) -> None:
    """The server tells what is wrong with it; the command is no place for a traceback."""
    given = ["host=::1", "port=80", f"server.ssl_certfile={tmp_path}/none.pem"]
    command = curl(load_profile("demo", given), with_key=False)
    assert command.startswith("curl 'https://[::1]:80/v1/chat/completions' --cacert ")
