"""Batches over HTTP, by OpenAI's own client, on a scripted engine."""

from __future__ import annotations

import asyncio
import base64
import errno
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from qwen2vl_serve import app
from qwen2vl_serve.auth.keys import Keys
from qwen2vl_serve.auth.keys_file import KeyLimits, KeysFile
from qwen2vl_serve.auth.quota import Quotas
from qwen2vl_serve.batches import runner
from qwen2vl_serve.batches import store as store_module
from qwen2vl_serve.batches.store import Batch, BatchStore
from qwen2vl_serve.engine import Medium, Usage
from qwen2vl_serve.errors import PreflightError
from qwen2vl_serve.launch.resources import batch_store
from qwen2vl_serve.profile import Profile, load_profile
from qwen2vl_serve.protocol.chat import ChatRequest
from tests.conftest import ServerProcess
from tests.fake_engine import FakeEngine
from tests.served import CountingEngine, Served, eventually, served

URL = "/v1/chat/completions"


def asking(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


def jsonl(bodies: dict[str, dict[str, Any]]) -> bytes:
    return b"".join(
        json.dumps({"custom_id": name, "method": "POST", "url": URL, "body": body}).encode() + b"\n"
        for name, body in bodies.items()
    )


def many(count: int) -> dict[str, dict[str, Any]]:
    return {f"r{number}": asking(f"number {number}") for number in range(count)}


def profile(folder: Path, **sections: dict[str, Any]) -> Profile:
    chosen = {"batches": {"enabled": True, "folder": str(folder)}}
    for name, fields in sections.items():
        chosen[name] = chosen.get(name, {}) | fields
    return load_profile(
        "demo",
        [
            f"{section}.{name}={json.dumps(value)}"
            for section, fields in chosen.items()
            for name, value in fields.items()
        ],
    )


def client(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


def begun(ai: openai.OpenAI, bodies: dict[str, dict[str, Any]], **fields: Any) -> Any:
    file = ai.files.create(file=("in.jsonl", jsonl(bodies)), purpose="batch")
    return ai.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h", **fields)


def ended(ai: openai.OpenAI, batch: Any, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while batch.status in ("validating", "in_progress", "finalizing", "cancelling"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)
        batch = ai.batches.retrieve(batch.id)
    return batch


def outcomes(ai: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    """What a file of results says, by ``custom_id``; none stands there twice."""
    if file_id is None:
        return {}
    told = [json.loads(line) for line in ai.files.content(file_id).text.splitlines()]
    found = {one["custom_id"]: one for one in told}
    assert len(found) == len(told)
    return found


def test_a_batch_from_its_file_to_its_answers(tmp_path: Path) -> None:
    """As OpenAI's documentation writes it: upload, create, retrieve, list, read the outcomes."""
    bodies = many(5) | {"wrong": asking("x", n=99), "unknown": asking("x", model="other")}
    with served(profile(tmp_path), Keys()) as server, client(server.root) as ai:
        batch = begun(ai, bodies, metadata={"job": "nightly"})
        assert batch.status == "validating"
        batch = ended(ai, batch)
        assert batch.status == "completed"
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (7, 5, 2)
        assert batch.metadata == {"job": "nightly"}
        assert batch.expires_at == batch.created_at + 24 * 3600
        assert batch.created_at <= batch.in_progress_at <= batch.completed_at
        good = outcomes(ai, batch.output_file_id)
        assert set(good) == set(many(5))
        for one in good.values():
            assert one["error"] is None
            assert one["response"]["status_code"] == 200
            choice = one["response"]["body"]["choices"][0]
            assert choice["message"]["content"] == "A red circle."
        bad = outcomes(ai, batch.error_file_id)
        codes = {name: one["response"]["body"]["error"]["code"] for name, one in bad.items()}
        assert codes == {"wrong": "invalid_value", "unknown": "model_not_found"}
        assert [one.id for one in ai.batches.list()] == [batch.id]
        purposes = [one.purpose for one in ai.files.list()]
        assert sorted(purposes) == ["batch", "batch_output", "batch_output"]
        with pytest.raises(openai.BadRequestError, match="completed already"):
            ai.batches.cancel(batch.id)
        text = server.request("GET", "/metrics").text
        assert 'qwen2vl_batch_requests_total{outcome="completed"} 5.0' in text
        assert 'qwen2vl_batch_requests_total{outcome="failed"} 2.0' in text
        assert "qwen2vl_batches_unfinished 0.0" in text


def test_a_reload_changes_how_long_a_line_may_be(tmp_path: Path) -> None:
    """As it does with the body of a request."""
    with (
        served(profile(tmp_path, limits={"max_body_bytes": 1000}), Keys()) as server,
        client(server.root) as ai,
    ):
        long = {"long": asking("x" * 2000)}
        assert ended(ai, begun(ai, long)).status == "failed"
        server.app.state.api.take_limits(profile(tmp_path, limits={"max_body_bytes": 4000}))
        assert ended(ai, begun(ai, long)).status == "completed"


def test_faulty_lines_fail_the_batch_by_number(tmp_path: Path) -> None:
    """Nothing is asked; each fault has its line, its code and what to do."""
    data = jsonl(many(2)) + b"{\n" + jsonl({"r0": asking("again")})
    with served(profile(tmp_path), Keys()) as server, client(server.root) as ai:
        file = ai.files.create(file=("in.jsonl", data), purpose="batch")
        batch = ended(
            ai,
            ai.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h"),
        )
        assert batch.status == "failed"
        faults = [(fault.line, fault.code) for fault in batch.errors.data]
        assert faults == [(3, "invalid_json_line"), (4, "duplicate_custom_id")]
        assert server.engine.requests == []


def test_what_cannot_be_a_batch_is_refused(tmp_path: Path) -> None:
    """Another endpoint, window, file or metadata: by the field's name."""
    picture = io.BytesIO()
    Image.new("RGB", (56, 56), "red").save(picture, "PNG")
    limits = {"max_file_bytes": 2000, "max_lines": 3}
    with served(profile(tmp_path, batches=limits), Keys()) as server, client(server.root) as ai:
        file = ai.files.create(file=("in.jsonl", jsonl(many(2))), purpose="batch")
        shown = ai.files.create(file=("a.png", picture.getvalue()), purpose="vision")
        good: Any = {
            "input_file_id": file.id,
            "endpoint": URL,
            "completion_window": "24h",
        }
        for change, param, status in (
            ({"endpoint": "/v1/embeddings"}, "endpoint", 400),
            ({"completion_window": "1h"}, "completion_window", 400),
            ({"input_file_id": "file-none"}, "input_file_id", 404),
            ({"input_file_id": shown.id}, "input_file_id", 404),
            ({"metadata": {"a" * 65: "b"}}, "metadata", 400),
        ):
            with pytest.raises(openai.APIStatusError) as caught:
                ai.batches.create(**good | change)
            assert (caught.value.param, caught.value.status_code) == (param, status)
        with pytest.raises(openai.APIStatusError) as caught:
            ai.files.create(file=("in.jsonl", jsonl(many(20))), purpose="batch")
        assert caught.value.status_code == 413
        assert "batches.max_file_bytes" in caught.value.message
        with pytest.raises(openai.NotFoundError) as caught:
            ai.batches.retrieve("batch_none")
        assert caught.value.code == "batch_not_found"


def test_requests_of_a_batch_are_kept_no_longer_than_batches_are(tmp_path: Path) -> None:
    """The refusal names the section's own limit, not that of other uploads."""
    limits = {"ttl_seconds": 7200}
    with served(profile(tmp_path, batches=limits), Keys()) as server, client(server.root) as ai:

        def kept(purpose: Any, seconds: int) -> Any:
            after = {"anchor": "created_at", "seconds": seconds}
            data = ("in.jsonl", jsonl(many(1)))
            return ai.files.create(file=data, purpose=purpose, expires_after=after)

        file = kept("batch", 7200)
        assert file.expires_at == file.created_at + 7200
        for purpose, most, name in (("batch", 7200, "batches"), ("vision", 86400, "files")):
            with pytest.raises(openai.BadRequestError) as caught:
                kept(purpose, most + 1)
            assert f"from 1 to {most} ({name}.ttl_seconds" in caught.value.message


def test_batches_that_are_off_say_so() -> None:
    """Off is the default."""
    with served(load_profile("demo"), Keys()) as server, client(server.root) as ai:
        with pytest.raises(openai.NotFoundError, match=r"batches\.enabled"):
            ai.batches.list()
        with pytest.raises(openai.BadRequestError) as caught:
            ai.files.create(file=("in.jsonl", b"{}"), purpose="batch")
        assert caught.value.param == "purpose"


def test_a_batch_belongs_to_its_key(tmp_path: Path) -> None:
    """To any other it is not there, nor are its files; its pictures are its key's uploads."""
    file = KeysFile(tmp_path / "keys.json")
    ada, bob = file.add("ada"), file.add("bob")
    picture = io.BytesIO()
    Image.new("RGB", (56, 56), "red").save(picture, "PNG")
    with served(profile(tmp_path / "b"), Keys(file=file)) as server:
        ours, theirs = client(server.root, ada), client(server.root, bob)
        shown = {"url": "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()}
        kept = {}
        for name, ai in (("ada", ours), ("bob", theirs)):
            kept[name] = ai.files.create(file=("a.png", picture.getvalue()), purpose="vision").id
        parts = {
            "data": shown,
            "ours": {"file_id": kept["ada"]},
            "theirs": {"file_id": kept["bob"]},
        }
        bodies = {
            name: {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": part}]}
                ]
            }
            for name, part in parts.items()
        }
        batch = ended(ours, begun(ours, bodies))
        assert set(outcomes(ours, batch.output_file_id)) == {"data", "ours"}
        assert set(outcomes(ours, batch.error_file_id)) == {"theirs"}
        assert list(theirs.batches.list()) == []
        for attempt in (
            lambda: theirs.batches.retrieve(batch.id),
            lambda: theirs.batches.cancel(batch.id),
            lambda: theirs.files.content(batch.output_file_id),
            lambda: theirs.files.delete(batch.output_file_id),
            lambda: begun_from(theirs, batch.input_file_id),
        ):
            with pytest.raises(openai.NotFoundError):
                attempt()


def begun_from(ai: openai.OpenAI, file_id: str) -> Any:
    return ai.batches.create(input_file_id=file_id, endpoint=URL, completion_window="24h")


def test_usage_is_counted_against_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the batch used is gone from the minute, and a request that alone exceeds it fails."""
    # However long it takes, it is one minute.
    monkeypatch.setattr(app, "Quotas", partial(Quotas, clock=lambda: 6_000_000.0))
    file = KeysFile(tmp_path / "keys.json")
    key = file.add("ada", KeyLimits(tokens_per_minute=10_000, concurrent=3))
    chosen = profile(tmp_path / "b", server={"quota_storage": "memory://"})
    with (
        served(chosen, Keys(file=file), CountingEngine()) as server,
        client(server.root, key) as ai,
    ):
        batch = begun(ai, many(5) | {"large": asking("x", max_tokens=20_000)})
        batch = ended(ai, batch)
        assert batch.request_counts.completed == 5
        told = outcomes(ai, batch.error_file_id)["large"]["response"]
        assert told["status_code"] == 429
        left = server.chat(key).headers["x-ratelimit-remaining-tokens"]
        assert 10_000 - 6 * 40 - 300 <= int(left) <= 10_000 - 5 * 40


@dataclass
class Gate(FakeEngine):
    """Lets answers go when told to, and knows who is inside."""

    inside: list[str] = field(default_factory=list)
    most: int = 0
    open: threading.Event = field(default_factory=threading.Event)

    async def complete(
        self, request: ChatRequest, media: Sequence[Medium], request_id: str, usage: Usage
    ) -> bytes:
        name = str(request.messages[0].content)
        self.inside.append(name)
        self.most = max(self.most, len(self.inside))
        try:
            while not self.open.is_set() and name != "interactive":
                await asyncio.sleep(0.005)
        finally:
            self.inside.remove(name)
        return await super().complete(request, media, request_id, usage)


def test_a_full_batch_leaves_a_place_to_whoever_comes(tmp_path: Path) -> None:
    """With every slot of the batch taken and held, an interactive request waits for nobody."""
    engine = Gate()
    chosen = profile(tmp_path, limits={"max_in_flight": 4}, batches={"concurrency": 16})
    with served(chosen, Keys(), engine) as server, client(server.root) as ai:
        batch = begun(ai, many(30))
        eventually(lambda: len(engine.inside) == 3)
        time.sleep(0.2)
        assert len(engine.inside) == 3
        for _ in range(5):
            answer = server.chat(messages=asking("interactive")["messages"])
            assert answer.status_code == 200
        waited = server.request("GET", "/metrics").text
        assert "qwen2vl_admission_waited_seconds_count 0.0" in waited
        engine.open.set()
        assert ended(ai, batch).request_counts.completed == 30
        assert engine.most <= 4


def test_what_a_batch_has_under_way_is_not_in_its_keys_way(tmp_path: Path) -> None:
    """A key that may have one request under way asks, and looks at its batch, beside the batch."""
    file = KeysFile(tmp_path / "keys.json")
    key = file.add("ada", KeyLimits(tokens_per_minute=100_000, concurrent=1))
    engine = Gate()
    chosen = profile(
        tmp_path / "b", batches={"concurrency": 4}, server={"quota_storage": "memory://"}
    )
    with served(chosen, Keys(file=file), engine) as server, client(server.root, key) as ai:
        batch = begun(ai, many(10))
        eventually(lambda: len(engine.inside) == 4)
        assert ai.with_options(max_retries=0).batches.retrieve(batch.id).status == "in_progress"
        assert server.chat(key, messages=asking("interactive")["messages"]).status_code == 200
        engine.open.set()
        assert ended(ai, batch).request_counts.completed == 10


def test_with_one_place_only_the_one_in_flight_is_waited_for(tmp_path: Path) -> None:
    """Those who wait come next, all of them, before the batch's next request."""
    engine = Gate()
    chosen = profile(tmp_path, limits={"max_in_flight": 1}, batches={"concurrency": 8})
    with served(chosen, Keys(), engine) as server, client(server.root) as ai:
        batch = begun(ai, many(40))
        eventually(lambda: len(engine.inside) == 1)
        (first,) = engine.inside  # whichever was read soonest
        threads = [
            threading.Thread(target=server.chat, kwargs=asking("interactive")) for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        places = server.app.state.api.chats.places
        eventually(lambda: places.waiting == 6)
        engine.open.set()
        for thread in threads:
            thread.join()
        assert ended(ai, batch).request_counts.completed == 40
        names = [str(one.messages[0].content) for one in engine.requests]
        assert names[:7] == [first, *["interactive"] * 6]


def test_cancelling_ends_a_batch_with_what_is_done(tmp_path: Path) -> None:
    """What is being answered is still written; nothing more is asked."""
    engine = Gate()
    with (
        served(profile(tmp_path, batches={"concurrency": 2}), Keys(), engine) as server,
        client(server.root) as ai,
    ):
        batch, later = begun(ai, many(20)), begun(ai, many(21))
        eventually(lambda: len(engine.inside) == 2)
        assert ai.batches.cancel(batch.id).status == "cancelling"
        later = ended(ai, ai.batches.cancel(later.id))
        assert (later.status, later.output_file_id) == ("cancelled", None)
        engine.open.set()
        batch = ended(ai, batch)
        assert batch.status == "cancelled"
        assert batch.cancelling_at <= batch.cancelled_at
        assert set(outcomes(ai, batch.output_file_id)) == {"r0", "r1"}
        assert len(engine.requests) == 2


def test_a_batch_that_is_cancelled_after_a_restart_counts_what_is_done(tmp_path: Path) -> None:
    """Before its turn has come again."""
    store = BatchStore(tmp_path, ttl_seconds=60, max_bytes=10**6)
    first, second = (store.add("", "file-x", jsonl(many(3)), None) for _ in range(2))
    second.created_at += 1
    for batch in (first, second):
        batch.total = 3
        batch.reach("in_progress")
        store.save(batch)
    store.append(second, b'{"custom_id": "r0"}\n', failed=False)
    store.append(second, b'{"custom_id": "r1"}\n', failed=True)
    store.close()
    engine = Gate()
    with served(profile(tmp_path), Keys(), engine) as server, client(server.root) as ai:
        ai.batches.list()
        eventually(lambda: len(engine.inside) > 0)
        batch = ended(ai, ai.batches.cancel(second.id))
        assert batch.status == "cancelled"
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (3, 1, 1)
        engine.open.set()
        ended(ai, ai.batches.retrieve(first.id))


def test_what_is_not_asked_in_time_is_told_as_expired(tmp_path: Path) -> None:
    """Every request has an outcome, in one file or the other."""
    engine = Gate()
    with (
        served(profile(tmp_path, batches={"concurrency": 2}), Keys(), engine) as server,
        client(server.root) as ai,
    ):
        batch = begun(ai, many(6))
        eventually(lambda: len(engine.inside) == 2)
        server.app.state.batches.store.batches[batch.id].expires_at = int(time.time()) - 1
        engine.open.set()
        batch = ended(ai, batch)
        assert batch.status == "expired"
        done, left = (outcomes(ai, one) for one in (batch.output_file_id, batch.error_file_id))
        assert set(done) | set(left) == set(many(6))
        assert {one["error"]["code"] for one in left.values()} == {"batch_expired"}


def test_so_many_unfinished_batches_are_taken(tmp_path: Path) -> None:
    """One more is told to come again."""
    engine = Gate()
    with (
        served(profile(tmp_path, batches={"max_unfinished": 1}), Keys(), engine) as server,
        client(server.root) as ai,
    ):
        batch = begun(ai, many(1))
        with pytest.raises(openai.RateLimitError):
            begun(ai, many(2))
        engine.open.set()
        ended(ai, batch)
        assert ended(ai, begun(ai, many(2))).status == "completed"


def test_batches_that_are_made_at_once_count_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow disk too."""
    with (
        served(profile(tmp_path, batches={"max_unfinished": 1}), Keys(), Gate()) as server,
        client(server.root) as ai,
    ):
        files = server.app.state.batches.store.files
        read = files.read

        def slowly(file_id: str, owner: str) -> bytes:
            time.sleep(0.2)
            return bytes(read(file_id, owner))

        file = ai.files.create(file=("in.jsonl", jsonl(many(1))), purpose="batch")
        monkeypatch.setattr(files, "read", slowly)
        with ThreadPoolExecutor(4) as pool:
            made = [pool.submit(begun_from, ai, file.id) for _ in range(4)]
            refused = [one.exception(60) for one in made]
        assert sum(error is None for error in refused) == 1
        assert {type(error) for error in refused if error} == {openai.RateLimitError}


def refuse(number: int) -> Callable[..., Any]:
    """A call of a disk that is full, or broken."""

    def call(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


def saved(store: BatchStore, batch: Any) -> Any:
    """What a restart would find."""
    return json.loads((store.folder / batch.id / "batch.json").read_bytes())


@pytest.mark.parametrize("at", ["in_progress", "finalizing", "completed"])
def test_a_batch_waits_for_room_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Full once it has been read, while its answers are filed, or at its last word: it goes on.

    Nothing is asked twice, and the end is on disk.
    """
    monkeypatch.setattr(runner, "PAUSE_SECONDS", 0.01)
    with served(profile(tmp_path), Keys()) as server, client(server.root) as ai:
        store = server.app.state.batches.store
        save, add = store.save, store.files.add
        full, room = threading.Event(), threading.Event()

        def with_room(write: Callable[..., Any], status: str, *given: Any, **more: Any) -> Any:
            if status != at or room.is_set():
                return write(*given, **more)
            full.set()
            return refuse(errno.ENOSPC)()

        file = ai.files.create(file=("in.jsonl", jsonl(many(3))), purpose="batch")
        monkeypatch.setattr(store, "save", lambda batch: with_room(save, batch.status, batch))
        monkeypatch.setattr(store.files, "add", partial(with_room, add, "finalizing"))
        batch = begun_from(ai, file.id)
        assert full.wait(60)
        room.set()
        batch = ended(ai, batch)
        assert batch.status == "completed"
        assert set(outcomes(ai, batch.output_file_id)) == set(many(3))
        assert len(server.engine.requests) == 3
        eventually(lambda: saved(store, batch)["status"] == "completed")


def test_an_answer_waits_for_room_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is kept meanwhile: asked for again it would be paid for twice."""
    monkeypatch.setattr(runner, "PAUSE_SECONDS", 0.01)
    with served(profile(tmp_path), Keys()) as server, client(server.root) as ai:
        store = server.app.state.batches.store
        append, refused = store.append, []

        def with_room(batch: Batch, line: bytes, *, failed: bool) -> None:
            if len(refused) < 20:
                refused.append(line)
                refuse(errno.ENOSPC)()
            append(batch, line, failed=failed)

        monkeypatch.setattr(store, "append", with_room)
        batch = ended(ai, begun(ai, many(3)))
        assert (batch.status, len(refused)) == ("completed", 20)
        assert batch.request_counts.completed == 3
        assert set(outcomes(ai, batch.output_file_id)) == set(many(3))
        assert len(server.engine.requests) == 3


def test_a_batch_is_saved_by_two_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work on it and its cancellation: neither takes the other's file away, on a slow disk."""
    fsync, slow, goes_on = os.fsync, threading.Event(), threading.Event()

    def slowly(target: int) -> None:
        if not slow.is_set():
            slow.set()
            goes_on.wait(60)
        fsync(target)

    with served(profile(tmp_path), Keys()) as server, client(server.root) as ai:
        store = server.app.state.batches.store
        batch = store.batches[ended(ai, begun(ai, many(1))).id]
        eventually(lambda: saved(store, batch)["status"] == "completed")
        monkeypatch.setattr(os, "fsync", slowly)
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(store.save, batch)
            assert slow.wait(60)
            second = pool.submit(store.save, batch)
            wait([second], 0.5)  # alone it has ended by then
            goes_on.set()
            first.result(60)
            second.result(60)
        assert saved(store, batch)["status"] == "completed"


def test_an_outcome_that_has_no_room_takes_no_other_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two come at once, the first is cut short, and the second had room."""
    store = BatchStore(tmp_path, ttl_seconds=60, max_bytes=10**6)
    batch = store.add("", "file-x", jsonl(many(2)), None)
    write, begun, goes_on = os.write, threading.Event(), threading.Event()

    def cut_short(target: int, data: bytes) -> int:
        if b"r0" not in data:
            return write(target, data)
        begun.set()
        goes_on.wait(60)
        return write(target, data[:5])

    monkeypatch.setattr(os, "write", cut_short)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(store.append, batch, b'{"custom_id": "r0"}\n', failed=False)
        assert begun.wait(60)
        second = pool.submit(store.append, batch, b'{"custom_id": "r1"}\n', failed=False)
        wait([second], 0.5)  # alone it has ended by then
        goes_on.set()
        with pytest.raises(OSError, match="no room"):
            first.result(60)
        second.result(60)
    assert store.settled(batch) == {"r1"}
    store.close()


def test_a_batch_that_is_being_made_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written in a thread while the event loop goes over those that are there."""
    store = BatchStore(tmp_path, ttl_seconds=60, max_bytes=10**6)
    batch = store.add("", "file-x", b"", None)
    store.batches[batch.id] = batch

    def meanwhile(_: Batch) -> bool:
        store.add("", "file-y", b"", None)
        return True

    monkeypatch.setattr(Batch, "unfinished", property(meanwhile))
    assert store.unfinished() == [batch]
    store.close()


def test_what_expires_on_a_full_disk_is_told_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request once, those that were written down before it was full included."""
    monkeypatch.setattr(runner, "PAUSE_SECONDS", 0.01)
    with served(profile(tmp_path), Keys()) as server, client(server.root) as ai:
        store = server.app.state.batches.store
        monkeypatch.setattr(store_module, "WINDOW_SECONDS", 0)
        append, written, full = store.append, [], threading.Event()

        def with_room(batch: Batch, line: bytes, *, failed: bool) -> None:
            if len(written) == 2 and not full.is_set():
                full.set()
                refuse(errno.ENOSPC)()
            written.append(line)
            append(batch, line, failed=failed)

        monkeypatch.setattr(store, "append", with_room)
        batch = ended(ai, begun(ai, many(5)))
        assert (batch.status, full.is_set()) == ("expired", True)
        assert batch.request_counts.failed == 5
        assert set(outcomes(ai, batch.error_file_id)) == set(many(5))


@pytest.mark.parametrize("broken", ["input", "add"])
def test_a_batch_whose_files_cannot_be_kept_fails_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """While it is read, or while its answers are filed: neither ``validating`` for ever nor anew.

    The next server does not go on with it, and its key's next batch is worked on.
    """
    with served(profile(tmp_path), Keys()) as server, client(server.root) as ai:
        store = server.app.state.batches.store
        file = ai.files.create(file=("in.jsonl", jsonl(many(2))), purpose="batch")
        with monkeypatch.context() as disk:
            disk.setattr(store.files if broken == "add" else store, broken, refuse(errno.EIO))
            batch = ended(ai, begun_from(ai, file.id))
        assert batch.status == "failed"
        (fault,) = batch.errors.data
        assert (fault.code, "Input/output error" in fault.message) == ("storage_error", True)
        eventually(lambda: saved(store, batch)["status"] == "failed")
        assert ended(ai, begun(ai, many(1))).status == "completed"
    with served(profile(tmp_path), Keys()) as server, client(server.root) as ai:
        assert ai.batches.retrieve(batch.id).errors.data[0].code == "storage_error"
        assert ended(ai, begun(ai, many(1))).status == "completed"
        assert len(server.engine.requests) == 1


def test_outcomes_that_exceed_what_is_kept_name_the_limit(tmp_path: Path) -> None:
    """All files together may hold so many bytes, and one alone is more."""
    small = {"max_bytes": 1000, "max_file_bytes": 1000}
    with served(profile(tmp_path, batches=small), Keys()) as server, client(server.root) as ai:
        batch = ended(ai, begun(ai, many(5)))
        assert batch.status == "failed"
        (fault,) = batch.errors.data
        assert "exceed the 1000 of all files, batches.max_bytes" in fault.message


def test_a_folder_serves_one_server(tmp_path: Path) -> None:
    """Two would ask everything twice."""
    store = batch_store(profile(tmp_path))
    assert store is not None
    with pytest.raises(PreflightError, match="another server"):
        batch_store(profile(tmp_path))
    store.close()
    again = batch_store(profile(tmp_path))
    assert again is not None
    again.close()


def test_a_torn_outcome_is_taken_away(tmp_path: Path) -> None:
    """What a crash cut off is asked again, and the file goes on after its last whole line."""
    store = BatchStore(tmp_path, ttl_seconds=60, max_bytes=10**6)
    batch = store.add("", "file-x", jsonl(many(3)), None)
    store.append(batch, b'{"custom_id": "r0"}\n', failed=False)
    store.append(batch, b'{"custom_id": "r1"}\n', failed=True)
    store.append(batch, b'{"custom_id": "r2", "resp', failed=False)
    store.close()
    again = BatchStore(tmp_path, ttl_seconds=60, max_bytes=10**6)
    found = again.find(batch.id, "")
    assert again.settled(found) == {"r0", "r1"}
    assert (found.completed, found.failed) == (1, 1)
    assert again.outcomes(found, failed=False).read_bytes() == b'{"custom_id": "r0"}\n'
    again.close()


def test_a_batch_that_was_never_finished_being_made_is_gone(tmp_path: Path) -> None:
    """Its client was never told of it; what is no batch's is left alone."""
    cut = tmp_path / f"batch_{'0' * 32}"
    cut.mkdir()
    (cut / "input.jsonl").write_bytes(b"x")
    (tmp_path / "notes").mkdir()
    store = BatchStore(tmp_path, ttl_seconds=60, max_bytes=10**6)
    assert not store.batches
    assert not cut.exists()
    assert (tmp_path / "notes").is_dir()
    store.close()


def test_finished_batches_leave_after_their_time(tmp_path: Path) -> None:
    """And unfinished ones stay, however old."""
    store = BatchStore(tmp_path, ttl_seconds=60, max_bytes=10**6)
    old, new, waiting = (store.add("", "file-x", b"", None) for _ in range(3))
    store.batches = {batch.id: batch for batch in (old, new, waiting)}
    for batch in (old, new):
        batch.reach("completed")
    old.reached["completed"] -= 61
    waiting.created_at -= 10**6
    assert store.clear() == [tmp_path / old.id]
    assert set(store.batches) == {new.id, waiting.id}
    store.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_batch_survives_the_end_of_its_server(
    tmp_path: Path, launch_server: Callable[..., ServerProcess], number: int
) -> None:
    """After kill -9, or a drain, and a restart every request has one outcome.

    40 words of 50 ms each, two at a time: the first server would take half a minute.
    """
    folder = tmp_path / "batches"

    def launched(concurrency: int) -> ServerProcess:
        server = launch_server(
            "up", "batches.enabled=true", f"batches.folder={folder}",
            f"batches.concurrency={concurrency}", "server.shutdown_timeout=0.3",
            command=[sys.executable, "-m", "tests.serve_fake"],
            environment={"XDG_STATE_HOME": str(tmp_path)},
        )  # fmt: skip
        server.wait_ready()
        return server

    server = launched(2)
    with client(server.root) as ai:
        batch = begun(ai, many(30))
        eventually(lambda: ai.batches.retrieve(batch.id).request_counts.completed > 0)
        server.process.send_signal(number)
        assert server.ended() == (0 if number == signal.SIGTERM else -number)
    done = (folder / batch.id / "output.jsonl").read_bytes().count(b"\n")
    assert 0 < done < 30
    with client(launched(30).root) as ai:
        batch = ended(ai, ai.batches.retrieve(batch.id))
        assert batch.status == "completed"
        assert batch.request_counts.completed == 30
        assert set(outcomes(ai, batch.output_file_id)) == set(many(30))
        assert batch.error_file_id is None


def test_a_server_that_loses_its_key_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of a key that was revoked meanwhile fail with 401."""
    monkeypatch.setattr("qwen2vl_serve.auth.keys.LOOK_SECONDS", 0.0)
    file = KeysFile(tmp_path / "keys.json")
    key = file.add("ada")
    file.add("bob")
    engine = Gate()
    server: Served
    chosen = profile(tmp_path / "b", batches={"concurrency": 1})
    with served(chosen, Keys(file=file), engine) as server, client(server.root, key) as ai:
        batch = begun(ai, many(2))
        eventually(lambda: len(engine.inside) == 1)
        file.revoke("ada")
        engine.open.set()
        store = server.app.state.batches.store
        eventually(lambda: not store.find(batch.id, "ada").unfinished)
        lines = store.outcomes(store.find(batch.id, "ada"), failed=True).read_text().splitlines()
        (told,) = map(json.loads, lines)
        assert told["response"]["status_code"] == 401
