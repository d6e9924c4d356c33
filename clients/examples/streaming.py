"""Print the answer while it is generated."""

from qwen2vl_client import Client

from arguments import SQUARE_AND_TRIANGLE, parse

args = parse(__doc__, SQUARE_AND_TRIANGLE)
with Client(args.url, args.api_key, args.model) as client:
    stream = client.stream("Describe the picture.", images=args.images)
    for text in stream:
        print(text, end="", flush=True)
print()
print(f"total time: {stream.answer.seconds:.2f} s")
