"""What must hold after every case, and what of the server after all of them."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from dataclasses import dataclass

from bench.engineless import Engineless
from bench.fuzz.bodies import PICTURES, SITE
from bench.fuzz.cases import Case
from bench.fuzz.document import undocumented
from bench.servers import HOST

SECONDS = 40.0
"""No answer may take longer; a PDF has 20 seconds, and the machine other work."""

LONGEST_MESSAGE = 1500

# What tells of libraries, paths or the inside of the process.
_TELLTALE = re.compile(
    r"Traceback|File \"|site-packages|/tmp/|/work/|/usr/|/home/|/proc/|\.py\b|object at 0x|Errno|"
    r"PIL\b|[Pp]illow\b(?!-)|libpng|libjpeg|libtiff|libwebp|zlib|OpenCV|cv2|FFmpeg|ffmpeg|libav|"
    r"aiohttp|yarl|pydantic|starlette|uvicorn|NoneType|\w+Error\b|\w+Exception\b|codec can't|"
    r"numpy|torch|BytesIO|0x[0-9a-f]{6,}|unpack|operand|[A-Za-z0-9+/]{120,}"
)


@dataclass(frozen=True)
class Answer:
    """What came back; ``status`` 0: the connection ended without an answer."""

    status: int
    kind: str
    body: bytes
    seconds: float


def send(case: Case, port: int, site_port: int) -> Answer:
    """Send a case and read the answer; raises ``TimeoutError`` when none comes in time."""
    request = case.request.replace(SITE.encode(), SITE.replace("00000", str(site_port)).encode())
    begun = time.monotonic()
    with socket.create_connection((HOST, port), timeout=SECONDS) as connection:
        try:
            step = max(len(request) // case.pieces, 1)
            for start in range(0, len(request), step):
                connection.sendall(request[start : start + step])
                time.sleep(case.pause)
            if case.client == "gone":
                return Answer(0, "", b"", time.monotonic() - begun)
            if case.client == "half":
                connection.shutdown(socket.SHUT_WR)
        except ConnectionError:
            pass  # refused in the middle of it: the answer is there to be read
        try:
            answer = http.client.HTTPResponse(
                connection, method=request.split(b" ", 1)[0].decode("latin-1")
            )
            answer.begin()
            body = answer.read()
        except (ConnectionError, http.client.HTTPException):
            return Answer(0, "", b"", time.monotonic() - begun)
        kind = answer.headers.get_content_type()
        return Answer(answer.status, kind, body, time.monotonic() - begun)


def fault(case: Case, answer: Answer) -> str | None:
    """Return what is wrong with an answer, None where all is as it should be."""
    if answer.seconds > SECONDS:
        wrong: str | None = f"took {answer.seconds:.1f} s"
    elif answer.status == 0:
        wrong = None if case.client != "here" or case.malformed else "no answer"
    elif answer.status >= 500:
        wrong = f"status {answer.status}"
    elif answer.status == 200:
        wrong = _unfinished(case, answer)
    elif case.malformed and (answer.kind == "text/plain" or not answer.body):
        wrong = None
    else:
        wrong = _unfit_error(case, answer)
    if wrong is None and case.kind == "document":
        wrong = undocumented(case.request, answer.status, answer.kind, answer.body)
    return wrong


def _unfit_error(case: Case, answer: Answer) -> str | None:
    try:
        error = json.loads(answer.body)["error"]
        whole = {"message", "type", "param", "code"} == set(error)
        strings = isinstance(error["message"], str) and isinstance(error["code"] or "", str)
    except (ValueError, TypeError, KeyError):
        return "an error in another shape"
    if not (whole and strings and error["type"] == "invalid_request_error"):
        return "an error in another shape"
    message = f"{error['message']} {error['param']}"
    told = _TELLTALE.search(message)
    if told and told.group().encode() not in case.request:
        return f"the message tells {told.group()!r}"
    return f"{len(message)} characters of message" if len(message) > LONGEST_MESSAGE else None


def _unfinished(case: Case, answer: Answer) -> str | None:
    if case.kind == "document" and answer.kind == "text/plain":
        return None  # whether the operation may, the document says
    if answer.kind == "text/event-stream":
        return None if answer.body.endswith(b"data: [DONE]\n\n") else "a stream without [DONE]"
    try:
        json.loads(answer.body)
    except ValueError:
        return "no JSON" if answer.body else None
    return None


def good_request(server: Engineless) -> str | None:
    """Ask as a good client does; return what is wrong with the answer."""
    part = {"type": "image_url", "image_url": {"url": PICTURES[0]}}
    body = json.dumps({"messages": [{"role": "user", "content": [part]}]})
    connection = http.client.HTTPConnection(HOST, server.port, timeout=SECONDS)
    try:
        connection.request(
            "POST", "/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    if answer.status != 200 or b"That is all." not in text:
        return f"a good request got {answer.status}: {text[:200]!r}"
    return None


def unsettled(server: Engineless, seconds: float = 15.0) -> str | None:
    """Wait until nothing is under way; return what still is after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        state, in_flight = server.state(), _in_flight(server)
        if state.idle and in_flight == 0:
            return None
        if time.monotonic() > end:
            return f"{in_flight} requests in flight, {state} though nobody asks"
        time.sleep(0.1)


def _in_flight(server: Engineless) -> float:
    text = get(server, "/metrics").decode()
    found = re.search(r"^qwen2vl_requests_in_flight (\S+)", text, re.MULTILINE)
    return float(found[1]) if found else -1.0


def left_behind(server: Engineless) -> str | None:
    """Return what lies in the folder for temporary files beside the uploads that are listed."""
    listed = {one["id"] for one in json.loads(get(server, "/v1/files"))["data"]}
    found = {path.name for path in server.temporary.rglob("*") if path.is_file()}
    odd = sorted(found ^ listed)
    return f"files left behind or gone: {odd[:3]}" if odd else None


def complaints(server: Engineless) -> list[str]:
    """Return the lines of the server's log that tell of a fault in it."""
    lines = server.log.read_text("utf-8", "replace").splitlines()
    return [line for line in lines if _COMPLAINT.search(line)]


_COMPLAINT = re.compile(
    r"Traceback|never retrieved|never awaited|Unclosed|double free|free\(\): |malloc\(\): "
)


def get(server: Engineless, path: str) -> bytes:
    """Return the body of an answer."""
    connection = http.client.HTTPConnection(HOST, server.port, timeout=SECONDS)
    try:
        connection.request("GET", path)
        return connection.getresponse().read()
    finally:
        connection.close()
