# --- setup
import base64

import openai
from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="sk-your-key")


def encode_image(path):
    with open(path, "rb") as file:
        return base64.b64encode(file.read()).decode("utf-8")


# --- text
completion = client.chat.completions.create(
    model="qwen2-vl-demo",
    messages=[{"role": "user", "content": "Hello, who are you?"}],
    temperature=0,
)
print(completion.choices[0].message.content)

# --- picture
completion = client.chat.completions.create(
    model="qwen2-vl-demo",
    messages=[
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What colour is the circle?"},
                {
                    "type": "image_url",
                    "image_url": {
                        "url": f"data:image/jpeg;base64,{encode_image('red_circle.jpg')}"
                    },
                },
            ],
        }
    ],
    temperature=0,
)
print(completion.choices[0].message.content)

# --- address
completion = client.chat.completions.create(
    model="qwen2-vl-demo",
    messages=[
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What colour is the square?"},
                {
                    "type": "image_url",
                    "image_url": {"url": "https://example.org/blue_square.png", "detail": "high"},
                },
            ],
        }
    ],
    temperature=0,
)
print(completion.choices[0].message.content)

# --- several
pictures = [("red_circle.jpg", "jpeg"), ("blue_square.png", "png")]
content = [
    {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{encode_image(path)}"}}
    for path, kind in pictures
]
content.append({"type": "text", "text": "What is in the second picture?"})
completion = client.chat.completions.create(
    model="qwen2-vl-demo",
    messages=[{"role": "user", "content": content}],
    temperature=0,
)
print(completion.choices[0].message.content)

# --- stream
stream = client.chat.completions.create(
    model="qwen2-vl-demo",
    messages=[{"role": "user", "content": content}],
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="|", flush=True)
    if chunk.usage:
        print(f"\n{chunk.usage.completion_tokens} tokens")

# --- stream helper
with client.chat.completions.stream(
    model="qwen2-vl-demo",
    messages=[{"role": "user", "content": content}],
    temperature=0,
) as events:
    for event in events:
        if event.type == "content.delta":
            print(event.delta, end="|", flush=True)
print(f"\n{events.get_final_completion().choices[0].finish_reason}")

# --- async
import asyncio

from openai import AsyncOpenAI


async def ask(question):
    async with AsyncOpenAI(
        base_url="http://127.0.0.1:8000/v1", api_key="sk-your-key"
    ) as async_client:
        stream = await async_client.chat.completions.create(
            model="qwen2-vl-demo",
            messages=[
                {"role": "user", "content": [*content[:2], {"type": "text", "text": question}]}
            ],
            temperature=0,
            stream=True,
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


async def main():
    questions = ("What is in the first picture?", "What is in the second picture?")
    print("\n".join(await asyncio.gather(*map(ask, questions))))


asyncio.run(main())

# --- structured
from pydantic import BaseModel


class Fields(BaseModel):
    color: str
    shape: str


completion = client.chat.completions.parse(
    model="qwen2-vl-demo",
    messages=[
        {
            "role": "user",
            "content": [content[1], {"type": "text", "text": "Return JSON with color, shape."}],
        }
    ],
    response_format=Fields,
    temperature=0,
)
print(repr(completion.choices[0].message.parsed))

# --- tools
tools = [
    {
        "type": "function",
        "function": {
            "name": "in_stock",
            "description": "How many sheets of paper of a colour are in stock.",
            "parameters": {
                "type": "object",
                "properties": {"colour": {"type": "string", "enum": ["red", "blue"]}},
                "required": ["colour"],
                "additionalProperties": False,
            },
        },
    }
]
question = [content[0], {"type": "text", "text": "What colour is the circle?"}]
messages = [{"role": "user", "content": question}]
completion = client.chat.completions.create(
    model="qwen2-vl-demo",
    messages=messages,
    tools=tools,
    tool_choice={"type": "function", "function": {"name": "in_stock"}},
    temperature=0,
)
message = completion.choices[0].message
messages.append(message)
for call in message.tool_calls:
    print(call.function.name, call.function.arguments)
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "12 sheets"})
completion = client.chat.completions.create(
    model="qwen2-vl-demo", messages=messages, tools=tools, tool_choice="none", temperature=0
)
print(completion.choices[0].message.content)

# --- wrong key
try:
    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="sk-wrong").models.list()
except openai.AuthenticationError as error:
    print(error.status_code, error.code, error.message, error.request_id)

# --- no such model
try:
    client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "Hello"}])
except openai.NotFoundError as error:
    print(error.status_code, error.code, error.param, error.message)

# --- too long
try:
    client.chat.completions.create(
        model="qwen2-vl-demo", messages=[{"role": "user", "content": "word " * 6000}]
    )
except openai.BadRequestError as error:
    print(error.status_code, error.code, error.param, error.message)
