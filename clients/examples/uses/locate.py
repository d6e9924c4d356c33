"""Find something in a picture, and draw a box around it."""

from qwen2vl_client import Client
from qwen2vl_client.draw import draw_boxes
from qwen2vl_client.tasks import locate

from arguments import parse

args = parse(__doc__, "shape.png", words="the yellow star")
with Client(args.url, args.api_key) as client:
    found = locate(client, args.images[0], args.words, **args.fields)
for box in found.boxes:
    print(box.label, *box.pixels)
draw_boxes(args.images[0], found.boxes).save("located.png")
print(f"{len(found.boxes)} boxes are drawn in located.png")
