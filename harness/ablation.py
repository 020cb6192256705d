"""Which optimization did what, as far as two sets of optimizations were measured that differ in just that one.

`attribute` reads summaries. It goes by which optimizations were active, not by what a run was called, so runs of
different sweeps and days add up, and an optimization that was not active is credited with nothing. An effect always
reads the same way: with it / without it (or with - without), whichever side of the job had it on.

A verdict among many is more easily wrong: of forty effects that are none, one or two alarm. So the effects of one
metric and place are one family, and their verdicts are Holm's.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from harness import stats
from harness.designs import closure
from harness.results import Comparison, Summary

Place = tuple[str, str, str, str]
"""Pipeline, device, workload and scenario: what two runs share whose changes may be put together."""

Requires = Mapping[str, Collection[str]]
"""What each optimization cannot run without."""


@dataclass(frozen=True)
class Effect:
    """What one optimization changed in one metric, beside the others in `beside` (none: alone).

    `along` names what came and went with it, where the runs cannot tell them apart. `interval` is a ratio or a delta
    as the metric's kind says, its own 95 %; `verdict` holds after Holm's correction, and `p_value` is the corrected
    one. `run_ids` are the runs it comes from.
    """

    optimization: str
    metric: str
    beside: tuple[str, ...]
    interval: stats.Interval
    verdict: str
    run_ids: tuple[str, ...]
    along: tuple[str, ...] = ()
    p_value: float | None = None
    threshold: float = 0.0
    place: Place = ("", "", "", "")

    @property
    def question(self) -> tuple[object, ...]:
        """What it answers; two effects with the same are two answers."""
        return self.place, self.metric, self.optimization, self.along, self.beside

    @property
    def withdrawn(self) -> bool:
        """Whether the interval by itself would have given a verdict that the correction took back."""
        return self.verdict == stats.NO_CHANGE != _verdict(self)


def attribute(summaries: Sequence[Summary], metrics: Iterable[str]) -> list[Effect]:
    """Every effect of one optimization that the runs tell: within a job, or between two against the same reference."""
    return _corrected(effect for effect in _effects(summaries, list(metrics)) if not effect.along)


def group_effects(summaries: Sequence[Summary], metrics: Iterable[str], requires: Requires) -> list[Effect]:
    """What optimizations did that a leave-one-out had to leave out together, because one needs the other.

    It needs it if it `requires` it, directly or not, or became unavailable without it. A job that left out others
    together, as a screening's do, tells nothing by itself.
    """
    by_id = {run.run_id: run for run in summaries}

    def is_group(effect: Effect) -> bool:
        records = by_id[effect.run_ids[0]].optimizations
        return all(
            (name in records and records[name]["status"] == "unavailable")
            or effect.optimization in closure([name], lambda one: requires.get(one, ()))
            for name in effect.along
        )

    return _corrected(effect for effect in _effects(summaries, list(metrics)) if effect.along and is_group(effect))


def _effects(summaries: Sequence[Summary], metrics: list[str]) -> list[Effect]:
    """One for each question; what a job tells by itself goes before what two jobs tell together."""
    runs = [run for run in summaries if clear(run)]
    within = [_within(run, metric) for run in runs for metric in metrics]
    between = [
        _between(other, run, metric)
        for run in runs
        for other in runs
        if reference(run) == reference(other) and place(run) == place(other)
        for metric in metrics
    ]
    found: dict[object, Effect] = {}
    for effect in (*within, *between):
        if effect is not None:
            found.setdefault(effect.question, effect)
    return list(found.values())


def clear(run: Summary) -> bool:
    """Whether the run's figures can be credited: nothing failed, and nothing was on without evidence, on either side.

    An unavailable optimization did not touch the pipeline, so it is as good as off.
    """
    records = [*run.optimizations.values(), *run.against_optimizations.values()]
    statuses = {record["status"] for record in records if record["enabled"]}
    return run.status != "failed" and statuses <= {"active", "unavailable"}


def place(run: Summary) -> Place:
    return run.pipeline, run.device, run.workload, run.scenario


def reference(run: Summary) -> tuple[str, ...]:
    """The optimizations that were active in what the combo was compared with."""
    return tuple(name for name, record in run.against_optimizations.items() if record["status"] == "active")


def _within(run: Summary, metric: str) -> Effect | None:
    """The effect that the two sides of one job tell; those of a whole combo against nothing are nobody's own."""
    on, off, change = set(run.active), set(reference(run)), _change(run, metric)
    if change is None:
        return None
    if on < off:  # left out: seen from the other side
        return _effect(run, metric, off - on, on, stats.inverse(change, stats.metric(metric).kind), (run.run_id,))
    return _effect(run, metric, on - off, off, change, (run.run_id,)) if off < on and len(on - off) == 1 else None


def _between(without: Summary, run: Summary, metric: str) -> Effect | None:
    """The effect that two jobs tell which share a reference; the noise of both is in it."""
    on, off = set(run.active), set(without.active)
    before, after = _change(without, metric), _change(run, metric)
    if not (off < on and len(on - off) == 1 and before and after):
        return None
    change = stats.contrast(before, after, stats.metric(metric).kind)
    return _effect(run, metric, on - off, off, change, (without.run_id, run.run_id))


def _change(run: Summary, metric: str) -> stats.Interval | None:
    """The run's change; without bounds where it was not judged, None where it was not measured."""
    record = run.comparison.get(metric)
    if record is None or record.value is None:
        return None
    found = interval(record)
    return replace(found, low=None, high=None) if record.verdict == stats.NOT_MEASURED else found


def _effect(
    run: Summary, metric: str, parts: set[str], beside: set[str], change: stats.Interval, run_ids: tuple[str, ...]
) -> Effect:
    name, *along = (name for name in run.optimizations if name in parts)
    others = tuple(name for name in run.optimizations if name in beside)
    effect = Effect(
        name, metric, others, change, "", run_ids, tuple(along), threshold=run.thresholds[metric], place=place(run)
    )
    return replace(effect, verdict=_verdict(effect))


def _verdict(effect: Effect) -> str:
    low, high = effect.interval.bounds or (None, None)
    return stats.verdict(low, high, effect.threshold, stats.metric(effect.metric))


def _corrected(effects: Iterable[Effect]) -> list[Effect]:
    """With Holm's correction within each metric of each place."""
    families: dict[tuple[Place, str], list[Effect]] = {}
    for effect in effects:
        families.setdefault((effect.place, effect.metric), []).append(effect)
    return [effect for family in families.values() for effect in _corrected_family(family)]


def _corrected_family(family: list[Effect]) -> list[Effect]:
    measure = stats.metric(family[0].metric)
    p_values = stats.holm([stats.p_value(effect.interval, effect.threshold, measure) for effect in family])
    return [
        replace(effect, p_value=p, verdict=effect.verdict if p is None or p <= stats.ALPHA else stats.NO_CHANGE)
        for effect, p in zip(family, p_values, strict=True)
    ]


def interval(record: Comparison) -> stats.Interval:
    """A comparison's figure as an interval. Raises ValueError for one that was not measured."""
    if record.value is None:
        raise ValueError("this comparison was not measured")
    return stats.Interval(record.value, record.low, record.high, record.n)
