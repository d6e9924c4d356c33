"""The HTTP application over real sockets, with a scripted engine behind it."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai
import pytest
import requests
import uvicorn
from PIL import Image
from qwen2vl_client.checks import server_timings

from qwen2vl_serve.app import build_app
from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.errors import EngineUnavailable, InvalidImage, Overloaded
from qwen2vl_serve.launch.resources import media_loader
from qwen2vl_serve.profile import Profile, load_profile
from tests.fake_engine import FakeEngine
from tests.media.movies import data_url, movie
from tests.served import eventually

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}


@dataclass
class Running:
    root: str
    port: int
    engine: FakeEngine
    app: Any

    def chat(self, body: Any = None, **options: Any) -> requests.Response:
        return requests.post(
            f"{self.root}/v1/chat/completions", json=body or HELLO, timeout=60, **options
        )

    def metrics(self) -> str:
        return requests.get(f"{self.root}/metrics", timeout=60).text


@contextmanager
def running(
    engine: FakeEngine | None = None,
    keys: tuple[str, ...] = (),
    profile: Profile | None = None,
    wrapped: Callable[[Any], Any] = lambda app: app,
) -> Iterator[Running]:
    engine = engine or FakeEngine()
    profile = profile or load_profile("demo")
    loader = media_loader(profile)
    app = build_app(engine, loader, profile, Keys(keys))
    try:
        with served(app, engine, wrapped) as one:
            yield one
    finally:
        if loader.sources.files is not None:  # the launcher closes all of the loader, on its loop
            loader.sources.files.close()


@contextmanager
def served(
    app: Any, engine: FakeEngine, wrapped: Callable[[Any], Any] = lambda app: app
) -> Iterator[Running]:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    http = uvicorn.Server(uvicorn.Config(wrapped(app), log_config=None, lifespan="off"))
    thread = threading.Thread(target=http.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield Running(f"http://127.0.0.1:{port}", port, engine, app)
    finally:
        http.should_exit = True
        thread.join(10)
        listener.close()


@pytest.fixture(scope="module")
def api() -> Iterator[Running]:
    with running() as one:
        yield one


def error_of(answer: requests.Response) -> dict[str, Any]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] is None or isinstance(error["code"], str)
    return dict(error)


def test_a_chat_is_answered_whole(api: Running) -> None:
    """Without ``stream`` the engine's answer comes back as one JSON object."""
    answer = api.chat()
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["choices"][0]["message"]["content"] == "A red circle."


def test_a_stream_ends_with_done(api: Running) -> None:
    """A stream holds one event a chunk and closes with ``[DONE]``."""
    answer = api.chat({**HELLO, "stream": True})
    events = answer.text.split("\n\n")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert events[-2:] == ["data: [DONE]", ""]
    texts = [json.loads(e.removeprefix("data: "))["choices"][0]["delta"] for e in events[:-2]]
    assert [text["content"] for text in texts] == ["A ", "red ", "circle."]


def test_the_openai_client_understands_answers_streams_and_errors(api: Running) -> None:
    """The official package reads whole answers, streams, the model list and our errors."""
    client = openai.OpenAI(base_url=f"{api.root}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["demo", "alias"]
    assert client.models.retrieve("demo").id == "demo"
    whole = client.chat.completions.create(model="demo", messages=HELLO["messages"])
    assert whole.choices[0].message.content == "A red circle."
    stream = client.chat.completions.create(model="demo", messages=HELLO["messages"], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "A red circle."
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=HELLO["messages"])
    assert caught.value.code == "model_not_found"
    assert "'demo', 'alias'" in str(caught.value)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("PUT", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("GET", "/v1/models/", 404, "not_found"),
        ("POST", "/v1/chat/completions/", 404, "not_found"),
        ("POST", "/invocations", 404, "not_found"),
        ("POST", "/tokenize", 404, "not_found"),
    ],
)
def test_what_is_not_there_is_told_in_openais_shape(
    api: Running, method: str, path: str, status: int, code: str
) -> None:
    """Unknown paths, wrong methods and vLLM's other routes get a typed error with an id."""
    answer = requests.request(method, api.root + path, timeout=60)
    assert answer.status_code == status
    assert error_of(answer)["code"] == code
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("path", "taken"),
    [("/v1/chat/completions", "POST"), ("/v1/files", "GET, POST"), ("/v1/files/x", "DELETE, GET")],
)
def test_a_method_that_is_not_taken_is_told_with_those_that_are(
    api: Running, path: str, taken: str
) -> None:
    """All of them, though each is a route of its own (RFC 9110, 15.5.6)."""
    answer = requests.put(api.root + path, timeout=60)
    assert answer.headers["allow"] == taken
    assert error_of(answer)["message"].endswith(f"does not take PUT; it takes {taken}.")


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_only_json_is_read(api: Running, kind: str | None) -> None:
    """A body that is not declared as JSON is refused with 415."""
    headers = {"content-type": kind} if kind else {}
    url = f"{api.root}/v1/chat/completions"
    answer = requests.post(url, data=json.dumps(HELLO), headers=headers, timeout=60)
    assert (answer.status_code, error_of(answer)["code"]) == (415, "unsupported_content_type")


