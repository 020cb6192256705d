"""The document as one HTML file that carries everything with it: to send, to read, to listen to, to print.

Its pictures are drawings in the page, its clips are in it, and what little script there is only adds: tables that
sort, tooltips, the blind test. It opens from a file, and asks nothing of any network.
"""

import functools
import re
from typing import Any

import jinja2
from markupsafe import Markup

from harness.report import words
from harness.report.document import Document

UNIT = re.compile(r"(?<=\d) (?=(?:%|s|ms|MB|J)(?![A-Za-z]))")
"""Between a number and its unit no line ends."""


def render(document: Document) -> str:
    return page("report.html.j2", document=document)


def page(template: str, **values: Any) -> str:
    """One of the templates with its values, which are escaped wherever they stand."""
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("harness.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["line"] = lambda text: Markup(UNIT.sub("\N{NO-BREAK SPACE}", words.markup(text)))
    environment.filters["plain"] = words.plain
    environment.filters["kind"] = lambda block: type(block).__name__.lower()
    return environment
