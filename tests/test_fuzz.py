"""A short run of ``bench.fuzz`` that is the same every time, and what its judgement is worth."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from PIL import Image

from bench import memory
from bench.engineless import Engineless, State, engineless
from bench.fuzz import profiles, properties
from bench.fuzz.__main__ import LIMITS, Run, fuzz, grown
from bench.fuzz.bodies import bodies
from bench.fuzz.cases import WEIGHTS, Case, cases, from_json, http, to_json
from bench.fuzz.properties import Answer, fault
from bench.fuzz.seeds import VIDEOS, seeds
from bench.fuzz.site import Site, site
from qwen2vl_serve.errors import RequestError
from qwen2vl_serve.media.image import decode, read_header
from qwen2vl_serve.media.video import DEFAULT_LIMITS
from qwen2vl_serve.media.video import read_header as read_video_header
from qwen2vl_serve.protocol.validation import RequestLimits, parse_chat

WARM_UP, MORE = 150, 200
SECONDS = 300.0
"""How long a slow machine may take for that many cases."""


@pytest.fixture(scope="module")
def hostile_site() -> Iterator[Site]:
    with site() as one:
        yield one


@pytest.fixture(scope="module")
def server(hostile_site: Site) -> Iterator[Engineless]:
    with engineless(*LIMITS, f"media.allowed_ports=[{hostile_site.port}]") as one:
        yield one


def told(run: Run) -> list[str]:
    return [f"{wrong} {to_json(case) if case else ''}" for wrong, case in run.failures]


def test_hostile_cases_break_no_property(server: Engineless, hostile_site: Site) -> None:
    """No 5xx, no hang, no telling message; afterwards no slot, file, thread or memory is held."""
    run, drawn = Run(server, hostile_site), cases(0)
    fuzz(run, drawn, SECONDS, most=WARM_UP)
    assert told(run) == []
    before = server.state(trim=True)
    fuzz(run, drawn, SECONDS, most=MORE)
    assert told(run) == []
    assert grown(before, server.state(trim=True)) is None
    assert run.total == WARM_UP + MORE
    seen = {kind for kind, _ in run.counts}
    assert seen >= {kind for kind, weight in WEIGHTS.items() if weight > 2 and kind in seeds()}
    assert {status for _, status in run.counts} >= {200, 400}


@settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(body=bodies())
def test_any_body_is_answered_in_openais_shape(
    server: Engineless, hostile_site: Site, body: bytes
) -> None:
    """Whatever fails here, hypothesis makes small."""
    request = http("POST", "/v1/chat/completions", body, "application/json")
    case = Case("one", "body", request)
    assert fault(case, properties.send(case, server.port, hostile_site.port)) is None


LIMITS_OF_A_REQUEST = RequestLimits(
    max_messages=4, max_n=8, max_tokens=None, images=2, videos=1, reserved_tokens="refuse"
)


@settings(
    max_examples=300, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(body=bodies())
def test_any_body_is_parsed_or_refused(body: bytes) -> None:
    """The request model alone: a request within its bounds, or an error of the client's."""
    try:
        request = parse_chat(body, LIMITS_OF_A_REQUEST)
    except RequestError as error:
        assert 400 <= error.status < 500
        assert error.code
        assert 0 < len(error.message) <= properties.LONGEST_MESSAGE
    else:
        assert 1 <= len(request.messages) <= 4
        assert request == type(request).model_validate(request.model_dump(exclude_unset=True))


