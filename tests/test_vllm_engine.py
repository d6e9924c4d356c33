"""The seam on the real engine: what the official OpenAI client sees, and what goes wrong."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import requests
from PIL import Image, ImageDraw

from qwen2vl_serve.demo.checkpoint import MODEL_FOLDER
from qwen2vl_serve.engine import Usage
from qwen2vl_serve.errors import InvalidValue
from qwen2vl_serve.machine import hardware
from qwen2vl_serve.plan import plan_for
from qwen2vl_serve.plan.capacity import capacity
from qwen2vl_serve.profile import load_profile
from qwen2vl_serve.protocol.chat import UNSUPPORTED, ChatRequest
from tests.conftest import BOOT_SECONDS, ServerProcess
from tests.served import eventually


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    data = io.BytesIO()
    image.save(data, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


def drawing(colour: str, shape: str = "ellipse", size: tuple[int, int] = (280, 280)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    width, height = size
    box = (width // 4, height // 4, 3 * width // 4, 3 * height // 4)
    getattr(ImageDraw.Draw(image), shape)(box, fill=colour)
    return image


def picture(colour: str = "red", shape: str = "ellipse") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(drawing(colour, shape))}}


def asked(text: str, *parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


def say(client: openai.OpenAI, messages: list[Any], **fields: Any) -> Any:
    fields = {"model": "demo", "max_tokens": 24, "temperature": 0, **fields}
    return client.chat.completions.create(messages=messages, **fields)


def colour_of(client: openai.OpenAI, colour: str) -> str:
    answer = say(client, asked("What colour is the circle?", picture(colour)))
    return str(answer.choices[0].message.content)


@pytest.mark.parametrize("colour", ["red", "green", "blue"])
def test_a_picture_goes_in_and_an_answer_comes_out(client: openai.OpenAI, colour: str) -> None:
    """The demo model names the colour of a circle that Pillow drew."""
    assert colour in colour_of(client, colour).lower()


def test_the_kv_cache_is_as_large_as_planned(server: ServerProcess) -> None:
    """The planner's tokens of the demo profile against what vLLM says that it made, within 5 %."""
    text = "\n".join(server.lines)
    made = re.search(r"KV cache holds ([\d,]+) tokens, ([\d.]+) full windows", text)
    assert made is not None, text
    plan = plan_for(load_profile("demo"), (), host=hardware.host())
    assert plan.kv_tokens.likely == pytest.approx(int(made[1].replace(",", "")), rel=0.05)
    windows = capacity(plan, plan.deployment.max_model_len).by_cache
    assert windows == pytest.approx(float(made[2]), rel=0.05)


