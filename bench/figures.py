"""What the samples say: medians of rounds and ratios of paired rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Spread:
    """Smallest, middle and largest of the rounds."""

    least: float
    middle: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        return cls(min(values), median(values), max(values))

    def shown(self, scale: float = 1.0) -> str:
        """Return ``middle (least…most)``, each times ``scale``."""
        least, middle, most = (value * scale for value in (self.least, self.middle, self.most))
        return f"{middle:.2f} ({least:.2f}…{most:.2f})"


@dataclass(frozen=True)
class Comparison:
    """One quantity of one case on both sides; the ratio is that of each round's pair."""

    case: str
    quantity: str
    stock: Spread
    ours: Spread
    ratio: Spread

    @classmethod
    def of(
        cls, case: str, quantity: str, stock: Sequence[float], ours: Sequence[float]
    ) -> Comparison:
        """Compare rounds in seconds; the two sides' n-th rounds were measured in turns."""
        ratios = [mine / theirs for theirs, mine in zip(stock, ours, strict=True)]
        return cls(case, quantity, Spread.of(stock), Spread.of(ours), Spread.of(ratios))


def table(comparisons: Sequence[Comparison]) -> str:
    """Return a Markdown table in milliseconds: median (least…most) of the rounds."""
    rows = [
        ("case", "per request", "stock, ms", "ours, ms", "ours / stock"),
        ("---", "---", "---", "---", "---"),
        *(
            (c.case, c.quantity, c.stock.shown(1000), c.ours.shown(1000), c.ratio.shown())
            for c in comparisons
        ),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    )
