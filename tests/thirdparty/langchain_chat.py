# --- setup
import base64

import openai
from langchain_openai import ChatOpenAI

llm = ChatOpenAI(
    model="qwen2-vl-demo",
    base_url="http://127.0.0.1:8000/v1",
    api_key="sk-your-key",
    temperature=0,
)


def encode_image(path):
    with open(path, "rb") as file:
        return base64.b64encode(file.read()).decode("utf-8")


# --- text
messages = [
    ("system", "You are a helpful assistant."),
    ("human", "Hello, who are you?"),
]
print(llm.invoke(messages).content)

# --- picture
message = {
    "role": "user",
    "content": [
        {"type": "text", "text": "What colour is the circle?"},
        {"type": "image", "base64": encode_image("red_circle.jpg"), "mime_type": "image/jpeg"},
    ],
}
print(llm.invoke([message]).content)

# --- address
message = {
    "role": "user",
    "content": [
        {"type": "text", "text": "What colour is the square?"},
        {"type": "image", "url": "https://example.org/blue_square.png"},
    ],
}
print(llm.invoke([message]).content)

# --- several
message = {
    "role": "user",
    "content": [
        {"type": "image", "base64": encode_image("red_circle.jpg"), "mime_type": "image/jpeg"},
        {
            "type": "image_url",
            "image_url": {"url": f"data:image/png;base64,{encode_image('blue_square.png')}"},
        },
        {"type": "text", "text": "What is in the second picture?"},
    ],
}
answer = llm.invoke([message])
print(answer.content, answer.usage_metadata["total_tokens"])

# --- stream
for chunk in llm.stream([message]):
    print(chunk.text, end="|", flush=True)
print()

# --- turns
from langchain_core.messages import HumanMessage

turns = [HumanMessage(content=message["content"]), answer, HumanMessage("What colour is it?")]
print(llm.invoke(turns).content)

# --- async
import asyncio


async def main():
    answers = await llm.abatch([[message], [message]])
    print("\n".join(answer.content for answer in answers))


asyncio.run(main())

# --- structured
from pydantic import BaseModel, Field


class Fields(BaseModel):
    """What the picture shows."""

    color: str = Field(description="The colour of the thing")
    shape: str = Field(description="The shape of the thing")


message = {
    "role": "user",
    "content": [
        {"type": "image", "base64": encode_image("blue_square.png"), "mime_type": "image/png"},
        {"type": "text", "text": "Return JSON with color, shape."},
    ],
}
print(repr(llm.with_structured_output(Fields, method="json_schema").invoke([message])))

# --- tools
from typing import Literal

from langchain_core.tools import tool


@tool
def in_stock(colour: Literal["red", "blue"]) -> str:
    """How many sheets of paper of a colour are in stock."""
    return f"12 {colour} sheets"


message = {
    "role": "user",
    "content": [
        {"type": "image", "base64": encode_image("red_circle.jpg"), "mime_type": "image/jpeg"},
        {"type": "text", "text": "What colour is the circle?"},
    ],
}
asked = llm.bind_tools([in_stock], tool_choice="any").invoke([message])
turns = [message, asked]
for call in asked.tool_calls:
    print(call["name"], call["args"])
    turns.append(in_stock.invoke(call))
print(llm.invoke(turns).content)

# --- wrong key
stranger = ChatOpenAI(
    model="qwen2-vl-demo", base_url="http://127.0.0.1:8000/v1", api_key="sk-wrong"
)
try:
    stranger.invoke("Hello")
except openai.AuthenticationError as error:
    print(error.status_code, error.code, error.message)

# --- no such model
other = ChatOpenAI(model="gpt-4o", base_url="http://127.0.0.1:8000/v1", api_key="sk-your-key")
try:
    other.invoke("Hello")
except openai.NotFoundError as error:
    print(error.status_code, error.code, error.message)

# --- too long
from langchain_core.exceptions import ContextOverflowError

try:
    llm.invoke("word " * 6000)
except ContextOverflowError as error:
    print(error.status_code, error.code, error.message)
