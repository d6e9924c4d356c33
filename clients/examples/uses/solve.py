"""Solve the problem in a picture, step by step."""

from qwen2vl_client import Client
from qwen2vl_client.tasks import solve

from arguments import parse

args = parse(__doc__, "problem.png")
with Client(args.url, args.api_key) as client:
    solution = solve(client, args.images[0], **args.fields)
for number, step in enumerate(solution.steps, 1):
    print(f"{number}. {step}")
print(f"answer: {solution.answer}")
