"""Extract named fields from a picture: into a dict, and into an object of a model's own."""

from pydantic import BaseModel
from qwen2vl_client import Client
from qwen2vl_client.tasks import extract_fields

from arguments import parse


class Drawing(BaseModel):
    """What is wanted of a picture."""

    color: str
    shape: str


args = parse(__doc__, "shape.png")
with Client(args.url, args.api_key) as client:
    print(extract_fields(client, args.images[0], ["color", "shape"], **args.fields))
    drawing = extract_fields(client, args.images[0], Drawing, **args.fields)
print(f"a {drawing.color} {drawing.shape}")
