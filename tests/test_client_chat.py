"""The command ``chat``: turns, commands, Ctrl-C, and Chinese on a real terminal."""

from __future__ import annotations

import base64
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import qwen2vl_client
from PIL import Image

from tests import stub_server as stub
from tests.conftest import ServerProcess

CLIENTS = Path(qwen2vl_client.__file__).parents[1]


def environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("QWEN2VL_")}
    return {
        **kept,
        "PYTHONPATH": str(CLIENTS),
        "XDG_STATE_HOME": str(folder),
        "LC_ALL": "C.UTF-8",
        "TERM": "xterm",
    }


def command(url: str, *words: str) -> list[str]:
    return [sys.executable, "-m", "qwen2vl_client", "chat", "--url", url, "--model", "m", *words]


ON_TERMINAL = (
    "import fcntl, os, sys, termios\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
)
"""Makes the terminal the session's own, so that Ctrl-C there becomes a signal."""


def piped(url: str, text: str, folder: Path, *words: str) -> str:
    done = subprocess.run(
        command(url, *words),
        env=environment(folder),
        input=text.encode(),
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@contextmanager
def terminal(words: list[str], folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The command on a terminal of its own; its other end is the second value."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_TERMINAL, *words[1:]],
        env=environment(folder),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait(10)
        os.close(ours)


def seen(terminal: int, text: str, seconds: float = 60) -> str:
    """Read what is shown until ``text`` is there."""
    shown = b""
    deadline = time.monotonic() + seconds
    while text.encode() not in shown:
        assert time.monotonic() < deadline, shown.decode(errors="replace")
        if select.select([terminal], [], [], 1)[0]:
            try:
                shown += os.read(terminal, 4096)
            except OSError:  # how a terminal says that nobody is at its other end
                raise AssertionError(shown.decode(errors="replace")) from None
            if b"\x1b[6n" in shown:  # where is the cursor?
                os.write(terminal, b"\x1b[1;1R")
                shown = shown.replace(b"\x1b[6n", b"")
    return shown.decode(errors="replace")


def test_turns_and_pictures_through_a_pipe(tmp_path: Path) -> None:
    """Earlier turns are sent again; pictures belong to the next question alone."""
    picture = tmp_path / "with a blank.png"
    Image.new("RGB", (56, 56), "red").save(picture)
    with stub.running(
        stub.events(stub.whole_stream("一个", "红色的圆")), stub.events(stub.whole_stream("第二"))
    ) as server:
        typed = f'/image "{picture}"\n这是什么？\n再说一遍\n/quit\n不再问\n'
        shown = piped(server.url, typed, tmp_path)
    assert "一个红色的圆\n" in shown
    assert "第二\n" in shown
    chats = [one.body for one in server.requests if one.path.endswith("/chat/completions")]
    assert len(chats) == 2
    first = chats[0]["messages"][-1]["content"]
    assert [part["type"] for part in first] == ["image_url", "text"]
    roles = [message["role"] for message in chats[1]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert chats[1]["messages"][-2]["content"] == "一个红色的圆"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/help", "/image PATH|URL"),
        ("/nonsense", "there is no /nonsense"),
        ("/image missing.png", "there is no picture file 'missing.png'"),
        ("/image", "/image needs a path"),
        ("/save", "/save needs a path"),
        ("/load missing.json", "error: "),
        ("/clear", "(forgotten)"),
    ],
)
def test_commands_answer_and_the_chat_goes_on(line: str, told: str, tmp_path: Path) -> None:
    """What is unknown, lacks its path or names no file is told, and the next line is answered."""
    with stub.running(stub.events(stub.whole_stream("still here"))) as server:
        shown = piped(server.url, f"{line}\nHello\n", tmp_path)
    assert told in shown
    assert "still here\n" in shown


def test_what_is_no_picture_is_told_when_it_is_attached(tmp_path: Path) -> None:
    """It joins no question, and a picture that was attached before stays."""
    notes, good = tmp_path / "notes.txt", tmp_path / "a.png"
    notes.write_text("no picture")
    Image.new("RGB", (56, 56), "red").save(good)
    with stub.running(stub.events(stub.whole_stream("ok"))) as server:
        shown = piped(server.url, f"/image {good}\n/image {notes}\n/video {good}\nQ\n", tmp_path)
    assert "of no known kind" in shown
    assert "not a video" in shown
    (chat,) = [one.body for one in server.requests if one.path.endswith("/chat/completions")]
    content = chat["messages"][-1]["content"]
    assert [part["type"] for part in content] == ["image_url", "text"]


@pytest.mark.parametrize("status", [400, 403, 404, 413, 415, 422])
def test_a_picture_that_is_refused_is_not_sent_again(status: int, tmp_path: Path) -> None:
    """Else every further question would end as that one; what may pass keeps it."""
    good = tmp_path / "a.png"
    Image.new("RGB", (56, 56), "red").save(good)
    script = [stub.failure(401), stub.failure(status), stub.events(stub.whole_stream("ok"))]
    with stub.running(*script) as server:
        shown = piped(server.url, f"/image {good}\none\ntwo\nthree\n", tmp_path)
    assert shown.count("(what was attached is not sent again)") == 1
    chats = [one.body for one in server.requests if one.path.endswith("/chat/completions")]
    asked = [chat["messages"][-1]["content"] for chat in chats]
    assert [isinstance(content, list) for content in asked] == [True, True, False]


def test_a_failure_is_told_and_the_turn_is_not_kept(tmp_path: Path) -> None:
    """Its status and code are shown, and the next question is sent without the one that failed."""
    with stub.running(
        stub.failure(400, "invalid_value"), stub.events(stub.whole_stream("ok"))
    ) as server:
        shown = piped(server.url, "one\ntwo\n", tmp_path)
    assert "error: HTTP 400 invalid_value" in shown
    last = [one.body for one in server.requests if one.path.endswith("/chat/completions")][-1]
    assert [message["content"] for message in last["messages"][1:]] == ["two"]


def test_a_conversation_is_saved_and_gone_on_with(tmp_path: Path) -> None:
    """Also by ``--load``; the file is JSON."""
    saved = tmp_path / "talk.json"
    answers = [stub.events(stub.whole_stream(text)) for text in ("one", "two")]
    with stub.running(*answers) as server:
        assert "(saved to" in piped(server.url, f"Hello\n/save {saved}\n", tmp_path)
        json.loads(saved.read_text("utf-8"))
        piped(server.url, "And?\n", tmp_path, "--load", str(saved))
    last = [one.body for one in server.requests if one.path.endswith("/chat/completions")][-1]
    assert [message["content"] for message in last["messages"][1:]] == ["Hello", "one", "And?"]


def test_what_is_given_goes_before_what_was_saved(tmp_path: Path) -> None:
    """Each option by itself; what is not given stays as it was saved, in the next file too."""
    saved, again = tmp_path / "talk.json", tmp_path / "again.json"
    begun = ["--temperature", "0.5", "--top-p", "0.6", "--seed", "3", "--system", "Old"]
    given = ["--temperature", "0", "--max-tokens", "7", "--system", "新的", "--overflow", "error"]
    with stub.running(stub.events(stub.whole_stream("ok"))) as server:
        piped(server.url, f"Hello\n/save {saved}\n", tmp_path, *begun)
        piped(server.url, "And?\n", tmp_path, "--load", str(saved))
        piped(server.url, f"And?\n/save {again}\n", tmp_path, "--load", str(saved), *given)
        piped(server.url, f"/load {saved}\nAnd?\n", tmp_path, "--temperature", "0")
    chats = [one.body for one in server.requests if one.path.endswith("/chat/completions")]
    names = ("temperature", "max_tokens", "top_p", "seed")
    told = [(chat["messages"][0]["content"], *(chat[name] for name in names)) for chat in chats]
    assert told == [
        ("Old", 0.5, 1024, 0.6, 3),
        ("Old", 0.5, 1024, 0.6, 3),
        ("新的", 0, 7, 0.6, 3),
        ("Old", 0, 1024, 0.6, 3),
    ]
    settings = [json.loads(file.read_text("utf-8"))["settings"] for file in (saved, again)]
    assert [one["overflow"] for one in settings] == ["drop_oldest_images", "error"]


def test_a_video_belongs_to_the_next_question(tmp_path: Path) -> None:
    """It is sent inline before the question, in that turn and again in the history of the next."""
    film = b"\x00\x00\x00\x18ftypmp42 not looked into by the client"
    (tmp_path / "a film.mp4").write_bytes(film)
    with stub.running(
        stub.events(stub.whole_stream("A film.")), stub.events(stub.whole_stream("Yes."))
    ) as server:
        typed = f"/video {tmp_path}/a film.mp4\nWhat happens?\nReally?\n"
        shown = piped(server.url, typed, tmp_path)
    assert "(video 1 for the next question: " in shown
    assert "A film.\n" in shown
    first, second = [one.body for one in server.requests if one.path.endswith("/completions")]
    video, question = first["messages"][-1]["content"]
    kind, _, data = video["video_url"]["url"].partition(";base64,")
    assert (kind, base64.b64decode(data)) == ("data:video/mp4", film)
    assert question == {"type": "text", "text": "What happens?"}
    assert second["messages"][1] == first["messages"][-1]
    assert second["messages"][-1]["content"] == "Really?"


def test_ctrl_c_stops_an_answer_and_keeps_the_session(tmp_path: Path) -> None:
    """On a terminal: Chinese is typed and shown, Ctrl-C stops, the next question is answered."""
    with (
        stub.running(stub.endless_events, stub.events(stub.whole_stream("好的"))) as server,
        terminal(command(server.url), tmp_path) as (process, line),
    ):
        seen(line, ">")
        os.write(line, "你好\r".encode())
        seen(line, "word ")
        os.write(line, b"\x03")
        seen(line, "(stopped")
        assert server.client_left.wait(60)
        seen(line, ">")
        os.write(line, "再来\r".encode())
        seen(line, "好的")
        seen(line, ">")
        os.write(line, b"\x04")
        assert process.wait(60) == 0
    last = [one.body for one in server.requests if one.path.endswith("/chat/completions")][-1]
    assert [message["content"] for message in last["messages"][1:]] == ["再来"]
    history = tmp_path / "qwen2vl-serve" / "chat_history"
    assert "你好" in history.read_text("utf-8")
    assert history.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("plain", [False, True])
def test_half_a_character_ends_no_session(tmp_path: Path, plain: bool) -> None:
    """Of Chinese that was cut, or of another encoding: a question mark, as ``ask`` has it.

    With prompt_toolkit, whose history is UTF-8, and without it, in a locale of strict UTF-8.
    """
    with stub.running(stub.events(stub.whole_stream("好的"))) as server:
        words = command(server.url)
        if plain:
            code = (
                "import sys; sys.modules['prompt_toolkit'] = None; "
                "sys.stdin.reconfigure(errors='strict'); from qwen2vl_client.cli import main; "
                "sys.exit(main(sys.argv[1:]))"
            )
            words = [sys.executable, "-c", code, *words[3:]]
        with terminal(words, tmp_path) as (process, line):
            seen(line, ">")
            os.write(line, b"\xe4\xbd\r")
            shown = seen(line, "好的")
            seen(line, ">")
            os.write(line, "你好\r".encode())
            shown += seen(line, "好的")
            assert "ENTER" not in shown
            seen(line, ">")
            os.write(line, b"\x04")
            assert process.wait(60) == 0
    bodies = [one.body for one in server.requests if one.path.endswith("/chat/completions")]
    first, second = (body["messages"][-1]["content"] for body in bodies)
    assert set(first) == {"?"}
    assert second == "你好"


def test_the_real_model_is_talked_with(
    server: ServerProcess, pictures: Path, tmp_path: Path
) -> None:
    """A picture, a question about it, and what the conversation takes of the window."""
    words = [sys.executable, "-m", "qwen2vl_client", "chat", "--url", server.url]
    done = subprocess.run(
        [*words, "--temperature", "0"],
        env=environment(tmp_path),
        input=f"/image {pictures / 'red_circle.jpg'}\nWhat colour is the circle?\n/tokens\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "red" in done.stdout.lower()
    assert "4096" in done.stdout
