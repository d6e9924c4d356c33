"""``--rehearse``: a multi-card profile's own topology with the demo model on CPU workers."""

from __future__ import annotations

from collections.abc import Callable

import openai
import psutil
import pytest

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
    """The profile's worker processes run, and their greedy answers are those of one worker."""
    rehearsal = launch_server(*options)
    rehearsal.wait_ready(400)
    processes = psutil.Process(rehearsal.process.pid).children(recursive=True)
    assert sum("Worker" in process.name() for process in processes) == workers
    assert answers(rehearsal) == answers(server)
    assert rehearsal.stop() == 0
