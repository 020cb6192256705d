"""The index of the reference runs: what was measured where, at which commit, and what came of it.

Its best lines stand in the README too, between `<!-- figures -->` and `<!-- /figures -->`; and what a combo is without
each of its parts, by a sweep of reference, between `<!-- without DEVICE/SWEEP -->` and `<!-- /without -->`.

Reference runs live in `results/reference/<device>/<combo>-<pipeline>/`, sweeps as a folder of such runs, and the report
of each under the same name in `reports/reference/`; a report over several of them has their names, joined by `+`. The
index is `reports/README.md`; links in it are relative to it.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from harness.errors import UserError
from harness.report import data, markdown, words
from harness.report.data import Run
from harness.report.document import Document, Heading, Paragraph, Table
from harness.report.outcome import quality_in_short, times_as_fast, times_as_fast_bounds
from harness.results import BASELINE, find_runs, is_run, write_atomically

REFERENCE = "reference"
FRONT = re.compile(r"<!-- figures -->\n.*?<!-- /figures -->", re.DOTALL)
WITHOUT = re.compile(r"(<!-- without (\S+) -->\n).*?(<!-- /without -->)", re.DOTALL)
MODELS = {
    "mini": "miniature",
    "mini_multilingual": "miniature, multilingual",
    "random": "full size, random weights",
    "random_multilingual": "full size, multilingual, random weights",
    "chatterbox": "Chatterbox",
    "multilingual": "Chatterbox, multilingual",
}
"""Pipelines as somebody calls them who has not read on yet."""
METRICS = {"rtf": "time", "peak_memory_mb": "peak memory", "energy_j_per_audio_s": "energy"}
INTRODUCTION = (
    "Written by `python -m harness index` from the summaries under `results/reference`. Figures are combo / baseline, "
    "or what else it is against, with their 95 % interval: below 1 is faster or smaller. Ratios are what may be "
    "compared between devices; each report has the absolute figures, and says how to repeat its run. Quality is kept "
    "where the intervals of word error rate and similarity rule out a loss that counts; what cannot be heard, as "
    "random weights cannot, has each stage compared with the baseline's ([all combos](../docs/fidelity.md))."
)


def write_index(results: Path, reports: Path) -> Path:
    """Write `reports/README.md` over all runs under `results/reference`; gives its path.

    Raises UserError for results without a report, and for a report without results.
    """
    document = Document("Reference runs")
    document.add(Paragraph(INTRODUCTION))
    _refuse_orphans(results / REFERENCE, reports / REFERENCE)
    for device in _folders(results / REFERENCE):
        experiments = {folder: data.load(find_runs([folder])) for folder in _folders(device)}
        names = dict.fromkeys(run.summary.device for runs in experiments.values() for run in runs)
        document.add(Heading(2, f"{words.listing(list(names))}, `{device.name}`"))
        links = {folder: _link(folder, results, reports) for folder in experiments}
        combos = [(links[folder], run) for folder, runs in experiments.items() if is_run(folder) for run in runs]
        if combos:
            document.add(_table(combos))
        for folder, runs in experiments.items():
            if not is_run(folder):
                document.add(Heading(3, f"Sweep: [{folder.name}]({links[folder]})"))
                document.add(_table([(None, run) for run in data.ranked(runs)]))
    path = reports / "README.md"
    write_atomically(path, markdown.render(document))
    return path


def write_front(readme: Path, results: Path, reports: Path) -> bool:
    """Put the combos' figures between the marks of a README; false where there is no such file, or no marks in it.

    Raises UserError for marks that name a sweep which is not there.
    """
    if not readme.is_file() or not FRONT.search(text := readme.read_text(encoding="utf-8")):
        return False
    front = _alone(_front(results, reports, readme.parent))
    text = FRONT.sub(lambda _: f"<!-- figures -->\n{front}<!-- /figures -->", text)
    text = WITHOUT.sub(lambda marks: marks[1] + _alone(_without(results / REFERENCE / marks[2])) + marks[3], text)
    write_atomically(readme, text)
    return True


def _alone(table: Table) -> str:
    """A table as Markdown, without a document around it."""
    return markdown.render(Document("", [table])).removeprefix("# \n\n")


def _without(sweep: Path) -> Table:
    """What a combo is without each of its parts: the dearest to leave out first."""
    runs = [run for run in data.load(find_runs([sweep])) if run.name.startswith(f"{run.reference}-without-")]
    whole = {run.reference for run in runs if run.reference != BASELINE and "-without-" not in run.reference}
    if len(whole) != 1:
        raise UserError(f"{sweep} is no sweep that leaves parts of one combo out, as a mark in the README says")
    (combo,) = whole
    left_out = sorted((run for run in runs if run.reference == combo), key=lambda run: -(run.change("rtf").value or 0))
    columns = [f"`{combo}` without", "takes so many times as long", "peak memory", "time"]
    return Table(columns, [_left_out(run) for run in left_out], frozenset({1, 2}))


def _left_out(run: Run) -> list[str]:
    parts = run.name.removeprefix(f"{run.reference}-without-").split("+")
    time, memory = run.change("rtf"), run.change("peak_memory_mb").value
    return [
        words.listing([f"`{part}`" for part in parts]),
        words.change(time),
        words.NOT_MEASURED if memory is None else words.percent(memory),
        time.verdict,
    ]


def _front(results: Path, reports: Path, start: Path) -> Table:
    """Every combo that has a reference of its own against the baseline, GPUs first, each with its hardware."""
    folders = [folder for device in _folders(results / REFERENCE) for folder in _folders(device) if is_run(folder)]
    runs = [(folder, run) for folder in folders for run in data.load(find_runs([folder]))]
    runs = [(folder, run) for folder, run in runs if run.reference == BASELINE and run.name != "custom"]
    runs.sort(key=lambda one: (one[1].baseline.memory_kind != "vram", one[1].summary.pipeline.startswith("mini")))
    columns = ["combo", "on", "model", "times as fast", "of the peak memory", "quality"]
    return Table(columns, [_front_row(folder, run, results, reports, start) for folder, run in runs], frozenset({3, 4}))


def _front_row(folder: Path, run: Run, results: Path, reports: Path, start: Path) -> list[str]:
    report = (reports / _link(folder, results, reports)).relative_to(start).as_posix()
    time, memory = run.change("rtf"), run.change("peak_memory_mb").value
    bounds = times_as_fast_bounds(time)
    return [
        f"[{run.code}]({report})",
        words.said(run.summary.device),
        words.said(MODELS.get(run.summary.pipeline, run.summary.pipeline)),
        times_as_fast(time) + (f" ({bounds})" if bounds else ""),
        words.NOT_MEASURED if memory is None else words.percent(memory),
        quality_in_short(run),
    ]


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []


def _refuse_orphans(results: Path, reports: Path) -> None:
    measured, told = (
        {path.relative_to(root) for device in _folders(root) for path in _folders(device)}
        for root in (results, reports)
    )
    for name in sorted(measured - told):
        raise UserError(
            f"{results / name} has no report: `python -m harness report {results / name} --out {reports / name}`"
        )
    for name in sorted(told - measured):
        several = [name.with_name(part) for part in name.name.split("+")]
        if missing := [part for part in several if part not in measured]:
            raise UserError(f"{reports / name} tells of results that are not in {results / missing[0]}: remove it")


def _link(folder: Path, results: Path, reports: Path) -> str:
    report = reports / folder.relative_to(results) / "report.md"
    return report.relative_to(reports).as_posix()


def _table(rows: Sequence[tuple[str | None, Run]]) -> Table:
    """One row a run, its name a link where it has a report of its own; what none of them measured has no column."""
    measured = {name for _, run in rows for name, record in run.summary.comparison.items() if record.value is not None}
    metrics = {name: title for name, title in METRICS.items() if name in measured}
    columns = ["combo", "pipeline", "workload", "scenario", *metrics.values(), "quality", "commit"]
    return Table(columns, [[_name(link, run), *_cells(run, metrics)] for link, run in rows])


def _name(link: str | None, run: Run) -> str:
    """The combo, or the optimizations that were on; what it is compared with; what takes weight from its figures."""
    name = words.listing([f"`{name}`" for name in run.summary.enabled]) if run.name == "custom" else f"`{run.name}`"
    against = "" if run.summary.against == BASELINE else f" against `{run.summary.against}`"
    return (f"[{name}]({link})" if link else name) + against + run.doubt


def _cells(run: Run, metrics: dict[str, str]) -> list[str]:
    summary = run.summary
    where = [summary.pipeline, summary.workload, summary.scenario.replace("_", " ")]
    return [*where, *(run.told_and_judged(name) for name in metrics), quality_in_short(run), summary.git]
