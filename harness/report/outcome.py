"""One run's outcome: a headline for people, and the sentence with all its figures. Never speed without quality."""

from collections.abc import Mapping
from typing import Any

from harness import stats
from harness.quality.fidelity import FAITHFUL
from harness.report import streams, words
from harness.report.data import KEPT, Run
from harness.report.document import Tile
from harness.results import BASELINE, Comparison

A_FRACTION = 0.2
"""A ratio below which a percentage hides the difference: 98 % less time is twice as fast as 96 %."""

# -- in a headline ---------------------------------------------------------------------------------------------------


def headline(run: Run) -> str:
    """The verdict as one would tell it to somebody who asks."""
    if run.failed:
        return f"{run.code} **failed**: {words.last_line(run.combo.error or run.baseline.error)}."
    unfinished = "" if run.summary.status == "ok" else f" The run is {run.summary.status}."
    if run.is_noise_floor:
        time, memory = (run.verdict(name) for name in ("rtf", "peak_memory_mb"))
        return f"The baseline against itself: time {time}, memory {memory}. Whatever differs here is noise.{unfinished}"
    return f"{streams.headline(run)}{run.code} {_time(run)}, {_memory(run)}, {_quality(run)}.{unfinished}"


def _time(run: Run) -> str:
    record = run.change("rtf")
    if record.value is None:
        return "has no figure of time"
    if record.verdict == "faster":
        return f"is **{times_as_fast(record)} times as fast** as {run.versus}"
    if record.verdict == "slower":
        return f"is **slower** than {run.versus}: it takes {words.amount_of_change('rtf', record.value)}"
    if record.verdict == stats.NO_CHANGE:
        return f"shows no detectable change in time against {run.versus}"
    return "has no verdict on time"


def _memory(run: Run) -> str:
    record = run.change("peak_memory_mb")
    if record.verdict in ("less", "more"):
        return f"needs {words.amount_of_change('peak_memory_mb', record.value or 1.0)}"
    return "with no detectable change in memory" if record.verdict == stats.NO_CHANGE else "its memory has no verdict"


def _quality(run: Run) -> str:
    told = computed(run)
    return {
        KEPT: "and quality is kept",
        "worse": "and quality is **worse**",
        stats.NOT_MEASURED: f"and of its quality, which nobody judged by ear, this was computed: {told}"
        if told
        else "and nobody knows its quality: it was not measured",
        stats.NO_CHANGE: "and no loss of quality was detected, but too few clips were heard to rule one out",
    }[run.quality()]


def times_as_fast(record: Comparison) -> str:
    return words.number(1 / record.value) if record.value else words.NOT_MEASURED


def times_as_fast_bounds(record: Comparison) -> str:
    """Of its interval; empty where there is none."""
    if not record.low or not record.high:
        return ""
    return f"{words.number(1 / record.high)} to {words.number(1 / record.low)}"


# -- in large figures ------------------------------------------------------------------------------------------------


def tiles(run: Run) -> list[Tile]:
    """Streams under load, times as fast, memory, quality: each with its interval and where it comes from."""
    return [*streams.tiles(run), _time_tile(run), _memory_tile(run), _quality_tile(run)]


def _time_tile(run: Run) -> Tile:
    record = run.change("rtf")
    before, after = (words.number(variant.rtf) for variant in (run.baseline, run.combo))
    if not record.value:
        return Tile("?", f"times as fast as {run.versus}", "not measured")
    bounds = times_as_fast_bounds(record)
    pairs = words.count(record.n, "pair")
    detail = f"{bounds}{', ' if bounds else ''}{pairs}; {words.verdict(record.verdict)}; RTF {before} to {after}"
    return Tile(times_as_fast(record), f"times as fast as {run.versus}", detail, _sense(record.verdict))


def _memory_tile(run: Run) -> Tile:
    record = run.change("peak_memory_mb")
    about = {"vram": "of its peak memory on the GPU", "rss": "of its peak resident memory"}[run.baseline.memory_kind]
    if record.value is None:
        return Tile("?", about, "not measured")
    before, after = (words.megabytes(variant.peak_memory_mb) for variant in (run.baseline, run.combo))
    detail = f"ratio {run.told('peak_memory_mb')}; {words.verdict(record.verdict)}; {before} to {after}"
    return Tile(words.percent(record.value), about, detail, _sense(record.verdict))


