"""Translate the text in a picture."""

from qwen2vl_client import Client
from qwen2vl_client.tasks import translate

from arguments import parse

args = parse(__doc__, "sign.png", words="Chinese")
with Client(args.url, args.api_key) as client:
    print(translate(client, args.images[0], args.words, **args.fields))
