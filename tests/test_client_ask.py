"""The command ``ask``: what it prints where, and its exit status."""

from __future__ import annotations

import base64
import io
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import qwen2vl_client
from qwen2vl_client.cli.ask import main

from tests import stub_server as stub

CLIENTS = Path(qwen2vl_client.__file__).parents[1]
JPEG = b"\xff\xd8\xff\xe0 not decoded by the client"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QWEN2VL_BASE_URL", "QWEN2VL_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "qwen2vl_client", *words]


def environment(**more: str) -> dict[str, str]:
    """This process's own, without what would name a server or hide that a flush is missing."""
    hidden = ("QWEN2VL_", "PYTHONUNBUFFERED")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return {**kept, "PYTHONPATH": str(CLIENTS), **more}


def test_the_answer_goes_to_stdout_and_the_time_to_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """So a pipe gets the text alone; it is streamed, with the tutorials' settings and no seed."""
    with stub.running(stub.events(stub.whole_stream("一个", "红色的圆"))) as server:
        assert main(["--url", server.url, "What is it?"]) == 0
    out, err = capsys.readouterr()
    assert out == "一个红色的圆\n"
    assert re.fullmatch(r"total time: \d+\.\d\d s\n", err)
    body = server.requests[-1].body
    assert (body["stream"], body["max_tokens"], body["temperature"]) == (True, 1024, 0.7)
    assert "seed" not in body


