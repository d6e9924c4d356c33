"""Extract a table from a picture, as Markdown and as a CSV file."""

from qwen2vl_client import Client
from qwen2vl_client.tasks import extract_table

from arguments import parse

args = parse(__doc__, "table.png")
with Client(args.url, args.api_key) as client:
    table = extract_table(client, args.images[0], **args.fields)
print(table.to_markdown())
table.to_csv("table.csv")
print(f"{len(table.rows)} rows are in table.csv")
