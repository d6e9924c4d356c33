"""The command line: ``main(["ask", …])``; a file a command.

Exit status of each: 0 done; 1 the server refused, failed or was not there, or a batch ended early;
2 an argument cannot be used (a picture that is missing, too); 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "ask": "ask a running server, with or without pictures",
    "chat": "talk with a running server, turn by turn",
    "ocr": "print the text in pictures",
    "extract": "print fields or a table of a picture as data",
    "locate": "find something in a picture: boxes, drawn if wanted",
    "batch": "ask all of a file or a folder, each once, resumable",
}
"""What there is and what it does; each is a module of this package with ``main(argv, prog)``."""


def main(argv: Sequence[str], prog: str = "qwen2vl-serve") -> int:
    """Run the command that ``argv`` begins with and return its exit status."""
    name, *words = argv
    command = import_module(f"{__name__}.{name}")
    status: int = command.main(words, f"{prog} {name}")
    return status
