"""Which optimization did what: designs of runs, and how their results are shared out.

A design turns a combo into jobs, each a label and the optimizations that are on:

    one_at_a_time    each alone: what it does to the unmodified pipeline
    leave_one_out    a combo, and the combo without each of its members: what each adds to the others
    pairs            each two together: do their effects multiply, or do they overlap

`attribute` reads the summaries back. It goes by which optimizations were on, not by what a run was called,
so runs of different sweeps and days add up. An optimization that was not active is credited with nothing.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from harness import stats
from harness.errors import UserError
from harness.results import Comparison, Summary

Job = tuple[str, list[str]]
"""A job's label and its enabled optimizations, in the order of application."""

Design = Callable[[str, list[str], list[str]], list[Job]]
"""(the combo's name, its enabled optimizations, all known optimizations) -> jobs."""


def one_at_a_time(_combo: str, enabled: list[str], known: list[str]) -> list[Job]:
    """Each of the combo's optimizations, or of all where no combo is named."""
    return [(name, [name]) for name in enabled or known]


def leave_one_out(combo: str, enabled: list[str], _known: list[str]) -> list[Job]:
    """Raises UserError for a combo with nothing to leave out."""
    if not enabled:
        raise UserError("+sweep=leave_one_out leaves out of a combo: add +combo=production, or another one")
    without = [(f"{combo}-without-{name}", [other for other in enabled if other != name]) for name in enabled]
    return [(combo, enabled), *without]


def pairs(_combo: str, enabled: list[str], known: list[str]) -> list[Job]:
    """Every two of the combo's optimizations, or of all where no combo is named; and each of them alone."""
    names = enabled or known
    together = [(f"{one}+{other}", [one, other]) for one, other in combinations(names, 2)]
    return [*((name, [name]) for name in names), *together]


DESIGNS: dict[str, Design] = {
    "one_at_a_time": one_at_a_time,
    "leave_one_out": leave_one_out,
    "pairs": pairs,
}


@dataclass(frozen=True)
class Effect:
    """What one optimization changed in one metric, beside the others in `beside` (none: alone).

    `interval` is a ratio or a delta as the metric's kind says; `run_ids` are the runs it comes from.
    """

    optimization: str
    metric: str
    beside: tuple[str, ...]
    interval: stats.Interval
    verdict: str
    run_ids: tuple[str, ...]


def attribute(summaries: Sequence[Summary], metrics: Iterable[str]) -> list[Effect]:
    """Every effect that the runs allow to be told apart: runs that differ in exactly one active optimization."""
    names = list(metrics)
    runs = [run for run in summaries if _clear(run)]
    effects = []
    for run in runs:
        if len(run.active) == 1:
            effects += [_alone(run, metric) for metric in names if _known(run, metric)]
            continue
        for other in runs:
            added = set(run.active) - set(other.active)
            if len(added) == 1 and set(other.active) < set(run.active) and _same_place(run, other):
                (name,) = added
                both = [metric for metric in names if _known(run, metric) and _known(other, metric)]
                effects += [_added(other, run, name, metric) for metric in both]
    return effects


def _clear(run: Summary) -> bool:
    """Whether the run's figures can be credited: nothing failed, and nothing was on without evidence.

    An unavailable optimization did not touch the pipeline, so it is as good as off.
    """
    statuses = {record["status"] for record in run.optimizations.values() if record["enabled"]}
    return run.status != "failed" and statuses <= {"active", "unavailable"}


def _same_place(run: Summary, other: Summary) -> bool:
    return (run.pipeline, run.device, run.workload) == (other.pipeline, other.device, other.workload)


def _known(run: Summary, metric: str) -> bool:
    return metric in run.comparison and run.comparison[metric].value is not None


def _alone(run: Summary, metric: str) -> Effect:
    record = run.comparison[metric]
    return Effect(run.active[0], metric, (), interval(record), record.verdict, (run.run_id,))


def _added(without: Summary, run: Summary, name: str, metric: str) -> Effect:
    kind = stats.metric(metric)
    change = stats.contrast(interval(without.comparison[metric]), interval(run.comparison[metric]), kind.kind)
    verdict = stats.verdict(change.low, change.high, run.thresholds[metric], kind)
    beside = tuple(member for member in run.active if member != name)
    return Effect(name, metric, beside, change, verdict, (without.run_id, run.run_id))


def interval(record: Comparison) -> stats.Interval:
    """A comparison's figure as an interval. Raises ValueError for one that was not measured."""
    if record.value is None:
        raise ValueError("this comparison was not measured")
    return stats.Interval(record.value, record.low, record.high, record.n)
