"""The launcher: phases, signals, faults and exit statuses, over a scripted engine."""

from __future__ import annotations

import datetime
import io
import ipaddress
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID
from PIL import Image

from qwen2vl_serve.auth.keys_file import KeyLimits, KeysFile
from qwen2vl_serve.boot.forecast import Start, comparison, foresee
from qwen2vl_serve.machine.hardware import GIB
from qwen2vl_serve.profile import load_profile
from tests.conftest import ServerProcess
from tests.served import eventually

FAKE = [sys.executable, "-m", "tests.serve_fake"]
STREAM = {"messages": [{"role": "user", "content": "x"}], "stream": True}
Launch = Callable[..., ServerProcess]


@pytest.fixture
def launch(launch_server: Launch, tmp_path: Path) -> Launch:
    def start(mode: str, *overrides: str, **environment: str) -> ServerProcess:
        environment["XDG_STATE_HOME"] = str(tmp_path)
        return launch_server(mode, *overrides, command=FAKE, environment=environment)

    return start


def metric_is(server: ServerProcess, name: str, value: float) -> None:
    eventually(lambda: server.metric(f'qwen2vl_admission_{name}{{kind="chat"}}') == value)


def later(server: ServerProcess, body: dict[str, object]) -> Callable[[], requests.Response]:
    """Send a request in a thread; the result waits for its answer."""
    url = f"{server.url}/chat/completions"
    pool = ThreadPoolExecutor(1)
    answer = pool.submit(requests.post, url, json=body, timeout=60)
    pool.shutdown(wait=False)
    return answer.result


def last_event(answer: requests.Response) -> dict[str, Any]:
    """The last event of a stream, which is not [DONE]."""
    events = [line for line in answer.text.split("\n\n") if line]
    return dict(json.loads(events[-1].removeprefix("data: ")))


def start_stream(server: ServerProcess) -> requests.Response:
    url = f"{server.url}/chat/completions"
    answer = requests.post(url, json=STREAM, stream=True, timeout=60)
    assert answer.status_code == 200
    return answer


def test_a_boot_is_told_in_one_line_a_phase(launch: Launch, tmp_path: Path) -> None:
    """The operator sees phases, address and a command to try; the engine's words are in a file."""
    server = launch("up")
    server.wait_ready()
    words = [line.split()[0] for line in server.lines]
    assert words[:5] == ["log", "import", "engine", "plan", "ready"]
    log = Path(server.lines[0].split(maxsplit=1)[1])
    assert log.is_relative_to(tmp_path)
    assert log.stem == f"serve-{server.url.rpartition(':')[2].removesuffix('/v1')}", "its own file"
    assert "words of the engine" in log.read_text()
    assert log.stat().st_mode & 0o777 == 0o600, "what clients sent may stand in it"
    assert not any("words of the engine" in line for line in server.lines)


def test_the_printed_command_can_be_copied(launch: Launch) -> None:
    """The curl line asks the running server about a picture and gets an answer."""
    server = launch("up")
    server.wait_ready()
    eventually(lambda: any(line.startswith("try") for line in server.lines))
    found = next(line for line in server.lines if line.startswith("try"))
    done = subprocess.run(
        ["sh", "-c", found.removeprefix("try").strip()], capture_output=True, timeout=60
    )
    assert json.loads(done.stdout)["object"] == "chat.completion"


def test_sigterm_finishes_the_stream_and_exits_0(launch: Launch) -> None:
    """What runs is finished to its [DONE]; nothing new is taken; the status is 0."""
    server = launch("up")
    server.wait_ready()
    answer = start_stream(server)
    server.process.send_signal(signal.SIGTERM)
    assert answer.text.endswith("data: [DONE]\n\n")
    assert server.ended() == 0
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{server.root}/health/live", timeout=60)


