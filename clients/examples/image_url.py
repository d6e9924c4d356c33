"""Ask about a picture on the web: the server fetches it, the client sends its address only.

Without --image-url the example serves a picture of its own on this machine's loopback, so that
it runs without the internet. A server elsewhere cannot reach that, and one that blocks private
addresses will not: give --image-url a public address then.
"""

import argparse
import contextlib
import functools
import http.server
import threading
from collections.abc import Iterator

from qwen2vl_client import Client

from arguments import PICTURES, RED_CIRCLE


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line on the terminal for each."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@contextlib.contextmanager
def picture_on_loopback() -> Iterator[str]:
    """Yield the address of a picture that this process serves."""
    handler = functools.partial(QuietHandler, directory=PICTURES)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{RED_CIRCLE.name}"
        server.shutdown()


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--url", help="the server (default: http://127.0.0.1:8000/v1)")
parser.add_argument("--api-key", help="the key (default: QWEN2VL_API_KEY)")
parser.add_argument("--image-url", help="the picture's address")
args = parser.parse_args()

with contextlib.ExitStack() as stack:
    address = args.image_url or stack.enter_context(picture_on_loopback())
    client = stack.enter_context(Client(args.url, args.api_key))
    answer = client.chat("What colour is it?", images=address)
print(answer)
print(f"total time: {answer.seconds:.2f} s")
