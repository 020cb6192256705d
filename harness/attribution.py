"""From the baseline to a combo, step by step: how much of the way is each optimization's.

Percentages of single optimizations must not be added up: they multiply, they overlap, and some do nothing without
another. Shapley's value shares a combo's whole change out: an optimization's part is what it changes when it is
switched on, averaged over the orders in which all of them can be switched on, and the parts add up to the whole (for
ratios: multiply; everything here is on the log scale for them). In an order, each next optimization is picked by chance
among those whose prerequisites are there already, so that no order asks for what no pipeline can be.

**From which runs.** Every job compares two sets of optimizations, whatever its sweep was. Where the jobs connect all
sets that can be, the parts follow from the measured changes alone: "exact". A combo of twelve has 4096 sets, so mostly
a model stands in for those that were not measured: each optimization has an effect, and each two of them an
interaction,

    log time(S) - log time(R)  =  sum of b_i (z_i(S) - z_i(R))  +  sum of w_ij (z_i z_j (S) - z_i z_j (R))  +  error

with z = +1/2 where an optimization is on and -1/2 where it is off. The jobs are far fewer than the interactions, so
these are random effects, w ~ N(0, tau^2): few are large, and what nothing speaks for stays near 0. What does much by
itself is expected to interact more, as is usual ("heredity"): tau is larger for it, up to several times. The error has
each job's own variance and, for what interactions of three and more do, sigma^2. A job of too few pairs for an interval
counts too: it is known as badly as the worst of the others, and where none has an interval, sigma is all that there is.
Both variances are estimated by restricted maximum likelihood (H. D. Patterson, R. Thompson, Biometrika 58, 1971), with
a wide prior where there are too few jobs to tell. Intervals follow from the model's covariance, so they widen where the
jobs say little. Without prerequisites, an optimization's part is its main effect b_i, averaged over all sets of the
others.

The model takes jobs from both ends, near the baseline and near the combo: `one_at_a_time` and `leave_one_out` together,
or a `screening`. Leaving one out of the combo says nothing about the first steps, so by itself it makes no waterfall.

What the parts leave of the measured whole is shown as the remainder.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from scipy import optimize, special

from harness import stats
from harness.ablation import Place, clear, interval, place, reference
from harness.results import BASELINE, Summary

Names = tuple[str, ...]
Requires = Mapping[str, Collection[str]]

EXACT = "exact"
FITTED = "fitted"
ENUMERATED = 12
"""Up to so many optimizations all sets that can be are gone through; for more, SAMPLED orders are drawn."""
SAMPLED = 2000
LEAST_ERROR = 1e-4
"""No job is known better than this: 0.01 per cent of a time, 0.0001 of a word error rate."""
Z = float(special.ndtri((1 + stats.CONFIDENCE) / 2))


@dataclass(frozen=True)
class Measured:
    """A run's summary and the parameters of its optimizations, as job.yaml has them (empty where it was not kept)."""

    summary: Summary
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Observation:
    """One job's change of one metric between two sets of optimizations: log ratio or delta, with standard error.

    The error is None where the job had too few pairs to tell.
    """

    on: frozenset[str]
    off: frozenset[str]
    change: float
    error: float | None
    run_id: str


@dataclass(frozen=True)
class Part:
    """A step of the waterfall: ratio or delta with its interval; the verdict is Holm's within the waterfall."""

    optimization: str
    interval: stats.Interval
    verdict: str


@dataclass(frozen=True)
class Interaction:
    """How the effect of one optimization changes where the other is on: a ratio below 1 means that together they
    save more than their ratios multiplied; the verdict is Holm's among all interactions."""

    pair: tuple[str, str]
    interval: stats.Interval
    verdict: str