def test_a_compressed_body_is_refused(api: Running) -> None:
    """A gzip body could unpack to anything; it is not read."""
    answer = api.chat(headers={"content-encoding": "gzip"})
    assert (answer.status_code, error_of(answer)["code"]) == (415, "unsupported_content_type")


@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "chunked"])
def test_a_body_over_the_cap_is_cut(chunked: bool) -> None:
    """Over ``limits.max_body_bytes`` a body is refused, by its declared or its counted length."""
    profile = load_profile("demo", ["limits.max_body_bytes=1000"])
    text = json.dumps({"messages": [{"role": "user", "content": "x" * 2000}]}).encode()
    pieces = (text[start : start + 100] for start in range(0, len(text), 100))
    with running(profile=profile) as api:
        url = f"{api.root}/v1/chat/completions"
        headers = {"content-type": "application/json"}
        answer = requests.post(url, data=pieces if chunked else text, headers=headers, timeout=60)
        error = error_of(answer)
        assert (answer.status_code, error["code"]) == (413, "request_too_large")
        assert "1000" in error["message"]
        assert api.chat().status_code == 200


def test_a_request_id_goes_out_as_it_came_in(api: Running) -> None:
    """A client's id is echoed; without one, or with an unfit one, the server makes its own."""
    assert api.chat(headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = api.chat().headers["x-request-id"]
    assert len(made) == 32
    unfit = api.chat(headers={"x-request-id": "a b" * 99}).headers["x-request-id"]
    assert len(unfit) == 32


def test_the_stages_of_an_answer_are_told_in_its_head() -> None:
    """``Server-Timing``: what was done so far, one after another, and all; of answers only."""
    before = ["read", "queue", "fetch", "decode"]
    with running(FakeEngine(pause=0.02)) as api:
        for body, last in ((HELLO, "answer"), ({**HELLO, "stream": True}, "first-token")):
            answer = api.chat(body)
            told = server_timings({"server-timing": answer.headers["server-timing"]})
            assert list(told) == [*before, last, "total"]
            stages = sum(told.values()) - told["total"]
            # A stream's head is written after its first token; where this machine stands still in
            # between, the next one is looked at.
            for _ in range(20):
                if stages == pytest.approx(told["total"], abs=0.001):
                    break
                answer = api.chat(body)
                told = server_timings({"server-timing": answer.headers["server-timing"]})
                stages = sum(told.values()) - told["total"]
            assert stages == pytest.approx(told["total"], abs=0.001)
            # Each word of three takes 20 ms; a stream's head waits for the first only.
            assert told[last] >= (0.05 if last == "answer" else 0.015)
            assert answer.elapsed.total_seconds() >= told["total"] - 0.001
        assert "server-timing" not in api.chat({"messages": []}).headers
        assert "server-timing" not in requests.get(f"{api.root}/v1/models", timeout=60).headers


def test_the_stages_of_an_explanation_are_those_of_an_answer(api: Running) -> None:
    """Reading the body is no waiting: each stage has its own time."""
    url = f"{api.root}/v1/chat/completions/explain"
    answer = requests.post(url, json=HELLO, timeout=60)
    told = server_timings({"server-timing": answer.headers["server-timing"]})
    assert list(told) == ["read", "queue", "fetch", "decode", "answer", "total"]


def test_a_reload_leaves_what_the_engine_was_started_with() -> None:
    """How many pictures a request may show is none of the ``limits``: it waits for a restart."""
    with running() as api:
        new = load_profile("demo", ["media.limit_mm_per_prompt.image=99", "limits.max_n=1"])
        api.app.state.api.take_limits(new)
        (card, _) = requests.get(f"{api.root}/v1/models", timeout=60).json()["data"]
        assert card["limit_mm_per_prompt"] == {"image": 4, "video": 1}
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        refused = api.chat({"messages": [{"role": "user", "content": [image] * 5}]})
        assert error_of(refused)["code"] == "too_many_items"
        assert error_of(api.chat({**HELLO, "n": 2, "temperature": 1}))["param"] == "n"


def test_a_reload_changes_what_the_media_of_a_request_may_hold() -> None:
    """Both ways, and the refusal names the field that was changed."""
    data = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(data, "PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    body = {"messages": [{"role": "user", "content": [part]}]}
    size = -(-len(data.getvalue()) // 3) * 3  # base64's padding is counted
    with running(profile=load_profile("demo", [f"limits.max_media_bytes={size - 3}"])) as api:
        for most in (size - 3, size, size - 3):
            api.app.state.api.take_limits(load_profile("demo", [f"limits.max_media_bytes={most}"]))
            answer = api.chat(body)
            if most == size:
                assert answer.status_code == 200, answer.text
            else:
                assert "(limits.max_media_bytes)" in error_of(answer)["message"]


def test_two_requests_may_carry_one_id(api: Running) -> None:
    """The engine's own id never comes from a client, so that two cannot collide."""
    ids = {api.chat(headers={"x-request-id": "same"}).json()["id"] for _ in range(2)}
    assert len(ids) == 2


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (InvalidImage("no picture"), 400, "invalid_image"),
        (EngineUnavailable("gone"), 503, "engine_unavailable"),
        (Overloaded("full"), 503, "overloaded"),
        (RuntimeError("secret /path/0x7f"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_has_its_own_status(
    failure: Exception, status: int, code: str, stream: bool
) -> None:
    """Streams too: nothing has been sent, so the status line still tells the truth."""
    with running(FakeEngine(failure=failure)) as api:
        answer = api.chat({**HELLO, "stream": stream})
        error = error_of(answer)
        assert (answer.status_code, error["code"]) == (status, code)
        assert "secret" not in answer.text
        assert (status == 503) == ("retry-after" in answer.headers)
        api.engine.failure = None
        assert api.chat().status_code == 200


def test_a_stream_that_breaks_ends_with_an_error_and_without_done() -> None:
    """A client must not take a cut answer for a whole one."""
    with running(FakeEngine(failure=EngineUnavailable("died"), fail_at=2)) as api:
        answer = api.chat({**HELLO, "stream": True})
        assert answer.status_code == 200
        last = answer.text.rstrip("\n").split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
        assert "[DONE]" not in answer.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("pause", [0.05, 30], ids=["generating", "before the first token"])
def test_a_client_that_leaves_stops_the_generation(stream: bool, pause: float) -> None:
    """Within a second of a closed connection the engine's request is aborted.

    The second is counted in the engine's words, twenty of 50 ms: they stand still where it does.
    """
    with running(FakeEngine(words=["word "] * 2000, pause=pause)) as api:
        body = json.dumps({**HELLO, "stream": stream}).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", api.port)) as client:
            client.sendall(head.encode() + body)
            eventually(lambda: api.engine.running == 1)
            before = api.engine.progress
        eventually(lambda: api.engine.running == 0)
        assert api.engine.progress - before <= (20 if pause < 1 else 0)
        assert api.engine.aborted == 1
        eventually(lambda: "qwen2vl_requests_in_flight 0.0" in api.metrics())


def test_without_a_key_nothing_but_the_probes_answers() -> None:
    """Keys close every path, known or not, except liveness and readiness."""
    with running(keys=("sk-one", "sk-two")) as api:
        for path in ("/v1/models", "/metrics", "/version", "/docs", "/openapi.json", "/nothing"):
            answer = requests.get(api.root + path, timeout=60)
            assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/health/live", "/health/ready"):
            assert requests.get(api.root + path, timeout=60).status_code == 200
        for key in ("sk-one", "sk-two"):
            assert api.chat(headers={"authorization": f"Bearer {key}"}).status_code == 200


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic sk-one", "Bearer sk-on", "Bearer sk-one2", "sk-one"]
)
def test_a_wrong_key_opens_nothing(header: str) -> None:
    """Missing, empty, near or differently announced keys are all the same 401."""
    with running(keys=("sk-one",)) as api:
        answer = api.chat(headers={"authorization": header})
        assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize("target", ["//v1/models", "/v1//models", "/health/live/../../v1/models"])
def test_path_tricks_open_nothing(target: str) -> None:
    """The path that is compared is the path that is routed."""
    with running(keys=("sk-one",)) as api, socket.create_connection(("127.0.0.1", api.port)) as raw:
        raw.sendall(f"GET {target} HTTP/1.1\r\nHost: a/?x=\r\nConnection: close\r\n\r\n".encode())
        assert raw.recv(4096).startswith(b"HTTP/1.1 401")


def test_a_dead_engine_is_not_ready_but_live() -> None:
    """Readiness asks the engine; liveness only the event loop."""
    with running(FakeEngine(dead=True)) as api:
        ready = requests.get(f"{api.root}/health/ready", timeout=60)
        assert (ready.status_code, error_of(ready)["code"]) == (503, "engine_unavailable")
        assert requests.get(f"{api.root}/health/live", timeout=60).status_code == 200


def test_a_draining_server_takes_nothing_new() -> None:
    """While it drains, readiness is red and chats are refused with Retry-After."""
    with running() as api:
        api.app.state.api.draining = True
        for answer in (api.chat(), requests.get(f"{api.root}/health/ready", timeout=60)):
            assert (answer.status_code, error_of(answer)["code"]) == (503, "shutting_down")
            assert answer.headers["retry-after"]


FILM = data_url(movie(40, (320, 240)))


def film(**fields: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": FILM}, **fields}


def shown(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": "What moves?"}]
    return {"messages": [{"role": "user", "content": content}], **fields}


def test_a_video_reaches_the_engine_decoded_and_is_reported() -> None:
    """The engine gets frames, the client their number, size, tokens, and what was cut."""
    with running() as api:
        answer = api.chat(shown(film(fps=100.0), include_media_info=True)).json()
        (report,) = answer["media"]
        assert (report["type"], report["width"], report["duration"]) == ("video", 320, 4.0)
        assert (report["frames"], report["clamped"]) == (16, True)
        (video,) = api.engine.media[0]
        height, width = report["resized_height"], report["resized_width"]
        assert video.frames().shape == (16, height, width, 3)
        assert report["visual_tokens"] == 8 * (height // 28) * (width // 28)
        again = api.chat(shown(film(fps=100.0), include_media_info=True)).json()
        assert again["media"][0]["cached"]


def test_a_stream_reports_its_videos_as_well(api: Running) -> None:
    """In its first chunk."""
    text = api.chat(shown(film(), stream=True, include_media_info=True)).text
    first = json.loads(text.partition("\n\n")[0].removeprefix("data: "))
    assert first["media"][0]["frames"] == 8


def test_a_video_is_explained(api: Running) -> None:
    """What it costs and which budget would fit, without the engine."""
    url = f"{api.root}/v1/chat/completions/explain"
    told = requests.post(url, json=shown(film(nframes=8)), timeout=60).json()
    (report,) = told["media"]
    assert told["visual_tokens"] == report["visual_tokens"]
    assert told["prompt_tokens"] == told["text_tokens"] + told["visual_tokens"]
    assert told["fits"]
    body = shown(film(nframes=16, max_pixels=100_000), max_tokens=4096 - 500)
    tight = requests.post(url, json=body, timeout=60).json()
    assert not tight["fits"]
    body["messages"][0]["content"][0]["max_pixels"] = tight["largest_max_pixels"]
    assert requests.post(url, json=body, timeout=60).json()["fits"]


def test_a_video_is_shrunk_to_fit(api: Running) -> None:
    """By the size of its frames; the answer says to which budget."""
    body = shown(film(nframes=16, max_pixels=100_000), max_tokens=4096 - 500)
    answer = api.chat({**body, "overflow": "shrink", "include_media_info": True}).json()
    (report,) = answer["media"]
    assert answer["overflow"]["policy"] == "shrink"
    assert report["resized_height"] * report["resized_width"] <= answer["overflow"]["max_pixels"]
    assert report["frames"] == 16


@pytest.mark.parametrize(
    ("part", "code", "param"),
    [
        (film(nframes=200), "invalid_value", "messages[0].content[0].video_url"),
        (film(fps=1.0, nframes=4), "invalid_value", "messages[0].content[0].video_url"),
        (film(fps=0), "invalid_value", "messages[0].content[0].fps"),
        (film(uuid="mine"), "unsupported_parameter", "messages[0].content[0].uuid"),
        ({"type": "video", "video": []}, "invalid_value", "messages[0].content[0].video"),
        ({"type": "video", "video": ["http://127.0.0.1/1.jpg"]}, "invalid_image_url",
         "messages[0].content[0].video[0]"),
        ({"type": "video_url", "video_url": {"url": "http://127.0.0.1/x.mp4"}}, "invalid_video",
         "messages[0].content[0].video_url"),
        ({"type": "video_url", "video_url": {"url": FILM[:-4000]}}, "invalid_video",
         "messages[0].content[0].video_url"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_a_bad_video_is_the_clients_error(
    api: Running, part: dict[str, Any], code: str, param: str
) -> None:
    """A 400 that names the field, without a word of a library, and the next one is served."""
    answer = api.chat(shown(part))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param)
    assert not re.search(r"av\.|Errno|Invalid data|ffmpeg|127\.0|Traceback", error["message"])
    assert api.chat(shown(film())).status_code == 200


def test_metrics_count_answers_by_route_status_and_code(api: Running) -> None:
    """Each answer is counted once, under the route's pattern rather than the path."""
    line = (
        'qwen2vl_requests_total{code="model_not_found",route="/v1/models/{name:path}",status="404"}'
    )

    def count() -> float:
        found = [one for one in api.metrics().splitlines() if one.startswith(line)]
        return float(found[0].rpartition(" ")[2]) if found else 0.0

    before = count()
    requests.get(f"{api.root}/v1/models/unknown", timeout=60)
    assert count() == before + 1


def test_metrics_count_media_by_kind_and_outcome() -> None:
    """A video that is sent twice is decoded once; its bytes came twice."""
    with running() as one:
        for _ in range(2):
            assert one.chat(shown(film())).status_code == 200
        lines = one.metrics().splitlines()
    assert 'qwen2vl_media_total{kind="video",outcome="decoded"} 1.0' in lines
    assert 'qwen2vl_media_total{kind="video",outcome="known"} 1.0' in lines
    (sent,) = (line for line in lines if line.startswith('qwen2vl_media_bytes_total{kind="video"}'))
    assert float(sent.rpartition(" ")[2]) > 1000


def test_the_openapi_document_describes_the_chat_body(api: Running) -> None:
    """The schema served at /openapi.json resolves and names the fields clients send."""
    document = requests.get(f"{api.root}/openapi.json", timeout=60).json()
    schemas = document["components"]["schemas"]
    assert {"messages", "model", "stream", "response_format"} <= set(
        schemas["ChatRequest"]["properties"]
    )
    for path in ("/v1/chat/completions", "/v1/chat/completions/explain"):
        assert "ChatRequest" in json.dumps(document["paths"][path]["post"]["requestBody"])
    for reference in json.dumps(document).split('"$ref": "')[1:]:
        name = reference.partition('"')[0].rpartition("/")[2]
        assert name in schemas


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_without_max_tokens_is_held_to_the_profiles(stream: bool) -> None:
    """``limits.max_tokens`` bounds every answer; what the request asks for itself is kept."""
    profile = load_profile("demo", ["limits.max_tokens=2"])
    with running(FakeEngine(words=["a "] * 9), profile=profile) as server:
        assert server.chat({**HELLO, "stream": stream}).text.count('"a ') == (2 if stream else 1)
        assert server.chat({**HELLO, "stream": stream, "max_tokens": 1}).status_code == 200
        assert [one.most_tokens for one in server.engine.requests] == [2, 1]
        error = error_of(server.chat({**HELLO, "stream": stream, "min_tokens": 3}))
    assert error["param"] == "min_tokens"
    assert "min_tokens is 3, more than limits.max_tokens" in error["message"]
    assert "(2)" in error["message"]
