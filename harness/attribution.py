"""From the baseline to a combo, step by step: how much of the way is each optimization's.

Percentages of single optimizations must not be added up: they multiply, they overlap, and some do nothing without
another. Shapley's value shares a combo's whole change out: an optimization's part is what it changes when it is
switched on, averaged over the orders in which all of them can be switched on, and the parts add up to the whole (for
ratios: multiply; everything here is on the log scale for them). In an order, each next optimization is picked by chance
among those whose prerequisites are there already, so that no order asks for what no pipeline can be.

**From which runs.** Every job compares two sets of optimizations, whatever its sweep was. Where the jobs connect all
sets that can be, the parts follow from the measured changes alone: "exact". A combo of twelve has 4096 sets, so mostly
a model stands in for those that were not measured: a Gaussian process for each stage of a call, or for the whole where
a figure is no sum of stages or some run does not tell them (`harness.surrogate`). It takes every job between sets of
the combo's members, so sweeps that are reported together sharpen each other. A job of too few pairs for an interval
counts too: it is known as badly as the worst of the others, and where none has an interval, how they scatter is all
that there is. Intervals follow from the model, so they widen where the jobs say little.

An optimization with other parameters is another one: a combo that was measured with two has two waterfalls, each from
its own jobs and with the number of those it leaves out. Nothing can tell what code of another commit does; the commits
are told.

**Whether the model may be believed.** Each job is told from all others, and held against what it measured: of intervals
that are 95 % sure, about 95 of 100 have to hold it (`Foretold`).

The model takes jobs from both ends, near the baseline and near the combo: `one_at_a_time` and `leave_one_out` together,
or a `screening`. Leaving one out of the combo says nothing about the first steps, so by itself it makes no waterfall.

What the parts leave of the measured whole is shown as the remainder.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from scipy import special

from harness import orders, stats, surrogate
from harness.ablation import Place, Requires, clear, interval, place, reference
from harness.designs import JOBS_A_MEMBER
from harness.orders import Names, Needs, Sums
from harness.results import BASELINE, Summary, Variant

Change = tuple[float, float]
"""Seconds of a stage, for each second of audio, with the one set on and with the other."""

EXACT = "exact"
FITTED = "fitted"
BY_STAGE = "rtf"
"""The metric that is a sum of stages."""
REST = "rest"
LEAST_STAGE = 0.005
"""What takes less of the call, in every job and on both sides, counts with the rest."""
IMPLAUSIBLE = 0.01
FEWER = 60
"""Of more optimizations than can be enumerated, the variances are those of so many orders."""


@dataclass(frozen=True)
class Measured:
    """A run's summary and the parameters of its optimizations, as job.yaml has them (empty where it was not kept)."""

    summary: Summary
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Observation:
    """One job's change of one metric between two sets of optimizations: log ratio or delta, with standard error.

    The error is None where the job had too few pairs to tell. `stages` is empty where the metric is no sum of them.
    """

    on: frozenset[str]
    off: frozenset[str]
    change: float
    error: float | None
    run_id: str
    stages: Mapping[str, Change] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """A step of the waterfall: ratio or delta with its interval; the verdict is Holm's within the waterfall.

    Where it has found nothing, `smallest_detectable` is the change for the worse that an interval of this width would
    have found by itself, without Holm's correction (relative for a ratio); else None.
    """

    optimization: str
    interval: stats.Interval
    verdict: str
    smallest_detectable: float | None


@dataclass(frozen=True)
class Interaction:
    """How the effect of one optimization changes where the other is on: a ratio below 1 means that together they
    save more than their ratios multiplied; the verdict is Holm's among all interactions, `smallest_detectable` as in
    Part."""

    pair: tuple[str, str]
    interval: stats.Interval
    verdict: str
    smallest_detectable: float | None


@dataclass(frozen=True)
class Foretold:
    """The model's answers for jobs that it was not shown: of all `jobs` so many lay within their 95 % interval.

    Half of the answers were `typical` or less beside what was measured: a share of it for a ratio, else a difference.
    """

    held: int
    jobs: int
    typical: float

    @property
    def is_plausible(self) -> bool:
        """Whether intervals that are 95 % sure hold so few once in a hundred times, or more often."""
        return bool(special.bdtr(self.held, self.jobs, 1 - stats.ALPHA) >= IMPLAUSIBLE)


