"""The matrix: on the session's server for what it can show, few others beside it."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qwen2vl_serve import cli
from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.profile import load_profile
from tests.conftest import ServerProcess
from tests.fake_engine import FakeEngine
from tests.hostile import boot, classes, faults, servers
from tests.hostile.__main__ import TITLES, main
from tests.hostile.case import Case, Outcome, Refusal, leak, manners
from tests.hostile.servers import SETTINGS
from tests.hostile.sites import Sites
from tests.hostile.table import Result, Run, rows
from tests.hostile.target import Answer, Target, attempt
from tests.served import served

CASES = classes.cases()
OTHER = ("limits", "no tools")
"""What the session's server does not have: it is patient, and tools are on."""

REAL = [case for case in CASES if case.group != "J" and case.needs not in OTHER]
LIMITED = [case for case in CASES if case.group == "J" or case.needs in OTHER]
KEY = "sesame-open-up"


@pytest.fixture(scope="module")
def target(server: ServerProcess, hostile_sites: Sites) -> Target:
    """The session's server, which may fetch from the site."""
    one = Target(server.root, hostile_sites, alive=lambda: server.process.poll() is None)
    one.warm_up()
    return one


@pytest.fixture(scope="module")
def limited(hostile_sites: Sites) -> Iterator[Target]:
    """Keys and small limits: what is decided before an engine is asked."""
    profile = load_profile("demo", [*SETTINGS, *hostile_sites.settings()])
    engine = FakeEngine(words=["word "] * 16, pause=0.1)  # of most cases one word comes
    with served(profile, Keys([KEY]), engine) as api:
        yield Target(api.root, hostile_sites, KEY)


def test_there_are_cases_of_every_class() -> None:
    """At least 250, each with a name of its own."""
    assert len(CASES) + len(boot.BOOTS) >= 550
    assert set(TITLES) == set("ABCDEFGHIJKL")
    assert min(len(classes.cases(letter)) for letter in classes.CLASSES) >= 15


@pytest.mark.parametrize("case", REAL, ids=lambda case: case.id)
def test_the_real_engine(target: Target, case: Case) -> None:
    """As promised; the next good request works, nothing is held, the process is the same."""
    assert attempt(target, case) == Outcome()


@pytest.mark.parametrize("case", LIMITED, ids=lambda case: case.id)
def test_keys_and_limits(limited: Target, case: Case) -> None:
    """The same over a scripted engine; ``--start`` shows it on the real one."""
    assert attempt(limited, case) == Outcome()


def test_a_life_is_played_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM twice, over a scripted engine; test_vllm_engine ends the real one in several ways."""

    def command(kind: str, port: int, key: str, settings: Sequence[str] = ()) -> list[str]:
        return [sys.executable, "-m", "tests.serve_fake", "--port", str(port), "long", *settings]

    monkeypatch.setattr(servers, "command", command)
    (scenario,) = [one for one in faults.SCENARIOS if one.name == "SIGTERM twice"]
    verdicts = scenario.play("ours", tmp_path)
    assert verdicts == dict.fromkeys(scenario.checks, Outcome())


def in_this_process(words: list[str], folder: Path) -> boot.Done[str]:
    """Run the command without a new interpreter."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setenv("XDG_STATE_HOME", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        status = cli.main(words[3:])
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


@pytest.mark.parametrize("one", boot.BOOTS, ids=lambda one: one.name)
def test_what_cannot_start(one: boot.Boot, tmp_path: Path) -> None:
    """Exit status 2, one line that names file, line or field, and nothing loaded."""
    assert boot.judge(one, "ours", tmp_path / "x", in_this_process) == Outcome()


def test_a_command_that_cannot_start_is_a_process_that_ends(tmp_path: Path) -> None:
    """One of them as its user sees it."""
    (one,) = [one for one in boot.BOOTS if one.name == "a key twice"]
    assert boot.judge(one, "ours", tmp_path / "x") == Outcome()
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["mine.yaml"]