def test_a_second_sigterm_ends_at_once(launch: Launch) -> None:
    """An operator in a hurry is obeyed: running answers are dropped."""
    server = launch("long", "server.shutdown_timeout=300")
    server.wait_ready()
    answer = start_stream(server)
    server.process.send_signal(signal.SIGTERM)
    # Two signals that nobody has seen yet would be one.
    eventually(lambda: requests.get(f"{server.root}/health/ready", timeout=60).status_code == 503)
    server.process.send_signal(signal.SIGTERM)
    assert server.ended() == 0, "the stream alone takes 5 minutes, and would be given them"
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        _ = answer.text


def test_while_it_drains_newcomers_are_told_to_go_elsewhere(launch: Launch) -> None:
    """Between SIGTERM and the last answer: readiness red, liveness green, 503 with Retry-After."""
    server = launch("long", "server.shutdown_timeout=300", "server.hang_seconds=0")
    server.wait_ready()
    answer = start_stream(server)
    server.process.send_signal(signal.SIGUSR1)  # or the stream could end before we have looked
    server.process.send_signal(signal.SIGTERM)
    eventually(lambda: requests.get(f"{server.root}/health/ready", timeout=60).status_code == 503)
    refused = requests.post(f"{server.url}/chat/completions", json=STREAM, timeout=60)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert refused.headers["retry-after"]
    assert requests.get(f"{server.root}/health/live", timeout=60).status_code == 200
    server.process.send_signal(signal.SIGUSR2)
    assert answer.text.endswith("data: [DONE]\n\n")
    assert server.ended() == 0


def test_after_the_grace_period_the_rest_is_told_and_dropped(launch: Launch) -> None:
    """A stream ends with an error event and no [DONE], a whole answer is 503; the status is 0."""
    server = launch("long", "server.shutdown_timeout=1", "limits.max_in_flight=2")
    server.wait_ready()
    answer = start_stream(server)
    others = [later(server, {**STREAM, "stream": False}) for _ in range(2)]
    metric_is(server, "queued", 1)
    server.process.send_signal(signal.SIGTERM)
    assert last_event(answer)["error"]["code"] == "shutting_down"
    for other in others:  # one was generating, one was queued
        told = other()
        assert (told.status_code, told.json()["error"]["code"]) == (503, "shutting_down")
        assert told.headers["x-request-id"]
    assert server.ended() == 0


def test_a_hung_engine_ends_the_server_with_status_1(launch: Launch) -> None:
    """An engine that lives and does not move: streams and answers end with an error."""
    server = launch("long", "server.hang_seconds=2")
    server.wait_ready()
    answer = start_stream(server)
    other = later(server, {**STREAM, "stream": False})
    metric_is(server, "in_flight", 2)
    server.process.send_signal(signal.SIGUSR1)
    assert last_event(answer)["error"]["code"] == "engine_unavailable"
    told = other()
    assert (told.status_code, told.json()["error"]["code"]) == (503, "engine_unavailable")
    assert told.headers["x-request-id"]
    assert server.ended() == 1
    assert any(line.startswith("error   The engine has not moved") for line in server.lines)


def test_a_hung_engine_may_be_waited_for(launch: Launch) -> None:
    """Without ``exit_on_hang`` readiness turns red, new requests are refused, until it moves."""
    server = launch("long", "server.hang_seconds=5", "server.exit_on_hang=false")
    server.wait_ready()
    answer = start_stream(server)
    server.process.send_signal(signal.SIGUSR1)
    ready = f"{server.root}/health/ready"
    eventually(lambda: requests.get(ready, timeout=60).status_code == 503)
    assert requests.get(f"{server.root}/health/live", timeout=60).status_code == 200
    refused = requests.post(f"{server.url}/chat/completions", json=STREAM, timeout=60)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
    server.process.send_signal(signal.SIGUSR2)
    eventually(lambda: requests.get(ready, timeout=60).status_code == 200)
    answer.close()
    assert server.stop() == 0


def test_an_idle_engine_that_hangs_is_noticed(launch: Launch) -> None:
    """Nobody asks anything: the probe finds out."""
    server = launch("up", "server.hang_seconds=1", "server.probe_seconds=0.5")
    server.wait_ready()
    server.process.send_signal(signal.SIGUSR1)
    assert server.ended() == 1


