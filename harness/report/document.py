"""A report as data: blocks that Markdown and HTML both know how to print.

Text is a line of CommonMark, with `code` and **strong** spans; words that are not our own go through `words.said`.
"""

from __future__ import annotations

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
    """A picture beside the report; `title` is what it shows, in words, and `drawing` the same as SVG."""

    path: Path
    title: str
    drawing: str = ""


@dataclass(frozen=True)
class Code:
    text: str
    language: str = ""


@dataclass(frozen=True)
class Tile:
    """One large figure. `about` says of what, `detail` where it comes from, `sense` is "good", "bad" or "neutral"."""

    figure: str
    about: str
    detail: str
    sense: str = "neutral"


@dataclass(frozen=True)
class Front:
    """The first screen: the verdict in a sentence, large figures, a picture."""

    title: str
    sentence: str
    tiles: list[Tile]
    figure: Figure | None = None


@dataclass(frozen=True)
class Clip:
    """One text as both variants speak it; each sound is a data URI."""

    text: str
    voice: str
    sounds: tuple[str, str]


@dataclass(frozen=True)
class Listening:
    """Players for the ear, of which a page can offer what paper cannot; `names` are the two variants'."""

    names: tuple[str, str]
    clips: list[Clip]
    note: str


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown when their title is chosen."""

    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Section:
    """A part of the report, which folds where a page can; `open` is how it is met."""

    title: str
    blocks: list[Block]
    open: bool = False


Block = Heading | Paragraph | Bullets | Table | Figure | Code | Front | Listening | Fold | Section


@dataclass
class Document:
    title: str
    blocks: list[Block] = field(default_factory=list)

    def add(self, *blocks: Block | None) -> None:
        """Append blocks; None stands for a block that had nothing to say."""
        self.blocks += [block for block in blocks if block is not None]
