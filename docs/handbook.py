"""The parts of these pages that are made from the code and the results when the site is built.

A page says where a part goes in a comment of its own, `<!-- catalogue -->`, which a reader of the plain file does not
see. Links that leave `docs` lead to what the site takes along, the reports and the model card; others become words.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from inspect import cleandoc
from pathlib import Path
from typing import Any

import yaml

import run_sweep
from harness import declared
from harness.__main__ import parser
from harness.report import claims, data, markdown, tables, words
from harness.report.claims import CANNOT, Finding
from harness.report.data import Run
from harness.report.document import Block, Document, Heading, Paragraph, Table
from harness.report.outcome import quality_in_short
from harness.report.together import as_one
from harness.results import BASELINE, find_runs

ROOT = Path(__file__).resolve().parents[1]
DOCS, OPTIMIZATIONS, REFERENCE = ROOT / "docs", ROOT / "optimizations", ROOT / "results" / "reference"
LABEL = re.compile(r"^([A-Z][a-z ,]{2,40}:)", re.MULTILINE)
"""What begins a paragraph in an optimization's docstring: `Baseline:`, `Where not:`."""
LIST = re.compile(r"(?<=\n)((?:- .*\n(?:  .*\n)*)+)")
GROUPS = ("pipeline", "combo", "workload", "measure", "quality", "gate", "sweep", "hydra/sweeper")


# -- the catalogue -----------------------------------------------------------------------------------------------


def catalogue() -> str:
    """Every optimization: what its docstring says, its parameters, what was claimed and what was measured."""
    known, runs = declared.read(), reference_runs()
    findings = [claims.judge(claim, runs) for claim in claims.load_claims()]
    return _printed([block for name in sorted(known) for block in _entry(known[name], runs, findings)])


def _entry(one: declared.Declaration, runs: Sequence[Run], findings: Sequence[Finding]) -> Iterator[Block]:
    yield Heading(3, f"`{one.name}`")
    told, parameters = docstrings(OPTIMIZATIONS / f"{one.name}.py")
    yield Paragraph(LABEL.sub(r"\n**\1**", LIST.sub(r"\n\1\n", told)))
    if fields(one.parameters):
        yield Paragraph(f"Parameters, `optimizations.{one.name}.*`. {parameters}")
        yield Table(["name", "default", "within"], [_parameter(name, one) for name in one.defaults])
    if needed := [*one.requires, *one.requires_on_gpu]:
        on_gpu = (
            f" ({', '.join(f'`{name}`' for name in one.requires_on_gpu)} on a GPU only)" if one.requires_on_gpu else ""
        )
        yield Paragraph(f"Requires {words.listing([f'`{name}`' for name in needed])}{on_gpu}.")
    own = [finding for finding in findings if finding.claim.optimization == one.name]
    if own:
        rows = [[f.claim.says, f"**{f.verdict}**", f.measured or f.reason] for f in own]
        yield Table(["claimed by the campaign", "verdict", "measured, or why not"], rows)
    alone = [run for run in runs if run.summary.enabled == [one.name] and run.reference == BASELINE]
    if alone:
        yield _measured(alone, one.name)
    else:
        yield Paragraph("No reference run has it on alone.")


def docstrings(path: Path) -> tuple[str, str]:
    """Of a plugin's class and of its parameters, as they stand in the file."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    (plugin,) = (node for node in module.body if isinstance(node, ast.ClassDef) and _is_registered(node))
    config = [node for node in plugin.body if isinstance(node, ast.ClassDef) and node.name == "Config"]
    return ast.get_docstring(plugin) or "", " ".join((ast.get_docstring(config[0]) or "").split()) if config else ""


def _is_registered(plugin: ast.ClassDef) -> bool:
    return "register" in map(ast.unparse, plugin.decorator_list)


def _parameter(name: str, one: declared.Declaration) -> list[str]:
    (field,) = (field for field in fields(one.parameters) if field.name == name)
    limits = field.metadata.get("range") or field.metadata.get("choice") or ""
    return [f"`{name}`", f"`{one.defaults[name]}`", words.said(str(limits))]


def _measured(runs: Sequence[Run], name: str) -> Table:
    rows = [
        [
            words.said(run.summary.device),
            f"`{run.summary.pipeline}`",
            _change(run, "rtf"),
            _change(run, "peak_memory_mb"),
            quality_in_short(run),
            run.summary.optimizations[name]["status"],
            f"[report]({_report(run)})" if _report(run) else "",
        ]
        for run in runs
    ]
    return Table(["measured alone on", "pipeline", "time", "peak memory", "quality", "was", ""], rows)


def _change(run: Run, metric: str) -> str:
    verdict = run.verdict(metric)
    return words.NOT_MEASURED if run.change(metric).value is None else f"{run.told(metric)}, {verdict}"


def _report(run: Run) -> str | None:
    """The link from a page in `docs` to the report that tells of a reference run."""
    for place in (run.path, run.path.parent):
        report = ROOT / "reports" / place.resolve().relative_to(ROOT / "results") / "report.md"
        if report.is_file():
            return posixpath.join("..", report.relative_to(ROOT).as_posix())
    return None


def reference_runs() -> list[Run]:
    return as_one(data.load(find_runs([REFERENCE])))


# -- claims, frauds, commands ------------------------------------------------------------------------------------


def claimed() -> str:
    """Every figure of the campaign's, held against the reference runs."""
    runs = reference_runs()
    findings = [claims.judge(claim, runs) for claim in claims.load_claims()]
    held = [finding for finding in findings if finding.verdict != CANNOT]
    rest = [finding for finding in findings if finding.verdict == CANNOT]
    counts = [f"{sum(f.verdict == verdict for f in findings)} {verdict}" for verdict in claims.VERDICTS]
    return _printed(
        [
            Paragraph(f"Of {len(findings)} figures, {words.listing(counts)}."),
            tables.claims(held),
            Heading(2, "What cannot be measured here, and why"),
            tables.unmeasured_claims(rest),
        ]
    )