@dataclass(frozen=True)
class Waterfall:
    """A combo's change of one metric, shared out.

    `parts` multiply (a ratio) or add up (a delta) to `sum`, whose interval is the parts' own together; `total` is what
    was measured, by one job or several, `remainder` what of it the parts leave. `model` is what tells the parts, from
    jobs of these `commits`; `left_out` is the number of those that have other parameters, and `apart` says what these
    parameters ("kv_cache.dtype") are here.
    """

    combo: str
    metric: str
    place: Place
    total: stats.Interval
    parts: tuple[Part, ...]
    sum: stats.Interval
    interactions: tuple[Interaction, ...]
    model: "Model"
    commits: tuple[str, ...]
    left_out: int
    apart: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return stats.metric(self.metric).kind

    @cached_property
    def foretold(self) -> Foretold | None:
        """How well the model tells of each job from the others; None where every set was measured."""
        return self.model.foretold(self.kind)

    @property
    def remainder(self) -> float:
        """total / sum, or total - sum."""
        if self.kind == "ratio":
            return self.total.estimate / self.sum.estimate
        return self.total.estimate - self.sum.estimate

    @property
    def within_measured(self) -> bool:
        """Whether the parts' sum lies within the measured whole's interval."""
        return _holds(self.total, self.sum.estimate)

    @property
    def adds_up(self) -> bool:
        """Whether one of the two lies within the other's interval: the whole's has no width, or is not known, where a
        figure does not vary (memory) or a process has it only once."""
        return self.within_measured or _holds(self.sum, self.total.estimate)


def _holds(interval: stats.Interval, value: float) -> bool:
    return interval.bounds is not None and interval.bounds[0] <= value <= interval.bounds[1]


def waterfalls(runs: Sequence[Measured], metric: str, requires: Requires | None = None) -> list[Waterfall]:
    """One for each combo that the runs tell enough about: measured against the baseline, all its active members varied.

    A combo that lies within another one of the same place is left to that one's.
    """
    credited = [run for run in runs if clear(run.summary)]
    wholes = [run for run in credited if run.summary.against == BASELINE and len(run.summary.active) > 1]
    chosen: list[Measured] = []
    for whole in wholes:
        there = [other for other in wholes if place(other.summary) == place(whole.summary)]
        lies_within = any(set(whole.summary.active) < set(other.summary.active) for other in there)
        if not lies_within and not any(_same(whole, other) for other in chosen):
            chosen.append(whole)
    found = [
        share_out(whole, [run for run in credited if place(run.summary) == place(whole.summary)], metric, requires)
        for whole in chosen
    ]
    return [waterfall for waterfall in found if waterfall is not None]


def share_out(
    combo: Measured, runs: Sequence[Measured], metric: str, requires: Requires | None = None
) -> Waterfall | None:
    """The combo's waterfall from runs of its place; None where they are too few for one, or do not vary each member."""
    measure = stats.metric(metric)
    names = tuple(combo.summary.active)
    observed = [(run, job) for run in runs if (job := observe(run.summary, metric))]
    inside = [(run, job, _apart(run, combo)) for run, job in observed if job.on | job.off <= set(names)]
    apart = [differing for _, _, differing in inside if differing]
    told = [(run, job) for run, job, differing in inside if not differing]
    jobs = [job for _, job in told]
    wholes = [run.summary for run, job in told if not job.off and job.on == set(names)]
    varied = {name for job in jobs if job.off or job.on != set(names) for name in job.on ^ job.off}
    if not wholes or varied != set(names):
        return None
    needs = {name: frozenset((requires or {}).get(name, ())) & set(names) for name in names}
    sums, pairs = asked(names, needs)
    model: Model | None = exact_model(names, sums.sets, jobs)
    if model is None:
        if len(jobs) < JOBS_A_MEMBER * len(names):
            return None
        model = fitted_model(names, needs, jobs)
    answers = [_interval(*one, measure.kind, model.jobs) for one in zip(*model.tell(sums), strict=True)]
    changes, whole_way, beyond = answers[: len(names)], answers[len(names)], answers[len(names) + 1 :]
    threshold = combo.summary.thresholds[metric]
    return Waterfall(
        combo=combo.summary.combo,
        metric=metric,
        place=place(combo.summary),
        total=stats.pooled([interval(whole.comparison[metric]) for whole in wholes], measure.kind),
        parts=tuple(Part(*judged) for judged in _judged(names, changes, measure, threshold)),
        sum=whole_way,
        interactions=tuple(Interaction(*judged) for judged in _judged(pairs, beyond, measure, threshold)),
        model=model,
        commits=tuple(dict.fromkeys(run.summary.git for run, _ in told)),
        left_out=len(apart),
        apart={name: value for differing in apart for name, value in differing.items()},
    )