@settings(
    max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(text=profiles.profiles())
def test_any_profile_loads_or_is_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    """Whatever its sections hold: a profile that vLLM's arguments come of, or one line."""
    assert profiles.fault(text, tmp_path_factory.getbasetemp()) is None


def test_the_seeds_are_valid_files() -> None:
    """Mutation begins with what the server takes: every format, none of it broken before."""
    assert set(seeds()) >= {"jpeg", "png", "webp", "gif", "bmp", "tiff", "pdf", *VIDEOS}
    for kind, files in seeds().items():
        for data in files:
            if kind in VIDEOS:
                assert read_video_header(data, DEFAULT_LIMITS, kind).frames == 8
            elif kind != "pdf":
                header = read_header(data, 4_000_000, kind)
                assert header.width * header.height == 67 * 53
                decode(data, (28, 28), kind)


def test_equal_seeds_give_equal_cases() -> None:
    """A run can be repeated, and a case kept in a file is the case that failed."""
    one, same, other = (list(itertools.islice(cases(seed), 60)) for seed in (5, 5, 6))
    assert one == same
    assert one != other
    assert [from_json(to_json(case)) for case in one] == one


CASE = Case("one", "body", b"POST / HTTP/1.1\r\n\r\n{}")


def error(message: str = "p is wrong.", **fields: object) -> bytes:
    whole = {"message": message, "type": "invalid_request_error", "param": None, "code": "x"}
    return json.dumps({"error": {**whole, **fields}}).encode()


@pytest.mark.parametrize(
    ("status", "kind", "body", "fine"),
    [
        (200, "application/json", b"{}", True),
        (200, "application/json", b"{", False),
        (200, "text/event-stream", b"data: {}\n\ndata: [DONE]\n\n", True),
        (200, "text/event-stream", b"data: {}\n\n", False),
        (400, "application/json", error(), True),
        (400, "application/json", error(type="server_error"), False),
        (400, "application/json", error(code=400), False),
        (400, "application/json", error(more=1), False),
        (400, "application/json", b'{"detail": "no"}', False),
        (400, "text/plain", b"Invalid HTTP request received.", False),
        (400, "application/json", error("cannot identify <_io.BytesIO object at 0x7f>"), False),
        (400, "application/json", error("[Errno 2] No such file: '/tmp/x'"), False),
        (400, "application/json", error("UnidentifiedImageError"), False),
        (400, "application/json", error("iVBORw0KGgo" * 12), False),
        (400, "application/json", error("a " * 2000), False),
        (500, "application/json", error(), False),
        (503, "application/json", error(), False),
        (0, "", b"", False),
    ],
)
def test_an_answer_is_judged(status: int, kind: str, body: bytes, fine: bool) -> None:
    """What no client may get is seen, and what is as it should be passes."""
    assert (fault(CASE, Answer(status, kind, body, 0.1)) is None) == fine


@pytest.mark.parametrize(
    ("line", "answer", "fine"),
    [
        (b"GET /metrics", Answer(200, "text/plain", b"# HELP", 0.1), True),
        (b"GET /version", Answer(200, "text/plain", b"# HELP", 0.1), False),
        (b"GET /version", Answer(200, "application/json", b"{}", 0.1), False),
        (b"GET /v1/models/x", Answer(404, "application/json", error(), 0.1), True),
        (b"GET /v1/models/x", Answer(413, "application/json", error(), 0.1), False),
    ],
)
def test_a_request_of_the_document_is_judged_by_it(line: bytes, answer: Answer, fine: bool) -> None:
    """Its status, content type and shape must be documented for its operation."""
    case = Case("one", "document", line + b" HTTP/1.1\r\n\r\n")
    assert (fault(case, answer) is None) == fine


def test_a_late_answer_is_a_fault() -> None:
    """However good it is."""
    answer = Answer(200, "application/json", b"{}", properties.SECONDS + 1)
    assert "took" in str(fault(CASE, answer))


STATE = State(
    held=0, waiting=0, receiving=0, threads=20, descriptors=30, children=0, rss=2**28, peak=2**28
)


@pytest.mark.parametrize(
    ("change", "fine"),
    [
        ({}, True),
        ({"rss": 2**28 + 2**26}, True),
        ({"rss": 2**29}, False),
        ({"threads": 60}, False),
        ({"descriptors": 60}, False),
    ],
)
def test_growth_is_judged(change: dict[str, int], fine: bool) -> None:
    """More than the tolerance of memory, threads or descriptors is a leak."""
    assert (grown(STATE, replace(STATE, **change)) is None) == fine


@pytest.mark.parametrize("what", ["held", "waiting", "receiving", "children"])
def test_a_slot_that_is_held_is_not_idle(what: str) -> None:
    """Each kind of slot counts."""
    assert STATE.idle
    assert not replace(STATE, **{what: 1}).idle


def test_a_file_that_is_left_behind_is_seen(server: Engineless) -> None:
    """Beside the uploads that are listed nothing may lie in the server's temporary folder."""
    assert properties.left_behind(server) is None
    forgotten = server.temporary / "forgotten"
    forgotten.touch()
    try:
        assert "forgotten" in str(properties.left_behind(server))
    finally:
        forgotten.unlink()


def test_photos_for_the_memory_are_all_different() -> None:
    """Each is a whole JPEG of its own, made from one without encoding it again."""
    gradient = Image.radial_gradient("L").resize((400, 300)).convert("RGB")
    photos = list(itertools.islice(memory.photos(gradient), 3))
    pixels = []
    for data in photos:
        image = Image.open(io.BytesIO(data))
        assert image.size == (400, 300)
        pixels.append(image.tobytes())
    assert len(set(photos)) == len(set(pixels)) == 3
