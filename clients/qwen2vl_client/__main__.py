"""``python -m qwen2vl_client --image a.jpg "What is this?"``."""

import sys

from qwen2vl_client.cli import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m qwen2vl_client"))
