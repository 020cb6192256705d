"""The document as Markdown, readable as plain text too. What folds on a page folds where GitHub shows it."""

from collections.abc import Sequence

from harness.report import words
from harness.report.document import (
    Block,
    Bullets,
    Code,
    Document,
    Figure,
    Fold,
    Front,
    Heading,
    Listening,
    Paragraph,
    Section,
    Table,
    Tile,
)


def render(document: Document) -> str:
    return f"# {document.title}\n\n{_blocks(document.blocks)}\n"


def _blocks(blocks: Sequence[Block]) -> str:
    return "\n\n".join(filter(None, map(_block, blocks)))


def _block(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Bullets(items):
            return "\n".join(f"- {item}" for item in items)
        case Table():
            return _table(block)
        case Figure(path, title):
            return f"![{words.said(title)}]({path.name})"
        case Code(text, language):
            return f"```{language}\n{text}\n```"
        case Front(title, sentence, tiles, figure):
            parts: list[Block] = [Heading(2, title), Paragraph(sentence)]
            parts += [_tiles(tiles)] if tiles else []
            parts += [figure] if figure else []
            return _blocks(parts)
        case Listening(note=note):
            return f"{note} The players are in `report.html`."
        case Fold(title, blocks):
            return f"<details><summary>{words.markup(title)}</summary>\n\n{_blocks(blocks)}\n\n</details>"
        case Section(title, blocks):
            return f"## {title}\n\n{_blocks(blocks)}"


def _tiles(tiles: Sequence[Tile]) -> Table:
    return Table(["", "", ""], [[tile.about, f"**{tile.figure}**", tile.detail] for tile in tiles])


def _table(table: Table) -> str:
    rule = ["---:" if column in table.numeric else "---" for column in range(len(table.columns))]
    columns, *rows = ([_cell(cell) for cell in row] for row in (table.columns, *table.rows))
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, rule, *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