@dataclass(frozen=True)
class Waterfall:
    """A combo's change of one metric, shared out.

    `parts` multiply (a ratio) or add up (a delta) to `sum`, whose interval is the parts' own together; `total` is what
    was measured, `remainder` what of it the parts leave. `method` is EXACT or FITTED, `jobs` the number of jobs that
    went in.
    """

    combo: str
    metric: str
    place: Place
    total: stats.Interval
    parts: tuple[Part, ...]
    sum: stats.Interval
    interactions: tuple[Interaction, ...]
    method: str
    jobs: int

    @property
    def kind(self) -> str:
        return stats.metric(self.metric).kind

    @property
    def remainder(self) -> float:
        """total / sum, or total - sum."""
        if self.kind == "ratio":
            return self.total.estimate / self.sum.estimate
        return self.total.estimate - self.sum.estimate

    @property
    def adds_up(self) -> bool:
        """Whether the parts' sum lies within the measured whole's interval; if it has none, the whole in the sum's."""
        if self.total.bounds is None:
            return self.sum.bounds is not None and self.sum.bounds[0] <= self.total.estimate <= self.sum.bounds[1]
        return self.total.bounds[0] <= self.sum.estimate <= self.total.bounds[1]


def waterfalls(runs: Sequence[Measured], metric: str, requires: Requires | None = None) -> list[Waterfall]:
    """One for each combo that the runs tell enough about: measured against the baseline, all its active members varied.

    A combo that lies within another one of the same place is left to that one's.
    """
    credited = [run for run in runs if clear(run.summary)]
    wholes = {
        (place(run.summary), frozenset(run.summary.active)): run
        for run in credited
        if run.summary.against == BASELINE and len(run.summary.active) > 1
    }
    found = []
    for (where, members), run in wholes.items():
        here = [other for other in credited if place(other.summary) == where]
        if not any(where == other and members < larger for other, larger in wholes):
            found.append(share_out(run, here, metric, requires))
    return [waterfall for waterfall in found if waterfall is not None]