def frauds() -> str:
    """What is planted in the tests, and what gives it away: the docstrings and the rows of the tests themselves."""
    planted = ast.parse((ROOT / "tests/planted.py").read_text(encoding="utf-8"))
    does = {
        _text(statement.value): ast.get_docstring(node) or ""
        for node in planted.body
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "name"
    }
    rows = [
        [f"`{name}`", does[name], "not yet" if still_open else words.said(given_away)]
        for name, given_away, still_open in _rows(ROOT / "tests/test_planted.py")
    ]
    return _printed([Table(["planted", "what it does", "what is said of it, in part"], rows)])


def _rows(path: Path) -> Iterator[tuple[str, str, bool]]:
    """Name, what gives it away, and whether that is still missing, of each `Row(...)` in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Row":
            name, given_away = map(_text, node.args[:2])
            yield name, given_away, any(keyword.arg == "open" for keyword in node.keywords)


def _text(node: ast.expr) -> str:
    return str(ast.literal_eval(node))


def gate_campaign() -> str:
    """How often the gate was right: the table that tests/gate_campaign.py wrote, where it was run."""
    path = DOCS / "gate_campaign.json"
    if not path.is_file():
        return "Not measured yet."
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        [kind, *(str(counts[name]) for name in ("gates", "right", "repetitions", "seconds_median", "seconds_most"))]
        for kind, counts in found["kinds"].items()
        if counts["gates"]
    ]
    where = f"{', '.join(found['cpus'])}, {found['cores_of_each']} cores for each gate, {found['at_once']} at once"
    return _printed(
        [
            Paragraph(f"On {where}, at {', '.join(found['commits'])}:"),
            Table(["planted", "gates", "right", "repetitions", "seconds, median", "most"], rows),
        ]
    )


def command_line() -> str:
    """Every command with its own help, and every file of the configuration with its own first lines."""
    blocks: list[Block] = [Heading(2, "`run_sweep.py`"), Paragraph(_fenced(cleandoc(run_sweep.__doc__ or "")))]
    for group in GROUPS:
        rows = [[f"`{path.stem}`", *_introduced(path)] for path in sorted((ROOT / "configs" / group).glob("*.yaml"))]
        blocks += [Heading(3, f"`{group}=`"), Table(["preset", "what it is", "as in"], rows)]
    defaults = yaml.safe_load((ROOT / "configs/config.yaml").read_text(encoding="utf-8"))
    settings = ", ".join(f"`{name}`" for name in defaults if name not in ("defaults", "hydra", "combo", "sweep"))
    blocks.append(Paragraph(f"Outside the groups: {settings}. `python run_sweep.py --cfg job` prints every setting."))
    blocks += [Heading(2, "`python -m harness`"), Paragraph(_fenced(_help(parser())))]
    for name, one in _commands(parser()).items():
        blocks += [Heading(3, f"`python -m harness {name}`"), Paragraph(_fenced(_help(one)))]
    return _printed(blocks)


def _introduced(path: Path) -> list[str]:
    """What the comments at the top of a file say, and the command that they give."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    lines = [line.removeprefix("#").strip() for line in lines if "@package" not in line]
    command = [line for line in lines if line.startswith("python ")]
    return [words.said(" ".join(line for line in lines if line not in command)), f"`{command[0]}`" if command else ""]


def _commands(one: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    (commands,) = (action for action in one._actions if isinstance(action, argparse._SubParsersAction))
    return commands.choices


def _help(one: argparse.ArgumentParser) -> str:
    os.environ["COLUMNS"] = "100"  # and not the width of whoever builds
    return one.format_help()


def _fenced(text: str) -> str:
    return f"```text\n{text.strip()}\n```"


def _printed(blocks: Sequence[Block]) -> str:
    document = Document("")
    document.add(*blocks)
    return markdown.render(document).removeprefix("# \n\n")


# -- the site ----------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[], str]] = {
    "catalogue": catalogue,
    "claimed": claimed,
    "gate campaign": gate_campaign,
    "frauds": frauds,
    "command line": command_line,
}
MARK = re.compile(rf"<!-- ({'|'.join(PARTS)}) -->")
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")


def filled(page: str) -> str:
    """A page with its parts in their places."""
    return MARK.sub(lambda mark: PARTS[mark[1]](), page)


def taken_along() -> list[Path]:
    """What lies outside `docs` and belongs to the site."""
    reports = ROOT / "reports"
    return [ROOT / "harness/mini/README.md", reports / "README.md", *sorted(reports.glob("reference/**/report.html"))]


def linked(page: str, path: Path) -> str:
    """The page at `path` with links that lead to where things are on the site; a link that leads off it is words."""
    here = posixpath.dirname(_place(path) or "")

    def lead(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        place = _place((path.parent / target).resolve())
        return f"[{text}]({posixpath.relpath(place, here or '.')}{anchor})" if place else text

    return LINK.sub(lead, page)


def _place(path: Path) -> str | None:
    """Where a file of the repository is on the site; None if it is not there."""
    if path.name == "report.md":
        path = path.with_suffix(".html")  # the page, and not its plain twin
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return path.relative_to(ROOT).as_posix() if path in taken_along() else None


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path in taken_along():
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(page_text: str, page: Any, **_: Any) -> str:
    place = Path(page.file.src_uri)
    path = ROOT / place if (ROOT / place) in taken_along() else DOCS / place
    return linked(filled(page_text), path)