def observe(run: Summary, metric: str) -> Observation | None:
    """What the run says about the metric; None where it may not be judged by it, or both sides had the same on."""
    record, on, off = run.comparison.get(metric), frozenset(run.active), frozenset(reference(run))
    if record is None or record.value is None or on == off:
        return None
    change = interval(record)
    if change.bounds is not None and record.verdict == stats.NOT_MEASURED:
        return None
    if stats.metric(metric).kind == "ratio":
        change = change.map(math.log)
    error = max((change.bounds[1] - change.bounds[0]) / (2 * stats.Z), surrogate.LEAST) if change.bounds else None
    return Observation(on, off, change.estimate, error, run.run_id, _stages(run) if metric == BY_STAGE else {})


def _stages(run: Summary) -> dict[str, Change]:
    """Each stage's time on both sides, what is left of the call as REST; empty where a side does not tell them."""
    after, before = (_times(side) for side in (run.variants[run.candidate or run.against], run.reference))
    return {name: (after.get(name, 0.0), before.get(name, 0.0)) for name in after | before} if after and before else {}


def _times(side: Variant) -> dict[str, float]:
    """Seconds of each stage for each second of audio; they add up to the real-time factor."""
    if not (side.rtf and side.generation_time_s and side.stages_s):
        return {}
    rest = side.generation_time_s - sum(side.stages_s.values())
    if rest < -LEAST_STAGE * side.generation_time_s:
        return {}  # stages that overlap are no sum
    return {
        name: seconds * side.rtf / side.generation_time_s for name, seconds in (side.stages_s | {REST: rest}).items()
    }


def _same(one: Measured, other: Measured) -> bool:
    """Whether both measured the same set of optimizations, at one place and with the same parameters."""
    what = [(place(run.summary), frozenset(run.summary.active)) for run in (one, other)]
    return what[0] == what[1] and not _apart(one, other)


def _apart(run: Measured, combo: Measured) -> dict[str, Any]:
    """The combo's parameters ("kv_cache.dtype") of which the run has others, in what is on in both; empty if it is the
    same as far as both tell."""
    on = set(run.summary.active) | set(reference(run.summary))
    both = [name for name in combo.parameters if name in on and name in run.parameters]
    return {
        f"{name}.{parameter}": combo.parameters[name].get(parameter)
        for name in both
        for parameter in combo.parameters[name] | run.parameters[name]
        if combo.parameters[name].get(parameter, ...) != run.parameters[name].get(parameter, ...)
    }


def _judged(
    names: Sequence[Any], changes: Sequence[stats.Interval], measure: stats.Metric, threshold: float
) -> list[tuple[Any, stats.Interval, str, float | None]]:
    """Each with its verdict, after Holm's correction for all of them, and what would have been found if none was."""
    p_values = stats.holm([stats.p_value(change, threshold, measure) for change in changes])
    verdicts = [
        stats.verdict(change.low, change.high, threshold, measure)
        if p is not None and p <= stats.ALPHA
        else stats.NO_CHANGE
        for change, p in zip(changes, p_values, strict=True)
    ]
    missed = [
        stats.smallest_detectable(change, threshold, measure) if verdict == stats.NO_CHANGE else None
        for change, verdict in zip(changes, verdicts, strict=True)
    ]
    return list(zip(names, changes, verdicts, missed, strict=True))


# -------------------------------------------------------------------------------------------- models


class Model(Protocol):
    """What so many `jobs` say of sets of optimizations: EXACT or FITTED, `stages` one by one, 1 for the whole."""

    @property
    def method(self) -> str: ...
    @property
    def jobs(self) -> int: ...
    @property
    def stages(self) -> int: ...
    def tell(self, sums: Sums) -> tuple[np.ndarray, np.ndarray]:
        """Estimates and variances [sums], on the log scale for ratios."""

    def foretold(self, kind: str) -> Foretold | None:
        """As in Waterfall."""


@dataclass(frozen=True)
class Exact:
    """Every set but the empty one has a change of its own: their means and covariance, in the order of the sets."""

    mean: np.ndarray
    covariance: np.ndarray
    jobs: int
    method: str = EXACT
    stages: int = 1

    def tell(self, sums: Sums) -> tuple[np.ndarray, np.ndarray]:
        weights = sums.weights[:, 1:]
        return weights @ self.mean, ((weights @ self.covariance) * weights).sum(axis=1)

    def foretold(self, kind: str) -> None:
        return None


