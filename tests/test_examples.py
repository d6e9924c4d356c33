"""Every example runs as a user starts it, and asks the real server."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import stub_server as stub
from tests.conftest import ServerProcess
from tests.ports import quiet_port

CLIENTS = Path(__file__).parents[1] / "clients"
EXAMPLES = CLIENTS / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "arguments.py")
TUTORIAL = {
    "text.py",
    "image_url.py",
    "local_image.py",
    "several_images.py",
    "multi_turn.py",
    "streaming.py",
    "openai_client.py",
}
AGENTS = {"tools.py"}
SAID = {
    "text.py": "demo model",
    "image_url.py": "circle is red",
    "local_image.py": "red circle",
    "several_images.py": "blue square",
    "multi_turn.py": r"circle(.|\n)*red",
    "streaming.py": r"blue square.*green triangle",
    "openai_client.py": "red circle",
    "tools.py": r"[^\W\d_]{2,}",
}
"""What each says of its own pictures, at the tutorial's temperature; tools.py any word."""
TOTAL_TIME = re.compile(r"\ntotal time: \d+\.\d\d s\n$")


def run_example(
    name: str, *words: str, url: str, api_key: str | None = None
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("QWEN2VL_")}
    key = {"QWEN2VL_API_KEY": api_key} if api_key else {}
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--url", url, *words],
        env={**kept, **key, "PYTHONPATH": str(CLIENTS)},
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
        cwd="/",
    )


def test_there_is_one_example_for_each_call_of_the_tutorial() -> None:
    """Seven of them, and ``tools.py`` for agents; no other example lies in the folder."""
    assert set(SCRIPTS) == TUTORIAL | AGENTS


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "image_url.py"])
def test_it_answers_on_the_real_server(name: str, server: ServerProcess) -> None:
    """Without arguments but the address: exit 0, what is to be seen, the total time."""
    check_answer(name, run_example(name, url=server.url, api_key=server.api_key))


def test_an_address_answers_on_a_real_server_that_may_fetch_it(
    fetching_server: tuple[ServerProcess, int],
) -> None:
    """With the two settings that the example's help names."""
    server, port = fetching_server
    own_port = ["--port", str(port)]
    done = run_example("image_url.py", *own_port, url=server.url, api_key=server.api_key)
    check_answer("image_url.py", done)


def test_a_private_address_is_refused_with_advice(server: ServerProcess) -> None:
    """A server as it comes fetches from public addresses only."""
    done = run_example(
        "image_url.py", "--port", str(quiet_port()), url=server.url, api_key=server.api_key
    )
    assert done.returncode == 1
    assert "invalid_image_url" in done.stderr
    assert "--image-url" in done.stderr
    assert "Traceback" not in done.stderr


def check_answer(name: str, done: subprocess.CompletedProcess[str]) -> None:
    """What ``SAID`` has of it, then the total time."""
    assert done.returncode == 0, done.stderr
    assert TOTAL_TIME.search(done.stdout), done.stdout
    said = TOTAL_TIME.sub("", done.stdout)
    assert re.search(SAID[name], said), done.stdout


@pytest.mark.parametrize(
    ("name", "script", "asked"),
    [
        ("text.py", [stub.completion("I am a stub.")], [[]]),
        ("image_url.py", [stub.completion("Red.")], [["http"]]),
        ("local_image.py", [stub.completion("A circle.")], [["jpeg"]]),
        ("several_images.py", [stub.completion("A square.")], [["jpeg", "png"]]),
        (
            "multi_turn.py",
            [stub.completion("A circle."), stub.completion("Red.")],
            [["jpeg"], ["jpeg"]],
        ),
        ("streaming.py", [stub.events(stub.whole_stream("A ", "square."))], [["png"]]),
        ("openai_client.py", [stub.completion("A circle.")], [["jpeg"]]),
    ],
)
def test_it_sends_what_it_shows(name: str, script: list[stub.Step], asked: list[list[str]]) -> None:
    """The request holds the tutorial's fields, the model named, the pictures by their own type."""
    own_port = ["--port", str(quiet_port())] if name == "image_url.py" else []
    with stub.running(*script) as server:
        done = run_example(name, *own_port, "--model", "adapter-a", url=server.url)
    assert done.returncode == 0, done.stderr
    posted = [request.body for request in server.requests if request.body]
    assert posted
    for body in posted:
        assert body["model"] == "adapter-a"
        assert body["messages"][0]["role"] == "system"
        assert body["messages"][0]["content"].startswith("You are Qwen, created by Alibaba")
        sampling = [body[key] for key in ("temperature", "top_p", "repetition_penalty")]
        assert sampling == [0.7, 0.8, 1.05]
        assert body["max_tokens"] == 1024
    sent = [
        [
            re.split("[:;/]", part["image_url"]["url"])[2 if "data:" in str(part) else 0]
            for turn in body["messages"]
            if isinstance(turn["content"], list)
            for part in turn["content"]
            if part["type"] == "image_url"
        ]
        for body in posted
    ]
    assert sent == asked
    if name == "multi_turn.py":
        assert posted[1]["messages"][2] == {"role": "assistant", "content": "A circle."}


def test_pictures_of_one_s_own_can_be_named(tmp_path: Path) -> None:
    """A path takes the place of the example's own picture and is sent as the PNG that it is."""
    picture = tmp_path / "own.png"
    Image.new("RGB", (30, 30), "green").save(picture)
    with stub.running(stub.completion("Green.")) as server:
        done = run_example("local_image.py", str(picture), url=server.url)
    assert done.returncode == 0, done.stderr
    sent = server.requests[-1].body["messages"][1]["content"][0]["image_url"]["url"]
    assert sent.startswith("data:image/png;base64,")


def test_a_public_address_is_sent_as_it_is() -> None:
    """``--image-url`` reaches the server word for word: the client does not fetch it."""
    with stub.running(stub.completion("Red.")) as server:
        done = run_example("image_url.py", "--image-url", "https://h/a.jpg", url=server.url)
    assert done.returncode == 0, done.stderr
    sent = server.requests[-1].body["messages"][1]["content"][0]["image_url"]["url"]
    assert sent == "https://h/a.jpg"


def test_the_pictures_are_small_and_what_their_names_say() -> None:
    """Three of less than 20 kB each, with these figures in these colours and no others."""
    pictures = sorted((EXAMPLES / "pictures").iterdir())
    assert [path.name for path in pictures] == [
        "blue_square.png",
        "red_circle.jpg",
        "square_and_triangle.png",
    ]
    for path in pictures:
        assert path.stat().st_size < 20_000
    square, circle, triangle = 1, math.pi / 4, 1 / 2
    red, green, blue = (220, 40, 40), (40, 150, 70), (40, 80, 210)
    figures = [[filled(path, colour) for colour in (red, green, blue)] for path in pictures]
    assert figures[0] == pytest.approx([0, 0, square], abs=0.03)
    assert figures[1] == pytest.approx([circle, 0, 0], abs=0.03)
    assert figures[2] == pytest.approx([0, triangle, square], abs=0.03)


def filled(path: Path, colour: tuple[int, int, int]) -> float:
    """The share of its bounding box that the figure of this colour fills; 0 where there is none."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    rows, columns = np.nonzero((abs(pixels - colour) < 40).all(axis=2))
    if not len(rows):
        return 0
    return len(rows) / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1))
