"""The fleet's gateway over scripted replicas: which is asked, and what becomes of lost ones."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.fleet.affinity import content_key
from qwen2vl_serve.fleet.asking import REPLICA_HEADER, Ask, Messages
from qwen2vl_serve.fleet.gateway import ATTEMPTS, Gateway, ReplicaLost
from qwen2vl_serve.line import Refused
from qwen2vl_serve.profile import Profile, load_profile

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
CHAT = "/v1/chat/completions"


def start(status: int = 200, kind: bytes = b"application/json", name: bytes = b"one") -> Any:
    headers = [(b"content-type", kind), (REPLICA_HEADER, name)]
    return {"type": "http.response.start", "status": status, "headers": headers}


def piece(data: bytes, *, more: bool = False) -> Any:
    return {"type": "http.response.body", "body": data, "more_body": more}


WHOLE = [[start(), piece(b'{"ok":true}')]]


@dataclass
class Fleet:
    """Answers the n-th request with the n-th script, the last one for ever.

    Of a script an error is raised, and a text is the replica that the router sends it to.
    """

    scripts: list[list[Any]]
    names: list[str] = field(default_factory=lambda: ["one", "two"])
    asked: list[Ask] = field(default_factory=list)

    async def answers(self, ask: Ask) -> AsyncGenerator[Messages, None]:
        self.asked.append(ask)
        for batch in self.scripts[min(len(self.asked), len(self.scripts)) - 1]:
            if isinstance(batch, Exception):
                raise batch
            if isinstance(batch, str):
                ask.sent_to.append(batch)
            else:
                yield batch

    def gateway(self, profile: Profile, keys: Keys | None = None) -> Gateway:
        return Gateway(profile, keys or Keys(), self.answers, lambda: self.names)


def send(
    fleet: Fleet, *, settings: tuple[str, ...] = (), keys: Keys | None = None, **request: Any
) -> httpx.Response:
    """Send one request through the gateway; an answer that breaks off is an httpx error."""
    request = {"method": "POST", "url": CHAT, "json": HELLO} | request
    app = fleet.gateway(load_profile("demo", list(settings)), keys).app

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(**request)

    return asyncio.run(run())


def code(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


def test_an_answer_passes_as_it_is() -> None:
    """Status, headers and body; the request id of the client reaches the replica and comes back."""
    fleet = Fleet([[[start(201)], [piece(b"ab", more=True), piece(b"c")]]])
    answer = send(fleet, headers={"x-request-id": "mine-1", "authorization": "Bearer k"})
    assert (answer.status_code, answer.content) == (201, b"abc")
    assert answer.headers["x-request-id"] == "mine-1"
    (ask,) = fleet.asked
    headers = dict(ask.scope["headers"])
    assert (headers[b"x-request-id"], headers[b"authorization"]) == (b"mine-1", b"Bearer k")
    assert json.loads(ask.body) == HELLO
    assert ask.key == content_key(ask.body) != ""


def test_a_conversation_has_one_key_by_whatever_name_its_model_is_called() -> None:
    """Clients that know the model by several names find what the others had cached."""
    fleet = Fleet([WHOLE])
    settings = ('model.served_model_name=["one", "other"]',)
    for fields in ({}, {"model": "one"}, {"model": "other"}, {"model": "adapter"}):
        send(fleet, settings=settings, json={**HELLO, **fields})
    *same, adapter = (ask.key for ask in fleet.asked)
    assert len(set(same)) == 1
    assert adapter not in same


def test_only_conversations_have_a_key() -> None:
    """Whatever else is asked goes to who is least busy."""
    fleet = Fleet([WHOLE])
    send(fleet, url="/v1/models", method="GET", json=None)
    send(fleet, url="/v1/chat/completions/explain")
    assert [bool(ask.key) for ask in fleet.asked] == [False, True]


@pytest.mark.parametrize("script", [[ReplicaLost("gone")], []])
def test_a_replica_lost_before_it_answered_is_replaced(script: list[Any]) -> None:
    """The client notices nothing."""
    fleet = Fleet([script, WHOLE])
    assert send(fleet).status_code == 200
    assert len(fleet.asked) == 2


@pytest.mark.parametrize("script", [["one", ReplicaLost("gone")], ["one"]])
def test_who_was_lost_is_not_asked_again(script: list[Any]) -> None:
    """The retry is told whom the router had chosen, and starts with a note of its own."""
    fleet = Fleet([script, WHOLE])
    assert send(fleet).status_code == 200
    assert [ask.tried for ask in fleet.asked] == [frozenset(), frozenset({"one"})]
    assert fleet.asked[1].sent_to == []


def test_who_was_lost_and_who_refused_are_both_known() -> None:
    """The third attempt has to go elsewhere than the first two."""
    refusal = [[start(503, name=b"two"), piece(b"{}")]]
    fleet = Fleet([["one", ReplicaLost("gone")], refusal, WHOLE], names=["one", "two", "three"])
    assert send(fleet).status_code == 200
    assert fleet.asked[-1].tried == {"one", "two"}


def test_after_some_lost_replicas_it_is_an_error() -> None:
    """In OpenAI's shape, with the time to try again."""
    fleet = Fleet([[ReplicaLost("gone")]])
    answer = send(fleet)
    assert (answer.status_code, code(answer)) == (503, "engine_unavailable")
    assert answer.headers["retry-after"]
    assert len(fleet.asked) == ATTEMPTS


