"""``python -m qwen2vl_client --image a.jpg "What is this?"``; a command's name may come first."""

import sys

from qwen2vl_client.cli import COMMANDS, main

if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit(main(words if words[:1] and words[0] in COMMANDS else ["ask", *words]))
