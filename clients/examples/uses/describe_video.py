"""Describe a video, one frame of it a second and each of at most 360 × 420 pixels."""

from qwen2vl_client import Client
from qwen2vl_client.tasks import describe_video

from arguments import parse

args = parse(__doc__, "moving.mp4")
with Client(args.url, args.api_key) as client:
    video = args.images[0]
    print(describe_video(client, video, fps=1.0, max_pixels=360 * 420, **args.fields))
