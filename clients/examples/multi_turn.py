"""Ask, then ask on: each turn is sent together with those before it."""

import time

from qwen2vl_client import Client, Conversation

from arguments import RED_CIRCLE, parse

args = parse(__doc__, RED_CIRCLE)
started = time.monotonic()
with Client(args.url, args.api_key, args.model) as client:
    conversation = Conversation(client)
    print(conversation.ask("What shape is it?", images=args.images))
    print(conversation.ask("What colour is it?"))
print(f"total time: {time.monotonic() - started:.2f} s")