class Careless(BaseHTTPRequestHandler):
    """Says yes to everything, and what it thinks."""

    status, words = 200, b'{"choices": [{"message": {"content": "yes"}}]}'

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.words)))
        self.end_headers()
        self.wfile.write(self.words)

    do_GET = do_POST  # noqa: N815  (as the base class has it)


@pytest.fixture
def careless() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Careless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_server_that_takes_everything_fails(
    careless: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every refusal that is due is missed; what is to be answered is not."""
    assert main(["--target", f"{careless}/v1", "--class", "bi"]) == 1
    out, err = capsys.readouterr()
    due = [case for case in classes.cases("BI") if f"UNSAFE {case.id}: " in err]
    assert {len(due), err.count("UNSAFE")} == {114}
    assert re.search(r"\| B \| types and fields \| 68 \| 3 \| \d+ \| 1?\d \|", out), out


def test_the_command_tells_the_table(limited: Target, capsys: pytest.CaptureFixture[str]) -> None:
    """A row a class, the sum, what was left out and why; status 0 where all is well."""
    assert main(["--target", limited.url, "--key", KEY, "--class", "BJ"]) == 0
    out, err = capsys.readouterr()
    assert "UNSAFE" not in err
    assert re.search(r"\| B \|.*\n\| J \|.*\n\|  \| all \| 133 \| 133 \|", out), out
    assert main(["--target", limited.url, "--class", "J", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["runs"][0]["left_out"].values()) == {"key"}


@pytest.mark.parametrize(
    "words", [["--target", "x", "--class", "Z"], ["--target", "x", "--stock"], []]
)
def test_a_wrong_option_is_a_usage_error(words: list[str]) -> None:
    """Status 2 and nothing run."""
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2


SHAPED = (
    b'{"error": {"message": "no", "type": "invalid_request_error", "param": null, "code": "x"}}'
)


@pytest.mark.parametrize(
    ("status", "body", "unsafe"),
    [
        (400, SHAPED, False),
        (500, b"{}", True),
        (200, b"{}", True),
        (0, b"", True),
        (400, b"cannot identify image file <_io.BytesIO object at 0x7f>", True),
        (400, b"Cannot connect to host 10.0.0.1:80", True),
        (400, b"iVBORw0KGgo" * 20, True),
        (422, b"/tmp/x.png", True),
    ],
)  # fmt: skip
def test_an_answer_is_judged(status: int, body: bytes, unsafe: bool) -> None:
    """Status class and leaks decide what is safe; the code is ours."""
    answer = Answer(status, {"x-request-id": "1"}, body)
    outcome = Refusal(codes=("x",)).judge(b"GET /", answer)
    assert (outcome.unsafe is not None) == unsafe
    assert (outcome.wrong is None) == (not unsafe)
    assert Refusal(codes=("y",)).judge(b"GET /", answer).wrong is not None


def test_what_a_client_said_himself_is_no_leak() -> None:
    """But base64 is not said back to him."""
    own = b"GET /%2fetc/passwd"
    assert leak(Answer(404, {}, b"no '//etc/passwd' here"), own) is None
    assert leak(Answer(400, {}, b"A" * 200), b"A" * 200) is None
    assert manners(Answer(400, {}, b"A" * 200), b"A" * 200) is not None
    assert manners(Answer(400, {}, b"see errors.pydantic.dev"), b"") == "pydantic"


def test_the_table_counts_what_is_compared() -> None:
    """A case of ours alone is in the first column only."""
    mine, theirs = Run("ours"), Run("stock")
    mine.results = [
        Result("A", "one", Outcome(), True),
        Result("A", "two", Outcome(unlike="x"), True),
        Result("A", "three", Outcome("x"), False),
    ]
    theirs.results = [Result("A", "one", Outcome("x"), True), Result("A", "two", Outcome(), True)]
    assert rows({"A": "a"}, [mine, theirs])[1] == ["A", "a", "3", "1", "2", "2", "1"]
    # Cases of two classes may have one name.
    mine.results.append(Result("B", "one", Outcome(), True))
    assert rows({"A": "a", "B": "b"}, [mine, theirs])[-1] == ["", "all", "4", "2", "3", "3", "1"]
