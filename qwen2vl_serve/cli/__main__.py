"""``python -m qwen2vl_serve.cli``."""

import sys

from qwen2vl_serve.cli import main

if __name__ == "__main__":
    sys.exit(main())
