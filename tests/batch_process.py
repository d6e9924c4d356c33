"""``python -m tests.batch_process URL INPUT OUTPUT``: a batch in a process that a test may kill."""

from __future__ import annotations

import sys

from qwen2vl_client import Client
from qwen2vl_client.batch import batch


def main(url: str, source: str, output: str) -> None:
    with Client(url) as client:
        report = batch(client, source, output=output, concurrency=4)
    sys.stdout.write(f"{report}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
