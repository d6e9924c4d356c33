"""A table in a picture, as rows."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen2vl_client.answer import Answer
from qwen2vl_client.errors import AnswerError, InvalidArgumentError
from qwen2vl_client.media import ImageSource
from qwen2vl_client.prompts import PromptsGiven, chosen
from qwen2vl_client.tasks.task import (
    EXACT,
    Task,
    Use,
    json_format,
    json_of,
    list_of,
    pictures,
    texts_of,
)

SCHEMA = {
    "type": "object",
    "properties": {
        "columns": {"type": "array", "items": {"type": "string"}},
        "rows": {"type": "array", "items": {"type": "array", "items": {"type": "string"}}},
    },
    "required": ["columns", "rows"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Table:
    """Headings and rows of texts; every row has as many cells as there are columns."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    source: Answer = field(repr=False)

    def records(self) -> list[dict[str, str]]:
        """Each row by its headings; of two columns with one heading the last holds."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the table as CSV (RFC 4180); with ``path`` also write it, readable by Excel."""
        sheet = io.StringIO()
        csv.writer(sheet).writerows([self.columns, *self.rows])
        if path is not None:
            # Excel takes a file without the byte order mark for one of the local code page.
            Path(path).write_text(sheet.getvalue(), encoding="utf-8-sig", newline="")
        return sheet.getvalue()

    def to_markdown(self) -> str:
        """Return the table as Markdown (GitHub's); ends with a line end."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame`` of texts; needs the extra ``pandas``."""
        try:
            import pandas as pd  # noqa: PLC0415  (an extra, imported by those who ask for it)
        except ImportError:
            raise InvalidArgumentError("to_pandas() needs pandas: pip install pandas") from None
        return pd.DataFrame(list(self.rows), columns=list(self.columns))


@Use
def extract_table(
    image: ImageSource, *, prompts: PromptsGiven = "en", **fields: Any
) -> Task[Table]:
    """Extract the table in a picture; the engine is bound to answer in its shape.

    ``AnswerError`` where the answer is of another.
    """
    given = {"response_format": json_format("table", SCHEMA), **fields}
    return Task(chosen(prompts).table, _read, pictures(image), fields=given, defaults=EXACT)


def _read(answer: Answer) -> Table:
    value = json_of(answer)
    columns = texts_of(list_of(value, "columns", answer))
    given = list_of(value, "rows", answer)
    if not all(isinstance(row, list) for row in given):
        raise AnswerError(
            f"the rows of the answer's table are no lists of cells: {given!r:.120}", answer
        )
    rows = [texts_of(row) for row in given]
    width = max([len(columns), *map(len, rows)])
    return Table(_padded(columns, width), tuple(_padded(row, width) for row in rows), answer)


def _padded(cells: Sequence[str], width: int) -> tuple[str, ...]:
    return (*cells, *[""] * (width - len(cells)))


def _cell(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())
