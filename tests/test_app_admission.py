"""Admission through the whole application, over real sockets."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pytest
import requests
from PIL import Image

from qwen2vl_serve.media.picture import Picture
from qwen2vl_serve.profile import load_profile
from tests.fake_engine import FakeEngine
from tests.test_app import HELLO, Running, error_of, eventually, running

ENDLESS = ["word "] * 100_000


pytestmark = pytest.mark.usefixtures("compiled")


def image(url: str) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "x"}]}]}


def picture(side: int = 280) -> dict[str, Any]:
    data = io.BytesIO()
    Image.effect_noise((side, side), 90).convert("RGB").save(data, "PNG", compress_level=1)
    return image("data:image/png;base64," + base64.b64encode(data.getvalue()).decode())


@contextmanager
def limited(engine: FakeEngine, *overrides: str, **options: Any) -> Iterator[Running]:
    with running(engine, profile=load_profile("demo", overrides), **options) as api:
        yield api


def begun(
    api: Running, body: dict[str, Any], path: str = "/v1/chat/completions", *, key: str = ""
) -> socket.socket:
    """Send a request and leave its answer alone; ``key`` is for ``named``."""
    data = json.dumps(body).encode()
    line = socket.create_connection(("127.0.0.1", api.port))
    line.sendall(
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nx-key: {key}\r\n"
        f"content-length: {len(data)}\r\n\r\n".encode()
    )
    line.sendall(data)
    return line


def idle(api: Running) -> bool:
    state = api.app.state.api
    lines = (state.chats, state.explanations, state.uploads)
    return (
        not any(one.places.held + one.tokens.held + one.waiting for one in lines)
        and not any(one.starts.held for one in lines)
        and not state.calls
        and state.bodies.held == 0
        and state.loader.ledger.held == 0
        and api.engine.running == 0
    )


@contextmanager
def stalling_host() -> Iterator[int]:
    """A host that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as host:
        yield host.getsockname()[1]


def test_leaving_while_queued_frees_the_turn() -> None:
    """Who closes in the queue is out of it, and the next one takes its turn."""
    with limited(FakeEngine(ENDLESS, pause=0.01), "limits.max_in_flight=1") as api:
        chats = api.app.state.api.chats
        with closing(begun(api, HELLO)) as first:
            eventually(lambda: api.engine.running == 1)
            second = begun(api, HELLO)
            eventually(lambda: chats.places.waiting == 1)
            second.close()
            eventually(lambda: chats.places.waiting == 0)
            first.close()
        eventually(lambda: idle(api))
        assert len(api.engine.requests) == 1, "the one that left never reached the engine"


def test_leaving_while_fetching_frees_the_place() -> None:
    """A host that never answers does not keep the place of a client that has left."""
    with stalling_host() as port:
        overrides = ("media.allowed_networks=[127.0.0.0/8]", f"media.allowed_ports=[{port}]")
        with limited(FakeEngine(), *overrides) as api:
            line = begun(api, image(f"http://127.0.0.1:{port}/x.jpg"))
            eventually(lambda: api.app.state.api.chats.places.held == 1)
            line.close()
            eventually(lambda: idle(api))
            assert api.engine.requests == []