def test_a_deletion_is_not_repeated() -> None:
    """The lost replica may have done it."""
    fleet = Fleet([[ReplicaLost("gone")], WHOLE])
    answer = send(fleet, method="DELETE", url="/v1/files/file-1", json=None)
    assert (answer.status_code, len(fleet.asked)) == (503, 1)


def test_a_stream_that_had_begun_ends_with_an_error() -> None:
    """Not with ``[DONE]``, and nobody else is asked."""
    begun = [start(kind=b"text/event-stream; charset=utf-8"), piece(b"data: 1\n\n", more=True)]
    fleet = Fleet([[begun, ReplicaLost("gone")], WHOLE])
    answer = send(fleet)
    first, last = answer.text.strip().split("\n\n")
    assert first == "data: 1"
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    assert len(fleet.asked) == 1


def test_who_refuses_is_not_asked_again() -> None:
    """A replica without engine, or a full one: the next is told who was tried."""
    refusal = [[start(503, name=b"one"), piece(b"{}")]]
    fleet = Fleet([refusal, WHOLE])
    assert send(fleet).status_code == 200
    assert [ask.tried for ask in fleet.asked] == [frozenset(), frozenset({"one"})]


def test_when_all_refuse_the_last_refusal_is_the_answer() -> None:
    """Of two replicas both are asked, of one only that one."""
    refusals = [[[start(503, name=name), piece(name)]] for name in (b"one", b"two")]
    both, alone = Fleet(refusals), Fleet(refusals, names=["one"])
    assert [(send(fleet).content, len(fleet.asked)) for fleet in (both, alone)] == [
        (b"two", 2),
        (b"one", 1),
    ]


def test_too_many_waiting_is_overload() -> None:
    """As on one server: 503, and when to come again."""
    answer = send(Fleet([[Refused("full", "Too many wait")]]))
    assert (answer.status_code, code(answer)) == (503, "overloaded")
    assert answer.headers["retry-after"] == "1"


def test_without_a_key_no_replica_is_asked() -> None:
    """And no body is read; what probes ask needs none."""
    fleet = Fleet([WHOLE])
    keys = Keys(["sk-1"])
    assert code(send(fleet, keys=keys)) == "invalid_api_key"
    assert code(send(fleet, keys=keys, method="GET", url="/metrics")) == "invalid_api_key"
    assert fleet.asked == []
    assert send(fleet, keys=keys, headers={"authorization": "Bearer sk-1"}).status_code == 200
    assert send(fleet, keys=keys, method="GET", url="/health/ready").status_code == 200
    assert send(fleet, keys=keys, method="GET", url="/health/live").json() == {"status": "live"}


PREFLIGHT = {"origin": "https://ui.example.com", "access-control-request-method": "POST"}


