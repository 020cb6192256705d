"""One run's outcome in one sentence: speed and memory, never without what became of quality."""

from harness import stats
from harness.report import words
from harness.report.data import Run
from harness.results import Comparison

A_FRACTION = 0.2
"""A ratio below which a percentage hides the difference: 98 % less time is twice as fast as 96 %."""


def verdict_sentence(run: Run) -> str:
    """What the run found, with figures, intervals and the number of pairs."""
    if run.failed:
        return f"{run.code} failed: {words.last_line(run.combo.error or run.baseline.error)}."
    unfinished = "" if run.summary.status == "ok" else f" (the run is {run.summary.status})"
    parts = [_change_clause(run, "rtf"), _change_clause(run, "peak_memory_mb"), _quality_clause(run)]
    return f"{run.code}{unfinished}: {'; '.join(parts)}."


def _change_clause(run: Run, metric: str) -> str:
    record = run.change(metric)
    name = "time" if metric == "rtf" else words.label(metric)
    if record.value is None:
        return f"{name} not measured"
    if record.verdict == stats.NOT_MEASURED:
        return f"{name}: no verdict, {_ratio(record)}"
    if record.verdict == stats.NO_CHANGE:
        return f"{record.verdict} in {name}, {_ratio(record)}"
    verdict = record.verdict if metric == "rtf" else f"{record.verdict} {name}"
    times = f", {1 / record.value:.3g} times as fast" if metric == "rtf" and record.value < A_FRACTION else ""
    before, after = (words.figure(metric, variant.figure(metric)) for variant in (run.baseline, run.combo))
    return (
        f"**{verdict}**, {words.amount_of_change(metric, record.value)}{times} "
        f"({words.label(metric)} {before} to {after}, {_ratio(record)})"
    )


def _ratio(record: Comparison) -> str:
    return f"ratio {words.change(record)}, {words.count(record.n, 'pair')}"


def _quality_clause(run: Run) -> str:
    if run.quality() == stats.NOT_MEASURED:
        if not run.combo.quality_note:
            pairs = words.count(run.change("wer").n, "pair")
            return f"quality not judged ({pairs} of clips give no interval: {stats.MIN_PAIRS} do)"
        note = words.last_line(run.combo.quality_note).removeprefix("WER and similarity are not measured: ")
        return f"quality not measured ({note})"
    changes = [
        f"{words.label(name)} {words.change(run.change(name))}, {run.verdict(name)}" for name in run.quality_metrics
    ]
    return f"quality **{run.quality()}** ({'; '.join(changes)})"
