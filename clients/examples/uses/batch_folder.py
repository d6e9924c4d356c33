"""Read the text of every picture in a folder; started again, it goes on where it was."""

import argparse

from qwen2vl_client import Client
from qwen2vl_client.batch import batch
from qwen2vl_client.tasks import ocr

from arguments import PICTURES

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--url", help="the server (default: http://127.0.0.1:8000/v1)")
parser.add_argument("--api-key", help="the key (default: QWEN2VL_API_KEY)")
parser.add_argument("folder", nargs="?", default=str(PICTURES), help="pictures")
args = parser.parse_args()
with Client(args.url, args.api_key) as client:
    report = batch(client, args.folder, each=ocr.task, output="texts.jsonl", progress=True)
for outcome in report.outcomes:
    print(f"{outcome.id}: {outcome.text or outcome.error}")
print(report)