def _quality_tile(run: Run) -> Tile:
    quality = run.quality()
    if quality == stats.NOT_MEASURED:
        reason = words.last_line(run.combo.quality_note) if run.combo.quality_note else "too few clips for an interval"
        told = computed(run)
        return Tile("computed" if told else "?", "quality", f"{told}; not heard: {reason}" if told else reason)
    changes = [f"{words.label(name)} {words.change(run.change(name))}" for name in run.quality_metrics]
    sense = {"worse": "bad", KEPT: "good"}.get(quality, "neutral")
    return Tile(quality if quality in (KEPT, "worse") else "unsure", "quality", "; ".join(changes), sense)


def _sense(verdict: str) -> str:
    return "good" if verdict in stats.GOOD else "bad" if verdict in stats.BAD else "neutral"


# -- with all its figures --------------------------------------------------------------------------------------------


def verdict_sentence(run: Run) -> str:
    """What the run found, with figures, intervals and the number of pairs."""
    if run.failed:
        return f"{run.code} failed: {words.last_line(run.combo.error or run.baseline.error)}."
    against = "" if run.reference == BASELINE else f" against {run.versus}"
    changes = [_change_clause(run, name) for name in ("rtf", "peak_memory_mb")]
    parts = [*streams.clauses(run), *changes, _quality_clause(run)]
    return f"{run.code}{against}{run.doubt}: {'; '.join(parts)}."


def _change_clause(run: Run, metric: str) -> str:
    record = run.change(metric)
    name = "time" if metric == "rtf" else words.label(metric)
    if record.value is None:
        return f"{name} not measured"
    figures = f"ratio {run.told(metric)}, {words.count(record.n, 'pair')}"
    if record.verdict == stats.NOT_MEASURED:
        return f"{name}: no verdict, {figures}"
    if record.verdict == stats.NO_CHANGE:
        return f"{record.verdict} in {name}, {figures}{_power(record)}"
    verdict = record.verdict if metric == "rtf" else f"{record.verdict} {name}"
    times = f", {1 / record.value:.3g} times as fast" if metric == "rtf" and 0 < record.value < A_FRACTION else ""
    before, after = (words.figure(metric, variant.figure(metric)) for variant in (run.baseline, run.combo))
    return (
        f"**{verdict}**, {words.amount_of_change(metric, record.value)}{times} "
        f"({words.label(metric)} {before} to {after}, {figures})"
    )


def _power(record: Comparison) -> str:
    """What "no detectable change" is worth."""
    if record.smallest_detectable is None:
        return ""
    return f" (a change of {words.size(record.smallest_detectable, record.kind)} or more would have been found)"


def _quality_clause(run: Run) -> str:
    if run.quality() == stats.NOT_MEASURED:
        by_stage = f", computed: {computed(run)}" if run.fidelity else ""
        if not run.combo.quality_note:
            pairs = words.count(run.change("wer").n, "pair")
            return f"quality not judged ({pairs} of clips give no interval: {stats.MIN_PAIRS} do){by_stage}"
        note = words.last_line(run.combo.quality_note).removeprefix("WER and similarity are not measured: ")
        return f"quality not {'heard' if by_stage else 'measured'} ({note}){by_stage}"
    told = [*run.quality_metrics, *(name for name in (*run.timed_metrics, "watermark") if run.verdict(name) == "worse")]
    changes = [
        f"{words.label(name)} {words.change(run.change(name))}, {run.verdict(name)}"
        + (_power(run.change(name)) if run.verdict(name) == stats.NO_CHANGE and run.quality() != KEPT else "")
        for name in told
    ]
    return f"quality **{run.quality()}** ({'; '.join(changes)})"


def computed(run: Run) -> str:
    """What needs no ear: which stages are not faithful to the reference's; empty where they were not compared."""
    others = unfaithful(run.fidelity)
    return words.listing(others) if others else "every stage is faithful" if run.fidelity else ""


def unfaithful(stages: Mapping[str, Any]) -> list[str]:
    """The stages that are not faithful, each with its verdict."""
    verdicts = {stage: found["verdict"] for stage, found in stages.items()}
    return [f"{words.code(stage)} {verdict}" for stage, verdict in verdicts.items() if verdict != FAITHFUL]


def quality_in_short(run: Run) -> str:
    """For a table: what was heard, or else what was computed."""
    told = computed(run) if run.quality() == stats.NOT_MEASURED else ""
    return f"computed: {told}" if told else run.quality()
