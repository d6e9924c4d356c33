"""Read the text in a picture."""

from qwen2vl_client import Client
from qwen2vl_client.tasks import ocr

from arguments import parse

args = parse(__doc__, "sign.png")
with Client(args.url, args.api_key) as client:
    for image in args.images:
        print(ocr(client, image, **args.fields))
