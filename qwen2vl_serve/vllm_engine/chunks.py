"""Chunks of a streamed answer, written by hand.

vLLM builds four pydantic objects for every token and has them find out again which of their fields
were set; of a chunk only the text changes. What it alone can write (log probabilities, counts that
run along, parsed tool calls) it still writes: ``is_plain`` tells.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from pydantic_core import to_json
from vllm.exceptions import GenerationError
from vllm.outputs import RequestOutput

from qwen2vl_serve.vllm_engine.request import Asked


def is_plain(request: Asked) -> bool:
    """Whether chunks of its answer hold text and nothing else."""
    options = request.stream_options
    counted = options is not None and options.continuous_usage_stats
    return not (request.logprobs or request.tools or counted)


async def plain_chunks(
    request: Asked, outputs: AsyncGenerator[RequestOutput, None], answer_id: str, model: str
) -> AsyncGenerator[str, None]:
    """Yield each ``chat.completion.chunk`` as JSON: a role per answer, its pieces, the usage.

    ``request.usage`` holds the tokens of what has been yielded. Closing it ends the generation.

    Raises:
        GenerationError: the engine gave a request up.
        Exception: what vLLM raises while it generates.
    """
    created = int(time.time())
    head = to_json(
        {"id": answer_id, "object": "chat.completion.chunk", "created": created, "model": model}
    ).decode()
    head = f'{head[:-1]},"choices":['
    answers = range(request.n or 1)
    unfinished = set(answers)
    usage = request.usage
    counts = dict.fromkeys(answers, 0)
    begun = False
    async with aclosing(outputs):
        async for result in outputs:
            for output in result.outputs:
                index, reason = output.index, output.finish_reason
                if index not in unfinished:
                    continue
                if reason == "error":
                    raise GenerationError("the engine gave the request up")
                if not output.text and not output.token_ids and not counts[index]:
                    continue  # a prompt that is read in pieces
                if not begun:
                    begun = True
                    for each in answers:
                        yield (
                            f'{head}{{"index":{each},"delta":{{"role":"assistant","content":""}},'
                            '"logprobs":null,"finish_reason":null}]}'
                        )
                counts[index] += len(output.token_ids)
                usage.completion_tokens = sum(counts.values())
                text = to_json(output.text).decode()
                end = "null"
                if reason is not None:
                    unfinished.discard(index)
                    end = f'"{reason}","stop_reason":{to_json(output.stop_reason).decode()}'
                yield (
                    f'{head}{{"index":{index},"delta":{{"content":{text}}},'
                    f'"logprobs":null,"finish_reason":{end}}}]}}'
                )
    if request.stream_options is not None and request.stream_options.include_usage:
        yield f'{head}],"usage":{to_json(_counts(usage)).decode()}}}'


def _counts(usage: Any) -> dict[str, int]:
    prompt, completion = usage.prompt_tokens, usage.completion_tokens or 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
