"""Judge whether a picture may be published."""

from qwen2vl_client import Client
from qwen2vl_client.tasks import moderate

from arguments import parse

args = parse(__doc__, "shape.png")
with Client(args.url, args.api_key) as client:
    judgement = moderate(client, args.images[0], **args.fields)
print(f"verdict: {judgement.verdict}")
print(f"categories: {', '.join(judgement.categories) or 'none'}")
for reason in judgement.reasons:
    print(f"- {reason}")