def test_a_dead_engine_ends_streams_and_answers_with_errors(launch: Launch) -> None:
    """Nothing is left waiting for an engine that is gone, what was queued included."""
    server = launch("long", "limits.max_in_flight=1")
    server.wait_ready()
    answer = start_stream(server)
    other = later(server, {**STREAM, "stream": False})
    metric_is(server, "queued", 1)
    server.process.send_signal(signal.SIGRTMIN)
    assert last_event(answer)["error"]["code"] == "engine_unavailable"
    assert other().status_code == 503
    assert server.ended() == 1


def test_what_follows_from_a_profile_waits_for_no_restart(launch: Launch) -> None:
    """Engine arguments that adapters bring along are no change of the profile."""
    sailor = Path(__file__).parents[2] / "qwen2vl_serve" / "demo" / "adapters" / "sailor"
    server = launch("up", f"adapters.lora_modules.sailor={sailor}")
    server.wait_ready()
    server.process.send_signal(signal.SIGHUP)
    eventually(lambda: any(line.startswith("reload") for line in server.lines))
    told = next(line for line in server.lines if line.startswith("reload"))
    assert told == "reload  no field has changed that is taken while running"


def test_the_engine_gets_the_adapters_that_were_read(launch: Launch) -> None:
    """Once, before it boots: their files are read whole, which takes seconds."""
    sailor = Path(__file__).parents[2] / "qwen2vl_serve" / "demo" / "adapters" / "sailor"
    server = launch("up", f"adapters.lora_modules.sailor={sailor}")
    server.wait_ready()
    assert any("/v1 serves demo" in line and "sailor" in line for line in server.lines)


def test_sighup_takes_the_limits_and_names_what_waits(launch: Launch, tmp_path: Path) -> None:
    """Limits change without a restart; one line says what does not; a bad file changes nothing."""
    path = tmp_path / "mine.yaml"
    path.write_text("model: {model: demo}\n", "utf-8")
    server = launch("up", FAKE_PROFILE=str(path))
    server.wait_ready()

    def status() -> int:
        body = {**STREAM, "max_tokens": 5}
        return requests.post(f"{server.url}/chat/completions", json=body, timeout=60).status_code

    def reloaded() -> str:
        told = [line for line in server.lines if line.startswith("reload")]
        server.process.send_signal(signal.SIGHUP)
        eventually(
            lambda: len([line for line in server.lines if line.startswith("reload")]) > len(told)
        )
        return next(line for line in reversed(server.lines) if line.startswith("reload"))

    assert status() == 200
    path.write_text("model: {model: demo}\nlimits: {max_tokens: 4}\nengine: {seed: 7}\n", "utf-8")
    assert reloaded() == "reload  limits.max_tokens; needs a restart: engine.seed"
    assert status() == 400
    path.write_text("model: {model: demo}\nlimits: {max_tokens: none}\n", "utf-8")
    assert "kept as it was" in reloaded()
    assert status() == 400
    assert server.stop() == 0


def test_a_terminal_that_goes_ends_the_server(launch_server: Launch, tmp_path: Path) -> None:
    """SIGHUP with its old meaning drains; nobody is left with a server that he cannot see."""
    mine, theirs = pty.openpty()
    environment = {"XDG_STATE_HOME": str(tmp_path)}
    server = launch_server("up", command=FAKE, environment=environment, stdin=theirs)
    os.close(theirs)
    server.wait_ready()
    server.process.send_signal(signal.SIGHUP)
    eventually(lambda: any(line.startswith("reload") for line in server.lines))
    os.close(mine)
    server.process.send_signal(signal.SIGHUP)
    assert server.ended() == 0


