"""The client's calls against a server on loopback: requests, answers, turns."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qwen2vl_client
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from qwen2vl_client import (
    SYSTEM_PROMPT,
    APIConnectionError,
    APIResponseError,
    BadRequestError,
    Client,
    Conversation,
    InvalidArgumentError,
    NotFoundError,
    Usage,
)
from qwen2vl_client.answer import Model
from qwen2vl_client.flows import Flows, Question
from qwen2vl_client.steps import Reply

from tests import stub_server as stub

CLIENTS = Path(qwen2vl_client.__file__).parents[1]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QWEN2VL_BASE_URL", "QWEN2VL_API_KEY", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)


@contextlib.contextmanager
def asking(
    *script: stub.Step, timeout: float = 60, max_retries: int = 2, api_key: str | None = None
) -> Iterator[tuple[Client, stub.Stub]]:
    with (
        stub.running(*script) as server,
        Client(
            server.url, api_key, "stub-model", timeout=timeout, max_retries=max_retries
        ) as client,
    ):
        yield client, server


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class TestPackage:
    def test_it_is_importable_with_requests_alone(self) -> None:
        """Neither the server nor Pillow, torch or any other package is touched by the import."""
        program = (
            "import sys; sys.path.insert(0, sys.argv[1]); import qwen2vl_client, "
            "qwen2vl_client.cli\n"
            "heavy = {'PIL', 'torch', 'vllm', 'numpy', 'pydantic', 'fastapi', 'qwen2vl_serve', "
            "'openai'}\n"
            "print(sorted(heavy & set(sys.modules)), qwen2vl_client.__file__)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(CLIENTS)],
            capture_output=True,
            text=True,
            check=True,
            cwd="/",
        )
        assert done.stdout.split() == ["[]", str(CLIENTS / "qwen2vl_client/__init__.py")]

    def test_the_server_package_need_not_exist(self, tmp_path: Path) -> None:
        """With every qwen2vl_serve module refused, a call still works from end to end."""
        program = (
            "import sys\nsys.path.insert(0, sys.argv[1])\n"
            "sys.modules['qwen2vl_serve'] = None\nsys.modules['PIL'] = None\n"
            "from qwen2vl_client import Client\n"
            "print(Client(sys.argv[2]).chat('hi'))"
        )
        with stub.running(stub.completion("hello")) as server:
            done = subprocess.run(
                [sys.executable, "-c", program, str(CLIENTS), server.url],
                capture_output=True,
                text=True,
                check=True,
            )
        assert done.stdout == "hello\n"

    def test_its_version_is_the_distribution_s(self) -> None:
        """Client and server are released together, under one ``__version__``."""
        import qwen2vl_serve

        assert qwen2vl_client.__version__ == qwen2vl_serve.__version__

    @pytest.mark.parametrize("folder", [CLIENTS, CLIENTS.parent])
    def test_it_asks_for_what_it_calls(self, folder: Path) -> None:
        """``HTTPResponse.shutdown`` came with urllib3 2.3; requests is content with 1.26."""
        project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
        needed = {one.name: one.specifier for one in map(Requirement, project["dependencies"])}
        for version, enough in (("1.26.20", False), ("2.2.3", False), ("2.3.0", True)):
            assert needed["urllib3"].contains(version) is enough

    def test_it_is_typed(self) -> None:
        """The package holds ``py.typed``, so type checkers read its annotations (PEP 561)."""
        assert (CLIENTS / "qwen2vl_client" / "py.typed").exists()


class TestChat:
    def test_the_request_is_the_tutorial_s(self) -> None:
        """Without options a call sends the tutorial's sampling fields and system prompt."""
        with asking(stub.completion()) as (client, server):
            client.chat("Hello")
        (request,) = server.requests
        assert (request.method, request.path) == ("POST", "/v1/chat/completions")
        assert request.body == {
            "model": "stub-model",
            "messages": [
                {
                    "role": "system",
                    "content": "You are Qwen, created by Alibaba Cloud. "
                    "You are a helpful assistant.",
                },
                {"role": "user", "content": "Hello"},
            ],
            "temperature": 0.7,
            "top_p": 0.8,
            "repetition_penalty": 1.05,
            "max_tokens": 1024,
        }
        assert "authorization" not in request.headers

    def test_the_answer_carries_what_the_server_said(self) -> None:
        """Usage, finish reason, model and request id are kept; ``str`` and ``in`` see the text."""
        with asking(stub.completion("一个红色的圆。")) as (client, _):
            answer = client.chat("What is it?")
        assert f"{answer}" == answer.text == "一个红色的圆。"
        assert "红色" in answer
        assert answer.usage == Usage(30, 5, 35)
        assert (answer.finish_reason, answer.model) == ("stop", "stub-model")
        assert answer.request_id == stub.REQUEST_ID
        assert 0 < answer.seconds < 10
        assert answer.raw["id"] == "chatcmpl-1"

    @pytest.mark.parametrize("count", ["x", [1], float("inf")])
    def test_a_usage_without_counts_is_a_typed_error(self, count: object) -> None:
        """Of whatever speaks OpenAI's API half: never Python's own ``ValueError``."""
        with pytest.raises(APIResponseError, match="usage holds no counts"):
            Usage.from_raw({"prompt_tokens": count})

    def test_sampling_overrides_defaults_and_none_leaves_out(self) -> None:
        """Zero is sent as it is; ``max_completion_tokens`` drops the default ``max_tokens``."""
        with asking(stub.completion()) as (client, server):
            client.chat("Hi", temperature=0, top_p=None, seed=7, stop=["."])
            client.chat("Hi", max_completion_tokens=9)
        body, other = server.requests[0].body, server.requests[1].body
        assert body["temperature"] == 0
        assert "top_p" not in body
        assert (body["seed"], body["stop"]) == (7, ["."])
        assert other["max_completion_tokens"] == 9
        assert "max_tokens" not in other

    def test_earlier_messages_come_before_the_question(self) -> None:
        """A system message among them stands for the client's own; ``system=None`` sends none."""
        earlier = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        with asking(stub.completion()) as (client, server):
            client.chat("c", messages=earlier, system="S")
            client.chat(messages=[{"role": "system", "content": "own"}, *earlier])
            client.chat("c", system=None)
        said = [
            [(turn["role"], turn["content"]) for turn in request.body["messages"]]
            for request in server.requests
        ]
        assert said[0] == [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c")]
        assert said[1] == [("system", "own"), ("user", "a"), ("assistant", "b")]
        assert said[2] == [("user", "c")]

    def test_a_developer_message_is_a_system_message(self) -> None:
        """The client's own prompt is not put before it, and ``system=`` with it is refused."""
        told = [{"role": "developer", "content": "own"}, {"role": "user", "content": "a"}]
        with asking(stub.completion()) as (client, server):
            client.chat(messages=told)
            with pytest.raises(InvalidArgumentError, match="drop one of the two"):
                client.chat(messages=told, system="S")
        assert [request.body["messages"] for request in server.requests] == [told]

    def test_the_model_is_asked_of_the_server_once(self) -> None:
        """Eight calls at once read the list of models once, and all name the model it offers."""
        with stub.running(stub.completion()) as server, Client(server.url) as client:
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(client.chat, ["Hi"] * 8))
            assert client.model == "stub-model"
        assert sum(request.method == "GET" for request in server.requests) == 1
        posted = [request.body["model"] for request in server.requests if request.body]
        assert posted == ["stub-model"] * 8

    def test_another_model_after_a_restart_is_found(self) -> None:
        """The name that the server offered may be unknown to it by now: it is asked once more."""
        script = [stub.completion(), stub.failure(404, "model_not_found"), stub.completion("new")]
        with stub.running(*script) as server, Client(server.url) as client:
            client.chat("x")
            server.models[0]["id"] = "other"
            assert client.chat("x").text == "new"
            assert client.model == "other"
        posted = [request.body["model"] for request in server.requests if request.body]
        assert posted == ["stub-model", "stub-model", "other"]

    def test_models_are_forgotten_once_by_calls_at_the_same_time(self) -> None:
        """A late refusal of the old name costs no further list; nor is one lost on its way."""
        reads = []
        flows = Flows("http://127.0.0.1:9/v1", None, 0, None)

        def listed(step: Any, name: str) -> list[Model]:
            """Read the models, as a transport does for a call that has to."""
            try:
                next(step.flow)
                reads.append(name)
                step.flow.send(Reply({"data": [{"id": name}]}))
            except StopIteration as end:
                return list(end.value)
            raise AssertionError

        def posted(call: Any) -> str:
            return str(json.loads(call.body)["model"])

        def begun() -> tuple[Any, Any]:
            flow = flows.chat(Question("x"), None, None, {})
            return flow, next(flow)

        gone = NotFoundError("no", status=404, code="model_not_found")
        first, step = begun()
        assert posted(first.send(listed(step, "old"))) == "old"
        late, call = begun()
        assert posted(call) == "old"
        assert posted(first.send(listed(first.throw(gone), "new"))) == "new"
        assert posted(late.throw(gone)) == "new"
        assert reads == ["old", "new"]

        flows = Flows("http://127.0.0.1:9/v1", None, 0, None)
        waiting, step = begun()
        models = listed(step, "old")
        other, _ = begun()
        other.throw(gone)
        assert posted(waiting.send(models)) == "old"

    @pytest.mark.parametrize("given", [None, "mine"])
    def test_a_model_that_stays_unknown_is_an_error(self, given: str | None) -> None:
        """A name of the caller's own is no other's business."""
        with (
            stub.running(stub.failure(404, "model_not_found")) as server,
            Client(server.url, model=given) as client,
            pytest.raises(NotFoundError),
        ):
            client.chat("x")
        posted = [request.body["model"] for request in server.requests if request.body]
        assert posted == (["mine"] if given else ["stub-model"] * 2)

    def test_models_are_listed_with_their_window(self) -> None:
        """Its ``max_model_len`` is what the server tells, and a model prints as its id."""
        with asking(stub.completion()) as (client, _):
            (model,) = client.models()
        assert (str(model), model.max_model_len) == ("stub-model", 2048)

    def test_one_connection_serves_many_calls(self) -> None:
        """Whole answers, errors and streams leave their connection to the next call."""
        script = [
            stub.completion(),
            stub.failure(400),
            stub.events(stub.whole_stream("a")),
            stub.completion(),
        ]
        with asking(*script) as (client, server):
            client.chat("1")
            with pytest.raises(BadRequestError):
                client.chat("2")
            assert "".join(client.stream("3")) == "a"
            client.chat("4")
        assert len({request.connection for request in server.requests}) == 1

    def test_numbers_of_numpy_are_numbers(self) -> None:
        """As a field, a timeout or an option of the client, they go as Python's own do."""
        with stub.running(stub.completion()) as server:
            retries: Any = np.int64(1)
            with Client(server.url, max_retries=retries, upload_above=retries) as client:
                given: Any = {"seed": np.int64(7), "temperature": np.float32(0.5)}
                client.chat("x", timeout=np.float32(20), **given)
        body = server.requests[-1].body
        assert (body["seed"], body["temperature"]) == (7, 0.5)

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            ({}, "nothing to ask"),
            ({"text": b"x"}, "text must be a string, not bytes"),
            (
                {"text": "x", "temperature": float("nan")},
                "temperature=nan cannot be written as JSON",
            ),
            ({"text": "x", "stop": {1}}, "stop={1} cannot be written as JSON"),
            ({"text": "x", "ignore_eos": np.True_}, "ignore_eos=np.True_ cannot be written as"),
            ({"text": "half \ud83d"}, "surrogate"),
            ({"text": "x", "stream": True}, "use stream()"),
            ({"text": "x", "timeout": 0}, "timeout=0"),
            ({"text": "x", "timeout": True}, "timeout=True"),
            (
                {"text": "x", "system": "A", "messages": [{"role": "system", "content": "B"}]},
                "drop one",
            ),
        ],
    )
    def test_a_call_that_cannot_be_sent_is_refused_here(
        self, call: dict[str, object], words: str
    ) -> None:
        """The error says what is wrong with the call, and no request reaches the server."""
        with (
            asking(stub.completion()) as (client, server),
            pytest.raises(InvalidArgumentError) as caught,
        ):
            client.chat(**call)  # type: ignore[arg-type]
        assert words in str(caught.value)
        assert server.requests == []

    @pytest.mark.parametrize("method", ["chat", "stream", "explain"])
    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"messages": "hi"}, "messages='hi' must be a list of messages"),
            ({"messages": 5}, "messages=5 must be a list"),
            ({"messages": {"role": "user"}}, "must be a list"),
            ({"messages": ["hi"]}, "messages[0]='hi' must be a mapping"),
            ({"image": "a.jpg"}, "image= is no parameter and no field of the API: use images="),
            ({"text": "x", "Picture": "a.jpg"}, "use images="),
            ({"text": "x", "img": "a.jpg"}, "use images="),
            ({"text": "x", "imagse": "a.jpg"}, "use images="),
            ({"text": "x", "file": "a.jpg"}, "use images="),
            ({"text": "x", "video": "a.mp4"}, "use videos="),
            ({"text": "x", "message": []}, "use messages="),
            ({"prompt": "x"}, "use text="),
        ],
    )  # fmt: skip
    def test_what_would_be_lost_silently_is_refused(
        self, method: str, given: dict[str, Any], words: str
    ) -> None:
        """Messages that are none, and keywords that a server would ignore, a picture with them."""
        with (
            asking(stub.completion()) as (client, server),
            pytest.raises(InvalidArgumentError) as caught,
        ):
            getattr(client, method)(**{"text": "x", **given})
        assert words in str(caught.value)
        assert server.requests == []

    def test_a_field_that_nobody_meant_otherwise_still_goes_through(self) -> None:
        """Of other servers, and ``self``, which is no parameter either."""
        fields = {"user": "u", "models": ["a"], "prompt_logprobs": 1, "mode": "m", "self": 1}
        with asking(stub.completion()) as (client, server):
            client.chat("x", **fields)  # type: ignore[arg-type]
        assert fields.items() <= server.requests[0].body.items()

    def test_a_stream_yields_one_text_only(self) -> None:
        """With ``n=2`` the call to ``stream`` itself is refused, not the reading of its text."""
        with asking(stub.completion()) as (client, _), pytest.raises(InvalidArgumentError):
            client.stream("x", n=2)

    def test_other_names_reach_the_server(self) -> None:
        """Sampling names this version does not list are the server's to judge."""
        with asking(stub.completion()) as (client, server):
            client.chat("x", min_pixels=3136)  # type: ignore[call-arg]
        assert server.requests[0].body["min_pixels"] == 3136


