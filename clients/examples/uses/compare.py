"""Compare two pictures."""

from qwen2vl_client import Client
from qwen2vl_client.tasks import compare

from arguments import parse

args = parse(__doc__, "shape.png", "other_shape.png")
with Client(args.url, args.api_key) as client:
    print(compare(client, args.images, **args.fields))
