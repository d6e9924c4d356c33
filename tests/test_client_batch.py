"""Batches: order, bounded reading, retries, and no request lost or doubled by a kill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qwen2vl_client import Answer, AsyncClient, BatchError, Client, InvalidArgumentError
from qwen2vl_client.batch import Outcome, batch
from qwen2vl_client.batch.journal import Journal
from qwen2vl_client.batch.progress import Pace
from qwen2vl_client.tasks import Task, extract_table, ocr
from qwen2vl_client.tasks.task import as_reply

from tests import stub_server as stub
from tests.served import eventually

ROOT = Path(__file__).parents[1]


def asked(body: Any) -> str:
    """The text of the last message of a request."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def echo(handler: stub.Handler) -> None:
    """Answer with the question."""
    text = asked(handler.stub.requests[-1].body)
    stub.completion(f"answer to {text}")(handler)


class Echo:
    """A client that answers at once, and remembers how many it answered at a time."""

    def __init__(
        self,
        failures: dict[str, int] | None = None,
        pause: float = 0.0,
        meeting: threading.Barrier | None = None,
    ) -> None:
        self.failures, self.pause, self.meeting = failures or {}, pause, meeting
        self.running = self.most = 0
        self.asked: list[str] = []
        self._lock = threading.Lock()

    def chat(self, text: str, **fields: Any) -> Answer:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
            self.asked.append(text)
            fails = self.failures.get(text, 0)
            self.failures[text] = fails - 1
        time.sleep(self.pause)
        if self.meeting:
            self.meeting.wait()
        with self._lock:
            self.running -= 1
        if fails > 0:
            raise stub_error(503)
        if fails < -100:
            raise stub_error(400)
        raw = {"usage": {"prompt_tokens": 3, "completion_tokens": 2}}
        choice = {"message": {"content": f"answer to {text}"}, "finish_reason": "stop"}
        return Answer.from_raw({**raw, "choices": [choice]}, None, 0.01)


def stub_error(status: int) -> Exception:
    from qwen2vl_client.transport import status_error

    return status_error(status, {}, b'{"error": {"message": "it failed"}}')


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_answers_come_in_the_order_of_the_questions(tmp_path: Path) -> None:
    """In the report and in the file, though the first ones take longest."""
    client = Echo()
    questions = [f"q{number}" for number in range(20)]

    def chat(text: str, **fields: Any) -> Answer:
        time.sleep(0.05 if text in questions[:4] else 0)
        return Echo.chat(client, text, **fields)

    slow = type("Slow", (), {"chat": staticmethod(chat)})()
    report = batch(slow, questions, output=tmp_path / "out.jsonl")
    assert [one.text for one in report.outcomes] == [f"answer to {q}" for q in questions]
    assert [one["index"] for one in lines_of(tmp_path / "out.jsonl")] == list(range(20))
    assert (report.requests, report.answered, report.resumed, report.failed) == (20, 20, 0, ())
    assert (report.prompt_tokens, report.completion_tokens) == (60, 40)
    assert report.requests_per_second == pytest.approx(20 / report.seconds)
    assert "20 answered, 0 failed" in str(report)


def test_a_generator_is_read_no_further_than_there_are_places() -> None:
    """What has been read never exceeds what has been answered by more than ``concurrency``.

    And that many do run at a time: each waits until four others wait as well.
    """
    client, read = Echo(meeting=threading.Barrier(5, timeout=30)), 0
    ahead = []

    def questions() -> Iterator[str]:
        nonlocal read
        for number in range(60):
            read += 1
            with client._lock:
                answered = len(client.asked) - client.running
            ahead.append(read - answered)
            yield f"q{number}"

    report = batch(client, questions(), concurrency=5)
    assert report.answered == 60
    assert client.most == 5
    assert max(ahead) <= 6  # five are asked, and the one that is being read


