"""Find something in a picture, and draw a box around it."""

import argparse

from qwen2vl_client import Client
from qwen2vl_client.draw import draw_boxes
from qwen2vl_client.tasks import locate

from arguments import PICTURES

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--url", help="the server (default: http://127.0.0.1:8000/v1)")
parser.add_argument("--api-key", help="the key (default: QWEN2VL_API_KEY)")
parser.add_argument("image", nargs="?", default=str(PICTURES / "shape.png"))
parser.add_argument("what", nargs="?", default="the shape", help="what to look for")
args = parser.parse_args()
with Client(args.url, args.api_key) as client:
    found = locate(client, args.image, args.what)
for box in found.boxes:
    print(box.label, *box.pixels)
draw_boxes(args.image, found.boxes).save("located.png")
print(f"{len(found.boxes)} boxes are drawn in located.png")
