"""The benchmark's own parts: arguments, statistics, clocks, streams; no server is timed."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bench import first_light, media, servers, traffic
from bench.figures import Comparison, Spread, table
from bench.first_light import main
from bench.rounds import compare, parser
from bench.servers import BenchError, Server, our_command, stock_command
from qwen2vl_serve.profile import load_profile

SECONDS = st.floats(min_value=1e-6, max_value=1e3)


def test_defaults_measure_the_demo_profile() -> None:
    """Without arguments the demo profile is measured for 30 rounds, to the terminal only."""
    arguments = parser("first_light", "", first_light.ROUNDS).parse_args([])
    assert (arguments.profile, arguments.rounds, arguments.requests) == ("demo", 30, 10)
    assert arguments.json is None


@pytest.mark.parametrize("given_", ["0", "-3", "many"])
def test_unusable_counts_are_refused(given_: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A number of rounds that measures nothing ends with status 2 and names the option."""
    with pytest.raises(SystemExit) as ended:
        main(["--rounds", given_])
    assert ended.value.code == 2
    assert "--rounds" in capsys.readouterr().err


def test_both_commands_start_the_same_engine() -> None:
    """Stock gets the words of the profile's own `vllm serve` line, ours the profile's name."""
    profile = load_profile("demo", ["host=127.0.0.1", "port=4321"])
    stock, ours = stock_command(profile), our_command(profile)
    assert stock[stock.index("--model") + 1 :] == profile.vllm_command()[2:]
    assert ours[-6:] == ["--profile", "demo", "--host", "127.0.0.1", "--port", "4321"]


@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=30))
def test_ratios_are_those_of_paired_rounds(rounds: list[tuple[float, float]]) -> None:
    """Each round is compared with the one measured in turns with it, not with the median."""
    stock, ours = zip(*rounds, strict=True)
    comparison = Comparison.of("text", "wall", stock, ours)
    ratios = sorted(mine / theirs for theirs, mine in rounds)
    assert comparison.ratio.least == ratios[0]
    assert comparison.ratio.most == ratios[-1]
    assert comparison.ratio.least <= comparison.ratio.middle <= comparison.ratio.most
    assert min(stock) <= comparison.stock.middle <= max(stock)


def test_rounds_without_a_partner_are_an_error() -> None:
    """A side that lost a round cannot be compared."""
    with pytest.raises(ValueError, match="shorter"):
        Comparison.of("text", "wall", [1.0, 2.0], [1.0])


def test_the_table_shows_milliseconds_and_plain_ratios() -> None:
    """Figures are milliseconds with their extremes; every line has the same width."""
    comparison = Comparison.of("text", "API CPU", [0.002, 0.004, 0.003], [0.001, 0.004, 0.003])
    lines = table([comparison]).splitlines()
    assert lines[-1].split(" | ")[2:] == [
        "3.00 (2.00…4.00)",
        "3.00 (1.00…4.00)",
        "1.00 (0.50…1.00) |",
    ]
    assert len({len(line) for line in lines}) == 1
    assert Spread.of([1.0]).shown() == "1.00 (1.00…1.00)"


def test_the_cpu_clock_counts_work_and_not_waiting() -> None:
    """A process that computes uses CPU time, one that sleeps does not; children do not count."""
    busy = "print(flush=True); input(); sum(range(10**7)); print(flush=True); input()"
    idle = "import subprocess,sys; print(flush=True); input(); "
    idle += (
        "subprocess.run([sys.executable, '-c', 'sum(range(10**7))']); print(flush=True); input()"
    )
    spent = {name: _cpu_of(code) for name, code in (("busy", busy), ("idle", idle))}
    assert spent["busy"] > 0.02
    assert spent["idle"] < spent["busy"] / 2


def _cpu_of(code: str) -> float:
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdout.readline()
        server = Server("any", 0, process.pid, "")
        before = server.cpu_seconds()
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        return server.cpu_seconds() - before
    finally:
        process.kill()
        process.communicate()


def test_no_two_pictures_are_alike() -> None:
    """Each number has a 280×280 JPEG of its own, the same in every run."""
    drawn = [traffic.drawn_jpeg(number) for number in range(20)]
    assert len(set(drawn)) == 20
    assert drawn[3] == traffic.drawn_jpeg(3)
    with Image.open(io.BytesIO(drawn[0])) as picture:
        assert (picture.format, picture.size) == ("JPEG", (280, 280))