def test_with_an_output_memory_does_not_grow_with_the_answers(tmp_path: Path) -> None:
    """10 MB of answers to a generator leave less than a third of that in memory at a time."""

    class Long(Echo):
        def chat(self, text: str, **fields: Any) -> Answer:
            choice = {"message": {"content": text + "x" * 50_000}, "finish_reason": "stop"}
            return Answer.from_raw({"choices": [choice]}, None, 0.01)

    tracemalloc.start()
    try:
        questions = (f"q{number}" for number in range(200))
        report = batch(Long(), questions, output=tmp_path / "out.jsonl")
        assert sum(len(one.text or "") for one in report.outcomes) > 10_000_000
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert report.answered == 200
    assert most < 3_000_000


def test_what_failed_is_asked_again_when_the_others_are_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two rounds help one, none helps what the server refuses."""
    monkeypatch.setattr("qwen2vl_client.batch.run._LONGEST_PAUSE", 0.01)
    client = Echo(failures={"b": 2, "c": -200})
    report = batch(client, ["a", "b", "c", "d"], concurrency=1)
    assert client.asked == ["a", "b", "c", "d", "b", "b"]
    assert [one.ok for one in report.outcomes] == [True, True, False, True]
    assert report.outcomes[1].attempts == 3
    (failed,) = report.failed
    assert (failed.id, failed.text) == ("2", None)
    assert "HTTP 400" in (failed.error or "")


def test_failures_are_asked_again_by_the_next_run_and_stand_once(tmp_path: Path) -> None:
    """The answer takes the place of the first run's error; what was answered is not asked."""
    out = tmp_path / "out.jsonl"
    first = batch(Echo(failures={"b": 9}), ["a", "b", "c"], output=out, retries=0)
    assert [line["error"] is None for line in lines_of(out)] == [True, False, True]
    assert len(first.failed) == 1
    client = Echo()
    second = batch(client, ["a", "b", "c"], output=out)
    assert client.asked == ["b"]
    assert (second.answered, second.resumed, second.failed) == (1, 2, ())
    assert [(line["id"], line["text"]) for line in lines_of(out)] == [
        ("0", "answer to a"),
        ("1", "answer to b"),
        ("2", "answer to c"),
    ]


def test_a_server_that_is_gone_ends_the_batch(tmp_path: Path) -> None:
    """Instead of a million failures; what was answered is kept."""
    client = Echo(failures={f"q{number}": 99 for number in range(5, 1000)})
    questions = (f"q{number}" for number in range(1000))
    with pytest.raises(BatchError, match="more than max_failures=10"):
        batch(client, questions, output=tmp_path / "o.jsonl", max_failures=10, concurrency=1)
    assert len(client.asked) < 25
    kept = {line["text"] for line in lines_of(tmp_path / "o.jsonl")}
    assert kept == {f"answer to q{number}" for number in range(5)}


def test_failures_here_and_there_do_not_end_it() -> None:
    """A folder may hold many damaged pictures; only a row of failures means the server."""
    bad = {f"q{number}": -200 for number in range(0, 60, 3)}
    report = batch(Echo(failures=bad), [f"q{n}" for n in range(60)], max_failures=8)
    assert (report.answered, len(report.failed)) == (40, 20)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """``progress=True`` without rich is an error with the command that installs it."""
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(InvalidArgumentError, match="pip install rich"):
        batch(Echo(), ["a"], progress=True)


def test_an_answer_that_cannot_be_read_is_one_failure(tmp_path: Path) -> None:
    """Its words are kept; a reader of the caller's own that fails ends nothing either."""

    def broken(answer: Answer) -> str:
        return str({}["no"])  # type: ignore[index]

    tasks = [extract_table.task(b"\xff\xd8\xff"), Task("b", broken), Task("c", as_reply)]
    report = batch(Echo(), tasks)
    assert [one.error is None for one in report.outcomes] == [False, False, True]
    assert "no JSON object" in str(report.outcomes[0].error)
    assert "KeyError" in str(report.outcomes[1].error)
    assert str(report.outcomes[0].text).startswith("answer to Extract")
    assert report.outcomes[2].value == {"text": "answer to c"}


