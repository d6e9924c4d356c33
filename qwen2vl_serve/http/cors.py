"""What pages of other origins may do: the framework's CORS with errors in our shape."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from qwen2vl_serve.errors import RequestError
from qwen2vl_serve.http.envelope import error_response

EXPOSED_HEADERS = (
    "retry-after",
    "server-timing",
    "x-request-id",
    *(
        f"x-ratelimit-{what}-{unit}"
        for unit in ("requests", "tokens", "visual-tokens")
        for what in ("limit", "remaining", "reset")
    ),
)
"""What a page of another origin, once allowed, may read beside the body."""


class CORS(CORSMiddleware):
    """Lets pages of ``origins`` read answers and errors; outermost, as no preflight has a key."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer what a browser asks first; the framework's refusals are plain text."""
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        reason = bytes(answer.body).decode()
        refused = RequestError(f"{reason}; the operator names origins in server.cors_origins.")
        refused.headers = {
            name: value
            for name, value in answer.headers.items()
            if not name.startswith("content-")  # the body's
        }
        return error_response(refused)
