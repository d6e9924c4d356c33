"""Turn a screenshot into the code of a page."""

import sys

from qwen2vl_client import AnswerError, Client
from qwen2vl_client.tasks import to_html

from arguments import parse

args = parse(__doc__, "screenshot.png")
with Client(args.url, args.api_key) as client:
    try:
        page = to_html(client, args.images[0], **args.fields)
    except AnswerError as error:
        sys.exit(f"this model writes no HTML: {error}")
page.save("page.html")
print(f"{len(page.html)} characters are in page.html")
