"""The documentation: every link between its pages leads somewhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "reports" / "README.md",
    ROOT / "harness/mini/README.md",
    *(ROOT / "docs").glob("*.md"),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """What headings are called in a link, as GitHub makes it from their words."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    lost = []
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


def test_every_page_is_reached_from_the_first():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in LINK.findall((ROOT / "README.md").read_text())}
    assert set(PAGES[1:]) <= linked


def test_what_an_application_overrides_is_what_this_project_overrides():
    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/application.md").read_text(), flags=re.DOTALL)
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert tomllib.loads(block)["tool"]["uv"]["override-dependencies"] == ours["tool"]["uv"]["override-dependencies"]
