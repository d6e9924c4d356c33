"""Ask a question without a picture."""

from qwen2vl_client import Client

from arguments import parse

args = parse(__doc__)
with Client(args.url, args.api_key, args.model) as client:
    answer = client.chat("Hello, who are you?")
print(answer)
print(f"total time: {answer.seconds:.2f} s")
