"""Let the model call a Python function and answer from its result: pip install openai.

Needs a server with server.tools: experimental in its profile.
"""

import base64
import json
import os
import time

from openai import OpenAI

from arguments import RED_CIRCLE, parse

STOCK = {"red": 12, "blue": 0, "green": 7, "yellow": 3}


def in_stock(colour: str) -> str:
    """What the model may call: how many sheets of a colour there are."""
    return f"There are {STOCK[colour]} {colour} sheets in stock."


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "in_stock",
            "description": "How many sheets of paper of a colour there are in stock.",
            "parameters": {
                "type": "object",
                "properties": {"colour": {"type": "string", "enum": list(STOCK)}},
                "required": ["colour"],
                "additionalProperties": False,
            },
        },
    }
]

args = parse(__doc__, RED_CIRCLE)
client = OpenAI(
    base_url=args.url or "http://127.0.0.1:8000/v1",
    api_key=args.api_key or os.environ.get("QWEN2VL_API_KEY") or "none",  # it insists on one
)
model = args.model or client.models.list().data[0].id
settings = {
    "model": model,
    "tools": TOOLS,
    "temperature": 0.7,
    "top_p": 0.8,
    "max_tokens": 1024,
    "extra_body": {"repetition_penalty": 1.05},
}
messages = [
    {
        "role": "system",
        "content": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    }
]
parts = []
for path in args.images:
    with open(path, "rb") as file:
        encoded = base64.b64encode(file.read()).decode()
    kind = "png" if str(path).endswith(".png") else "jpeg"
    url = f"data:image/{kind};base64,{encoded}"
    parts.append({"type": "image_url", "image_url": {"url": url}})
question = "How many sheets of the colour of this circle are in stock?"
messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
started = time.monotonic()
# "auto" leaves it to the model whether to call; here a call is asked for.
asked = client.chat.completions.create(
    messages=messages, tool_choice="required", parallel_tool_calls=False, **settings
)
message = asked.choices[0].message
messages.append(message.model_dump(exclude_none=True))
for call in message.tool_calls or []:
    arguments = json.loads(call.function.arguments)
    result = in_stock(**arguments)
    print(f"in_stock({arguments['colour']!r}): {result}")
    messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
answer = client.chat.completions.create(messages=messages, tool_choice="none", **settings)
print(answer.choices[0].message.content)
print(f"total time: {time.monotonic() - started:.2f} s")