def test_a_kill_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    """A real process is killed with SIGKILL in the middle, twice; the third run ends.

    The server counts what it was asked: a request may be asked twice (it was under way when the
    process died), at most as many as run at a time, and every answer stands once in the file.
    """
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    questions = [{"id": f"n{number:03}", "text": f"question {number}"} for number in range(120)]
    source.write_text("".join(json.dumps(line) + "\n" for line in questions), "utf-8")

    answers = threading.Semaphore(40)
    """What the server may still answer: no run that is to be killed comes to its end."""

    def step(handler: stub.Handler) -> None:
        text = asked(handler.stub.requests[-1].body)
        answers.acquire()
        stub.completion(text)(handler)

    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'clients'}"}

    def start(url: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "tests.batch_process", url, str(source), str(out)]
        return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    def written() -> int:
        return out.read_bytes().count(b"\n") if out.exists() else 0

    with stub.running(step) as server:
        for enough, more in ((30, 50), (70, 1000)):
            process = start(server.url)
            eventually(lambda enough=enough: written() >= enough)  # type: ignore[misc]
            assert process.poll() is None
            process.kill()
            process.wait(60)
            answers.release(more)
            # What a kill within a write leaves: a line without its end.
            with out.open("ab") as file:
                file.write(b'{"index": 119, "id": "n119", "te')
        assert 70 <= written() < 120
        last = start(server.url)
        told, _ = last.communicate(timeout=60)
        assert last.returncode == 0
    lines = lines_of(out)
    assert [line["id"] for line in lines] == [line["id"] for line in questions]
    assert [line["value"] for line in lines] == [{"text": one["text"]} for one in questions]
    assert f"{120 - int(told.split()[0])} kept from before" in told
    counts = Counter(asked(request.body) for request in server.requests if request.body)
    assert set(counts) == {one["text"] for one in questions}
    assert sum(counts.values()) <= 120 + 2 * 4


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    """A lacking end is enough: that request is asked again, and the file is whole afterwards."""
    out = tmp_path / "out.jsonl"
    batch(Echo(), ["a", "b", "c"], output=out)
    out.write_bytes(out.read_bytes()[:-cut])
    client = Echo()
    report = batch(client, ["a", "b", "c"], output=out, concurrency=1)
    assert client.asked == ["a", "b", "c"][-report.answered :]
    assert [line["text"] for line in lines_of(out)] == [f"answer to {q}" for q in "abc"]


@pytest.mark.parametrize(
    "text", ['{"my": "notes"}\n', "my diary, without a line's end", '{"text": "What is it?"}', "{{"]
)
def test_a_file_of_something_else_is_not_touched(tmp_path: Path, text: str) -> None:
    """Nor is one without a line's end taken for what a kill left; the requests' own, say."""
    out = tmp_path / "notes.jsonl"
    out.write_text(text)
    with pytest.raises(InvalidArgumentError, match="line 1 is no outcome"):
        batch(Echo(), ["a"], output=out)
    assert out.read_text() == text


def test_requests_that_changed_are_not_taken_for_answered(tmp_path: Path) -> None:
    """Another text under a known id ends the batch with an error that names the id."""
    out = tmp_path / "out.jsonl"
    batch(Echo(), ["a", "b"], output=out)
    with pytest.raises(InvalidArgumentError, match="another request under the id '0'"):
        batch(Echo(), ["z", "b"], output=out)


def test_with_ids_requests_may_be_added_between_runs(tmp_path: Path) -> None:
    """The file has the new order, each line its new place."""
    out = tmp_path / "out.jsonl"
    batch(Echo(), [{"id": "x", "text": "a"}, {"id": "y", "text": "b"}], output=out)
    client = Echo()
    batch(client, [{"id": n, "text": t} for n, t in zip("wyx", "cba", strict=True)], output=out)
    assert client.asked == ["c"]
    assert [(line["index"], line["id"]) for line in lines_of(out)] == [(0, "w"), (1, "y"), (2, "x")]


