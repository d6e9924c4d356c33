"""Ask about two pictures in one message."""

from qwen2vl_client import Client

from arguments import BLUE_SQUARE, RED_CIRCLE, parse

args = parse(__doc__, RED_CIRCLE, BLUE_SQUARE)
with Client(args.url, args.api_key, args.model) as client:
    answer = client.chat("What is in the second picture?", images=args.images)
print(answer)
print(f"total time: {answer.seconds:.2f} s")
