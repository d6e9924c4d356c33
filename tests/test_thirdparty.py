"""Other people's clients, as their own pages use them, against the real server."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest

from tests.conftest import ServerProcess
from tests.markdown import Document
from tests.thirdparty import environments, scripts
from tests.thirdparty.environments import Environment, NoNetwork

SCRIPTS = {
    "openai_sdk.py": "openai3.txt",
    "langchain_chat.py": "openai3.txt",
    "llm_command.sh": "openai3.txt",
    "vercel_ai.mjs": "openai3.txt",
    "curl.sh": "openai3.txt",
    "llama_index_like.py": "openai2.txt",
    "litellm_sdk.py": "openai2.txt",
}
"""Each script, and the environment that has its client (of curl.sh: any)."""

WHO = r"I am the demo model of qwen2vl_serve"
SECOND = r"The second picture shows a blue square\."
EXPECTED = {
    "text": WHO,
    "openai prefix": WHO,
    "picture": r"The circle is red\.",
    "address": r"The square is blue\.",
    "several": SECOND,
    "stream": SECOND,
    "stream helper": SECOND,
    "turns": r"The square is blue\.",
    "async": SECOND,
    "structured": r"\Wcolor\W+blue\W+shape\W+square\W",
    "wrong key": r"Incorrect API key provided: it is not one of this server's\.",
    "no such model": r"model 'gpt-4o' is not served here; served: 'qwen2-vl-demo', 'demo'\.",
    "too long": r"prompt is too long: it takes \d+ tokens .* context length is 4096 tokens",
    # The call as each client shows it; the demo model then says the colour, as a text or as JSON.
    "tools": r"^in_stock \{\s*[\"']?colour[\"']?: ?[\"'](red|blue)[\"']\s*\}\n.*\bred\b",
}
"""A pattern of what each case prints, for whichever client: the model's answers are known."""

STATUS = {"wrong key": "401", "no such model": "404", "too long": "400"}
STREAMS = {"stream", "stream helper"}
CALL_TOOLS = {
    "openai_sdk.py", "langchain_chat.py", "llama_index_like.py", "litellm_sdk.py", "vercel_ai.mjs"
}  # fmt: skip
EVERYWHERE = {"text", "picture", "address", "several", "structured", *STATUS}

PAGES = [Document("docs/clients.md"), Document("docs/clients.zh-CN.md")]
pages = pytest.mark.parametrize("page", PAGES, ids=str)
CASES = [(name, case) for name in SCRIPTS for case in scripts.cases(name) if case != "setup"]


@dataclass(frozen=True)
class Result:
    """What a script printed, and who fetched what from the site meanwhile."""

    outcome: scripts.Outcome
    visits: list[tuple[str, str]]


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the example pictures, and notes path and User-Agent of each GET."""

    def __init__(self, *words: object, visits: list[tuple[str, str]], directory: str) -> None:
        self.visits = visits
        super().__init__(*words, directory=directory)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.visits.append((self.path, self.headers["User-Agent"] or ""))
        super().do_GET()

    def log_message(self, *words: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def installed() -> dict[str, Environment]:
    """The Python environments by requirement file, and Node.js's packages beside theirs."""
    names = sorted(set(SCRIPTS.values()))
    files = [environments.HERE / name for name in names]
    try:
        with ThreadPoolExecutor() as pool:
            return dict(zip(names, pool.map(environments.python_environment, files), strict=True))
    except NoNetwork as error:
        return no_network(error)


@pytest.fixture(scope="module")
def packages(installed: dict[str, Environment]) -> Path:
    """The folder of npm's packages."""
    try:
        return environments.npm_packages(installed["openai3.txt"].node)
    except NoNetwork as error:
        return no_network(error)


def no_network(error: NoNetwork) -> object:
    """Skip where a person works offline; CI has the registries, and there the clients must run."""
    if os.environ.get("CI"):
        raise error
    return pytest.skip(f"the clients cannot be installed: {error}")


