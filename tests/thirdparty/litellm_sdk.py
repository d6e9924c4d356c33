# --- setup
import base64
import os

import litellm
from litellm import completion

os.environ["HOSTED_VLLM_API_BASE"] = "http://127.0.0.1:8000/v1"
os.environ["HOSTED_VLLM_API_KEY"] = "sk-your-key"


def encode_image(path):
    with open(path, "rb") as file:
        return base64.b64encode(file.read()).decode("utf-8")


# --- text
response = completion(
    model="hosted_vllm/qwen2-vl-demo",
    messages=[{"role": "user", "content": "Hello, who are you?"}],
    temperature=0,
)
print(response.choices[0].message.content)

# --- openai prefix
response = completion(
    model="openai/qwen2-vl-demo",
    api_base="http://127.0.0.1:8000/v1",
    api_key="sk-your-key",
    messages=[{"role": "user", "content": "Hello, who are you?"}],
    temperature=0,
)
print(response.choices[0].message.content)

# --- picture
response = completion(
    model="hosted_vllm/qwen2-vl-demo",
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
print(response.choices[0].message.content)

# --- address
response = completion(
    model="hosted_vllm/qwen2-vl-demo",
    messages=[
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What colour is the square?"},
                {
                    "type": "image_url",
                    "image_url": {"url": "https://example.org/blue_square.png"},
                },
            ],
        }
    ],
    temperature=0,
)
print(response.choices[0].message.content)

# --- several
pictures = [("red_circle.jpg", "jpeg"), ("blue_square.png", "png")]
content = [
    {"type": "image_url", "image_url": f"data:image/{kind};base64,{encode_image(path)}"}
    for path, kind in pictures
]
content.append({"type": "text", "text": "What is in the second picture?"})
response = completion(
    model="hosted_vllm/qwen2-vl-demo",
    messages=[{"role": "user", "content": content}],
    temperature=0,
)
print(response.choices[0].message.content, response.usage.total_tokens)

# --- stream
response = completion(
    model="hosted_vllm/qwen2-vl-demo",
    messages=[{"role": "user", "content": content}],
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
)
for part in response:
    print(part.choices[0].delta.content or "", end="|", flush=True)
print()

# --- async
import asyncio

from litellm import acompletion


async def main():
    response = await acompletion(
        model="hosted_vllm/qwen2-vl-demo",
        messages=[{"role": "user", "content": content}],
        temperature=0,
    )
    print(response.choices[0].message.content)


asyncio.run(main())

# --- structured
from pydantic import BaseModel


class Fields(BaseModel):
    color: str
    shape: str


response = completion(
    model="hosted_vllm/qwen2-vl-demo",
    messages=[
        {
            "role": "user",
            "content": [content[1], {"type": "text", "text": "Return JSON with color, shape."}],
        }
    ],
    response_format=Fields,
    temperature=0,
)
print(repr(Fields.model_validate_json(response.choices[0].message.content)))

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
            },
        },
    }
]
question = [content[0], {"type": "text", "text": "What colour is the circle?"}]
messages = [{"role": "user", "content": question}]
response = completion(
    model="hosted_vllm/qwen2-vl-demo",
    messages=messages,
    tools=tools,
    tool_choice="required",
    parallel_tool_calls=False,
    temperature=0,
)
message = response.choices[0].message
messages.append(message)
for call in message.tool_calls:
    print(call.function.name, call.function.arguments)
    messages.append(
        {
            "tool_call_id": call.id,
            "role": "tool",
            "name": call.function.name,
            "content": "12 sheets",
        }
    )
response = completion(model="hosted_vllm/qwen2-vl-demo", messages=messages, temperature=0)
print(response.choices[0].message.content)

# --- wrong key
try:
    completion(
        model="hosted_vllm/qwen2-vl-demo",
        api_key="sk-wrong",
        messages=[{"role": "user", "content": "Hello"}],
    )
except litellm.AuthenticationError as error:
    print(error.status_code, error.message)

# --- no such model
try:
    completion(model="hosted_vllm/gpt-4o", messages=[{"role": "user", "content": "Hello"}])
except litellm.NotFoundError as error:
    print(error.status_code, error.message)

# --- too long
try:
    completion(
        model="hosted_vllm/qwen2-vl-demo",
        messages=[{"role": "user", "content": "word " * 6000}],
    )
except litellm.ContextWindowExceededError as error:
    print(error.status_code, error.message)
