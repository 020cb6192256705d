"""A report as data: blocks that Markdown and HTML both know how to print.

Text is a line of CommonMark, with `code` and **strong** spans; words that are not our own go through `words.said`.
"""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: list[str]


@dataclass(frozen=True)
class Table:
    """`numeric` columns are set flush right; rows have one cell per column."""

    columns: list[str]
    rows: list[list[str]]
    numeric: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Figure:
    """A picture beside the report; `title` is what it shows, in words."""

    path: Path
    title: str


@dataclass(frozen=True)
class Code:
    text: str
    language: str = ""


Block = Heading | Paragraph | Bullets | Table | Figure | Code


@dataclass
class Document:
    title: str
    blocks: list[Block] = field(default_factory=list)

    def add(self, *blocks: Block | None) -> None:
        """Append blocks; None stands for a block that had nothing to say."""
        self.blocks += [block for block in blocks if block is not None]
