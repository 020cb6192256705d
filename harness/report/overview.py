"""One page over all runs that there are, `reports/index.html`: sorted, filtered, each with a link to its report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError
from harness.report import data, html
from harness.report.data import Run
from harness.results import RunFolder, find_runs, write_atomically

FILTERS = ("device", "pipeline", "combo", "against", "workload", "quality", "status")
"""Columns that a reader chooses from; each is an attribute of `Row`."""


@dataclass(frozen=True)
class Row:
    """One run, in words; `link` is relative to the page, and None where the run has no report."""

    link: str | None
    created: str
    device: str
    pipeline: str
    combo: str
    against: str
    workload: str
    time: str
    memory: str
    quality: str
    status: str
    commit: str


def write_overview(results: Path, reports: Path) -> Path:
    """Write the page over every run under `results`; gives its path. A run without a readable summary is left out."""
    rows = sorted((_row(run, results, reports) for run in _readable(results)), key=lambda row: row.created)
    choices = {name: sorted({getattr(row, name) for row in rows}) for name in FILTERS}
    page = html.page("overview.html.j2", rows=rows[::-1], choices=choices)
    path = reports / "index.html"
    write_atomically(path, page)
    return path


def _readable(results: Path) -> list[Run]:
    found: list[Run] = []
    for folder in _runs(results):
        try:
            found += data.load([folder])
        except UserError:
            continue
    return found


def _runs(results: Path) -> Sequence[RunFolder]:
    try:
        return find_runs([results])
    except UserError:  # none yet
        return []


def _row(run: Run, results: Path, reports: Path) -> Row:
    summary = run.summary
    return Row(
        link=_link(run.path, results, reports),
        created=summary.created[:16].replace("T", " "),
        device=summary.device,
        pipeline=summary.pipeline,
        combo=run.name,
        against=run.reference,
        workload=summary.workload,
        time=run.told_and_judged("rtf"),
        memory=run.told_and_judged("peak_memory_mb"),
        quality=run.quality(),
        status=summary.status,
        commit=summary.git,
    )


def _link(run: Path, results: Path, reports: Path) -> str | None:
    """The run's own report, or that of the sweep it belongs to."""
    name = run.resolve().relative_to(results.resolve())
    pages = (reports / part / "report.html" for part in (name, name.parent))
    return next((page.relative_to(reports).as_posix() for page in pages if page.is_file()), None)