def test_lines_may_be_json(launch: Launch) -> None:
    """Every line is an object: phases, requests with their figures, the end."""
    server = launch("long", "server.log_format=json")
    eventually(lambda: any('"event":"ready ' in line for line in server.lines))
    url = re.search(r"http://\S+/v1", next(line for line in server.lines if "/v1" in line))
    assert url is not None
    server.url = url[0]
    start_stream(server).close()
    body = {**STREAM, "stream": False, "user": "x", "max_tokens": 40}
    answer = requests.post(f"{server.url}/chat/completions?key=hidden", json=body, timeout=60)
    assert server.stop() == 0
    assert any("exit 0" in line for line in server.lines)
    told = [json.loads(line) for line in server.lines]
    assert all({"time", "level", "event"} <= one.keys() for one in told)
    left, whole = [one for one in told if one["event"] == "request"]
    assert (left["status"], left["route"]) == (499, "/v1/chat/completions")
    assert left["ttft_seconds"] > 0
    assert whole["id"] == answer.headers["x-request-id"]
    assert (whole["status"], whole["model"]) == (200, "demo")
    assert (whole["prompt_tokens"], whole["completion_tokens"]) == (1, 40)
    assert "hidden" not in "".join(server.lines)


def test_sigterm_while_starting_ends_at_once(launch: Launch) -> None:
    """A boot that hangs for ten minutes can be stopped; the status is 0 and one line says so."""
    server = launch("slow-boot")
    eventually(lambda: any(line.startswith("engine") for line in server.lines))
    time.sleep(0.5)
    server.process.send_signal(signal.SIGTERM)
    assert server.ended() == 0
    assert "stopped while starting" in server.lines


def test_sigterm_before_the_boot_is_the_same(launch: Launch) -> None:
    """From the first line on, and not a traceback of what handles the signal."""
    server = launch("stopped")
    assert server.ended() == 0
    assert server.lines[-1] == "stopped while starting"
    assert not any("Traceback" in line for line in server.lines)


def test_a_failed_boot_says_why_in_one_line(launch: Launch) -> None:
    """The root cause and the knob, not the last of twenty tracebacks."""
    server = launch("no-boot")
    assert server.ended() == 1
    assert server.lines[-1].startswith("BootError: the engine did not start: ValueError: No avail")
    assert "engine.max_model_len" in server.lines[-1]


def test_whatever_fails_while_vllm_is_imported_is_one_line(launch: Launch) -> None:
    """Not only a missing package: a library that is built for another torch fails otherwise."""
    server = launch("no-import")
    assert server.ended() == 1
    assert not any("Traceback" in line for line in server.lines)
    assert server.lines[-1].startswith(
        "BootError: the engine did not start: RuntimeError: operator torchvision::nms does not "
        "exist; torchvision is built for CUDA"
    )


def test_a_folder_of_no_use_is_told_before_vllm_is_imported(launch: Launch) -> None:
    """Of batches; the import takes seconds, and may fail for another reason."""
    server = launch("no-import", "batches.enabled=true", "batches.folder=/proc/nowhere")
    assert server.ended() != 0
    assert any("batches.folder: cannot use /proc/nowhere" in line for line in server.lines)
    assert not any("torchvision" in line for line in server.lines)


def test_what_was_foreseen_stands_beside_what_came(launch: Launch, tmp_path: Path) -> None:
    """In the operator's line and in the metrics; how long it took is kept for the next start."""
    file = f"server.log_file={tmp_path}/serve.log"
    foreseen = foresee(load_profile("demo", [file]))
    server = launch("figures", file)
    server.wait_ready()
    actual = Start(0.01, 262_144, server.metric('qwen2vl_start_seconds{kind="actual"}'))
    assert f"plan    {comparison(foreseen, actual)}" in server.lines
    for kind, start in (("foreseen", foreseen), ("actual", actual)):
        assert start.weights_gib is not None
        weights = server.metric(f'qwen2vl_start_weights_bytes{{kind="{kind}"}}')
        assert weights == pytest.approx(start.weights_gib * GIB)
        assert server.metric(f'qwen2vl_start_kv_tokens{{kind="{kind}"}}') == start.kv_tokens
    assert actual.seconds is not None
    (kept,) = json.loads((tmp_path / "starts.json").read_text()).values()
    assert kept == [round(actual.seconds, 1)]