@dataclass(frozen=True)
class Fitted:
    """`changes` [jobs] are those of the whole; `fewer` the same sums over fewer sets, for what `surrogate` would take
    too long over all of them."""

    surrogate: surrogate.Surrogate
    changes: np.ndarray
    stages: int
    fewer: Sums | None
    method: str = FITTED

    @property
    def jobs(self) -> int:
        return len(self.changes)

    def tell(self, sums: Sums) -> tuple[np.ndarray, np.ndarray]:
        return self.surrogate.tell(sums, self.fewer)

    def foretold(self, kind: str) -> Foretold:
        told = np.array([self.surrogate.held_out(job) for job in range(self.jobs)])
        beside = np.abs(told[:, 0] - self.changes)
        typical = float(np.median(beside))
        held = int((beside <= stats.Z * np.sqrt(told[:, 1])).sum())
        return Foretold(held, self.jobs, math.expm1(typical) if kind == "ratio" else typical)


def exact_model(names: Names, sets: np.ndarray, jobs: Sequence[Observation]) -> Exact | None:
    """None unless the jobs connect all sets that can be to the empty one, which comes first."""
    if len(names) > orders.ENUMERATED or len(sets) - 1 > len(jobs):
        return None
    column = {frozenset(name for name, on in zip(names, row, strict=True) if on): i for i, row in enumerate(sets)}
    known = [job for job in jobs if job.error and job.on in column and job.off in column]
    if not known:
        return None
    own = np.eye(len(sets))
    design = np.stack([own[column[job.on]] - own[column[job.off]] for job in known])[:, 1:]
    errors = np.array([job.error for job in known])
    weighted = design / errors[:, None]
    if np.linalg.matrix_rank(weighted) < len(sets) - 1:
        return None
    covariance = np.linalg.inv(weighted.T @ weighted)
    changes = np.array([job.change for job in known])
    return Exact(covariance @ weighted.T @ (changes / errors), covariance, len(known))


def fitted_model(names: Names, needs: Needs, jobs: Sequence[Observation]) -> Fitted:
    """Stage by stage where every job tells them, else the whole at once."""
    worst = max((job.error for job in jobs if job.error), default=surrogate.LEAST)
    if all(job.stages for job in jobs):
        changes, base = _by_stage(jobs)
    else:
        changes, base = np.array([[job.change for job in jobs]]), np.ones(1)
    learnt = surrogate.learn(
        surrogate.Jobs(
            on=orders.rows(names, [job.on for job in jobs]),
            off=orders.rows(names, [job.off for job in jobs]),
            changes=changes,
            errors=np.array([job.error or worst for job in jobs]),
            base=base,
        )
    )
    fewer = asked(names, needs, FEWER)[0] if len(names) > orders.ENUMERATED else None
    return Fitted(learnt, np.array([job.change for job in jobs]), len(base), fewer)


def _by_stage(jobs: Sequence[Observation]) -> tuple[np.ndarray, np.ndarray]:
    """Log ratios [stages, jobs], and each stage's share [stages] of the baseline, a mean over the jobs that have it."""
    names = [name for name in jobs[0].stages if name != REST and all(name in job.stages for job in jobs)]
    times = np.array([[job.stages[name] for name in names] for job in jobs])  # [jobs, stages, sides]
    whole = np.array([np.sum(list(job.stages.values()), axis=0) for job in jobs])[:, None, :]
    counts = (times > 0).all(axis=(0, 2)) & ((times / whole).max(axis=(0, 2)) >= LEAST_STAGE)
    times = times[:, counts]
    rest = np.maximum(whole - times.sum(axis=1, keepdims=True), surrogate.LEAST * whole)
    times = np.concatenate([times, rest], axis=1)
    shares = (times / times.sum(axis=1, keepdims=True))[[not job.off for job in jobs], :, 1]
    return np.log(times[..., 0] / times[..., 1]).T, shares.mean(axis=0)


def asked(names: Names, needs: Needs, count: int = orders.SAMPLED) -> tuple[Sums, list[tuple[str, str]]]:
    """A sum for each name's part, one for all of them together and one for each of the pairs; no pairs of too many."""
    steps = orders.average_steps(names, needs, count)
    weights = [steps.weights, steps.weights.sum(axis=0, keepdims=True)]
    pairs: list[tuple[str, str]] = []
    if len(names) <= orders.ENUMERATED:
        pairs, crossed = orders.second_differences(names, steps.sets)
        weights.append(crossed)
    return Sums(steps.sets, np.concatenate(weights)), pairs


def _interval(estimate: float, variance: float, kind: str, jobs: int) -> stats.Interval:
    half_width = stats.Z * math.sqrt(variance)
    change = stats.Interval(float(estimate), float(estimate) - half_width, float(estimate) + half_width, jobs)
    return change.map(math.exp) if kind == "ratio" else change