def test_options_reach_the_request(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Each is a field or a header; pictures come first, then the video, then the question."""
    first, second = tmp_path / "a.jpg", tmp_path / "b.jpg"
    first.write_bytes(JPEG + b" first")
    second.write_bytes(JPEG + b" second")
    words = ["--model", "m", "--api-key", "sk-1", "--system", "S", "--max-tokens", "5"]
    words += ["--temperature", "0", "--top-p", "0.5", "--seed", "3", "--no-stream"]
    words += ["--image", str(first), "--image", str(second), "--video", "http://h/v.mp4"]
    with stub.running(stub.completion("whole")) as server:
        assert main(["--url", server.url, *words, "Q"]) == 0
    assert capsys.readouterr().out == "whole\n"
    (request,) = server.requests
    assert request.headers["authorization"] == "Bearer sk-1"
    body = request.body
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 5, 0)
    assert (body["top_p"], body["seed"]) == (0.5, 3)
    assert "stream" not in body
    assert body["messages"][0]["content"] == "S"
    *images, video, text = body["messages"][1]["content"]
    sent = [base64.b64decode(part["image_url"]["url"].partition(",")[2]) for part in images]
    assert sent == [JPEG + b" first", JPEG + b" second"]
    assert video == {"type": "video_url", "video_url": {"url": "http://h/v.mp4"}}
    assert text == {"type": "text", "text": "Q"}


def test_a_server_that_is_not_there_is_one_line_with_advice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Status 1, nothing on standard output; the line says how to start a server or name one."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    assert main(["--url", f"http://127.0.0.1:{port}", "Q"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"error: cannot reach http://127.0.0.1:{port}/v1: Connection refused. Start a server "
        "with: serve --profile demo (or name a running one with --url)\n"
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--image", "missing.jpg", "Q"], "no picture file 'missing.jpg'"),
        (["--url", "nonsense", "Q"], "base_url='nonsense'"),
        (["--timeout", "0", "Q"], "timeout=0"),
        (["--max-tokens", "many", "Q"], "--max-tokens"),
        ([], "QUESTION"),
        (["-", "Q"], "nothing came there"),
        (["--unknown", "Q"], "--unknown"),
    ],
)
def test_arguments_that_cannot_be_used_are_status_2(
    words: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Standard error names what is at fault, be it a file, an address, a number or an option."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert main(words) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("words", [["a.jpg"], ["-"], ["a.jpg", "http://h/b.png"]])
def test_a_picture_is_not_taken_for_the_question(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its name alone would be asked, and a model makes something of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jpg").write_bytes(JPEG)
    assert main(["--url", "http://127.0.0.1:9", *words]) == 2
    assert f"the question is missing: {words[-1]} is a picture" in capsys.readouterr().err


def test_an_address_within_a_question_makes_it_no_picture() -> None:
    """Nor does a text longer than any file's name; each is asked and ends with 0."""
    with stub.running(stub.events(stub.whole_stream("ok"))) as server:
        for question in ("What is https://example.org ?", "什么是https://example.org", "x" * 5000):
            assert main(["--url", server.url, question]) == 0


@pytest.mark.parametrize("no_stream", [True, False])
def test_an_answer_that_was_cut_is_told(
    no_stream: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is printed with status 0; standard error names ``--max-tokens``, streamed or not."""
    message = {"role": "assistant", "content": "half"}
    whole = stub.completion(choices=[{"index": 0, "message": message, "finish_reason": "length"}])
    pieces = [stub.chunk("half"), stub.chunk(finish="length"), stub.DONE]
    words = ["--no-stream"] if no_stream else []
    with stub.running(whole if no_stream else stub.events(pieces)) as server:
        assert main(["--url", server.url, "--model", "m", *words, "Q"]) == 0
    out, err = capsys.readouterr()
    assert out == "half\n"
    assert err.startswith("the answer was cut at its limit of tokens; --max-tokens raises it\n")


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    """``--help`` prints to standard output and ends with 0, without a server or a question."""
    assert main(["--help"]) == 0
    options = set(re.findall(r"--[a-z]+(?:-[a-z]+)*", capsys.readouterr().out))
    assert options == {
        "--help", "--url", "--api-key", "--model", "--timeout", "--verify", "--image", "--video",
        "--system", "--max-tokens", "--temperature", "--top-p", "--seed", "--no-stream",
    }  # fmt: skip


@pytest.mark.parametrize("no_stream", [True, False])
def test_a_refusal_of_the_server_is_one_line(
    no_stream: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 1; a 401 comes with its code, its request id and how to give the key."""
    words = ["--no-stream"] if no_stream else []
    with stub.running(stub.failure(401, "invalid_api_key")) as server:
        assert main(["--url", server.url, "--model", "m", *words, "Q"]) == 1
    assert capsys.readouterr().err == (
        "error: HTTP 401 invalid_api_key: it failed (request id req-7). Give the key with "
        "QWEN2VL_API_KEY or --api-key\n"
    )


def test_an_error_in_mid_stream_starts_on_its_own_line(capsys: pytest.CaptureFixture[str]) -> None:
    """What had come stays, ended by a newline; status 1 and one line on standard error."""
    with stub.running(stub.events([stub.chunk("half")], ends=False)) as server:
        assert main(["--url", server.url, "Q"]) == 1
    out, err = capsys.readouterr()
    assert out == "half\n"
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_pictures_may_stand_before_the_question(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """``ask a.jpg b.jpg "Compare them"``: in the order of the command line."""
    paths = [tmp_path / "a.jpg", tmp_path / "b.png"]
    for path, data in zip(paths, (JPEG, b"\x89PNG\r\n\x1a\n..."), strict=True):
        path.write_bytes(data)
    with stub.running(stub.events(stub.whole_stream("ok"))) as server:
        assert main(["--url", server.url, *map(str, paths), "Q"]) == 0
    first, second, text = server.requests[-1].body["messages"][1]["content"]
    assert first["image_url"]["url"].startswith("data:image/jpeg;")
    assert second["image_url"]["url"].startswith("data:image/png;")
    assert text == {"type": "text", "text": "Q"}


def test_a_picture_may_come_through_a_pipe() -> None:
    """``cat a.jpg | … ask - "…"``; Chinese survives a locale that knows only ASCII."""
    with stub.running(stub.events(stub.whole_stream("ok"))) as server:
        done = subprocess.run(
            command("--url", server.url, "-", "这是什么？"),
            env=environment(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0"),
            input=JPEG,
            capture_output=True,
            check=False,
        )
    assert (done.returncode, done.stdout) == (0, b"ok\n")
    picture, text = server.requests[-1].body["messages"][1]["content"]
    assert base64.b64decode(picture["image_url"]["url"].partition(",")[2]) == JPEG
    assert text["text"] == "这是什么？"


def test_the_environment_names_the_server() -> None:
    """``QWEN2VL_BASE_URL`` and ``QWEN2VL_API_KEY`` stand in for ``--url`` and ``--api-key``."""
    with stub.running(stub.events(stub.whole_stream("ok"))) as server:
        done = subprocess.run(
            command("Q"),
            env=environment(QWEN2VL_BASE_URL=server.url, QWEN2VL_API_KEY="sk-e"),
            capture_output=True,
            check=False,
            text=True,
        )
    assert (done.returncode, done.stdout) == (0, "ok\n")
    assert server.requests[-1].headers["authorization"] == "Bearer sk-e"


def test_a_terminal_without_chinese_does_not_end_it() -> None:
    """A character that its encoding lacks is a question mark, the rest as it was, status 0."""
    with stub.running(stub.events(stub.whole_stream("红 red"))) as server:
        done = subprocess.run(
            command("--url", server.url, "Q"),
            env=environment(PYTHONIOENCODING="ascii"),
            capture_output=True,
            check=False,
        )
    assert (done.returncode, done.stdout) == (0, b"? red\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams_end_no_command(closed: str) -> None:
    """Of a process that was started without them: it does its work, and nobody is told."""
    with stub.running(stub.events(stub.whole_stream("ok"))) as server:
        for name, word in (("ask", "Q"), ("chat", "")):
            words = [sys.executable, "-m", "qwen2vl_client", name, "--url", server.url, word]
            line = f"echo Q | {shlex.join(filter(None, words))} {closed}"
            done = subprocess.run(
                ["bash", "-c", line], env=environment(), capture_output=True, text=True, check=False
            )
            assert done.returncode == 0
            assert "Traceback" not in done.stderr
            assert done.stdout == (
                "" if closed == ">&-" or (name, closed) == ("chat", "<&-") else "ok\n"
            )


def test_interrupting_stops_the_generation() -> None:
    """Ctrl-C ends with status 130 and one line; the server sees the client leave."""
    with (
        stub.running(stub.endless_events) as server,
        subprocess.Popen(
            command("--url", server.url, "Q"),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.read(5) == "word "
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert server.client_left.wait(60)
    assert process.returncode == 130
    assert err == "error: interrupted\n"


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    """``ask … | head -c 4``: no traceback, and the generation stops."""
    with (
        stub.running(stub.endless_events) as server,
        subprocess.Popen(
            command("--url", server.url, "Q"),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(4)
        process.stdout.close()
        assert process.wait(60) == 1
        assert process.stderr.read() == ""
        assert server.client_left.wait(60)


def test_a_reader_of_the_help_that_leaves_ends_it_quietly() -> None:
    """``ask --help | true``: status 1 and no complaint of Python's."""
    line = f"{shlex.join(command('--help'))} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.returncode == 1


def test_text_is_printed_as_it_arrives() -> None:
    """The first word is out while the server holds back the rest; a cut end is status 1."""
    with (
        stub.running(stub.stalled_events) as server,
        subprocess.Popen(
            command("--url", server.url, "--timeout", "60", "Q"),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        started = time.monotonic()
        assert process.stdout.read(4) == "word"
        assert time.monotonic() - started < 50
        server.proceed.set()
        assert process.wait(60) == 1
