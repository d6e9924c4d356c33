"""A batch about pictures on the real engine, by OpenAI's own client."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any

import openai

from tests.conftest import ServerProcess

URL = "/v1/chat/completions"


def test_a_batch_about_pictures_is_answered_right(server: ServerProcess, pictures: Path) -> None:
    """By data, by the id of an uploaded file, and under a schema; every answer under its name."""

    def inline(name: str) -> dict[str, str]:
        kind = "png" if name.endswith("png") else "jpeg"
        data = base64.b64encode((pictures / name).read_bytes()).decode()
        return {"url": f"data:image/{kind};base64,{data}"}

    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        kept = client.files.create(file=pictures / "blue_square.png", purpose="vision")
        asked: dict[str, tuple[dict[str, str], str, str]] = {
            "circle": (inline("red_circle.jpg"), "What colour is the circle?", "red"),
            "square": ({"file_id": kept.id}, "What colour is the square?", "blue"),
            "again": (inline("red_circle.jpg"), "What colour is the circle?", "red"),
        }
        requests = []
        for name, (picture, question, _) in asked.items():
            content: list[dict[str, Any]] = [
                {"type": "image_url", "image_url": picture},
                {"type": "text", "text": question},
            ]
            body = {
                "model": "demo",
                "messages": [{"role": "user", "content": content}],
                "max_tokens": 24,
                "temperature": 0,
            }
            requests.append({"custom_id": name, "method": "POST", "url": URL, "body": body})
        data = "\n".join(json.dumps(one) for one in requests).encode()
        file = client.files.create(file=("in.jsonl", data), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint=URL, completion_window="24h", metadata={"of": "test"}
        )
        deadline = time.monotonic() + 300
        while batch.status not in ("completed", "failed"):
            assert time.monotonic() < deadline, batch
            time.sleep(0.05)
            batch = client.batches.retrieve(batch.id)
        assert batch.status == "completed", batch.errors
        assert batch.request_counts is not None
        assert batch.request_counts.completed == len(asked)
        assert batch.output_file_id is not None
        lines = client.files.content(batch.output_file_id).text.splitlines()
        found = {one["custom_id"]: one["response"]["body"] for one in map(json.loads, lines)}
        assert found.keys() == asked.keys()
        for name, (_, _, colour) in asked.items():
            assert colour in found[name]["choices"][0]["message"]["content"].lower(), name
            assert found[name]["usage"]["prompt_tokens"] > 10