@pytest.fixture(scope="module")
def result_of(
    installed: dict[str, Environment],
    packages: Path,
    fetching_server: tuple[ServerProcess, int],
    pictures: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], Result]]:
    """Run a script once, however many of its cases are asked for."""
    server, port = fetching_server
    visits: list[tuple[str, str]] = []
    addresses = {scripts.SERVER: server.root, scripts.SITE: f"http://127.0.0.1:{port}"}

    @cache
    def run(name: str) -> Result:
        folder = tmp_path_factory.mktemp(Path(name).stem)
        shutil.copytree(pictures, folder, dirs_exist_ok=True)
        (folder / "node_modules").symlink_to(packages / "node_modules")
        home = installed[SCRIPTS[name]]
        path = f"{home.bin}{os.pathsep}{installed['openai3.txt'].node / 'bin'}"
        before = len(visits)
        outcome = scripts.run(name, folder, path, addresses)
        return Result(outcome, visits[before:])

    handler = partial(Handler, visits=visits, directory=str(pictures))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        yield run
        site.shutdown()


def test_every_client_does_all_of_it() -> None:
    """Text, a picture, an address, several, a schema and the errors; each case is expected."""
    for name in SCRIPTS:
        cases = scripts.cases(name).keys()
        assert cases >= EVERYWHERE, name
        assert cases & {"stream"} or name == "llm_command.sh"  # which streams unless told not to
        assert ("tools" in cases) == (name in CALL_TOOLS), name
        assert cases - {"setup"} <= EXPECTED.keys(), name


@pytest.mark.parametrize(
    ("variables", "raised"),
    [
        ({"HTTPS_PROXY": "http://127.0.0.1:9"}, NoNetwork),
        ({"UV_DEFAULT_INDEX": "file:///none"}, RuntimeError),
    ],
    ids=["no network", "no such version"],
)
def test_only_a_missing_network_excuses(
    variables: dict[str, str],
    raised: type[Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pin that cannot be had is a failure; what was begun is not taken for an environment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        with pytest.raises(raised):
            environments.python_environment(environments.HERE / "openai3.txt")


@pages
def test_the_code_of_the_page_is_what_is_run(page: Document) -> None:
    """Each block is one case of the script that is linked last before it, to the letter."""
    shown: dict[str, set[str]] = {name: set() for name in SCRIPTS}
    lines = page.source.splitlines()
    for block in page.blocks:
        linked = re.findall(r"tests/thirdparty/([\w.]+)\)", "\n".join(lines[: block.line]))[-1]
        named = {code: case for case, code in scripts.cases(linked).items()}
        assert block.text.strip("\n") in named, f"line {block.line}"
        shown[linked].add(named[block.text.strip("\n")])
    assert all(cases >= {"setup", "picture"} for cases in shown.values())


@pages
def test_the_page_names_the_versions_that_are_run(page: Document) -> None:
    """Those of the requirement files and of package.json."""
    pins = json.loads((environments.HERE / "package.json").read_text("utf-8"))["dependencies"]
    lines = {
        line
        for name in set(SCRIPTS.values())
        for line in (environments.HERE / name).read_text("utf-8").splitlines()
    }
    tested = [row[1] for row in page.tables[0]]
    assert len(tested) == len(SCRIPTS)
    for cell in tested:
        for code in cell.codes:
            assert code in lines or f"{code} {pins[code]}" in cell.text


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_client(result_of: Callable[[str], Result], name: str, case: str) -> None:
    """What its own page would write answers rightly, or fails with its own typed error."""
    if name == "curl.sh" and shutil.which("curl") is None:
        pytest.skip("this machine has no curl")
    result = result_of(name)
    outcome = result.outcome
    printed = outcome.printed.get(case, "").strip()
    assert printed, outcome.errors
    said = answer_of_curl(printed) if name == "curl.sh" else printed.replace("|", "")
    assert re.search(EXPECTED[case], said), printed
    if case in STREAMS:
        assert printed.count("|" if name != "curl.sh" else "data: {") > 5, "it came in one piece"
    if name == "llm_command.sh":
        assert printed.endswith("exit status 1") == (case in STATUS)
    elif case in STATUS:
        assert STATUS[case] in printed
    if case == "address":
        assert ("/blue_square.png", "qwen2vl_serve") in result.visits, "the server did not fetch it"


def answer_of_curl(printed: str) -> str:
    """What the JSON says that curl printed: an answer, a stream of one, or an error's message."""
    if printed.startswith("data: "):
        *events, done = [line.removeprefix("data: ") for line in printed.splitlines() if line]
        assert done == "[DONE]"
        choices = [choice for event in events for choice in json.loads(event)["choices"]]
        return "".join(choice["delta"].get("content") or "" for choice in choices)
    body = json.loads(printed.splitlines()[0])
    if "error" in body:
        return str(body["error"]["message"])
    return str(body["choices"][0]["message"]["content"])
