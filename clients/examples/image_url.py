"""Ask about a picture on the web: the server fetches it, the client sends its address only.

Without --image-url the example serves a picture of its own on this machine's loopback, so that
it can be tried without the internet. A server fetches from public addresses only unless it is
told otherwise; one that may fetch this picture is started with:

    serve --profile demo --set "media.allowed_networks=[127.0.0.1/32]" \\
        --set "media.allowed_ports=[80, 443, 8765]"
"""

import contextlib
import functools
import http.server
import sys
import threading
from collections.abc import Iterator

from qwen2vl_client import BadRequestError, Client

from arguments import PICTURES, RED_CIRCLE, parser


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line on the terminal for each."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (http.server's name)
        """Say nothing."""


@contextlib.contextmanager
def picture_on_loopback(port: int) -> Iterator[str]:
    """Yield the address of a picture that this process serves."""
    handler = functools.partial(QuietHandler, directory=PICTURES)
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/{RED_CIRCLE.name}"
        finally:
            server.shutdown()


command = parser(__doc__)
command.add_argument("--image-url", help="the picture's address")
command.add_argument("--port", type=int, default=8765, help="where this serves its own picture")
args = command.parse_args()

with contextlib.ExitStack() as stack:
    address = args.image_url or stack.enter_context(picture_on_loopback(args.port))
    client = stack.enter_context(Client(args.url, args.api_key, args.model))
    try:
        answer = client.chat("What colour is it?", images=address)
    except BadRequestError as error:
        if args.image_url or error.code != "invalid_image_url":
            raise
        sys.exit(f"{error}\n{address} is private: give --image-url a public one, or see --help")
print(answer)
print(f"total time: {answer.seconds:.2f} s")
