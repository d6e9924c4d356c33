"""Answer a customer's question about a photo, from it and from a text."""

from qwen2vl_client import Client
from qwen2vl_client.tasks import ask_product

from arguments import parse

KNOWLEDGE = """\
Every star costs 15 yuan. Every circle costs 28 yuan.
Goods may be returned within 7 days."""

args = parse(__doc__, "shape.png", words="What colour is it?")
with Client(args.url, args.api_key) as client:
    print(ask_product(client, args.images[0], args.words, KNOWLEDGE, **args.fields))