class TestConversation:
    def test_each_turn_is_sent_with_those_before_it(self) -> None:
        """Pictures and answers too; the conversation's fields hold, and a call adds its own."""
        with asking(stub.completion("one"), stub.completion("two")) as (client, server):
            conversation = Conversation(client, system="S", temperature=0)
            conversation.ask("first", images=[b"\xff\xd8\xffjpeg"])
            assert conversation.ask("second", max_tokens=5).text == "two"
        body = server.requests[1].body
        assert [turn["role"] for turn in body["messages"]] == [
            "system",
            "user",
            "assistant",
            "user",
        ]
        assert body["messages"][1] == server.requests[0].body["messages"][1]
        assert body["messages"][2] == {"role": "assistant", "content": "one"}
        assert (body["temperature"], body["max_tokens"]) == (0, 5)
        assert conversation.messages == [
            *body["messages"],
            {"role": "assistant", "content": "two"},
        ]

    def test_the_system_prompt_is_the_tutorial_s_and_can_be_none(self) -> None:
        """A new conversation holds that one message, or with ``system=None`` nothing."""
        with asking(stub.completion()) as (client, _):
            first = {"role": "system", "content": SYSTEM_PROMPT}
            assert Conversation(client).messages == [first]
            assert Conversation(client, system=None).messages == []

    def test_messages_is_a_copy(self) -> None:
        """Clearing the list or changing a message in it leaves the conversation as it was."""
        with asking(stub.completion()) as (client, _):
            conversation = Conversation(client)
            conversation.messages.clear()
            conversation.messages[0]["content"] = "changed"
            assert conversation.messages[0]["content"] == SYSTEM_PROMPT

    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.sampled_from(["ask", "fail", "stream", "closed", "cut", "empty"])))
    def test_only_whole_turns_enter_the_history(self, course: list[str]) -> None:
        """In any order of successes and failures, turns come in pairs and none is half."""
        steps = {
            "ask": stub.completion("a"),
            "fail": stub.failure(400),
            "stream": stub.events(stub.whole_stream("b")),
            "closed": stub.events(stub.whole_stream("c", "d", "e")),
            "cut": stub.events([stub.chunk("f")], ends=False),
        }
        script = [steps[move] for move in course if move != "empty"]
        expected: list[tuple[str, str]] = []
        with asking(*script, stub.completion()) as (client, _):
            conversation = Conversation(client, system=None)
            for number, move in enumerate(course):
                question = f"q{number}"
                if move == "ask":
                    conversation.ask(question)
                    expected += [("user", question), ("assistant", "a")]
                elif move == "stream":
                    list(conversation.stream(question))
                    expected += [("user", question), ("assistant", "b")]
                elif move == "closed":
                    with conversation.stream(question) as stream:
                        next(iter(stream))
                elif move == "empty":
                    with pytest.raises(InvalidArgumentError):
                        conversation.ask()
                elif move == "cut":
                    with pytest.raises(APIConnectionError):
                        list(conversation.stream(question))
                else:
                    with pytest.raises(BadRequestError):
                        conversation.ask(question)
            said = [(turn["role"], turn["content"]) for turn in conversation.messages]
        assert said == expected


def test_one_client_serves_many_threads() -> None:
    """Each caller gets the answer to its own question."""

    def echo(handler: stub.Handler) -> None:
        thread_request = next(
            request
            for request in reversed(handler.stub.requests)
            if request.connection == handler.client_address
        )
        stub.completion(thread_request.body["messages"][-1]["content"])(handler)

    questions = [f"question {number}" for number in range(200)]
    with asking(echo) as (client, server), ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda question: client.chat(question).text, questions))
        connections = {request.connection for request in server.requests}
    assert answers == questions
    assert len(connections) <= 32
