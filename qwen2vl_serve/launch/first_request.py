"""The address of a server and a first request to it, to be copied."""

from __future__ import annotations

import base64
import io
import json
import shlex

from qwen2vl_serve.profile import Profile
from qwen2vl_serve.profile.api_keys import API_KEY_VARIABLE


def server_url(profile: Profile) -> str:
    """Return the address that a client on this machine uses, without ``/v1``."""
    scheme = "https" if profile.server.ssl_certfile else "http"
    host, port = profile.server.host, profile.server.port
    if host in ("0.0.0.0", "::"):  # noqa: S104  # compared with, not bound to
        host = "127.0.0.1"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def curl(url: str, *, with_key: bool) -> str:
    """Return a command line that asks the server at ``url`` about a picture it carries."""
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
    words = ["curl", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    line = shlex.join([*words, "-d", json.dumps(body, separators=(",", ":"))])
    return f'{line} -H "Authorization: Bearer ${API_KEY_VARIABLE}"' if with_key else line


def _picture() -> str:
    from PIL import Image, ImageDraw  # noqa: PLC0415  # comes with vLLM

    picture = Image.new("P", (112, 112), 0)
    picture.putpalette([255, 255, 255, 220, 30, 30])
    ImageDraw.Draw(picture).ellipse((24, 24, 88, 88), fill=1)
    data = io.BytesIO()
    picture.save(data, "PNG", bits=1, optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
