"""How one figure moved from run to run of the same experiment on the same device.

    python -m harness history                             every run under results/
    python -m harness history results/nightly --metric wer --out reports/nightly

Runs belong together where combo, reference, pipeline, workload, scenario and the device's hardware are the same. What
is followed is the change against the run's own reference, which was measured in the same minutes: the machine's own
good and bad days are in both of its sides. A step is where a run differs from the level before it, the median run
since the step before, by more than counts: the whole 95 % interval of the difference, in which the uncertainties of
both runs are, is beyond the run's threshold. Beside it stands what else changed between the two runs.
"""

import argparse
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import stats
from harness.errors import UserError
from harness.gate.decide import fingerprint
from harness.gate.references import EARLIER
from harness.report import data, markdown, words
from harness.report.data import Run
from harness.report.document import Document, Figure, Heading, Paragraph, Table
from harness.results import BASELINE, RunFolder, find_runs, runs_below, slug, write_atomically
from harness.settings import did_you_mean

MOST_LABELS = 12
"""Dates below a picture."""


@dataclass(frozen=True)
class Point:
    """One run of a series. `before` is the run of the level before that it is compared with, None for the first."""

    run: Run
    interval: stats.Interval
    before: Run | None = None
    change: stats.Interval | None = None
    verdict: str = stats.NOT_MEASURED

    @property
    def is_step(self) -> bool:
        return self.verdict in (*stats.GOOD, *stats.BAD)

    @property
    def day(self) -> str:
        return _when(self.run)[:10]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RESULTS_DIR", help="folders that hold runs (default: results)"
    )
    parser.add_argument(
        "--metric", default="rtf", help="of the comparison: rtf, peak_memory_mb, wer, ... (default: rtf)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("reports/history"), metavar="FOLDER", help="default: reports/history"
    )


def history(options: argparse.Namespace) -> int:
    """Write history.md and its pictures, and say what was found. Raises UserError where there is nothing to follow."""
    metric, paths = options.metric, options.runs or [Path("results")]
    if metric not in stats.METRICS and not metric.startswith("sim_"):
        known = [*stats.METRICS, "sim_..."]
        raise UserError(f"--metric {metric}: unknown{did_you_mean(metric, known)}; known: {', '.join(known)}")
    runs, unread = _read(_with_earlier(find_runs(paths)))
    series = [_marked(points, metric) for points in _series(runs, metric)]
    where = words.listing(list(map(str, paths)))
    if not series:
        raise UserError(f"{where}: no finished run there has measured {metric}")
    path = _write(series, metric, unread, options.out)
    for points in series:
        for line in _found(points, metric):
            print(words.plain(line))
    print(path)
    return 0


# -- which runs --------------------------------------------------------------------------------------------------


def _with_earlier(folders: Sequence[RunFolder]) -> list[RunFolder]:
    """The runs, and those that a reference keeps of the time before it."""
    earlier = [RunFolder.open(path) for folder in folders for path in runs_below(folder.path / EARLIER)]
    return [*folders, *earlier]


def _read(folders: Sequence[RunFolder]) -> tuple[list[Run], list[str]]:
    """The runs that can be read, and in a line each why the others cannot."""
    runs: list[Run] = []
    unread: list[str] = []
    for folder in folders:
        try:
            runs += data.load([folder])
        except UserError as error:
            unread.append(str(error))
    return runs, unread


def _series(runs: Sequence[Run], metric: str) -> list[list[Point]]:
    """Finished runs of the same experiment on the same device that measured it, each series in order of time."""
    groups: dict[str, list[Point]] = {}
    for run in sorted(runs, key=_when):
        record = run.summary.comparison.get(metric)
        if run.summary.status == "ok" and record is not None and record.value is not None:
            groups.setdefault(repr(_experiment(run)), []).append(Point(run, _interval(run, metric)))
    return list(groups.values())


def _experiment(run: Run) -> tuple[Any, ...]:
    one = run.summary
    return one.combo, one.against, one.pipeline, one.workload, one.scenario, one.device, fingerprint(run.environment)


def _when(run: Run) -> str:
    """When it was measured, as a run's name says, or when its summary was written: 2026-03-14 09:26:53."""
    named = re.match(r"(\d{4})(\d\d)(\d\d)-(\d\d)(\d\d)(\d\d)-", run.summary.run_id)
    return "{}-{}-{} {}:{}:{}".format(*named.groups()) if named else run.summary.created[:19].replace("T", " ")


def _interval(run: Run, metric: str) -> stats.Interval:
    """Without bounds where one pair of processes cannot give them."""
    record = run.change(metric)
    known = run.summary.processes > 1 or not run.is_per_process(metric)
    return stats.Interval(record.value or 0.0, record.low if known else None, record.high if known else None, record.n)


# -- steps -------------------------------------------------------------------------------------------------------


