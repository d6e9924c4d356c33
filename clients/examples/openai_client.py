"""The same with the official package: pip install openai."""

import base64
import os
import time

from openai import OpenAI

from arguments import RED_CIRCLE, parse

args = parse(__doc__, RED_CIRCLE)
client = OpenAI(
    base_url=args.url or "http://127.0.0.1:8000/v1",
    api_key=args.api_key or os.environ.get("QWEN2VL_API_KEY") or "none",  # it insists on one
)
parts = []
for path in args.images:
    with open(path, "rb") as file:
        encoded = base64.b64encode(file.read()).decode()
    kind = "png" if str(path).endswith(".png") else "jpeg"
    url = f"data:image/{kind};base64,{encoded}"
    parts.append({"type": "image_url", "image_url": {"url": url}})
started = time.monotonic()
answer = client.chat.completions.create(
    model=args.model or client.models.list().data[0].id,
    messages=[
        {
            "role": "system",
            "content": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        },
        {"role": "user", "content": [*parts, {"type": "text", "text": "Describe the picture."}]},
    ],
    temperature=0.7,
    top_p=0.8,
    max_tokens=1024,
    extra_body={"repetition_penalty": 1.05},
)
print(answer.choices[0].message.content)
print(f"total time: {time.monotonic() - started:.2f} s")
