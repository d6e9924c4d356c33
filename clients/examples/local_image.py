"""Ask about a picture on this machine; the client sends it as base64."""

from qwen2vl_client import Client

from arguments import RED_CIRCLE, parse

args = parse(__doc__, RED_CIRCLE)
with Client(args.url, args.api_key, args.model) as client:
    answer = client.chat("Describe the picture.", images=args.images)
print(answer)
print(f"total time: {answer.seconds:.2f} s")