def _marked(points: Sequence[Point], metric: str) -> list[Point]:
    """The series with each run held against the level before it."""
    marked: list[Point] = []
    level: list[Point] = []
    for point in points:
        if level:
            middle = sorted(level, key=lambda one: one.interval.estimate)[(len(level) - 1) // 2]
            change = _contrast(middle.interval, point.interval, stats.metric(metric).kind)
            low, high = (change.bounds if change else None) or (None, None)
            threshold = point.run.summary.thresholds[metric]
            verdict = stats.verdict(low, high, threshold, stats.metric(metric))
            point = Point(point.run, point.interval, middle.run, change, verdict)
        level = [point] if point.is_step else [*level, point]
        marked.append(point)
    return marked


def _contrast(first: stats.Interval, second: stats.Interval, kind: str) -> stats.Interval | None:
    """None where a figure is of no size that could be compared."""
    try:
        change = stats.contrast(first, second, kind)
    except (ValueError, OverflowError, ZeroDivisionError):  # a ratio of nothing, or of numbers without end
        return None
    return change if math.isfinite(change.estimate) else None


def _since(point: Point) -> str:
    """What else changed between a run and the one that it is held against."""
    if point.before is None:
        return ""
    then, now = point.before, point.run
    before = {"commit": then.summary.git, **_packages(then)}
    after = {"commit": now.summary.git, **_packages(now)}
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    changes = [words.said(f"{name} {before.get(name, 'none')} → {after.get(name, 'none')}") for name in names]
    if then.summary.config_hash != now.summary.config_hash:
        changes.append("the configuration")
    return ", ".join(changes) or "nothing that was noted"


def _packages(run: Run) -> dict[str, Any]:
    packages = run.environment.get("packages")
    return packages if isinstance(packages, dict) else {}


# -- in words and pictures ---------------------------------------------------------------------------------------


def _write(series: Sequence[list[Point]], metric: str, unread: Sequence[str], out: Path) -> Path:
    long = [points for points in series if len(points) > 1]
    document = Document(f"{words.label(metric)}, run by run")
    document.add(Paragraph(_introduction(metric)))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made a folder ({error.strerror})") from None
    for number, points in enumerate(long, start=1):
        run = points[0].run
        document.add(Heading(2, f"{run.title} on {words.said(run.summary.device)}"))
        document.add(Paragraph(_what(run)))
        document.add(*map(Paragraph, _found(points, metric)))
        document.add(
            _picture(points, metric, out / f"{number}-{slug(run.name)[:80]}.png"),
            _table(points, stats.metric(metric).kind),
        )
    single = [points[0].run for points in series if len(points) == 1]
    if single:
        names = dict.fromkeys(f"{run.code} on {words.said(run.summary.device)}" for run in single)
        document.add(Paragraph(f"Of these there is one run, and a history begins with the second: {'; '.join(names)}."))
    if unread:
        document.add(Paragraph(f"{words.count(len(unread), 'run')} could not be read: {words.said('; '.join(unread))}"))
    path = out / "history.md"
    write_atomically(path, markdown.render(document))
    return path


def _introduction(metric: str) -> str:
    return (
        f"Written by `python -m harness history`. Figures are {_axis(metric)}, with their 95 % interval. "
        "A step is marked where the interval of the difference to the level before, the median run since the last "
        "step, lies wholly beyond what counts."
    )


def _axis(metric: str) -> str:
    kind = "combo / reference" if stats.metric(metric).kind == "ratio" else "combo less reference"
    return f"{words.label(metric)}, {kind}"


def _what(run: Run) -> str:
    summary = run.summary
    against = "" if run.reference == BASELINE else f", against {run.versus}"
    scenario = summary.scenario.replace("_", " ")
    return f"Pipeline {words.code(summary.pipeline)}, workload {words.code(summary.workload)}, {scenario}{against}."


def _found(points: Sequence[Point], metric: str) -> Iterator[str]:
    """One sentence a step, or one that says that there was none."""
    name, n = points[0].run.code, words.count(len(points), "run")
    steps = [point for point in points if point.is_step]
    for point in steps:
        assert point.change is not None
        amount = words.amount_of_change(metric, point.change.estimate)
        since = _since(point)
        yield f"{name}: **{point.verdict}** from {point.day} on, {amount} than before. Changed with it: {since}."
    if not steps and len(points) > 1:
        yield f"{name}: no step in {n}."


def _table(points: Sequence[Point], kind: str) -> Table:
    columns = ["when", "run", "commit", "change", "against the level before", ""]
    rows = [
        [
            words.said(_when(point.run)[:16]),
            words.code(point.run.summary.run_id),
            words.said(point.run.summary.git),
            words.change(point.interval, kind),
            words.change(point.change, kind) if point.change else "",
            f"**{point.verdict}**" if point.is_step else "",
        ]
        for point in points
    ]
    return Table(columns, rows, frozenset({3, 4}))


def _picture(points: Sequence[Point], metric: str, path: Path) -> Figure:
    from harness.report import plots  # matplotlib takes a second

    with plots.plt.rc_context(plots.STYLE):
        canvas, axes = plots.plt.subplots(figsize=(plots.WIDTH, 4.2))
        for place, point in enumerate(points):
            colour = plots.colour_of(point.verdict) if point.is_step else plots.INK
            bounds = point.interval.bounds or (point.interval.estimate, point.interval.estimate)
            axes.plot([place, place], bounds, color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot(place, point.interval.estimate, "o", color=colour, markersize=6)
            if point.is_step:
                axes.axvline(place - 0.5, color=colour, linewidth=1, linestyle="--")
                axes.annotate(
                    f" {point.verdict}", (place - 0.5, 1), xycoords=("data", "axes fraction"), va="top", color=colour
                )
        every = math.ceil(len(points) / MOST_LABELS)
        axes.set_xticks(range(0, len(points), every), [point.day for point in points[::every]])
        axes.tick_params(axis="x", rotation=30)
        axes.set_xlim(-0.6, len(points) - 0.4)
        kind = stats.metric(metric).kind
        axes.set_ylabel(f"{words.label(metric)}, {'combo / reference' if kind == 'ratio' else 'combo less reference'}")
        steps = sum(point.is_step for point in points)
        axes.set_title(
            f"{points[0].run.name}: {words.count(steps, 'step') if steps else 'no step'} in {len(points)} runs"
        )
        return plots.saved(canvas, path)
