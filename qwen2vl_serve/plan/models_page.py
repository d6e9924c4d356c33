"""The table of ``docs/models.md`` and its Chinese twin: every published checkpoint, and its cards.

``python -m qwen2vl_serve.plan.models_page docs`` writes both tables anew; a test holds them to the
planner, and every row's profile to a plan that fits.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen2vl_serve.machine.hardware import GIB
from qwen2vl_serve.plan import question
from qwen2vl_serve.plan.architectures import Architecture, published, published_names
from qwen2vl_serve.plan.assessment import Verdict
from qwen2vl_serve.plan.capacity import capacity
from qwen2vl_serve.plan.planning import Assessment, plan_for
from qwen2vl_serve.plan.weights import stored_bytes

COMMAND = "python -m qwen2vl_serve.plan.models_page docs"
WINDOW = 8192
OVERRIDES = (f"engine.max_model_len={WINDOW}", "media.max_pixels=1003520")
"""What the rows are planned with, beside four pictures a request."""

CONSUMER = (
    "1x2080-8g", "1x3060-12g", "1x4060ti-16g", "1x3090", "2x3090", "4x3090", "8x3090",
)  # fmt: skip
DATACENTRE = ("1xl4-24g", "1xa100-40g", "1xa100-80g", "2xa100-80g", "4xa100-80g")

HEADS = {
    "models.md": "| model | GiB | consumer cards | at once | data centre cards | at once |",
    "models.zh-CN.md": "| 模型 | GiB | 消费级显卡 | 同时 | 数据中心显卡 | 同时 |",
}
_TABLE = re.compile(r"(?m)^\| (?:model|模型) \| [^\n]*\n\|---[^\n]*\n(?:\|[^\n]*\n)+")


@dataclass(frozen=True, slots=True)
class Row:
    """A checkpoint on the first cards of each ladder that it surely fits; None where on none."""

    name: str
    architecture: Architecture
    consumer: Assessment | None
    datacentre: Assessment | None


def rows() -> Iterator[Row]:
    """Plan every published checkpoint on both ladders of cards."""
    for name in published_names():
        architecture = published(name)
        if architecture is not None:
            yield Row(name, architecture, _first(name, CONSUMER), _first(name, DATACENTRE))


def table(page: str) -> str:
    """Write the table of one of the two pages."""
    lines = [HEADS[page], "|---|---|---|---|---|---|"]
    for row in rows():
        weights = stored_bytes(row.architecture) / GIB
        cells = [f"`{row.name}`", f"{weights:.1f}", *_cells(row.consumer), *_cells(row.datacentre)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(folder: Path) -> None:
    """Put the tables into the two pages."""
    for page in HEADS:
        path = folder / page
        text, count = _TABLE.subn(table(page), path.read_text("utf-8"))
        if count != 1:
            raise ValueError(f"{path}: holds {count} tables of models, and not one")
        path.write_text(text, "utf-8")


def _first(name: str, ladder: Sequence[str]) -> Assessment | None:
    for cards in ladder:
        asked = question.of_model(name, cards, OVERRIDES)
        plan = plan_for(
            asked.profile, asked.machines, host=asked.host, architecture=asked.architecture
        )
        if plan.verdict is Verdict.FITS:
            return plan
    return None


def _cells(plan: Assessment | None) -> tuple[str, str]:
    if plan is None:
        return "—", ""
    engine, cards = plan.profile.engine, plan.machines.cards
    split = engine.tensor_parallel_size
    how = f", TP {split}" if split > 1 else ""
    return f"{len(cards)} × {cards[0].name}{how}", f"{capacity(plan, WINDOW).by_cache:.0f}"


if __name__ == "__main__":
    write(Path(sys.argv[1]))
