"""Which measured combo to run, within limits, and which of its members earn their place in it.

**Limits** fail closed: where a combo has to keep to one, what was not measured does not. A rise of the word error rate
is ruled out by the whole interval; memory is the highest peak that was seen. With or without limits, a combo qualifies
only if its run is complete and was held against the baseline, nothing in it was on without evidence, it is faster or
smaller and not slower, and no verdict on quality or watermark is for the worse.

**A member earns its place** if the combo is better with it than without it, in any metric. One without which nothing
gets worse, as far as was judged, earns nothing here. What only another kind of run can judge, such as a first call in a
single process, is not held against it: it stays undecided.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import stats
from harness.ablation import Effect, attribute, clear, group_effects, place
from harness.errors import UserError
from harness.report import words
from harness.report.data import Run, ranked
from harness.results import BASELINE, Summary

EARNS, NOTHING, NEEDED, UNDECIDED = "earns its place", "earns nothing here", "is needed by others", "undecided"


@dataclass(frozen=True)
class Limits:
    """What a combo may cost at most: a rise in word error rate, and MB at the memory's peak; None is no limit."""

    wer_increase: float | None = None
    memory_mb: float | None = None

    def check(self) -> None:
        """Raises UserError for a limit that is no number, or below 0."""
        for option, limit in (("--max-wer-increase", self.wer_increase), ("--max-memory-mb", self.memory_mb)):
            if limit is not None and not 0 <= limit < float("inf"):
                raise UserError(f"{option} {limit}: give a number of 0 or more")


@dataclass(frozen=True)
class Member:
    """What became of one optimization of a combo, and why."""

    optimization: str
    grade: str
    reason: str

    @property
    def kept(self) -> bool:
        return self.grade != NOTHING


def objection(run: Run, limits: Limits) -> str | None:
    """Why the run's combo does not qualify, or None if it does."""
    if run.summary.status != "ok":
        return f"the run {'failed' if run.failed else 'is incomplete'}"
    if run.summary.against != BASELINE:
        return f"it was held against {words.code(run.summary.against)}, not against the baseline"
    if run.is_noise_floor:
        return "it switches nothing on"
    if not clear(run.summary):
        return "something in it was on without evidence"
    worse = [
        name for name, record in run.summary.comparison.items() if record.kind == "delta" and _is_bad(record.verdict)
    ]
    if worse or run.quality() == "worse":
        return f"its quality is worse ({words.listing([words.label(name) for name in worse]) if worse else 'cut off'})"
    return _over(run, limits) or (None if _gains(run) else "it is neither faster nor smaller")


def _is_bad(verdict: str) -> bool:
    return verdict in stats.BAD


def _gains(run: Run) -> bool:
    return bool(run.gains()) and run.verdict("rtf") != "slower"


def _over(run: Run, limits: Limits) -> str | None:
    if limits.wer_increase is not None:
        record = run.summary.comparison.get("wer")
        if record is None or record.high is None or not run.baseline.trained:
            return "its word error rate was not measured, so a rise cannot be ruled out"
        if record.high > limits.wer_increase:
            return f"its word error rate may rise by {words.rate(record.high)}, the limit is {limits.wer_increase:g}"
    if limits.memory_mb is not None:
        peak = run.combo.peak_memory_mb
        if peak is None:
            return "its memory was not measured"
        if peak > limits.memory_mb:
            return f"it needs {words.megabytes(peak)}, the limit is {words.megabytes(limits.memory_mb)}"
    return None


def best(runs: Sequence[Run], limits: Limits) -> Run | None:
    """The fastest combo that qualifies."""
    return next((run for run in ranked(runs) if objection(run, limits) is None), None)


# -- members -----------------------------------------------------------------------------------------------------------


def members(combo: Run, runs: Sequence[Run]) -> list[Member]:
    """Each of the combo's optimizations, as the runs of its place judge it beside the others."""
    summary = combo.summary
    alike = [run.summary for run in runs if place(run.summary) == place(summary) and same_parameters(run, combo)]
    metrics = dict.fromkeys(name for run in alike for name in run.comparison)
    requires: Mapping[str, Sequence[str]] = combo.job.get("requires") or {}
    effects = [*attribute(alike, metrics), *group_effects(alike, metrics, requires)]
    found = {name: _member(name, combo, effects) for name in summary.enabled}
    for name in reversed(summary.enabled):  # what needs another is applied after it, and is judged before it here
        others = [other for other, member in found.items() if member.kept and name in requires.get(other, ())]
        if others and not found[name].kept:
            found[name] = Member(name, NEEDED, f"by {words.listing(list(map(words.code, others)))}")
    return list(found.values())


