"""``--rehearse``: a multi-card profile's own topology with the demo model on CPU workers."""

from __future__ import annotations

from collections.abc import Callable

import openai
import psutil
import pytest

from qwen2vl_serve.profile import load_profile, profile_names
from qwen2vl_serve.profile.rehearsal import rehearsal
from tests.conftest import ServerProcess
from tests.test_vllm_engine import asked, picture, say

QUESTIONS = [
    asked("Hello, who are you?"),
    asked("什么是大语言模型？"),
    asked("What colour is the circle?", picture("red")),
    asked("圆形是什么颜色？", picture("blue")),
    asked("What shape is it?", picture("green", "rectangle")),
    asked("Describe the picture.", picture("yellow")),
    asked("What is in the second picture?", picture("red"), picture("blue", "rectangle")),
    asked("Where is the circle?", picture("green")),
]


def answers(server: ServerProcess) -> list[str]:
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120)
    model = client.models.list().data[0].id
    said = [say(client, question, model=model, max_tokens=16) for question in QUESTIONS]
    return [answer.choices[0].message.content for answer in said]


@pytest.mark.parametrize(
    ("options", "workers"),
    [
        (
            (
                *("--profile", "demo", "--rehearse"),
                *("--set", "engine.tensor_parallel_size=2"),
                *("--set", "engine.pipeline_parallel_size=2"),
            ),
            4,
        ),
        (("--profile", "multi-gpu", "--rehearse"), 8),
    ],
    ids=["2 × 2", "4 × 2"],
)
def test_a_rehearsed_topology_answers_as_one_worker_does(
    server: ServerProcess,
    launch_server: Callable[..., ServerProcess],
    options: tuple[str, ...],
    workers: int,
) -> None:
    """The profile's workers run, each on processors of its own; greedy answers are one worker's."""
    rehearsal = launch_server(*options)
    rehearsal.wait_ready(400)
    processes = psutil.Process(rehearsal.process.pid).children(recursive=True)
    found = [process for process in processes if "Worker" in process.name()]
    assert len(found) == workers
    allowed = set(psutil.Process(rehearsal.process.pid).cpu_affinity())
    assert all(set(one.cpu_affinity()) < allowed or len(allowed) == 1 for one in found)
    assert answers(rehearsal) == answers(server)
    assert rehearsal.stop() == 0


def test_rehearsal_keeps_topology_limits_and_address() -> None:
    """Names and media counts, too; the model is the demo's, and what only cards know is dropped."""
    profile = load_profile(
        "multi-gpu",
        [
            "server={port: 9000, api_keys: [k]}",
            "limits.max_n=3",
            "engine.kv_cache_dtype=fp8",
            "model.quantization=awq",
            "model.revision=abc",
        ],
    )
    rehearsed = rehearsal(profile)
    assert (rehearsed.engine.tensor_parallel_size, rehearsed.engine.pipeline_parallel_size) == (
        4,
        2,
    )
    assert rehearsed.engine.max_model_len == 8784
    assert rehearsed.server == profile.server
    assert rehearsed.limits == profile.limits
    assert rehearsed.files == profile.files
    assert rehearsed.media.limit_mm_per_prompt == profile.media.limit_mm_per_prompt
    assert rehearsed.model.served_names == profile.model.served_names
    assert rehearsed.name == "multi-gpu"
    demo = load_profile("demo")
    assert rehearsed.model.path == demo.model.path
    assert rehearsed.media.max_pixels == demo.media.max_pixels
    arguments = rehearsed.engine_args()
    assert arguments["dtype"] == "float32"
    assert arguments["kv_cache_memory_bytes"] == 2**27
    for dropped in ("quantization", "revision", "kv_cache_dtype", "gpu_memory_utilization"):
        assert dropped not in arguments
    assert arguments["enforce_eager"] is True
    assert len(rehearsed.environment()["VLLM_CPU_OMP_THREADS_BIND"].split("|")) == 8


def test_rehearsal_leaves_the_deployments_uploads_alone() -> None:
    """A folder belongs to one server; the quota is the deployment's."""
    overrides = ["files.folder=/srv/files", "files.max_files=7", "media.formats=[PNG]"]
    rehearsed = rehearsal(load_profile("multi-gpu", overrides))
    assert (rehearsed.files.folder, rehearsed.files.max_files) == (None, 7)
    assert rehearsed.media.formats == ("PNG",)


def test_rehearsal_of_one_card_is_one_eager_worker() -> None:
    """On the CPU, with nothing to compile and no worker bound to a processor."""
    rehearsed = rehearsal(load_profile("single-3090"))
    assert rehearsed.engine_args()["enforce_eager"] is True
    assert "compilation_config" not in rehearsed.engine_args()
    assert rehearsed.environment() == {}
    assert rehearsed.hardware.device == "cpu"


def test_every_profile_rehearses() -> None:
    """None that ships is refused, and each has as many workers as without ``--rehearse``."""
    for name in profile_names():
        rehearsed = rehearsal(load_profile(name))
        assert rehearsed.workers == load_profile(name).workers
