"""A document of this project taken apart: headings, tables, code blocks, links, code spans."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Cell:
    """One cell: its text without marks, and its code spans."""

    text: str
    codes: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """One fenced block: language, the words after it, the line it begins at."""

    language: str
    tags: frozenset[str]
    text: str
    line: int


Row = tuple[Cell, ...]


class Document:
    """One Markdown file, parsed once."""

    def __init__(self, name: str) -> None:
        self.path = ROOT / name
        self.source = self.path.read_text("utf-8")
        self._tokens = MarkdownIt("commonmark").enable("table").parse(self.source)

    def __repr__(self) -> str:
        return self.path.name

    @property
    def headings(self) -> list[tuple[str, str]]:
        """Pairs of level (``h2``) and text, in order."""
        return [
            (token.tag, self._tokens[index + 1].content)
            for index, token in enumerate(self._tokens)
            if token.type == "heading_open"
        ]

    @property
    def anchors(self) -> set[str]:
        """What ``#…`` may point at, as GitHub forms it from the headings."""
        return {
            re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for _, text in self.headings
        }

    @property
    def blocks(self) -> list[Block]:
        """The fenced code blocks, in order."""
        return [
            Block(words[0], frozenset(words[1:]), token.content, (token.map or [0])[0] + 1)
            for token in self._tokens
            if token.type == "fence" and (words := token.info.split() or [""])
        ]

    @property
    def tables(self) -> list[list[Row]]:
        """The rows of each table, without its heading row."""
        found: list[list[Row]] = []
        body = False
        for token, content in zip(self._tokens, self._tokens[1:], strict=False):
            if token.type == "tbody_open":
                found.append([])
            body = (body or token.type == "tbody_open") and token.type != "tbody_close"
            if token.type == "tr_open" and body:
                found[-1].append(())
            elif token.type == "td_open":
                found[-1][-1] += (_cell(content),)
        return found

    @property
    def links(self) -> list[str]:
        """Addresses of links and pictures."""
        return [
            unquote(str(token.attrGet("href") or token.attrGet("src")))
            for token in self._inline()
            if token.type in ("link_open", "image")
        ]

    @property
    def codes(self) -> list[str]:
        """Every code span outside of fenced blocks."""
        return [token.content for token in self._inline() if token.type == "code_inline"]

    def table_of(self, names: Iterable[str]) -> dict[str, Row]:
        """Find the table whose first column names most of ``names``; rows by each name."""
        wanted = set(names)

        def by_name(rows: list[Row]) -> dict[str, Row]:
            return {code: row for row in rows for code in row[0].codes}

        return max(map(by_name, self.tables), key=lambda table: len(wanted & table.keys()))

    def _inline(self) -> Iterator[Token]:
        for token in self._tokens:
            yield from token.children or ()


def _cell(token: Token) -> Cell:
    children = token.children or []
    return Cell(
        "".join(child.content for child in children),
        tuple(child.content for child in children if child.type == "code_inline"),
    )