def test_a_photo_is_sent_again_in_every_turn() -> None:
    """The conversation's picture stays, its questions grow; the first turn is not measured."""
    again, by_id, fresh = media.CASES
    assert (again.by_id, by_id.by_id) == (False, True)
    assert again.before is not None
    opening = again.before("m", 4)
    assert opening is not None
    assert again.before("m", 5) is None
    turns = [again.body("m", number) for number in range(4, 8)]
    pictures = {body["messages"][0]["content"][0]["image_url"]["url"] for body in turns}
    assert pictures == {opening["messages"][0]["content"][0]["image_url"]["url"]}
    assert [len(body["messages"]) for body in turns] == [3, 5, 7, 9]
    assert fresh.body("m", 1)["messages"] != fresh.body("m", 2)["messages"]


def test_a_photo_is_a_phones_photo() -> None:
    """12 megapixels in 2 to 3.5 MB."""
    data = base64.b64decode(media.photo(3).partition(",")[2])
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.size == (4000, 3000)
    assert 2_000_000 < len(data) < 3_500_000


def _event(content: str | None, usage: int | None = None) -> bytes:
    choices = [] if content is None else [{"delta": {"content": content}}]
    chunk = {"choices": choices, "usage": usage and {"completion_tokens": usage}}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def test_a_whole_stream_gives_its_text() -> None:
    """The pieces are joined when the stream says that all its tokens were made."""
    data = _event("Hel") + _event("lo") + _event(None, 64) + b"data: [DONE]\n\n"
    assert traffic.streamed_text(data) == "Hello"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_event("Hel"), "does not end in"),
        (b"", "does not end in"),
        (b'data: {"error": {}}\n\ndata: [DONE]\n\n', "holds an error"),
        (_event("Hel") + _event(None, 9) + b"data: [DONE]\n\n", "9 tokens instead of 64"),
        (_event("Hel") + b"data: [DONE]\n\n", "None tokens"),
    ],
)
def test_a_stream_that_did_less_work_is_not_measured(data: bytes, message: str) -> None:
    """A cut, failed or short answer ends the benchmark instead of looking fast."""
    with pytest.raises(BenchError, match=message):
        traffic.streamed_text(data)


