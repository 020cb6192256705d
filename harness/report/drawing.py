"""Matplotlib's SVG as a drawing for a page: it scales, follows the page's colours, and its marks answer a pointer.

A mark that `tip` has been called on carries its words into the page, as a title that any browser shows and as data
for the report's own tooltip.
"""

import io
import re
from typing import Any
from xml.etree import ElementTree

from matplotlib.figure import Figure as Canvas

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
TIP = "tip: "
INK, RULE, SOFT, PALE, BAND = "#222222", "#666666", "#444444", "#c4c4c4", "#ececec"
PAGE = "#fffffe"  # white that is the page's own, not a mark's
COLOURS = {
    INK: "var(--ink)",
    RULE: "var(--soft)",
    SOFT: "var(--ink)",
    PALE: "var(--pale)",
    BAND: "var(--band)",
    PAGE: "var(--page)",
}
"""What is not a figure's own colour takes the page's, which has a dark one too."""

ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", XLINK)


def tip(artist: Any, text: str) -> None:
    """Say what a mark stands for, to whoever points at it."""
    artist.set_gid(TIP + text)


def draw(canvas: Canvas, name: str) -> str:
    """The canvas as an `<svg>` element; the same figures give the same text. `name` is no other drawing's on a page."""
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    root.set("role", "img")
    _answer_pointers(root)
    _own_names(root, name)
    text = ElementTree.tostring(root, encoding="unicode")
    for colour, variable in COLOURS.items():
        text = text.replace(colour, variable)
    return re.sub(r"\n\s*", "\n", text)


def _answer_pointers(root: ElementTree.Element) -> None:
    for element in root.iter():
        name = element.get("id", "")
        if name.startswith(TIP):
            words = name.removeprefix(TIP)
            element.attrib.pop("id")
            element.set("class", "tip")
            element.set("data-tip", words)
            title = ElementTree.Element(f"{{{SVG}}}title")
            title.text = words
            element.insert(0, title)


def _own_names(root: ElementTree.Element, name: str) -> None:
    """A page has several drawings, and an id may stand once: those that are referred to are made this drawing's own."""
    used = {
        reference
        for element in root.iter()
        for value in element.attrib.values()
        for reference in re.findall(r"#([\w.-]+)", value)
    }
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key == f"{{{XLINK}}}href" or "url(#" in value:
                element.set(key, value.replace("#", f"#{name}-"))
