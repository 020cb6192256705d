"""The documentation: every link between its pages leads somewhere."""

from __future__ import annotations

import functools
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from optimizations import CATALOGUE

PAGES = [
    ROOT / "README.md",
    ROOT / "reports" / "README.md",
    ROOT / "harness/mini/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def load_handbook():
    """docs/handbook.py, as MkDocs loads it."""
    spec = importlib.util.spec_from_file_location("handbook", ROOT / "docs/handbook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


handbook = load_handbook()
handbook.reference_runs = functools.cache(handbook.reference_runs)


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


def test_the_site_lists_every_page():
    listed = re.findall(r"[\w/]+\.md", yaml.safe_dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    inside = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").glob("*.md")}
    assert sorted(listed) == sorted({*inside, "reports/README.md", "harness/mini/README.md"})


# -- what is made when the site is built -----------------------------------------------------------------------------


@functools.cache
def page(name: str) -> str:
    """As it goes into the site."""
    path = ROOT / "docs" / name
    text = handbook.filled(path.read_text())
    assert not re.search(r"<!-- [a-z ]+ -->", text), "a part was not put in its place"
    return handbook.linked(text, path)


def test_the_catalogue_tells_of_every_optimization_what_it_does_and_what_was_measured():
    text = page("optimizations.md")
    entries = re.split(r"^### `(\w+)`$", text, flags=re.MULTILINE)[1:]
    told = dict(zip(entries[::2], entries[1::2], strict=True))
    ours = {name for name, cls in CATALOGUE.items() if cls.__module__.startswith("optimizations.")}
    assert set(told) == ours
    assert set(re.findall(r"^\| `(\w+)` \|", text.split("### `")[0], flags=re.MULTILINE)) == ours
    for name, entry in told.items():
        assert "**Baseline:**" in entry, name
        assert "measured alone on" in entry or "No reference run has it on alone." in entry
    assert "32.3 % less time in sequential calls | **confirmed**" in told["alignment_analyzer"]
    assert re.search(r"\| NVIDIA H200 \| `random` \| 0\.\d+ .*faster .*report\.html", told["alignment_analyzer"])
    assert "| `steps` | `None` | from 1 to 10 |" in told["flow_steps"]


def test_every_claim_of_the_campaigns_has_its_verdict():
    claims = yaml.safe_load((ROOT / "configs/claims.yaml").read_text())["claims"]
    text = page("claims.md")
    assert f"Of {len(claims)} figures, " in text
    assert all(claim["says"] in text for claim in claims)


def test_every_planted_fraud_is_told_with_what_gives_it_away():
    planted = re.findall(r'^    name = "(\w+)"$', (ROOT / "tests/planted.py").read_text(), flags=re.MULTILINE)
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", page("measuring.md"), flags=re.MULTILINE)
    assert sorted(name for name, _, _ in rows) == sorted(planted)
    assert all(does.endswith(".") and said for _, does, said in rows)


def test_every_command_and_preset_is_told():
    text = page("command_line.md")
    commands = re.findall(
        r"^    ([a-z-]+)  +[a-z]", text.split("positional arguments:")[1].split("options:")[0], re.MULTILINE
    )
    assert {"score", "report", "gate", "history"} <= set(commands)
    for command in (*commands, "new-optimization"):
        assert f"usage: python -m harness {command} " in text
    for preset in (ROOT / "configs").glob("*/**/*.yaml"):
        assert f"| `{preset.stem}` |" in text


@pytest.mark.parametrize("name", [path.name for path in (ROOT / "docs").glob("*.md")])
def test_no_link_of_the_site_leaves_it(name):
    place = {path.relative_to(ROOT).as_posix() for path in handbook.taken_along()}
    for link in LINK.findall(page(name)):
        target = link.partition("#")[0]
        if target and not link.startswith(("http://", "https://")):
            assert (ROOT / "docs" / target).is_file() or target in place, link