def same_parameters(run: Run, combo: Run) -> bool:
    """Whether what is on in the run has the combo's parameters."""
    own, others = (one.job.get("optimizations") or {} for one in (combo, run))
    on = {*run.summary.enabled, *run.summary.against_optimizations}

    def parameters(settings: Mapping[str, Mapping[str, object]], name: str) -> dict[str, object]:
        return {key: value for key, value in (settings.get(name) or {}).items() if key != "enabled"}

    return all(parameters(own, name) == parameters(others, name) for name in on if name in own and name in others)


def _member(name: str, combo: Run, effects: Sequence[Effect]) -> Member:
    record = combo.summary.optimizations[name]
    if record["status"] != "active":
        return Member(name, NOTHING, f"{record['status']}: {words.last_line(record['reason'])}")
    others = set(combo.summary.active) - {name}
    own = [effect for effect in effects if effect.optimization == name and _is_last(effect, others)]
    if not own:
        return Member(name, UNDECIDED, "no run has this combo without it: `+sweep=leave_one_out` makes them")
    told = "; ".join(
        words.effect(effect) for effect in own if effect.metric in ("rtf", "peak_memory_mb") or _speaks(effect)
    )
    along = sorted({other for effect in own for other in effect.along})
    told += f" (with {words.listing(list(map(words.code, along)))}, which need it)" if along else ""
    if any(effect.verdict in stats.GOOD for effect in own):
        return Member(name, EARNS, told)
    unjudged = [effect for effect in own if effect.verdict == stats.NOT_MEASURED and _seems_good(effect)]
    if unjudged:
        seen = words.listing([words.label(effect.metric) for effect in unjudged])
        return Member(name, UNDECIDED, f"{told}; its {seen} may be better, which this run cannot judge")
    if not any(effect.metric == "rtf" and effect.interval.bounds for effect in own):
        return Member(name, UNDECIDED, told or "its time was not judged")
    return Member(name, NOTHING, told)


def _is_last(effect: Effect, others: set[str]) -> bool:
    """Whether the effect is that of switching it on last, after everything that does not need it."""
    return set(effect.beside) | set(effect.along) == others


def _speaks(effect: Effect) -> bool:
    return effect.verdict in (*stats.GOOD, *stats.BAD)


def _seems_good(effect: Effect) -> bool:
    measure, change = stats.metric(effect.metric), effect.interval.estimate
    if measure.below in stats.GOOD:
        return change < measure.neutral - effect.threshold
    return change > measure.neutral + effect.threshold


# -- Pareto's front ----------------------------------------------------------------------------------------------------

Cost = Callable[[Run], float | None]
COSTS: dict[str, Cost] = {
    "time ratio": lambda run: run.change("rtf").value,
    "peak memory": lambda run: run.combo.peak_memory_mb,
    "WER change": lambda run: run.change("wer").value if run.baseline.trained else None,
}


def front(runs: Sequence[Run]) -> list[Run]:
    """Runs against the baseline that no other is better than: as good in time, memory and quality, and better in one.

    By the figures themselves, not their intervals. A cost that one of the runs lacks is left out for all.
    """
    usable = [run for run in ranked(runs) if run.summary.status == "ok" and run.summary.against == BASELINE]
    usable = [run for run in usable if clear(run.summary) and not run.is_noise_floor]
    table = {name: [cost(run) for run in usable] for name, cost in COSTS.items()}
    columns = [column for column in table.values() if None not in column]
    points = list(zip(*columns, strict=True)) if columns else []
    return [run for run, point in zip(usable, points, strict=False) if not any(_dominates(o, point) for o in points)]


def _dominates(one: Sequence[float | None], other: Sequence[float | None]) -> bool:
    return one != other and all((a or 0.0) <= (b or 0.0) for a, b in zip(one, other, strict=True))


def objectives(summary: Summary | None) -> tuple[float, ...]:
    """A combo's costs, for a search that minimizes them; infinite for one that nobody would run.

    Where quality was not measured, every combo costs the same in it: none.
    """
    if summary is None:
        return (math.inf,) * len(COSTS)
    run = Run(summary, {}, {}, Path(summary.run_id))
    if summary.status != "ok" or not clear(summary) or run.quality() == "worse":
        return (math.inf,) * len(COSTS)
    time, memory, wer = (cost(run) for cost in COSTS.values())
    return (math.inf if time is None else time, math.inf if memory is None else memory, wer or 0.0)
