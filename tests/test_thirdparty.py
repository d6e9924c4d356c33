"""Other people's clients, as their own pages use them, against the real server."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import ServerProcess
from tests.thirdparty import environments, scripts
from tests.thirdparty.environments import NoNetwork, npm_packages, python_environment
from tests.thirdparty.scripts import Outcome, cases

SCRIPTS = {
    "openai_sdk.py": "openai3.txt",
    "langchain_chat.py": "openai3.txt",
    "llm_command.sh": "openai3.txt",
    "vercel_ai.mjs": "openai3.txt",
    "curl.sh": "openai3.txt",
    "llama_index_like.py": "openai2.txt",
    "litellm_sdk.py": "openai2.txt",
}
"""Each script, and the environment that has its client."""


@dataclass
class Site:
    """A site on this machine's loopback that notes who came for what."""

    address: str
    visits: list[tuple[str, str]] = field(default_factory=list)
    """Path and User-Agent of each GET."""


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the example pictures."""

    def __init__(self, *words: object, site: Site, **options: object) -> None:
        self.site = site
        super().__init__(*words, **options)  # type: ignore[arg-type]

    def do_GET(self) -> None:  # noqa: N802  (http.server's name)
        self.site.visits.append((self.path, self.headers["User-Agent"] or ""))
        super().do_GET()

    def log_message(self, *words: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site(fetching_server: tuple[ServerProcess, int], pictures: Path) -> Iterator[Site]:
    port = fetching_server[1]
    site = Site(f"http://127.0.0.1:{port}")
    handler = partial(Handler, site=site, directory=str(pictures))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield site
        listener.shutdown()


@pytest.fixture(scope="module")
def clients() -> dict[str, environments.Environment]:
    """The Python environments by requirement file; a machine without a network has none."""
    names = sorted(set(SCRIPTS.values()))
    files = [environments.HERE / name for name in names]
    try:
        with ThreadPoolExecutor() as pool:
            return dict(zip(names, pool.map(python_environment, files), strict=True))
    except NoNetwork as error:
        return no_network(error)


def no_network(error: NoNetwork) -> object:
    """Skip where a person works offline; in CI the clients must run."""
    if os.environ.get("CI"):
        raise error
    return pytest.skip(f"the clients cannot be installed: {error}")
