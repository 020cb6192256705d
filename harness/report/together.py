"""What several jobs that measured the same say together: nobody has a device for as long as a small change may take."""

import json
from collections.abc import Sequence
from dataclasses import replace

from harness import stats
from harness.ablation import interval
from harness.report import words
from harness.report.data import Run, grouped
from harness.report.document import Block, Paragraph, Table
from harness.report.tables import at_a_glance
from harness.results import Comparison

SAID = (
    "Some of these were measured more than once. Together, by a weighted mean in which what the jobs differ by beyond "
    "their own errors counts, they say:"
)


def as_one(runs: Sequence[Run]) -> list[Run]:
    """What was measured, each once: of jobs that measured the same one, with the changes of all of them.

    It is the first whose quality is bad, where there is such a one; its absolute figures are its own.
    """
    return [_joined(group) for group in grouped(runs, _what).values()]


def together(runs: Sequence[Run]) -> list[Block]:
    """Of one setting's runs those that measured the same, as one; nothing where each measured something else."""
    several = [group for group in grouped(runs, _what).values() if len(group) > 1]
    if not several:
        return []
    metrics = at_a_glance([run for group in several for run in group])
    rows = []
    for group in several:
        first, *others = [pooled(group, name) for name in metrics]
        findable = first.smallest_detectable if first else None
        rows.append(
            [
                group[0].code,
                words.counted(len(group)),
                words.counted(first.n if first else 0),
                _told(first),
                "" if findable is None else words.size(findable, "ratio"),
                *map(_told, others),
            ]
        )
    first_title, *titles = metrics.values()
    columns = ["combo", "jobs", "pairs", first_title, "smallest findable", *titles]
    return [Paragraph(SAID), Table(columns, rows, numeric=frozenset({1, 2, 4}))]


def pooled(runs: Sequence[Run], metric: str) -> Comparison | None:
    """One comparison out of several jobs'; None where none of them measured it.

    A job whose verdict was withdrawn, whatever its interval says, takes that of all with it.
    """
    records = [(run.change(metric), run.summary.thresholds[metric]) for run in runs if metric in run.summary.comparison]
    measured = [(record, limit) for record, limit in records if record.verdict != stats.NOT_MEASURED]
    if not measured:
        return None
    measure, threshold = stats.metric(metric), max(limit for _, limit in measured)
    change = stats.pooled([interval(record) for record, _ in measured], measure.kind)
    low, high = change.bounds or (None, None)
    withdrawn = [
        record.verdict
        for record, limit in measured
        if record.verdict != stats.verdict(record.low, record.high, limit, measure)
    ]
    return replace(
        measured[0][0],
        value=change.estimate,
        low=low,
        high=high,
        n=change.n,
        verdict=withdrawn[0] if withdrawn else stats.verdict(low, high, threshold, measure),
        smallest_detectable=stats.smallest_detectable(change, threshold, measure),
    )


def _joined(group: Sequence[Run]) -> Run:
    if len(group) == 1:
        return group[0]
    chosen = max(group, key=lambda run: (run.summary.status == "ok", run.quality() == "worse", not run.is_faithful))
    changes = {name: pooled(group, name) or record for name, record in chosen.summary.comparison.items()}
    return replace(chosen, summary=replace(chosen.summary, comparison=changes))


def _what(run: Run) -> str:
    """What a run measured, and where: the optimizations and their parameters on both sides, and the work."""
    summary, parameters = run.summary, run.parameters()
    ours = {name: parameters.get(name) for name in sorted(summary.enabled)}
    theirs = sorted(name for name, record in summary.against_optimizations.items() if record["enabled"])
    work = [summary.workload, summary.scenario, (run.job.get("measure") or {}).get("pinned_tokens")]
    failed = summary.run_id if run.failed else None  # nothing was measured there
    what = [run.name, run.setting, run.reference, ours, sorted(summary.active), theirs, work, failed]
    return json.dumps(what, sort_keys=True)


def _told(record: Comparison | None) -> str:
    return f"{words.change(record)}, {words.verdict(record.verdict)}" if record else words.NOT_MEASURED
