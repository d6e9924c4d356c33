# --- setup
import openai
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.llms.openai_like import OpenAILike

llm = OpenAILike(
    model="qwen2-vl-demo",
    api_base="http://127.0.0.1:8000/v1",
    api_key="sk-your-key",
    context_window=4096,
    is_chat_model=True,
    should_use_structured_outputs=True,
    temperature=0,
)

# --- text
print(llm.complete("Hello, who are you?"))

# --- picture
message = ChatMessage(
    role="user",
    blocks=[
        ImageBlock(path="red_circle.jpg"),
        TextBlock(text="What colour is the circle?"),
    ],
)
print(llm.chat([message]).message.content)

# --- address
message = ChatMessage(
    role="user",
    blocks=[
        ImageBlock(url="https://example.org/blue_square.png"),
        TextBlock(text="What colour is the square?"),
    ],
)
print(llm.chat([message]).message.content)

# --- several
message = ChatMessage(
    role="user",
    blocks=[
        ImageBlock(path="red_circle.jpg"),
        ImageBlock(path="blue_square.png"),
        TextBlock(text="What is in the second picture?"),
    ],
)
answer = llm.chat([message])
print(answer.message.content)

# --- stream
for piece in llm.stream_chat([message]):
    print(piece.delta, end="|", flush=True)
print()

# --- turns
turns = [message, answer.message, ChatMessage(role="user", content="What colour is it?")]
print(llm.chat(turns).message.content)

# --- async
import asyncio


async def main():
    print((await llm.achat([message])).message.content)


asyncio.run(main())

# --- structured
from pydantic import BaseModel


class Fields(BaseModel):
    color: str
    shape: str


message = ChatMessage(
    role="user",
    blocks=[
        ImageBlock(path="blue_square.png"),
        TextBlock(text="Return JSON with color, shape."),
    ],
)
print(repr(llm.as_structured_llm(Fields).chat([message]).raw))

# --- tools
from typing import Literal

from llama_index.core.tools import FunctionTool


def in_stock(colour: Literal["red", "blue"]) -> str:
    """How many sheets of paper of a colour are in stock."""
    return f"12 {colour} sheets"


agent = OpenAILike(
    model="qwen2-vl-demo",
    api_base="http://127.0.0.1:8000/v1",
    api_key="sk-your-key",
    context_window=4096,
    is_chat_model=True,
    is_function_calling_model=True,
    temperature=0,
)
tool = FunctionTool.from_defaults(in_stock)
turns = [
    ChatMessage(
        role="user",
        blocks=[
            ImageBlock(path="red_circle.jpg"),
            TextBlock(text="What colour is the circle?"),
        ],
    )
]
answer = agent.chat_with_tools([tool], chat_history=turns, tool_choice="in_stock")
turns.append(answer.message)
for call in agent.get_tool_calls_from_response(answer):
    print(call.tool_name, call.tool_kwargs)
    result = tool(**call.tool_kwargs)
    turns.append(
        ChatMessage(
            role="tool", content=str(result), additional_kwargs={"tool_call_id": call.tool_id}
        )
    )
print(agent.chat(turns).message.content)

# --- wrong key
try:
    OpenAILike(
        model="qwen2-vl-demo",
        api_base="http://127.0.0.1:8000/v1",
        api_key="sk-wrong",
        is_chat_model=True,
    ).complete("Hello")
except openai.AuthenticationError as error:
    print(error.status_code, error.code, error.message)

# --- no such model
try:
    OpenAILike(
        model="gpt-4o",
        api_base="http://127.0.0.1:8000/v1",
        api_key="sk-your-key",
        is_chat_model=True,
    ).complete("Hello")
except openai.NotFoundError as error:
    print(error.status_code, error.code, error.message)

# --- too long
try:
    llm.complete("word " * 6000)
except openai.BadRequestError as error:
    print(error.status_code, error.code, error.message)
