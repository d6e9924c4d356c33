"""The client against the real engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from qwen2vl_client import BadRequestError, Client, Conversation, NotFoundError
from qwen2vl_client.cli.ask import main
from qwen2vl_client.media import ImageSource

from tests.conftest import ServerProcess


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.url, server.api_key) as client:
        yield client


def test_the_first_model_is_asked_where_none_is_named(client: Client) -> None:
    """The answer and ``client.model`` name the first of the list, whose window is 2048 or more."""
    model = client.models()[0]
    answer = client.chat("Hello", max_tokens=4)
    assert answer.model == model.id == client.model
    assert model.max_model_len is not None
    assert model.max_model_len >= 2048


def test_path_bytes_and_pillow_are_the_same_picture(client: Client, pictures: Path) -> None:
    """Greedy answers and token counts are equal, so the pixels were."""
    path = pictures / "square_and_triangle.png"
    sources: list[ImageSource] = [
        path,
        str(path),
        path.read_bytes(),
        path.open("rb"),
        Image.open(path),
    ]
    answers = [
        client.chat("Describe the picture.", images=source, temperature=0, max_tokens=32)
        for source in sources
    ]
    assert len({(answer.text, answer.usage) for answer in answers}) == 1
    without = client.chat("Describe the picture.", temperature=0, max_tokens=32)
    assert answers[0].usage is not None
    assert without.usage is not None
    assert answers[0].usage.prompt_tokens >= without.usage.prompt_tokens + 4


def test_a_stream_is_the_whole_answer_in_pieces(client: Client, pictures: Path) -> None:
    """At temperature 0 its text, usage and finish reason are those of ``chat``."""
    picture = pictures / "red_circle.jpg"
    whole = client.chat("Describe it.", images=picture, temperature=0, max_tokens=32)
    stream = client.stream("Describe it.", images=picture, temperature=0, max_tokens=32)
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == stream.answer.text == whole.text
    assert stream.answer.usage == whole.usage
    assert stream.answer.finish_reason == whole.finish_reason
    assert stream.answer.request_id


def test_a_conversation_sends_its_pictures_again(client: Client, pictures: Path) -> None:
    """The model sees the picture with each question; the system message stays one, in front."""
    conversation = Conversation(client, temperature=0, max_tokens=16)
    first = conversation.ask("What colour is it?", images=pictures / "red_circle.jpg")
    second = conversation.ask("What shape is it?")
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    assert len(first.media) == len(second.media) == 1
    assert second.media[0].visual_tokens == first.media[0].visual_tokens
    roles = [turn["role"] for turn in conversation.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]


@pytest.mark.parametrize(
    ("call", "kind", "code", "param"),
    [
        ({"model": "nope"}, NotFoundError, "model_not_found", "model"),
        ({"temperature": 9}, BadRequestError, "invalid_value", "temperature"),
        ({"images": b"\xff\xd8\xffbroken"}, BadRequestError, "invalid_image", "messages"),
        ({"images": "https://"}, BadRequestError, "invalid_image_url", "messages"),
    ],
)
def test_the_server_s_refusals_are_typed(
    client: Client, call: dict[str, object], kind: type[BadRequestError], code: str, param: str
) -> None:
    """404 and 400 raise their own classes, with the server's code, parameter and request id."""
    with pytest.raises(kind) as caught:
        client.chat("What is it?", **call)  # type: ignore[arg-type]
    error = caught.value
    assert (error.code, error.type) == (code, "invalid_request_error")
    assert error.param is not None
    assert error.param.startswith(param)
    assert error.request_id


def test_closing_a_stream_stops_the_generation(client: Client, server: ServerProcess) -> None:
    """The engine makes only a part of the tokens asked for, and takes the next question."""
    before = server.metric("vllm:generation_tokens_total")
    with client.stream("Describe it.", min_tokens=3500, max_tokens=3500) as stream:
        next(iter(stream))
    deadline = time.monotonic() + 60
    made = 0.0
    # The engine reports after its steps: first that it began, then that nothing runs any more.
    while not made or server.metric("vllm:num_requests_running"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
        made = server.metric("vllm:generation_tokens_total") - before
    assert made < 3500  # not to the end
    assert client.chat("Hello", max_tokens=4).finish_reason is not None


@pytest.mark.parametrize("words", [[], ["--no-stream"]])
def test_the_command_line_asks_about_a_picture(
    words: list[str],
    server: ServerProcess,
    pictures: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Streamed or whole, the answer is on standard output, the total time on standard error."""
    picture = str(pictures / "red_circle.jpg")
    question = "What colour is the circle?"
    assert main(["--url", server.url, "--image", picture, "--seed", "1", *words, question]) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert err.startswith("total time: ")
