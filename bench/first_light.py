"""Ours beside stock vLLM on small requests: ``python -m bench.first_light``.

Text, a small picture, and 16 streams at once; ``bench.rounds`` tells how they are measured.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench import rounds
from bench.traffic import PICTURE, STREAMED, TEXT

CASES = (TEXT, PICTURE, STREAMED)
ROUNDS = 30


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and return 0; 1 when a server failed."""
    return rounds.run("first_light", __doc__ or "", CASES, argv, ROUNDS)


if __name__ == "__main__":
    sys.exit(main())