def test_verbose_shows_the_traceback_as_well(launch: Launch) -> None:
    """Who asks for it gets vLLM's own words; the last line is still the one that explains."""
    quiet, verbose = launch("no-boot"), launch("no-boot", "--verbose")
    assert quiet.ended() == verbose.ended() == 1
    assert not any("Traceback" in line for line in quiet.lines)
    assert any("Traceback" in line for line in verbose.lines)
    assert verbose.lines[-1].startswith("BootError: the engine did not start: ValueError")


def test_a_boot_that_stalls_says_where_it_stands(launch: Launch) -> None:
    """After the profile's time, while the engine blocks everything else."""
    server = launch("slow-boot", "server.boot_stall_seconds=0.5")
    stall = "stall   engine"
    eventually(lambda: any(line.startswith(stall) for line in server.lines))
    told = next(line for line in server.lines if line.startswith(stall))
    assert "starting the engine's processes. Usually " in told


def test_a_dead_engine_ends_the_server_with_status_1(launch: Launch) -> None:
    """A supervisor restarts what does not exit with 0."""
    server = launch("up")
    server.wait_ready()
    server.process.send_signal(signal.SIGRTMIN)
    assert server.ended() == 1
    assert any(line.startswith("error") for line in server.lines)


def test_a_taken_port_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    """The launcher binds first: no minute of loading is lost on a port that is not free."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [*FAKE, "--port", port, "up"],
            capture_output=True,
            text=True,
            timeout=60,
            env={"XDG_STATE_HOME": str(tmp_path)},
        )
    assert done.returncode == 1
    assert done.stdout.startswith(f"PreflightError: server.port: cannot listen on 127.0.0.1:{port}")


def test_a_second_start_on_a_port_is_told_while_the_first_boots(
    launch: Launch, tmp_path: Path
) -> None:
    """Until one listens the system lets both have the port; the first keeps it, and its log."""
    first = launch("slow-boot")
    eventually(lambda: any(line.startswith("engine") for line in first.lines))
    log = Path(first.lines[0].split(maxsplit=1)[1])
    eventually(lambda: "words of the engine" in log.read_text())
    port = log.stem.rpartition("-")[2]
    second = [*FAKE, "--port", port, "up"]
    environment = {"XDG_STATE_HOME": str(tmp_path)}
    done = subprocess.run(second, capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout.startswith(f"PreflightError: server.log_file: another server writes {log}")
    assert done.returncode == 1
    assert "words of the engine" in log.read_text()
    first.process.kill()
    first.process.wait(60)
    again = launch("up", f"server.log_file={log}")
    again.wait_ready()
    assert f"log     {log}" in again.lines


def test_a_log_that_nobody_keeps_may_be_shared(launch: Launch) -> None:
    """Of a device there is nothing to empty."""
    for server in (
        launch("up", "server.log_file=/dev/null"),
        launch("up", "server.log_file=/dev/null"),
    ):
        server.wait_ready()
        assert "log     /dev/null" in server.lines


def self_signed(folder: Path) -> tuple[Path, Path]:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(address, critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    paths = folder / "cert.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(pem))
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    paths[1].write_bytes(key.private_bytes(pem, *plain))
    return paths


def test_https_and_keys_by_profile_file_and_environment(launch: Launch, tmp_path: Path) -> None:
    """One server speaks HTTPS and knows the keys of all three places; others get 401."""
    certificate, key = self_signed(tmp_path)
    (tmp_path / "keys").write_text("# ours\nsk-file\n\n")
    server = launch(
        "up",
        f"server.ssl_certfile={certificate}",
        f"server.ssl_keyfile={key}",
        "server.api_keys=[sk-profile]",
        f"server.api_key_file={tmp_path / 'keys'}",
        QWEN2VL_API_KEY="sk-one,sk-two",
    )
    server.wait_ready()
    assert server.url.startswith("https://")
    session = requests.Session()
    session.trust_env = False  # a CA bundle in the environment would win over ours
    session.verify = str(certificate)
    for name in ("sk-profile", "sk-file", "sk-one", "sk-two"):
        headers = {"authorization": f"Bearer {name}"}
        assert session.get(f"{server.url}/models", headers=headers, timeout=60).status_code == 200
    assert session.get(f"{server.url}/models", timeout=60).status_code == 401
    told = "\n".join(server.lines)
    assert "$QWEN2VL_API_KEY" in told
    assert "sk-" not in told


def test_named_keys_that_are_not_where_the_profile_says_stop_the_start(
    launch: Launch, tmp_path: Path
) -> None:
    """A wrong path opens no server: one line says which, and how the file is made."""
    server = launch("up", f"server.keys_file={tmp_path}/typo.json")
    assert server.ended() != 0
    (told,) = server.lines
    assert told.startswith(f"ProfileError: keys file {tmp_path}/typo.json: No such file")
    assert f"qwen2vl-serve keys add NAME --file {tmp_path}/typo.json" in told


def test_named_keys_are_made_and_revoked_beside_a_running_server(
    launch: Launch, tmp_path: Path
) -> None:
    """The default file may appear later: from then on the server is closed, and stays so."""
    path = tmp_path / "qwen2vl-serve" / "keys.json"
    storage = f"server.quota_storage='sqlite:///{tmp_path / 'quotas.sqlite'}'"
    server = launch("up", storage, XDG_CONFIG_HOME=str(tmp_path))
    server.wait_ready()

    def status(secret: str = "") -> int:
        headers = {"authorization": f"Bearer {secret}"} if secret else {}
        return requests.get(f"{server.url}/models", headers=headers, timeout=60).status_code

    assert status() == 200
    secret = KeysFile(path).add("alice", KeyLimits(requests_per_minute=1000))
    eventually(lambda: status() == 401)
    assert status(secret) == 200
    assert (tmp_path / "quotas.sqlite").exists()
    KeysFile(path).revoke("alice")
    eventually(lambda: status(secret) == 401)
    assert status() == 401
    told = "\n".join(server.lines)
    assert "keys read again: 1 named" in told
    assert secret not in told


def upload(server: ServerProcess) -> str:
    picture = io.BytesIO()
    Image.new("RGB", (56, 56), "red").save(picture, "PNG")
    answer = requests.post(
        f"{server.url}/files",
        files={"file": ("a.png", picture.getvalue())},
        data={"purpose": "vision"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def test_uploads_end_with_the_server(launch: Launch, tmp_path: Path) -> None:
    """Without a folder of their own they lie in a temporary one, which goes with the server."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    server = launch("up", TMPDIR=str(temporary))
    server.wait_ready()
    upload(server)
    assert len(list(temporary.rglob("file-*"))) == 1
    assert server.stop() == 0
    assert list(temporary.iterdir()) == []


def test_uploads_in_a_folder_outlive_the_server(launch: Launch, tmp_path: Path) -> None:
    """With ``files.folder`` the next server knows what this one was given."""
    folder = f"files.folder={tmp_path / 'files'}"
    first = launch("up", folder)
    first.wait_ready()
    file_id = upload(first)
    assert first.stop() == 0
    second = launch("up", folder)
    second.wait_ready()
    assert requests.get(f"{second.url}/files/{file_id}", timeout=60).json()["id"] == file_id


def test_a_folder_of_uploads_that_fails_is_named(launch: Launch, tmp_path: Path) -> None:
    """One line and no boot, also where it was lost since the preflight."""
    (tmp_path / "file").write_bytes(b"")
    server = launch("up", f"files.folder={tmp_path / 'file'}")
    assert server.ended() == 1
    assert any("PreflightError: files.folder" in line for line in server.lines)