def test_leaving_while_decoding_frees_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread ends its picture, for which nobody waits: the place is free before that."""
    begins, ends = threading.Event(), threading.Event()
    decode = Picture.decode

    def slowly(self: Picture) -> None:
        begins.set()
        ends.wait(60)
        decode(self)

    monkeypatch.setattr(Picture, "decode", slowly)
    with limited(FakeEngine()) as api:
        state = api.app.state.api
        line = begun(api, picture())
        assert begins.wait(60)
        line.close()
        eventually(lambda: idle(api))
        assert state.loader.decoding.held > 0
        ends.set()
        eventually(lambda: state.loader.decoding.held == 0)
        assert api.engine.requests == []


def test_leaving_while_waiting_for_tokens_frees_place_and_turn() -> None:
    """Known by its header and waiting to be decoded, a request is let go as well."""
    engine = FakeEngine(ENDLESS, pause=0.01)
    with limited(engine, "limits.max_visual_tokens=64") as api:
        chats = api.app.state.api.chats
        with closing(begun(api, picture())):
            eventually(lambda: engine.running == 1)
            second = begun(api, picture(300))
            eventually(lambda: chats.tokens.waiting == 1)
            second.close()
            eventually(lambda: (chats.tokens.waiting, chats.places.held) == (0, 1))
        eventually(lambda: idle(api))


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_while_generating_frees_place_and_engine(stream: bool) -> None:
    """Streamed or not, the generation is aborted."""
    with limited(FakeEngine(ENDLESS, pause=0.01)) as api:
        line = begun(api, {**HELLO, "stream": stream})
        eventually(lambda: api.engine.running == 1)
        if stream:
            assert b"200 OK" in line.recv(1000)
        line.close()
        eventually(lambda: idle(api))
        assert api.engine.aborted == 1


def test_leaving_before_the_body_is_whole_holds_nothing() -> None:
    """Half a body takes no place; its bytes are given back when its sender goes."""
    with limited(FakeEngine()) as api:
        state = api.app.state.api
        line = socket.create_connection(("127.0.0.1", api.port))
        line.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 1000\r\n\r\n{"
        )
        eventually(lambda: state.bodies.held == 1)
        assert state.chats.places.held == 0
        line.close()
        eventually(lambda: idle(api))


def test_a_stream_keeps_its_place_to_its_end() -> None:
    """The next request is served after the last event, not after the first."""
    engine = FakeEngine(list(ENDLESS), pause=0.02)
    with limited(engine, "limits.max_in_flight=1") as api:
        places = api.app.state.api.chats.places
        stream = requests.post(
            f"{api.root}/v1/chat/completions",
            json={**HELLO, "stream": True},
            stream=True,
            timeout=60,
        )
        second = threading.Thread(target=api.chat)
        second.start()
        eventually(lambda: places.waiting == 1)
        assert (places.held, engine.running) == (1, 1)
        del engine.words[engine.progress + 5 :]
        most = 0
        for _ in stream.iter_lines():
            most = max(most, engine.running)
        second.join(60)
        assert (most, len(engine.requests)) == (1, 2)
        eventually(lambda: idle(api))


def test_a_stream_waits_for_the_first_token_of_another() -> None:
    """With ``limits.max_starting`` 1 the engine gets the second once the first has begun.

    Whole answers and fetches are not held up by it, and a client that leaves before its first token
    holds up nobody.
    """
    engine = FakeEngine(list(ENDLESS), pause=0.02, hung=True)
    stream = {**HELLO, "stream": True}
    with ExitStack() as lines, stalling_host() as port:
        api = lines.enter_context(
            limited(
                engine,
                "limits.max_starting=1",
                "limits.queue_seconds=60",
                "media.allowed_networks=[127.0.0.0/8]",
                f"media.allowed_ports=[{port}]",
            )
        )
        clients = lines.enter_context(ExitStack())
        chats = api.app.state.api.chats
        fetching = {**image(f"http://127.0.0.1:{port}/x.jpg"), "stream": True}
        clients.enter_context(closing(begun(api, fetching)))
        eventually(lambda: chats.places.held == 1)
        gone = begun(api, stream)
        eventually(lambda: engine.running == 1)
        clients.enter_context(closing(begun(api, stream)))
        eventually(lambda: chats.starts.waiting == 1)
        clients.enter_context(closing(begun(api, HELLO)))
        eventually(lambda: (engine.running, chats.starts.waiting) == (2, 1))
        gone.close()
        eventually(lambda: (len(engine.requests), chats.starts.waiting) == (3, 0))
        clients.enter_context(closing(begun(api, stream)))
        eventually(lambda: chats.starts.waiting == 1)
        engine.hung = False
        eventually(lambda: engine.running == 3)
        eventually(lambda: chats.starts.held == 0)
        clients.close()
        eventually(lambda: idle(api))


def test_who_waits_too_long_to_start_is_told_so() -> None:
    """503, as for a place, and nothing is held afterwards."""
    engine = FakeEngine(list(ENDLESS), pause=0.02, hung=True)
    overrides = ("limits.max_starting=1", "limits.queue_seconds=0.1")
    with limited(engine, *overrides) as api:
        with closing(begun(api, {**HELLO, "stream": True})):
            eventually(lambda: engine.running == 1)
            answer = api.chat({**HELLO, "stream": True})
            assert (answer.status_code, error_of(answer)["code"]) == (503, "overloaded")
            assert "waited" in error_of(answer)["message"]
        eventually(lambda: idle(api))


def test_beyond_cap_and_queue_is_503_with_a_time() -> None:
    """The server's own bound: 503, Retry-After, an id, and a count by reason."""
    engine = FakeEngine(ENDLESS, pause=0.01)
    overrides = ("limits.max_in_flight=1", "limits.max_queued=1")
    with limited(engine, *overrides) as api, ExitStack() as lines:
        lines.enter_context(closing(begun(api, HELLO)))
        eventually(lambda: engine.running == 1)
        lines.enter_context(closing(begun(api, HELLO)))
        eventually(lambda: api.app.state.api.chats.places.waiting == 1)
        answer = api.chat()
        assert (answer.status_code, error_of(answer)["code"]) == (503, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers["x-request-id"]
        text = api.metrics()
        labels = 'kind="chat",limit="limits.max_in_flight",reason="full"'
        assert f"qwen2vl_admission_refused_total{{{labels}}} 1.0" in text
        assert 'qwen2vl_admission_in_flight{kind="chat"} 1.0' in text
        assert 'qwen2vl_admission_queued{kind="chat"} 1.0' in text
        lines.close()
        eventually(lambda: idle(api))
        engine.words = ["done"]
        assert api.chat().status_code == 200


def test_a_wait_beyond_its_time_is_503() -> None:
    """Whoever waited ``limits.queue_seconds`` is told so."""
    engine = FakeEngine(ENDLESS, pause=0.01)
    overrides = ("limits.max_in_flight=1", "limits.queue_seconds=0.1")
    with limited(engine, *overrides) as api, closing(begun(api, HELLO)):
        eventually(lambda: engine.running == 1)
        answer = api.chat()
        assert (answer.status_code, error_of(answer)["code"]) == (503, "overloaded")
        assert "waited" in error_of(answer)["message"]


def test_several_answers_take_as_many_places() -> None:
    """``n`` answers are n times the work."""
    with limited(FakeEngine(ENDLESS, pause=0.01)) as api:
        with closing(begun(api, {**HELLO, "n": 5, "temperature": 1.0})):
            eventually(lambda: api.app.state.api.chats.places.held == 5)
        eventually(lambda: idle(api))


def test_explanations_have_places_of_their_own() -> None:
    """A server full of chats still explains."""
    engine = FakeEngine(ENDLESS, pause=0.01)
    with limited(engine, "limits.max_in_flight=1", "limits.max_queued=0") as api:
        with closing(begun(api, HELLO)):
            eventually(lambda: engine.running == 1)
            url = f"{api.root}/v1/chat/completions/explain"
            assert requests.post(url, json=HELLO, timeout=60).status_code == 200
            assert api.chat().status_code == 503
        eventually(lambda: idle(api))


def test_bodies_that_do_not_fit_together_are_refused() -> None:
    """Bytes in flight are bounded over all requests, those that wait included."""
    overrides = (
        "limits.max_in_flight=1", "limits.max_body_bytes=1000", "limits.max_held_body_bytes=1500",
    )  # fmt: skip
    long = {"messages": [{"role": "user", "content": "x" * 800}]}
    engine = FakeEngine(ENDLESS, pause=0.01)
    with limited(engine, *overrides) as api:
        with closing(begun(api, long)):
            eventually(lambda: engine.running == 1)
            answer = api.chat(long)
            assert (answer.status_code, error_of(answer)["code"]) == (503, "overloaded")
            assert (
                'kind="chat",limit="limits.max_held_body_bytes",reason="bytes"} 1.0'
                in api.metrics()
            )
        eventually(lambda: idle(api))


def test_one_key_holds_half_of_the_bytes() -> None:
    """What it sends beyond is its own fault (429), and another key's request is read."""
    overrides = (
        "limits.max_in_flight=4", "limits.max_body_bytes=1000", "limits.max_held_body_bytes=3000",
    )  # fmt: skip
    long = {"messages": [{"role": "user", "content": "x" * 800}]}
    engine = FakeEngine(ENDLESS, pause=0.01)
    with limited(engine, *overrides, wrapped=named) as api:
        with closing(begun(api, long, key="greedy")):
            eventually(lambda: engine.running == 1)
            answer = api.chat(long, headers={"x-key": "greedy"})
            assert (answer.status_code, error_of(answer)["code"]) == (429, "rate_limit_exceeded")
            assert "max_held_body_bytes" in error_of(answer)["message"]
            with closing(begun(api, long, key="modest")):
                eventually(lambda: engine.running == 2)
        eventually(lambda: idle(api))


def named(app: Callable[..., Any]) -> Callable[..., Any]:
    """Give each request the key name that its header says."""

    async def with_key(scope: Any, receive: Any, send: Any) -> None:
        names = [value.decode() for name, value in scope.get("headers", ()) if name == b"x-key"]
        scope["state"] = {"key": names[0]} if names else {}
        await app(scope, receive, send)

    return with_key


def test_a_flood_of_one_key_does_not_hold_up_another() -> None:
    """With a full queue of one key, the other's request is the next to be served."""
    engine = FakeEngine(["a ", "b "], hung=True)
    overrides = ("limits.max_in_flight=1", "limits.max_queued=8", "limits.queue_seconds=300")
    statuses: list[tuple[str, int]] = []

    with limited(engine, *overrides, wrapped=named) as api:

        def ask(key: str) -> None:
            body = {"messages": [{"role": "user", "content": key}]}
            statuses.append((key, api.chat(body, headers={"x-key": key}).status_code))

        flood = [threading.Thread(target=ask, args=("flood",)) for _ in range(30)]
        for one in flood:
            one.start()
        eventually(lambda: api.app.state.api.chats.places.waiting == 8)
        eventually(lambda: statuses == [("flood", 503)] * 21)
        calm = threading.Thread(target=ask, args=("calm",))
        calm.start()
        eventually(lambda: statuses == [("flood", 503)] * 22)  # one made room for it
        engine.hung = False
        for one in (calm, *flood):
            one.join(60)
        served = [str(one.messages[0].content) for one in engine.requests]
        # One was being worked on, and of those that waited it was the other key's turn first.
        assert served == ["flood", "flood", "calm", *["flood"] * 6]
        assert ("calm", 200) in statuses
        eventually(lambda: idle(api))
