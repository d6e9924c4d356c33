"""The uses without this client: what the tutorials' calls take with ``requests`` alone.

Counted by ``test_uses_docs.py`` and run there once each. Every function is whole: imports, the
tutorials' system prompt and their sampling. None retries, and none knows a cut answer.
"""

# ruff: noqa: PTH123  (each function holds all that it needs, in the tutorials' words)

from __future__ import annotations

URL = "http://127.0.0.1:8000/v1"
SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def ocr(path: str) -> None:
    import base64

    import requests

    with open(path, "rb") as file:
        encoded = base64.b64encode(file.read()).decode("utf-8")
    url = f"data:image/png;base64,{encoded}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "Read all the text in the picture."},
    ]
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
    sampling = {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.05, "max_tokens": 1024}
    body = {"model": "demo", "messages": messages, **sampling}
    answer = requests.post(f"{URL}/chat/completions", json=body, timeout=600)
    answer.raise_for_status()
    print(answer.json()["choices"][0]["message"]["content"])


def extract_fields(path: str) -> None:
    import base64

    import requests
    from pydantic import BaseModel

    class Receipt(BaseModel):
        shop: str
        date: str | None = None
        total: float

    with open(path, "rb") as file:
        encoded = base64.b64encode(file.read()).decode("utf-8")
    url = f"data:image/png;base64,{encoded}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "Return JSON with shop, date, total."},
    ]
    schema = {"name": "receipt", "schema": Receipt.model_json_schema()}
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
    sampling = {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.05, "max_tokens": 1024}
    body = {"model": "demo", "messages": messages, **sampling}
    body["response_format"] = {"type": "json_schema", "json_schema": schema}
    answer = requests.post(f"{URL}/chat/completions", json=body, timeout=600)
    answer.raise_for_status()
    receipt = Receipt.model_validate_json(answer.json()["choices"][0]["message"]["content"])
    print(receipt.shop, receipt.total)


def extract_table(path: str) -> None:
    import base64
    import csv
    import json

    import requests

    with open(path, "rb") as file:
        encoded = base64.b64encode(file.read()).decode("utf-8")
    url = f"data:image/png;base64,{encoded}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "Extract the table as JSON with columns and rows."},
    ]
    texts = {"type": "array", "items": {"type": "string"}}
    properties = {"columns": texts, "rows": {"type": "array", "items": texts}}
    schema = {"type": "object", "properties": properties, "required": ["columns", "rows"]}
    wanted = {"name": "table", "schema": schema}
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
    sampling = {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.05, "max_tokens": 1024}
    body = {"model": "demo", "messages": messages, **sampling}
    body["response_format"] = {"type": "json_schema", "json_schema": wanted}
    answer = requests.post(f"{URL}/chat/completions", json=body, timeout=600)
    answer.raise_for_status()
    table = json.loads(answer.json()["choices"][0]["message"]["content"])
    with open("table.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([table["columns"], *table["rows"]])


def locate(path: str) -> None:
    import base64
    import re

    import requests
    from PIL import Image

    with open(path, "rb") as file:
        encoded = base64.b64encode(file.read()).decode("utf-8")
    url = f"data:image/png;base64,{encoded}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "Output the bounding box coordinates of the yellow star."},
    ]
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
    sampling = {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.05, "max_tokens": 1024}
    body = {"model": "demo", "messages": messages, **sampling}
    body["skip_special_tokens"] = False
    answer = requests.post(f"{URL}/chat/completions", json=body, timeout=600)
    answer.raise_for_status()
    text = answer.json()["choices"][0]["message"]["content"]
    width, height = Image.open(path).size
    pattern = r"<\|object_ref_start\|>(.*?)<\|object_ref_end\|>"
    pattern += r"<\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>"
    for label, left, top, right, bottom in re.findall(pattern, text):
        xs = [round(int(x) * width / 1000) for x in (left, right)]
        ys = [round(int(y) * height / 1000) for y in (top, bottom)]
        print(label, xs[0], ys[0], xs[1], ys[1])


def compare(first: str, second: str) -> None:
    import base64

    import requests

    content = []
    for path in (first, second):
        with open(path, "rb") as file:
            encoded = base64.b64encode(file.read()).decode("utf-8")
        url = f"data:image/png;base64,{encoded}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    content.append({"type": "text", "text": "What is the difference between the two pictures?"})
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
    sampling = {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.05, "max_tokens": 1024}
    body = {"model": "demo", "messages": messages, **sampling}
    answer = requests.post(f"{URL}/chat/completions", json=body, timeout=600)
    answer.raise_for_status()
    print(answer.json()["choices"][0]["message"]["content"])


def describe_video(path: str) -> None:
    import base64

    import requests

    with open(path, "rb") as file:
        encoded = base64.b64encode(file.read()).decode("utf-8")
    url = f"data:video/mp4;base64,{encoded}"
    video = {"type": "video_url", "video_url": {"url": url}, "fps": 1.0, "max_pixels": 360 * 420}
    content = [video, {"type": "text", "text": "Describe the video."}]
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
    sampling = {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.05, "max_tokens": 1024}
    body = {"model": "demo", "messages": messages, **sampling}
    answer = requests.post(f"{URL}/chat/completions", json=body, timeout=600)
    answer.raise_for_status()
    print(answer.json()["choices"][0]["message"]["content"])


def batch(folder: str) -> None:
    import base64
    import json
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

    import requests

    def ask(path: Path) -> str:
        encoded = base64.b64encode(path.read_bytes()).decode("utf-8")
        url = f"data:image/png;base64,{encoded}"
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "Read all the text in the picture."},
        ]
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
        sampling = {
            "temperature": 0.7,
            "top_p": 0.8,
            "repetition_penalty": 1.05,
            "max_tokens": 1024,
        }
        body = {"model": "demo", "messages": messages, **sampling}
        answer = requests.post(f"{URL}/chat/completions", json=body, timeout=600)
        answer.raise_for_status()
        return answer.json()["choices"][0]["message"]["content"]

    paths = sorted(Path(folder).glob("*.png"))
    with ThreadPoolExecutor(8) as pool, open("texts.jsonl", "w", encoding="utf-8") as file:
        for path, text in zip(paths, pool.map(ask, paths), strict=True):
            file.write(json.dumps({"id": path.name, "text": text}, ensure_ascii=False) + "\n")
            print(path.name, text)
