"""The address of a server and a first request to it, to be copied."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import shlex
import ssl
from typing import Any
from urllib.parse import urlsplit

from qwen2vl_serve.profile import Profile
from qwen2vl_serve.profile.api_keys import API_KEY_VARIABLE


def server_url(profile: Profile) -> str:
    """Return the address that a client on this machine uses, without ``/v1``."""
    scheme = "https" if profile.server.ssl_certfile else "http"
    host, port = profile.server.host, profile.server.port
    if host in ("0.0.0.0", "::"):  # noqa: S104  # compared with, not bound to
        host = "127.0.0.1"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def curl(profile: Profile, *, with_key: bool) -> str:
    """Return a command line that asks the server, from this machine, about a picture it carries."""
    body = {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": _picture()}},
                    {"type": "text", "text": "What colour is the circle?"},
                ],
            }
        ]
    }
    url, trust = _trusted(profile)
    words = ["curl", f"{url}/v1/chat/completions", *trust, "-H", "Content-Type: application/json"]
    line = shlex.join([*words, "-d", json.dumps(body, separators=(",", ":"))])
    return f'{line} -H "Authorization: Bearer ${API_KEY_VARIABLE}"' if with_key else line


def _trusted(profile: Profile) -> tuple[str, list[str]]:
    """Return an address that the certificate vouches for, and curl's options to trust and reach it.

    The certificate may be signed by nobody that this machine knows, and name another host.
    """
    url = server_url(profile)
    if not (certificate := profile.server.ssl_certfile):
        return url, []
    trust = ["--cacert", certificate]
    names = _names(certificate, profile.server.ssl_keyfile)
    here = urlsplit(url)
    if not names or here.hostname in names:
        return url, trust
    name = f"[{names[0]}]" if ":" in names[0] else names[0].replace("*", "any")
    port = profile.server.port
    return f"https://{name}:{port}", [*trust, "--connect-to", f"::{here.netloc}"]


def _names(certificate: str, key: str | None) -> list[str]:
    """Return whom a certificate is for; nobody where it cannot be used.

    ``ssl`` reads a certificate only where a peer has shown it: here the two ends of a handshake
    in memory.
    """
    try:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(certificate, key)
        client = ssl.create_default_context(cafile=certificate)
        client.check_hostname = False
        client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the file may end before its root
        sent, received = ssl.MemoryBIO(), ssl.MemoryBIO()
        shown = client.wrap_bio(received, sent)
        ends = shown, server.wrap_bio(sent, received, server_side=True)
        for end in ends * 2:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
        told: dict[str, Any] = shown.getpeercert() or {}
    except (OSError, ValueError):  # ssl's own are OSErrors; an unfinished handshake: ValueError
        return []
    common = [value for ((name, value), *_) in told["subject"] if name == "commonName"]
    other = told.get("subjectAltName", ())
    return [value for kind, value in other if kind in ("DNS", "IP Address")] or common


def _picture() -> str:
    from PIL import Image, ImageDraw  # noqa: PLC0415  # comes with vLLM

    picture = Image.new("P", (112, 112), 0)
    picture.putpalette([255, 255, 255, 220, 30, 30])
    ImageDraw.Draw(picture).ellipse((24, 24, 88, 88), fill=1)
    data = io.BytesIO()
    picture.save(data, "PNG", bits=1, optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