def test_questions_may_be_chinese(client: openai.OpenAI) -> None:
    """The same picture, asked in Chinese, is answered in Chinese."""
    answer = say(client, asked("圆形是什么颜色？", picture("red")))
    assert "红" in answer.choices[0].message.content


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    """Greedy decoding gives one text either way; usage comes in the last chunk when asked for."""
    messages = asked("What is in the picture?", picture("blue"))
    whole = say(client, messages)
    chunks = list(say(client, messages, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    finish = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert finish[-1] == whole.choices[0].finish_reason


def test_a_picture_costs_its_visual_tokens(client: openai.OpenAI) -> None:
    """280 × 280 pixels are 64 tokens of 28 × 28 under the demo's bounds, and two markers."""
    text = say(client, asked("Hello")).usage.prompt_tokens
    with_picture = say(client, asked("Hello", picture())).usage.prompt_tokens
    assert with_picture - text == 64 + 2


def test_several_answers_at_once(client: openai.OpenAI) -> None:
    """``n`` answers come with their own index."""
    answer = say(client, asked("Hello"), n=3, temperature=1.0, max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


def test_a_seed_makes_sampling_repeatable(client: openai.OpenAI) -> None:
    """Same seed, same text, at a temperature at which texts differ."""
    texts = [
        say(client, asked("Hello"), seed=seed, temperature=2.0, max_tokens=20)
        .choices[0]
        .message.content
        for seed in (7, 7, 8)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    """The text up to the stop string is returned, with finish_reason stop."""
    whole = colour_of(client, "red")
    word = whole.split()[-1]
    answer = say(client, asked("What colour is the circle?", picture("red")), stop=[word])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == whole[: whole.index(word)]


def test_logprobs_come_with_their_alternatives(client: openai.OpenAI) -> None:
    """Each token has its logprob and as many alternatives as were asked for."""
    answer = say(client, asked("Hello"), logprobs=True, top_logprobs=3, max_tokens=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert all(len(token.top_logprobs) >= 3 and token.logprob <= 0 for token in content)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_is_cut_at_its_limit(client: openai.OpenAI, name: str) -> None:
    """Both of OpenAI's names bound the answer, and it says that it was cut."""
    limits = {"max_tokens": None, name: 2}
    answer = say(client, asked("Describe the picture.", picture()), **limits)
    assert answer.usage.completion_tokens == 2
    assert answer.choices[0].finish_reason == "length"


SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer"}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}


def test_a_json_schema_is_kept(client: openai.OpenAI) -> None:
    """The answer parses, and holds what the schema demands."""
    wanted = {"type": "json_schema", "json_schema": {"name": "fields", "schema": SCHEMA}}
    messages = asked('Give the fields as JSON: "colour", "count".', picture("green"))
    answer = say(client, messages, response_format=wanted, max_tokens=60)
    fields = json.loads(answer.choices[0].message.content)
    assert fields["colour"] in ("red", "green")
    assert isinstance(fields["count"], int)


def test_sampling_fields_have_their_effect(client: openai.OpenAI) -> None:
    """``top_k: 1`` makes any temperature greedy; ``min_tokens`` and ``ignore_eos`` go on."""
    messages = asked("What colour is the circle?", picture("red"))
    greedy = say(client, messages).choices[0].message.content
    hot = say(client, messages, temperature=2.0, extra_body={"top_k": 1})
    assert hot.choices[0].message.content == greedy
    long = say(client, messages, extra_body={"ignore_eos": True}, max_tokens=60)
    assert long.usage.completion_tokens == 60
    fields = {"repetition_penalty": 1.05}
    tutorial = say(client, messages, temperature=0.7, top_p=0.8, extra_body=fields)
    assert tutorial.choices[0].message.content


def test_turns_are_answered_in_their_context(client: openai.OpenAI) -> None:
    """The picture of the first turn is still seen in the second."""
    turns = asked("What shape is it?", picture("blue"))
    first = say(client, turns).choices[0].message.model_dump()
    turns += [first, {"role": "user", "content": "What colour is it?"}]
    assert "blue" in say(client, turns).choices[0].message.content.lower()


def test_formats_and_orientation_are_decoded(client: openai.OpenAI) -> None:
    """JPEG, WebP, GIF and a transparent PNG of the same circle get the same answer."""
    clear = Image.new("RGBA", (280, 280))
    ImageDraw.Draw(clear).ellipse((70, 70, 210, 210), fill=(255, 0, 0, 255))
    urls = [data_url(drawing("red"), kind) for kind in ("JPEG", "WEBP", "GIF")]
    for url in [*urls, data_url(clear)]:
        part = {"type": "image_url", "image_url": {"url": url}}
        answer = say(client, asked("What colour is the circle?", part))
        assert "red" in answer.choices[0].message.content.lower()


def test_a_video_is_its_frames(client: openai.OpenAI) -> None:
    """A list of frames as vLLM's users send it is taken as one video."""
    frames = [drawing("red", size=(140, 140)) for _ in range(4)]
    data = ",".join(data_url(frame, "JPEG").partition(",")[2] for frame in frames)
    part = {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{data}"}}
    answer = say(client, asked("What colour is it?", part))
    assert "red" in answer.choices[0].message.content.lower()


def test_a_client_that_leaves_frees_the_engine(server: ServerProcess) -> None:
    """A closed stream is aborted in the engine, which makes only a part of what was asked for.

    In tokens, as seconds are another number of them on a busy machine; 8 answers take some time.
    """
    body = {"messages": asked("x"), "stream": True, "ignore_eos": True, "max_tokens": 3900}
    body |= {"n": 8, "temperature": 1}
    before = server.metric("vllm:generation_tokens_total")
    answer = requests.post(f"{server.url}/chat/completions", json=body, stream=True, timeout=60)
    assert answer.status_code == 200, answer.text
    next(answer.iter_content(64))
    eventually(lambda: server.metric("vllm:num_requests_running") > 0)
    answer.close()
    eventually(lambda: server.metric("vllm:num_requests_running") == 0)
    assert server.metric("vllm:generation_tokens_total") - before < 8 * 3900


class Endless:
    """Results of an engine that never come."""

    def __aiter__(self) -> Endless:
        return self

    async def __anext__(self) -> None:
        await asyncio.sleep(60)


def test_vllm_does_not_swallow_what_ends_a_whole_answer() -> None:
    """Cancelled by a client that leaves or by ``Call.cut``: not vLLM's 400 about a client.

    vLLM's own method waits for the results here, and answers a cancellation with an error.
    """
    from types import SimpleNamespace

    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

    from qwen2vl_serve.vllm_engine.engine import VLLMEngine

    class Chat(OpenAIServingChat):  # type: ignore[misc]
        def __init__(self) -> None:
            self.model_config = SimpleNamespace(max_model_len=4096)
            self.models = SimpleNamespace(base_model_paths=[])
            self.log_error_stack = False

        async def create_chat_completion(self, request: Any, raw_request: Any = None) -> Any:
            return await self.chat_completion_full_generator(
                request, Endless(), "x", "demo", [], None, SimpleNamespace()
            )

    client = SimpleNamespace(errored=False)
    engine = VLLMEngine.__new__(VLLMEngine)
    engine._client, engine._chat, engine._window = client, Chat(), 4096
    engine._tool_chat, engine._adapters = None, SimpleNamespace(used=nullcontext)
    body = {"messages": [{"role": "user", "content": "Hello"}]}

    async def cut() -> None:
        task = asyncio.create_task(
            engine.complete(ChatRequest.model_validate(body), [], "a", Usage())
        )
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cut())


def rendered(prompt: int, most: int | None, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> Any:
    """Return vLLM's request once a prompt of so many tokens is rendered, in a window of 100."""
    from types import SimpleNamespace

    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

    from qwen2vl_serve.vllm_engine.engine import Chat
    from qwen2vl_serve.vllm_engine.request import as_vllm

    async def render(self: Any, request: Any) -> Any:
        return [], [{"prompt_token_ids": [0] * prompt}]

    monkeypatch.setattr(OpenAIServingChat, "render_chat_request", render)
    chat = Chat.__new__(Chat)
    chat.model_config = SimpleNamespace(max_model_len=100)
    body = {"messages": [{"role": "user", "content": "Hello"}], **fields}
    request = ChatRequest.model_validate(body)
    request.held_to(most)
    asked = as_vllm(request, [], "a")
    asyncio.run(chat.render_chat_request(asked))
    return asked


def test_the_profiles_max_tokens_is_cut_to_what_the_window_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody asked for so much; what a request asks for is never cut."""
    assert rendered(40, 20, monkeypatch).max_tokens == 20
    assert rendered(90, 20, monkeypatch).max_tokens == 10
    assert rendered(90, None, monkeypatch).max_tokens is None
    assert rendered(40, 20, monkeypatch, max_tokens=5).max_tokens == 5
    asked = rendered(40, 20, monkeypatch, max_completion_tokens=5)
    assert (asked.max_tokens, asked.max_completion_tokens) == (None, 5)


def test_more_min_tokens_than_the_window_leaves_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With what is left."""
    assert rendered(40, None, monkeypatch, min_tokens=60).min_tokens == 60
    with pytest.raises(InvalidValue, match=r"min_tokens is 61, .* leaves 60 of the 100") as caught:
        rendered(40, None, monkeypatch, min_tokens=61)
    assert caught.value.param == "min_tokens"


def test_what_vllm_refuses_is_told_in_our_words(caplog: pytest.LogCaptureFixture) -> None:
    """By the error's class, field and value; its text goes to the log alone."""
    from types import SimpleNamespace

    from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
    from vllm.exceptions import VLLMValidationError

    from qwen2vl_serve.errors import APIError
    from qwen2vl_serve.vllm_engine.engine import VLLMEngine

    engine = VLLMEngine.__new__(VLLMEngine)
    engine._client, engine._window = SimpleNamespace(errored=False), 4096
    theirs = "Their words, of /usr/lib"
    caplog.set_level("INFO")

    def answered(code: int, param: str | None) -> APIError:
        info = ErrorInfo(message=theirs, type="x", param=param, code=code)
        with pytest.raises(APIError) as caught:
            engine._raise_error(ErrorResponse(error=info))
        return caught.value

    raised = [
        VLLMValidationError(theirs, parameter="input_tokens", value=5000),
        VLLMValidationError(theirs, parameter="logit_bias", value=[999999]),
        VLLMValidationError(theirs),
        ValueError(theirs),
    ]
    errors = [engine._translated(one) for one in raised]
    errors += [answered(400, "stop_token_ids"), answered(400, None), answered(404, "model")]
    told = [(error.code, error.param) for error in errors]
    assert told == [
        ("context_length_exceeded", "messages"),
        ("invalid_value", "logit_bias"),
        ("invalid_value", None),
        ("invalid_value", None),
        ("invalid_value", "stop_token_ids"),
        ("invalid_value", None),
        ("model_not_found", "model"),
    ]
    assert "5000" in errors[0].message
    assert "4096" in errors[0].message
    assert "999999" in errors[1].message
    assert not [error.message for error in errors if "Their" in error.message]
    assert caplog.text.count("Their words") >= len(errors)


def test_the_log_has_the_cause_of_a_refusal_and_whose_it_was(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At a level that the server writes; a schema that the grammar refuses is named."""
    from types import SimpleNamespace

    from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
    from vllm.exceptions import VLLMValidationError

    from qwen2vl_serve.vllm_engine.engine import VLLMEngine
    from qwen2vl_serve.vllm_engine.request import as_vllm

    engine = VLLMEngine.__new__(VLLMEngine)
    engine._client, engine._window = SimpleNamespace(errored=False), 4096
    caplog.set_level("WARNING")
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "string"}}}
    body = {"messages": [{"role": "user", "content": "x"}], "response_format": wanted}
    asked = as_vllm(ChatRequest.model_validate(body), [], "the-id")
    theirs = "Failed to compile their grammar"
    info = ErrorInfo(message=theirs, type="x", param=None, code=400)
    with pytest.raises(InvalidValue) as caught:
        engine._raise_error(ErrorResponse(error=info), asked)
    errors = [engine._translated(one(theirs), asked) for one in (VLLMValidationError, ValueError)]
    for error in (caught.value, *errors):
        assert error.param == "response_format.json_schema.schema"
        assert error.param in error.message
    assert engine._translated(ValueError("of a temperature"), asked).param is None
    assert caplog.text.count("the-id") == 4
    assert caplog.text.count(theirs) >= 3


def test_a_client_that_leaves_a_whole_answer_is_counted_as_gone(server: ServerProcess) -> None:
    """With status 499 and no error code, as one that leaves a stream."""
    gone = 'qwen2vl_requests_total{code="",route="/v1/chat/completions",status="499"}'

    def count() -> float:
        text = requests.get(f"{server.root}/metrics", timeout=60).text
        found = [line for line in text.splitlines() if line.startswith(gone)]
        return float(found[0].rpartition(" ")[2]) if found else 0.0

    before = count()
    body = {"messages": asked("x"), "ignore_eos": True, "max_tokens": 3900, "n": 8}
    with pytest.raises(requests.ReadTimeout):
        requests.post(f"{server.url}/chat/completions", json=body | {"temperature": 1}, timeout=0.5)
    eventually(lambda: count() == before + 1)


def test_the_engines_figures_stand_beside_ours(server: ServerProcess) -> None:
    """/metrics carries vLLM's names unchanged and ours under one prefix."""
    text = requests.get(f"{server.root}/metrics", timeout=60).text
    for name in ("vllm:kv_cache_usage_perc", "vllm:time_to_first_token_seconds", "qwen2vl_"):
        assert f"\n{name}" in text


def test_versions_are_told(server: ServerProcess) -> None:
    """/version names this server's version and the engine's."""
    version = requests.get(f"{server.root}/version", timeout=60).json()
    assert version["engine"] == "vllm 0.32.0"


def test_no_field_of_vllms_request_is_silently_ignored() -> None:
    """Each field that vLLM 0.32 knows is served, refused, or bookkeeping without effect."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    bookkeeping = {"user"}
    known = set(ChatCompletionRequest.model_fields)
    assert known - set(ChatRequest.model_fields) - set(UNSUPPORTED) == bookkeeping


def test_requests_are_copies_that_share_nothing() -> None:
    """A copy has vLLM's defaults, as a request made by its own model has, and lists of its own."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    from qwen2vl_serve.vllm_engine.request import as_vllm

    body = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0.5, "seed": 3}
    one, other = (as_vllm(ChatRequest.model_validate(body), [], name) for name in ("a", "b"))
    theirs = ChatCompletionRequest.model_construct(**body, request_id="a")
    assert dict(one) == dict(theirs)
    assert one.model_fields_set >= {"messages", "temperature", "seed", "request_id"}
    for name, value in one:
        if isinstance(value, list | dict):
            assert value is not getattr(other, name), name
    assert (one.request_id, other.request_id) == ("a", "b")


def test_a_request_tells_its_limit_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    """vLLM reads ``max_tokens`` of every request, which its own model calls deprecated."""
    from qwen2vl_serve.vllm_engine.request import as_vllm

    body = {"messages": [{"role": "user", "content": "Hello"}]}
    for given, limit in ({}, None), ({"max_tokens": 7}, 7):
        request = as_vllm(ChatRequest.model_validate(body | given), [], "a")
        recwarn.clear()
        assert request.max_tokens == limit
        assert [str(one.message) for one in recwarn] == []


def test_an_engine_without_room_for_a_request_is_told_in_one_line_with_the_plans_advice(
    launch_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    """A KV cache too small: foreseen, and told in the engine's own words and figures; status 1."""
    small = "engine.kv_cache_memory_bytes=4000000"
    server = launch_server(
        "--profile", "demo", "--set", small, environment={"XDG_STATE_HOME": str(tmp_path)}
    )
    assert server.ended(BOOT_SECONDS) == 1
    plan = plan_for(load_profile("demo", [small]), (), host=hardware.host())
    foreseen, *phases, told = server.lines
    assert foreseen.startswith("serve: warnings: fit; ")
    log = Path(phases[0].split(maxsplit=1)[1])
    start = "serve: the engine did not start: ValueError: To serve at least one request with"
    assert told.startswith(start)
    # What vLLM found by trying is what the plan knew.
    assert f"the estimated maximum model length is {plan.longest.likely:.0f}; " in told
    advised = "engine.kv_cache_memory_bytes: 4000000 → 16908288"
    assert told.endswith(f"; the plan advises {advised}. Log: {log}")
    assert [line.split()[0] for line in phases][:3] == ["log", "import", "engine"]
    assert not any("Traceback" in line for line in phases)
    assert "Traceback" in log.read_text("utf-8")


MODEL_BYTES = 2 * (MODEL_FOLDER / "model.safetensors").stat().st_size
"""Its weights are kept in 16 bits and computed in 32."""


def test_what_the_plan_foresaw_stands_beside_what_came(server: ServerProcess) -> None:
    """In a line of the start and in the metrics; of the cache within 5 %, of the start its seconds.

    vLLM's CPU worker does not tell what its weights take: they are foreseen only.
    """
    (line,) = (line for line in server.lines if line.startswith("plan "))
    (ready,) = (line for line in server.lines if line.startswith("ready "))
    found = re.fullmatch(
        r"plan +weights 0\.0\d GiB a card foreseen; KV cache ([\d,]+) tokens as foreseen; "
        r"start (\d+\.\d) s(?:, \d+\.\d s foreseen| as foreseen)?",
        line,
    )
    assert found, line
    assert ready.endswith(f", {found[2]} s after the start")
    name = 'qwen2vl_start_{}{{kind="{}"}}'
    tokens = [server.metric(name.format("kv_tokens", kind)) for kind in ("foreseen", "actual")]
    assert tokens[1] == int(found[1].replace(",", ""))
    assert tokens[0] == pytest.approx(tokens[1], rel=0.05)
    assert server.metric(name.format("seconds", "actual")) == pytest.approx(
        float(found[2]), abs=0.1
    )
    assert server.metric(name.format("weights_bytes", "foreseen")) > MODEL_BYTES


def test_the_only_worker_computes_in_the_engines_process(server: ServerProcess) -> None:
    """The engine core has no process beside it, and one processor less than the server."""
    core = core_of(server)
    assert core.children() == []
    allowed = set(psutil.Process(server.process.pid).cpu_affinity())
    taken = set(core.cpu_affinity())
    assert taken <= allowed
    assert len(taken) <= max(1, len(allowed) - 1)


def test_a_killed_engine_ends_streams_with_an_error_and_the_server_with_1(
    launch_server: Callable[..., ServerProcess],
) -> None:
    """kill -9 of one with a worker apart: no [DONE], readiness red, a status that is not 0."""
    server = launch_server("--profile", "demo", "--set", "engine.distributed_executor_backend=mp")
    server.wait_ready()
    (worker,) = core_of(server).children()
    assert "Worker" in worker.name()
    body = {"messages": asked("x"), "stream": True, "ignore_eos": True, "max_tokens": 3900}
    answer = requests.post(f"{server.url}/chat/completions", json=body, stream=True, timeout=60)
    events = answer.iter_lines()
    next(events)
    core = core_of(server)
    os.kill(core.pid, signal.SIGKILL)
    rest = [line for line in events if line]
    assert json.loads(rest[-1].removeprefix(b"data: "))["error"]["code"] == "engine_unavailable"
    assert server.ended() == 1
    assert not psutil.pid_exists(core.pid) or psutil.Process(core.pid).status() == "zombie"
    eventually(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


def core_of(server: ServerProcess) -> psutil.Process:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return next(child for child in children if "EngineCore" in child.name())


def test_sigterm_in_a_stream_finishes_it_or_says_that_it_does_not(
    launch_server: Callable[..., ServerProcess],
    temporary: Path,
) -> None:
    """A short answer is finished, an endless one cut with an error after the grace; status 0.

    The processes' sockets are their owner's alone, and none is left.
    """
    words = ("--profile", "demo", "--set", "server.shutdown_timeout=6")
    server = launch_server(*words, environment={"TMPDIR": str(temporary)})
    server.wait_ready()
    folders = {path.parent for path in temporary.rglob("*") if path.is_socket()}
    assert {path.name.partition("-")[0] for path in folders} == {"vllm", "pymp"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}
    url = f"{server.url}/chat/completions"
    endless = {"messages": asked("x"), "stream": True, "ignore_eos": True, "n": 8, "temperature": 1}
    short = {"messages": asked("x"), "stream": True, "ignore_eos": True, "max_tokens": 8}
    long_one = requests.post(url, json=endless, stream=True, timeout=60)
    short_one = requests.post(url, json=short, stream=True, timeout=60)
    server.process.send_signal(signal.SIGTERM)
    short_text, long_text = short_one.text, long_one.text
    assert short_text.endswith("data: [DONE]\n\n")
    last = json.loads(long_text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "shutting_down"
    assert server.ended() == 0
    (told,) = [line for line in server.lines if "shutting_down" in line]
    assert re.search(r" in=\d+ out=[1-9]\d* ttft=", told), told
    assert [path for path in folders if path.exists()] == []


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder with a short name, as the path of a socket is bounded."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_an_engine_that_stands_still_turns_readiness_red_and_ends_the_server(
    launch_server: Callable[..., ServerProcess],
) -> None:
    """SIGSTOP of the engine in mid-stream: an error event, no [DONE], status 1, nothing left."""
    server = launch_server("--profile", "demo", "--set", "server.hang_seconds=5")
    server.wait_ready()
    core = core_of(server)
    body = {"messages": asked("x"), "stream": True, "ignore_eos": True, "max_tokens": 3900}
    answer = requests.post(f"{server.url}/chat/completions", json=body, stream=True, timeout=60)
    events = answer.iter_lines()
    next(events)
    core.suspend()
    rest = [line for line in events if line]
    assert json.loads(rest[-1].removeprefix(b"data: "))["error"]["code"] == "engine_unavailable"
    assert server.ended() == 1
    assert not psutil.pid_exists(core.pid) or core.status() == psutil.STATUS_ZOMBIE


def test_an_idle_engine_is_asked_for_a_token_and_recovers(
    launch_server: Callable[..., ServerProcess],
) -> None:
    """Probed while idle: SIGSTOP turns readiness red without a client, SIGCONT green again."""
    overrides = ("hang_seconds=3", "probe_seconds=1", "exit_on_hang=false")
    server = launch_server("--profile", "demo", *(f"--set=server.{one}" for one in overrides))
    server.wait_ready()

    def status() -> int:
        return requests.get(f"{server.root}/health/ready", timeout=60).status_code

    time.sleep(4)
    eventually(lambda: status() == 200)  # a machine that stood still turns it red for a moment
    core = core_of(server)
    core.suspend()
    eventually(lambda: status() == 503)
    core.resume()
    eventually(lambda: status() == 200)
    answer = requests.post(
        f"{server.url}/chat/completions", json={"messages": asked("Hello")}, timeout=60
    )
    assert answer.status_code == 200
    body = {"messages": asked("Hello", picture()), "stream": True, "n": 2, "temperature": 1}
    body["stream_options"] = {"include_usage": True}
    stream = requests.post(f"{server.url}/chat/completions", json=body, timeout=60).text
    last = json.loads(stream.split("\n\n")[-3].removeprefix("data: "))
    assert server.stop() == 0
    told = [line for line in server.lines if " POST /v1/chat" in line]
    for line, usage in zip(told, (answer.json()["usage"], last["usage"]), strict=True):
        assert f"in={usage['prompt_tokens']} out={usage['completion_tokens']}" in line
    assert "visual=64" in told[1]