def test_an_output_stays_what_it_was_when_it_is_put_in_order(tmp_path: Path) -> None:
    """A link to a file elsewhere, which only its owner may read."""
    out, real = tmp_path / "out.jsonl", tmp_path / "disk" / "real.jsonl"
    real.parent.mkdir()
    real.touch(0o600)
    out.symlink_to(real)
    batch(Echo(failures={"a": 1}), ["a", "b"], output=out)
    assert [line["text"] for line in lines_of(real)] == ["answer to a", "answer to b"]
    assert out.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in real.parent.iterdir()] == ["real.jsonl"]


def test_two_batches_do_not_write_one_file(tmp_path: Path) -> None:
    """The second is refused while the first holds its output, and runs once that is closed."""
    out = tmp_path / "out.jsonl"
    busy = pytest.raises(InvalidArgumentError, match="another batch is writing")
    with Journal(out), busy:
        batch(Echo(), ["a"], output=out)
    assert batch(Echo(), ["a"], output=out).answered == 1


@pytest.mark.parametrize("before", [False, True])
def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path, before: bool) -> None:
    """In the middle, or where the output of an earlier run is put in order: one line names it.

    The disk is a real limit on a file's size: 1 KiB. With room the batch goes on where it was.
    """
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"text": str(n)}) + "\n" for n in range(9)), "utf-8")
    if before:
        failing = Echo(failures={"8": -200})
        batch(failing, source, output=out)
    kept = out.read_bytes() if before else b""
    words = [sys.executable, "-m", "qwen2vl_client", "batch", str(source), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "clients")}
    with stub.running(echo) as server:
        words += ["--url", server.url, "--model", "m"]
        limited = ["bash", "-c", 'ulimit -f 1; exec "$@"', "bash", *words]
        full = subprocess.run(limited, env=environment, capture_output=True, text=True, timeout=60)
        assert full.returncode == 1
        assert full.stderr.startswith(f"error: cannot write {out}: File too large; ")
        assert full.stderr.count("\n") == 1
        assert not (tmp_path / "out.jsonl.new").exists()
        assert out.read_bytes().startswith(kept)
        assert out.read_bytes().count(b"\n") >= 3
        report = batch(Echo(), source, output=out)
    assert report.resumed >= 3
    assert [line["text"] for line in lines_of(out)] == [f"answer to {n}" for n in range(9)]


