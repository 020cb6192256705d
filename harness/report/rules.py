"""From verdicts to advice. Every recommendation of the report is made here, by rules a reader can check.

A configuration is recommended if its run is complete, it is faster or smaller, it is not slower, and the
intervals of word error rate and similarity rule out a loss that counts. Where quality was not measured, or its
intervals are too wide to rule one out, the configuration is only a candidate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from harness import stats
from harness.ablation import Effect
from harness.report import words
from harness.report.data import KEPT, Run, ranked
from harness.results import BASELINE

DEPLOY = "Deploy"
AFTER_CHECK = "Deploy after a quality check"
MEMORY_ONLY = "Only where memory is short"
NO_REASON = "No reason to deploy"
DO_NOT = "Do not deploy"
TOGETHER = "Measured only together with others"
NOT_HERE = "Could not be judged here"
GRADES = (DEPLOY, AFTER_CHECK, MEMORY_ONLY, NO_REASON, DO_NOT, TOGETHER, NOT_HERE)


@dataclass(frozen=True)
class Advice:
    """One optimization's grade and the reason for it."""

    optimization: str
    grade: str
    reason: str


def recommended(runs: Sequence[Run]) -> Run | None:
    """The fastest run that cleared every gate, quality included."""
    return next((run for run in ranked(runs) if objection(run) is None), None)


def candidate(runs: Sequence[Run]) -> Run | None:
    """The fastest run that lacks nothing but proof of its quality."""
    return next((run for run in ranked(runs) if _speaks_for(run) and run.quality() != "worse"), None)


def objection(run: Run) -> str | None:
    """Why this run's configuration is not recommended, or None if it may be."""
    if run.summary.status != "ok":
        return "the run failed" if run.failed else "the run is incomplete"
    if run.summary.against != BASELINE:
        return f"it was held against {words.code(run.summary.against)}, not against the baseline"
    if not _speaks_for(run):
        slower = run.verdict("rtf") == "slower"
        return "it is slower" if slower else "it is neither faster nor smaller beyond the thresholds"
    if run.quality() == "worse":
        worse = [name for name in run.summary.comparison if run.verdict(name) == "worse"]
        return f"its quality is worse ({', '.join(map(words.label, worse))})"
    if run.quality() == stats.NOT_MEASURED:
        return "its quality was not measured"
    return None if run.quality() == KEPT else "no loss of quality was detected, but its interval does not rule one out"


def _speaks_for(run: Run) -> bool:
    complete = run.summary.status == "ok" and run.summary.against == BASELINE and not run.is_noise_floor
    return complete and bool(run.gains()) and run.verdict("rtf") != "slower"


def advise(name: str, runs: Sequence[Run], effects: Sequence[Effect]) -> Advice:
    """The grade of one optimization, from the effects that are its own (alone, or added to others)."""
    status, reason = status_of(name, runs)
    if status != "active":
        return Advice(name, NOT_HERE, f"{status}{f': {words.last_line(reason)}' if reason else ''}")
    own = own_effects(name, effects)
    if not own:
        return Advice(name, *unattributed(name, runs))
    verdicts = {metric: effect.verdict for metric, effect in own.items()}
    beside = next(iter(own.values())).beside
    where = f"added to {', '.join(beside)}" if beside else "alone"
    time, memory = (verdicts.get(metric, stats.NOT_MEASURED) for metric in ("rtf", "peak_memory_mb"))
    quality = _quality([effect for effect in own.values() if stats.metric(effect.metric).kind == "delta"], runs)
    found = f"{where}: time {time}, memory {memory}, quality {quality}"
    if quality == "worse":
        return Advice(name, DO_NOT, found)
    if time == "slower":
        return Advice(name, MEMORY_ONLY if memory == "less" else DO_NOT, found)
    if time != "faster" and memory != "less":
        return Advice(name, NO_REASON, found)
    return Advice(name, DEPLOY if quality == KEPT else AFTER_CHECK, found)


def _quality(changes: Sequence[Effect], runs: Sequence[Run]) -> str:
    """What `Run.quality` says of a run, said of one optimization's own effects on quality."""
    if any(change.verdict == "worse" for change in changes):
        return "worse"
    if not all(run.baseline.trained for run in runs) or all(c.verdict == stats.NOT_MEASURED for c in changes):
        return stats.NOT_MEASURED
    limits = runs[0].summary.thresholds
    proved = (
        stats.proves_no_worse(c.interval.low, c.interval.high, limits[c.metric], stats.metric(c.metric))
        for c in changes
    )
    return KEPT if all(proved) else stats.NO_CHANGE


def unattributed(name: str, runs: Sequence[Run]) -> tuple[str, str]:
    """Why an active optimization has no effect of its own: the grade and the reason."""
    alone = [run for run in runs if run.summary.enabled == [name]]
    failed = next((run for run in alone if run.failed), None)
    if failed:
        return NOT_HERE, f"its run failed: {words.last_line(failed.combo.error or failed.baseline.error)}"
    together = [run.code for run in runs if name in run.summary.active]
    return TOGETHER, f"it was on only in {words.listing(together)}; a sweep tells its own share"


def own_effects(name: str, effects: Sequence[Effect]) -> dict[str, Effect]:
    """The optimization's effect per metric: alone if that was measured, else beside the fewest others."""
    own: dict[str, Effect] = {}
    for effect in sorted(effects, key=lambda effect: len(effect.beside)):
        if effect.optimization == name:
            own.setdefault(effect.metric, effect)
    return own


def effects_of(runs: Sequence[Run], effects: Sequence[Effect]) -> list[Effect]:
    """Those that come from these runs alone."""
    ids = {run.summary.run_id for run in runs}
    return [effect for effect in effects if ids.issuperset(effect.run_ids)]


def names(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """The optimizations that some run had on, and as code the others, with "not built" where that is the reason."""
    known = dict.fromkeys(name for run in runs for name in run.summary.optimizations)
    on = [name for name in known if any(name in run.summary.enabled for run in runs)]
    off = [
        f"{words.code(name)}{' (not built)' if status_of(name, runs)[0] == 'not built' else ''}"
        for name in known
        if name not in on
    ]
    return on, off


def status_of(name: str, runs: Sequence[Run]) -> tuple[str, str | None]:
    """Status and reason where it was enabled, with the fewest others; "off" or "not built" where it never was."""
    record = record_of(name, runs)
    return (record["status"], record["reason"]) if record else ("off", None)


def record_of(name: str, runs: Sequence[Run]) -> dict | None:
    having = [run for run in runs if name in run.summary.optimizations]
    enabled = [run for run in having if run.summary.optimizations[name]["enabled"]]
    chosen = sorted(enabled, key=lambda run: len(run.summary.enabled)) or having
    return chosen[0].summary.optimizations[name] if chosen else None
