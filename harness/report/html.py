"""The document as one HTML file that carries its pictures with it: for mailing, reading and printing."""

import base64
import html

from harness.report import words
from harness.report.document import Block, Bullets, Code, Document, Figure, Heading, Paragraph, Table

STYLE = """
body { font: 16px/1.55 Georgia, "Times New Roman", serif; color: #1a1a1a; max-width: 62rem; margin: 2.5rem auto;
       padding: 0 1.5rem; }
h1, h2, h3, th { font-family: "Helvetica Neue", Arial, sans-serif; line-height: 1.25; }
h1 { font-size: 1.9rem; } h2 { font-size: 1.35rem; margin-top: 2.6rem; border-bottom: 1px solid #bbb; }
h3 { font-size: 1.08rem; margin: 1.8rem 0 .3rem; }
p, ul { max-width: 44rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; line-height: 1.35; margin: 1rem 0; }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #555; font-size: .82rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1.6rem 0; } img { max-width: 100%; height: auto; }
figcaption { font-size: .88rem; color: #444; }
code, pre { font: .86em/1.45 ui-monospace, Menlo, Consolas, monospace; background: #f4f4f2; }
pre { padding: .8rem 1rem; overflow-x: auto; } pre code { font-size: 1em; }
@media print { body { font-size: 10.5pt; margin: 0; max-width: none; } h2, h3 { break-after: avoid; }
               figure, tr { break-inside: avoid; } pre { white-space: pre-wrap; } }
"""


def render(document: Document) -> str:
    title = html.escape(words.plain(document.title))
    body = "\n".join(_block(block) for block in document.blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{_inline(document.title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _block(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_inline(text)}</p>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{_inline(item)}</li>" for item in items) + "\n</ul>"
        case Table():
            return _table(block)
        case Figure(path, title):
            data = base64.b64encode(path.read_bytes()).decode()
            picture = f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
            return f"<figure>{picture}</figure>"
        case Code(text, _):
            return f"<pre><code>{html.escape(text)}</code></pre>"


def _table(table: Table) -> str:
    def line(cells: list[str], tag: str) -> str:
        classes = [' class="number"' if column in table.numeric else "" for column in range(len(cells))]
        marked = (f"<{tag}{css}>{_inline(cell)}</{tag}>" for css, cell in zip(classes, cells, strict=True))
        return f"<tr>{''.join(marked)}</tr>"

    rows = "\n".join(line(row, "td") for row in table.rows)
    head = line(table.columns, "th")
    return f'<div class="wide"><table>\n<thead>{head}</thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'


def _inline(text: str) -> str:
    return words.MARKDOWN.renderInline(text)