def test_pages_of_named_origins_are_served() -> None:
    """Preflights need no key and reach no replica; a page reads answers, and what they refuse."""
    fleet, keys = Fleet([WHOLE]), Keys(["sk-1"])
    open_to = {"settings": ('server.cors_origins=["https://ui.example.com"]',), "keys": keys}
    asked = {"method": "OPTIONS", "json": None, "headers": PREFLIGHT}
    origin = PREFLIGHT["origin"]
    assert send(fleet, **open_to, **asked).headers["access-control-allow-origin"] == origin
    assert code(send(fleet, keys=keys, **asked)) == "invalid_api_key"
    assert fleet.asked == []
    refused = send(fleet, **open_to, headers={"origin": origin})
    assert code(refused) == "invalid_api_key"
    assert refused.headers["access-control-allow-origin"] == origin
    answer = send(fleet, **open_to, headers={"origin": origin, "authorization": "Bearer sk-1"})
    assert (answer.status_code, len(fleet.asked)) == (200, 1)
    assert answer.headers["access-control-allow-origin"] == origin
    assert "x-request-id" in answer.headers["access-control-expose-headers"]


def test_bodies_are_bounded_before_they_reach_a_replica() -> None:
    """Chats and uploads, each by its own setting."""
    fleet = Fleet([WHOLE])
    small = ("limits.max_body_bytes=10", "files.max_file_bytes=10")
    chat = send(fleet, settings=small)
    form = send(
        fleet, settings=small, url="/v1/files", json=None,
        files={"file": b"x" * 70_000}, data={"purpose": "vision"},
    )  # fmt: skip
    for answer, setting in ((chat, "limits.max_body_bytes"), (form, "files.max_file_bytes")):
        assert answer.status_code == 413
        assert setting in answer.json()["error"]["message"]
    assert code(send(fleet, json=None, content=b"x", headers={"content-type": "text/plain"})) == (
        "unsupported_content_type"
    )
    assert fleet.asked == []


def test_adapters_are_not_loaded_into_one_of_many() -> None:
    """It says where a fleet's adapters come from."""
    answer = send(Fleet([WHOLE]), url="/v1/load_lora_adapter", json={"lora_name": "a"})
    assert answer.status_code == 404
    assert "adapters.lora_modules" in answer.json()["error"]["message"]


def test_figures_of_all_replicas_are_on_one_page() -> None:
    """Each replica is asked by name; who does not answer is left out."""

    class Telling(Fleet):
        async def answers(self, ask: Ask) -> AsyncGenerator[Messages, None]:
            self.asked.append(ask)
            if ask.replica == "two":
                raise ReplicaLost
            page = b"# HELP up Up\n# TYPE up gauge\nup 1\n"
            yield [start(name=str(ask.replica).encode()), piece(page)]

    fleet = Telling([])
    text = send(fleet, method="GET", url="/metrics", json=None).text
    assert {ask.replica for ask in fleet.asked} == {"one", "two"}
    assert 'up{replica="one"} 1' in text
    assert 'replica="two"' not in text
    assert 'qwen2vl_requests_in_flight{replica="gateway"}' in text


def test_figures_of_a_replica_that_says_nothing_are_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An answer that ended before it began: the page has the others, the log names the replica."""
    answer = send(Fleet([[]]), method="GET", url="/metrics", json=None)
    assert answer.status_code == 200
    assert 'replica="gateway"' in answer.text
    assert 'replica="one"' not in answer.text
    assert "replica one does not tell its figures" in caplog.text


def test_a_client_that_leaves_ends_the_asking() -> None:
    """What a replica was doing for it is closed."""
    closed = asyncio.Event()
    left: Callable[[], None] = lambda: None  # noqa: E731

    async def answers(_: Ask) -> AsyncGenerator[Messages, None]:
        try:
            yield [start(kind=b"text/event-stream"), piece(b"data: 1\n\n", more=True)]
            left()
            await asyncio.sleep(3600)
        finally:
            closed.set()

    async def run() -> None:
        nonlocal left
        gone = asyncio.Event()
        left = gone.set
        body = json.dumps(HELLO).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def say(_: Any) -> None:
            pass

        gateway = Gateway(load_profile("demo"), Keys(), answers, lambda: ["one"])
        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "path": CHAT,
            "query_string": b"", "headers": [(b"content-type", b"application/json")],
        }  # fmt: skip
        async with asyncio.timeout(60):
            await gateway.app(scope, receive, say)
            await closed.wait()

    asyncio.run(run())
