"""The document as Markdown, readable as plain text too."""

from harness.report import words
from harness.report.document import Block, Bullets, Code, Document, Figure, Heading, Paragraph, Table


def render(document: Document) -> str:
    parts = [f"# {document.title}", *(_block(block) for block in document.blocks)]
    return "\n\n".join(parts) + "\n"


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


def _table(table: Table) -> str:
    rule = ["---:" if column in table.numeric else "---" for column in range(len(table.columns))]
    columns, *rows = ([_cell(cell) for cell in row] for row in (table.columns, *table.rows))
    rows = [columns, rule, *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