def test_an_outcome_is_on_the_disk_before_the_next_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line is forced out, and is whole when it is."""
    forced: list[bytes] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        forced.append((tmp_path / "out.jsonl").read_bytes())
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    batch(Echo(), ["a", "b"], output=tmp_path / "out.jsonl", concurrency=1)
    assert [raw.count(b"\n") for raw in forced[:2]] == [1, 2]
    assert all(raw.endswith(b"\n") for raw in forced)


def test_a_client_whose_calls_are_awaited_is_refused() -> None:
    """``batch`` asks from threads: an ``AsyncClient`` is refused by name, before it is asked."""
    with pytest.raises(InvalidArgumentError, match="not an AsyncClient"):
        batch(AsyncClient("http://127.0.0.1:9"), ["a"])  # type: ignore[arg-type]


def test_what_a_hook_raises_ends_the_batch_and_doubles_nothing(tmp_path: Path) -> None:
    """The exception reaches the caller; what the hook was told of is in the file, once."""
    out = tmp_path / "out.jsonl"

    def broken(outcome: Outcome) -> None:
        if outcome.index == 0:
            raise KeyError(outcome.id)

    with pytest.raises(KeyError):
        batch(Echo(), ["a", "b"], output=out, on_outcome=broken, concurrency=1)
    assert [line["id"] for line in lines_of(out)] == ["0"]


@pytest.mark.parametrize("count", [6, 60])
def test_what_was_asked_is_kept_though_a_hook_raises_each_time(tmp_path: Path, count: int) -> None:
    """It is called no more; what it raised first is what ends the batch."""
    out, client = tmp_path / "out.jsonl", Echo(pause=0.01)
    told: list[str] = []

    def broken(outcome: Outcome) -> None:
        told.append(outcome.id)
        raise KeyError(outcome.id)

    with pytest.raises(KeyError) as caught:
        batch(client, [str(n) for n in range(count)], output=out, on_outcome=broken, concurrency=6)
    assert told == [caught.value.args[0]]
    assert len(lines_of(out)) == len(client.asked) >= 6


def test_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    """What the server is at work on is not waited for, nor asked again by this process."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": str(n)}) + "\n" for n in range(20)), "utf-8")
    words = [sys.executable, "-m", "qwen2vl_client", "batch", str(source), str(tmp_path / "o")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "clients")}
    with stub.running(stub.silent(600)) as server:
        process = subprocess.Popen(
            [*words, "--url", server.url, "--model", "m", "--concurrency", "4"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            eventually(lambda: len(server.requests) == 4)
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=30)
        finally:
            process.kill()
        assert (process.returncode, told) == (130, "error: interrupted\n")
        assert len(server.requests) == 4


def test_visual_tokens_are_summed(tmp_path: Path) -> None:
    """Over all pictures of all answers, as the server tells them; the tokens read, too."""
    media = [{"type": "image", "visual_tokens": 48}, {"type": "image", "visual_tokens": 16}]
    with stub.running(stub.completion("A.", media=media)) as server, Client(server.url) as client:
        report = batch(client, [ocr.task(b"\xff\xd8\xff\xe0"), ocr.task(b"\xff\xd8\xff\xe1")])
    assert report.visual_tokens == 128
    assert report.prompt_tokens == 60


def test_the_bar_tells_what_is_done_and_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    """Answers of all, failures and the rate are on standard error; standard output stays empty."""
    batch(Echo(failures={"b": -200}), ["a", "b", "c"], progress=True)
    shown = capsys.readouterr()
    assert "2/3" in shown.err
    assert "1 failed" in shown.err
    assert "/s" in shown.err
    assert shown.out == ""


def test_outcomes_are_told_as_they_come_and_survive_json() -> None:
    """``on_outcome`` gets what the report holds; written as a line and read again it is equal."""
    told: list[Outcome] = []
    report = batch(Echo(), ["a"], on_outcome=told.append)
    assert told == list(report.outcomes)
    assert Outcome.from_json(json.loads(json.dumps(told[0].to_json()))) == told[0]


@pytest.mark.parametrize(
    ("total", "told"), [(520, ("2.00/s", "0:00:05 left")), (None, ("2.00/s", ""))]
)
def test_rate_and_time_left_are_those_of_this_run(total: int | None, told: tuple[str, str]) -> None:
    """500 that an earlier run has answered took no time: 10 in 5 seconds leave 10, and 5 more."""
    pace = Pace(total, now=100.0)
    for kept in range(1, 501):
        assert pace.told(kept, 0, 0, now=100.0 + kept / 100) == ("", "")
    assert pace.told(500, 10, 0, now=110.0) == told


def test_what_failed_is_no_answer_and_is_not_left_either() -> None:
    """The rate is that of answers; the rest comes as fast as what was tried."""
    pace = Pace(40, now=0.0)
    assert pace.told(0, 5, 5, now=10.0) == ("0.50/s", "0:00:30 left")
    assert pace.told(0, 35, 5, now=40.0) == ("0.88/s", "0:00:00 left")


def test_the_bar_of_a_resumed_batch_shows_its_own_pace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that were answered before count as done, and none of them for the rate."""
    source, out = tmp_path / "in.csv", tmp_path / "out.jsonl"
    rows = [str(number) for number in range(60)]
    source.write_text("\n".join(["text", *rows[:57]]) + "\n")
    batch(Echo(), source, output=out)
    source.write_text("\n".join(["text", *rows]) + "\n")
    batch(Echo(pause=0.2), source, output=out, concurrency=1, progress=True)
    shown = capsys.readouterr().err
    assert "60/60" in shown
    assert "0:00:00 left" in shown
    assert 0 < float(re.findall(r"([0-9.]+)/s", shown)[-1]) < 5.1