class _Answers(BaseHTTPRequestHandler):
    """Answers every chat with the server's ``text``, streamed when asked for."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        given = self.rfile.read(int(self.headers["Content-Length"]))
        assert isinstance(self.server, _Stub)
        self.server.asked.append((self.path, given))
        upload = self.path == "/v1/files"
        body = {} if upload else json.loads(given)
        text = self.server.text
        kind = "text/event-stream" if body.get("stream") else "application/json"
        data = json.dumps({"id": "file-1", "choices": [{"message": {"content": text}}]}).encode()
        if body.get("stream"):
            data = _event(text) + _event(None, 64) + b"data: [DONE]\n\n"
        self.send_response(self.server.status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


class _Stub(ThreadingHTTPServer):
    """A server that takes all streams of a burst at once, and what it answers."""

    request_queue_size = 2 * traffic.STREAMS
    text = "red"
    status = 200

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.asked: list[tuple[str, bytes]] = []


@pytest.fixture
def two() -> Iterator[list[_Stub]]:
    """Two HTTP servers that stand for stock and ours."""
    running = [_Stub(("127.0.0.1", 0), _Answers) for _ in range(2)]
    for one in running:
        threading.Thread(target=one.serve_forever, daemon=True).start()
    yield running
    for one in running:
        one.shutdown()
        one.server_close()


def _pair(two: list[_Stub]) -> tuple[Server, Server]:
    stock, ours = (
        Server(name, one.server_port, os.getpid(), "m")
        for name, one in zip(("stock", "ours"), two, strict=True)
    )
    return stock, ours


def test_every_case_is_compared_on_both_sides(two: list[_Stub]) -> None:
    """Each case gives its CPU line, the sequential ones a wall line as well."""
    lines = compare(_pair(two), first_light.CASES, rounds=2, requests=1)
    text, picture, streams = (case.name for case in first_light.CASES)
    assert [(line.case, line.quantity) for line in lines] == [
        (text, "API CPU"),
        (text, "wall"),
        (picture, "API CPU"),
        (picture, "wall"),
        (streams, "API CPU"),
    ]
    assert all(line.stock.least > 0 and line.ours.least > 0 for line in lines)


def test_pictures_by_id_are_uploaded_once_and_to_ours_alone(two: list[_Stub]) -> None:
    """Stock gets the bytes each time; ours gets them once, then the id."""
    url = "data:image/png;base64,AAAA"

    def body(model: str, number: int) -> dict[str, Any]:
        content = [{"type": "image_url", "image_url": {"url": url}}]
        return traffic.text(model, number) | {"messages": [{"role": "user", "content": content}]}

    case = traffic.Case("by id", body, warm_up=1, by_id=True)
    compare(_pair(two), [case], rounds=1, requests=2)
    stock, ours = ([path for path, _ in one.asked] for one in two)
    assert stock == ["/v1/chat/completions"] * 3
    assert ours == ["/v1/files", *["/v1/chat/completions"] * 3]
    shown = [
        json.loads(body)["messages"][0]["content"][0]["image_url"] for _, body in two[1].asked[1:]
    ]
    assert shown == [{"file_id": "file-1"}] * 3
    assert b"AAAA" in two[0].asked[0][1]


def test_each_case_counts_on_for_itself(two: list[_Stub]) -> None:
    """What one request begins the next of its case continues, on the same side."""
    asked: dict[str, list[int]] = {"one": [], "other": []}

    def body(name: str) -> Callable[[str, int], dict[str, Any]]:
        def made(model: str, number: int) -> dict[str, Any]:
            asked[name].append(number)
            return traffic.text(model, number)

        return made

    cases = [traffic.Case(name, body(name), warm_up=4) for name in asked]
    compare(_pair(two), cases, rounds=2, requests=3)
    for numbers in asked.values():
        blocks = [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
        assert numbers == [number for block in blocks for _ in two for number in block]


def test_servers_that_answer_differently_are_not_compared(two: list[_Stub]) -> None:
    """Another answer means other work: the benchmark stops and shows both."""
    two[1].text = "blue"
    with pytest.raises(BenchError, match=r"stock answered .*red.*, ours .*blue"):
        compare(_pair(two), first_light.CASES, rounds=1, requests=1)


def test_an_error_answer_ends_the_benchmark(two: list[_Stub]) -> None:
    """A server that refuses is not timed."""
    two[0].status = 503
    with pytest.raises(BenchError, match="HTTP 503"):
        compare(_pair(two), first_light.CASES, rounds=1, requests=1)


def test_a_server_that_fails_to_start_takes_the_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the side and its last lines; no process is left."""
    sleeper = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    log = tmp_path / "ours.log"
    broken = (
        "import time; from pathlib import Path\n"
        f"log = Path({str(log)!r})\n"
        "while not (log.exists() and log.read_text()): time.sleep(0.05)\n"
        "1/0"
    )
    monkeypatch.setattr(servers, "stock_command", lambda _: [sys.executable, "-c", broken])
    monkeypatch.setattr(servers, "our_command", lambda _: [sys.executable, "-c", sleeper])
    with (
        pytest.raises(BenchError, match=r"(?s)stock did not become ready.*ZeroDivisionError"),
        servers.both("demo", tmp_path),
    ):
        pass
    (pid,) = log.read_text().split()
    assert not Path(f"/proc/{pid}").exists()


def test_a_killed_benchmark_leaves_no_server(tmp_path: Path) -> None:
    """SIGKILL cannot be caught: the kernel ends the servers in the benchmark's place."""
    code = (
        "import os, sys, time, bench.servers as s\n"
        "from pathlib import Path\n"
        "sleeper = [sys.executable, '-c', "
        "'import os, time; print(os.getpid(), flush=True); time.sleep(600)']\n"
        "with s.run_process(sleeper, Path(sys.argv[1]), dict(os.environ)):\n"
        "    time.sleep(600)\n"
    )
    log = tmp_path / "log"
    bench = subprocess.Popen([sys.executable, "-c", code, str(log)])
    try:
        pid = _within(120, lambda: log.exists() and log.read_text().strip())
        bench.kill()
        bench.wait()
        _within(60, lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid))
    finally:
        bench.kill()


def _is_zombie(pid: object) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def _within(seconds: float, condition: object) -> object:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():  # type: ignore[operator]
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")