def share_out(
    combo: Measured, runs: Sequence[Measured], metric: str, requires: Requires | None = None
) -> Waterfall | None:
    """The combo's waterfall from runs of its place; None where they are too few for one, or do not vary each member."""
    measure = stats.metric(metric)
    names = tuple(combo.summary.active)
    jobs = [job for run in runs if _same_parameters(run, combo) and (job := observe(run.summary, metric))]
    jobs = [job for job in jobs if job.on | job.off <= set(names)]
    whole = next((job for job in jobs if not job.off and job.on == set(names)), None)
    varied = {name for job in jobs if job is not whole for name in job.on ^ job.off}
    if whole is None or varied != set(names):
        return None
    needs = {name: frozenset((requires or {}).get(name, ())) & set(names) for name in names}
    model = exact_model(names, needs, jobs)
    if model is None:
        if len(jobs) < 2 * len(names):
            return None
        model = two_way_model(names, jobs)
    shares, threshold = order_average(names, needs, model.features), combo.summary.thresholds[metric]
    parts = _judged(names, [model.tell(row, measure.kind) for row in shares], measure, threshold)
    return Waterfall(
        combo=combo.summary.combo,
        metric=metric,
        place=place(combo.summary),
        total=interval(combo.summary.comparison[metric]),
        parts=tuple(Part(*part) for part in parts),
        sum=model.tell(shares.sum(axis=0), measure.kind),
        interactions=tuple(Interaction(*pair) for pair in _judged(*_pairs(model, measure.kind), measure, threshold)),
        method=model.method,
        jobs=model.jobs,
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
    error = max((change.bounds[1] - change.bounds[0]) / (2 * Z), LEAST_ERROR) if change.bounds else None
    return Observation(on, off, change.estimate, error, run.run_id)


def _same_parameters(run: Measured, combo: Measured) -> bool:
    """Whether what both have on is the same: an optimization with other parameters is another one."""
    on = set(run.summary.active) | set(reference(run.summary))
    return all(
        run.parameters[name] == combo.parameters[name]
        for name in on
        if name in run.parameters and name in combo.parameters
    )


def _judged(
    names: Sequence[Any], changes: Sequence[stats.Interval], measure: stats.Metric, threshold: float
) -> list[tuple[Any, stats.Interval, str]]:
    """Each with its verdict, after Holm's correction for all of them."""
    p_values = stats.holm([stats.p_value(change, threshold, measure) for change in changes])
    verdicts = [
        stats.verdict(change.low, change.high, threshold, measure)
        if p is not None and p <= stats.ALPHA
        else stats.NO_CHANGE
        for change, p in zip(changes, p_values, strict=True)
    ]
    return list(zip(names, changes, verdicts, strict=True))


# -------------------------------------------------------------------------------------------- orders

Features = Callable[[frozenset[str]], np.ndarray]
"""What stands for a set of optimizations in a model: its log time is the product with the model's coefficients."""


def order_average(names: Names, needs: Mapping[str, frozenset[str]], features: Features) -> np.ndarray:
    """Each name's average step, [names, features]: what it changes in the features, over all orders that can be."""
    weights: dict[frozenset[str], np.ndarray] = {}
    index = {name: i for i, name in enumerate(names)}
    for before, name, weight in _steps(names, needs):
        for on, sign in ((before, -1), (before | {name}, 1)):
            weights.setdefault(on, np.zeros(len(names)))[index[name]] += sign * weight
    return np.stack(list(weights.values()), axis=1) @ np.stack([features(on) for on in weights])


def _steps(names: Names, needs: Mapping[str, frozenset[str]]) -> Iterator[tuple[frozenset[str], str, float]]:
    """What is on, what is switched on next, and how often an order has that step."""
    if len(names) > ENUMERATED:
        yield from _sampled_steps(names, needs)
        return
    level: dict[frozenset[str], float] = {frozenset(): 1.0}
    for _ in names:
        following: dict[frozenset[str], float] = {}
        for before, weight in level.items():
            ready = _ready(names, needs, before)
            for name in ready:
                yield before, name, weight / len(ready)
                after = before | {name}
                following[after] = following.get(after, 0.0) + weight / len(ready)
        level = following


def _sampled_steps(names: Names, needs: Mapping[str, frozenset[str]]) -> Iterator[tuple[frozenset[str], str, float]]:
    rng = np.random.default_rng(0)
    for _ in range(SAMPLED):
        before: frozenset[str] = frozenset()
        while ready := _ready(names, needs, before):
            name = ready[rng.integers(len(ready))]
            yield before, name, 1 / SAMPLED
            before |= {name}


def _ready(names: Names, needs: Mapping[str, frozenset[str]], on: frozenset[str]) -> list[str]:
    return [name for name in names if name not in on and needs[name] <= on]


# -------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Model:
    """Coefficients of the features with their covariance; `pairs` are the interactions, which come last of them."""

    features: Features
    mean: np.ndarray
    covariance: np.ndarray
    method: str
    jobs: int
    pairs: tuple[tuple[str, str], ...] = ()

    def tell(self, weights: np.ndarray, kind: str) -> stats.Interval:
        """A weighted sum of the coefficients, as a ratio or a delta with its interval."""
        estimate, half_width = float(weights @ self.mean), Z * float(weights @ self.covariance @ weights) ** 0.5
        change = stats.Interval(estimate, estimate - half_width, estimate + half_width, self.jobs)
        return change.map(math.exp) if kind == "ratio" else change


def exact_model(names: Names, needs: Mapping[str, frozenset[str]], jobs: Sequence[Observation]) -> Model | None:
    """Every set that can be has a coefficient of its own; None unless the jobs connect them all to the baseline."""
    if len(names) > ENUMERATED:
        return None
    sets = list(dict.fromkeys(before | {name} for before, name, _ in _steps(names, needs)))
    if len(sets) > len(jobs):
        return None
    column = {on: i for i, on in enumerate(sets)}

    def features(on: frozenset[str]) -> np.ndarray:
        return np.eye(1, len(sets), column[on])[0] if on else np.zeros(len(sets))

    known = [job for job in jobs if job.error and all(not on or on in column for on in (job.on, job.off))]
    if not known:
        return None
    design, changes, errors = _rows(known, features)
    weighted = design / errors[:, None]
    if np.linalg.matrix_rank(weighted) < len(sets):
        return None
    covariance = np.linalg.inv(weighted.T @ weighted)
    return Model(features, covariance @ weighted.T @ (changes / errors), covariance, EXACT, len(known))


def two_way_model(names: Names, jobs: Sequence[Observation]) -> Model:
    """An effect of each optimization and a random interaction of each two: see the top of this file."""
    n, crossed = len(names), list(combinations(range(len(names)), 2))
    first, second = (np.array(side) for side in zip(*crossed, strict=True))

    def features(on: frozenset[str]) -> np.ndarray:
        z = np.array([0.5 if name in on else -0.5 for name in names])
        return np.concatenate([z, z[first] * z[second]])

    rows = _rows(jobs, features)
    mean, _ = _fit(*rows, np.ones(len(crossed)))
    size = np.abs(mean[:n]) + max(float(np.abs(mean[:n]).mean()), LEAST_ERROR)
    scales = np.sqrt(size[first] * size[second])
    mean, covariance = _fit(*rows, scales / scales.max())
    return Model(features, mean, covariance, FITTED, len(jobs), tuple(combinations(names, 2)))


def _fit(
    design: np.ndarray, changes: np.ndarray, errors: np.ndarray, scales: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the coefficients; the interactions, the last ones, vary by tau times their `scales`."""
    wide = max(float(np.abs(changes).max()), LEAST_ERROR)
    n = design.shape[1] - len(scales)
    main, crossed = (part @ part.T for part in (design[:, :n], design[:, n:] * scales))

    def misfit(logs: np.ndarray) -> float:
        """-2 log of the likelihood of tau and sigma, main effects integrated out."""
        tau, sigma = np.exp(logs)
        spread = (FLAT * wide) ** 2 * main + tau**2 * crossed + np.diag(errors**2 + sigma**2)
        factor = np.linalg.cholesky(spread)
        rest = np.linalg.solve(factor, changes)
        return float(2 * np.log(np.diag(factor)).sum() + rest @ rest + (tau / wide) ** 2 + (sigma / wide) ** 2)

    found = optimize.minimize(misfit, np.log([wide / 4, max(np.median(errors), wide / 100)]), method="Nelder-Mead")
    tau, sigma = np.exp(found.x)
    scaled = design / np.sqrt(errors**2 + sigma**2)[:, None]
    prior = np.concatenate([np.full(n, FLAT * wide), np.maximum(tau * scales, LEAST_ERROR)])
    covariance = np.linalg.inv(scaled.T @ scaled + np.diag(prior**-2))
    return covariance @ scaled.T @ (changes / np.sqrt(errors**2 + sigma**2)), covariance


FLAT = 10.0
"""How wide the prior of a main effect is, in the largest changes that were measured: wide enough to say nothing."""


def _rows(jobs: Sequence[Observation], features: Features) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Design [jobs, features], changes and standard errors [jobs]."""
    design = np.stack([features(job.on) - features(job.off) for job in jobs])
    worst = max((job.error for job in jobs if job.error), default=LEAST_ERROR)
    return design, np.array([job.change for job in jobs]), np.array([job.error or worst for job in jobs])


def _pairs(model: Model, kind: str) -> tuple[tuple[tuple[str, str], ...], list[stats.Interval]]:
    """The model's interactions with their intervals."""
    own = np.eye(len(model.mean))[len(model.mean) - len(model.pairs) :]
    return model.pairs, [model.tell(row, kind) for row in own]
