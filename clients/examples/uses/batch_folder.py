"""Read the text of every picture in a folder; started again, it goes on where it was."""

from qwen2vl_client import Client
from qwen2vl_client.batch import batch
from qwen2vl_client.tasks import ocr

from arguments import PICTURES, parse

args = parse(__doc__)
folder = args.images[0] if args.images else PICTURES
with Client(args.url, args.api_key) as client:
    report = batch(client, folder, each=ocr.task, output="texts.jsonl", progress=True)
for outcome in report.outcomes:
    print(f"{outcome.id}: {outcome.text or outcome.error}")
print(report)
