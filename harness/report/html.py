"""The document as one HTML file that carries everything with it: to send, to read, to listen to, to print.

Its pictures are drawings in the page, its clips are in it, and what little script there is only adds: tables that
sort, tooltips, the blind test. It opens from a file, and asks nothing of any network.
"""

import functools

import jinja2
from markupsafe import Markup

from harness.report import words
from harness.report.document import Document


def render(document: Document) -> str:
    return _environment().get_template("report.html.j2").render(document=document)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("harness.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["line"] = lambda text: Markup(words.markup(text))
    environment.filters["plain"] = words.plain
    environment.filters["kind"] = lambda block: type(block).__name__.lower()
    return environment
