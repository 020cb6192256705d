"""Which optimization did what: how the results of runs are shared out.

`attribute` reads the summaries back. It goes by which optimizations were on, not by what a run was called,
so runs of different sweeps and days add up. An optimization that was not active is credited with nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness import stats
from harness.results import Comparison, Summary


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
