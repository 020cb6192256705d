"""Intervals and verdicts: what a paired experiment allows one to say, and no more.

**Pairing.** Both variants do the same work (text, voice, seed) in the same round, one right after the
other, so a slow minute of the machine slows both. Everything here resamples *pairs*; what the two share
cancels out.

**What is resampled.** With MIN_PAIRS texts or more, whole texts: repeats and seeds of one text resemble
each other, and treating them as independent would make the interval too narrow. The interval then speaks
about texts like these. With fewer texts, single pairs: the interval speaks about these texts only.

**Which interval.** The bootstrap's percentile interval, expanded for small samples (T. Hesterberg, "What
Teachers Should Know About the Bootstrap", The American Statistician 69, 2015, section 3.2): the plain one
covers only some 88 % at six pairs, because resampling knows nothing of Student's factor. The tail
probability becomes Phi(-sqrt(n / (n - 1)) * t), which gives back that factor; from fifty pairs on the
difference is gone. BCa corrects skewness instead, and its estimate of it is unusable at six pairs.

**When a change counts.** Only if the whole interval lies beyond a practical threshold: 3 % in time, 2 %
in memory, 0.02 in word error rate or similarity. Identical code against itself then alarms in 2 % of
experiments or less, from six pairs on, as long as single runs spread by no more than 10 %: a false alarm
needs both an unlucky interval and a distance that such noise seldom covers (`tests/test_stats.py`
simulates it, processes that are slower as a whole included). Noisier runs approach the interval's own
5 %, and are warned about from that same 10 % on.

Fewer than MIN_PAIRS pairs give no interval and no verdict.

**Several processes.** A process is slow or fast as a whole: where its memory lies, which kernels its library
picked. Rounds inside one process cannot see that, so pairs of processes are repeated. The two levels are
crossed: every process speaks the same texts. Resampling processes, then texts, then rounds inside each other
would count the noise of single runs once per level, and a text's own effect hardly at all, as each process
would draw texts of its own. Instead each level has its half-width, and their squares add up, less that of
process and text together, which is in both: the variance of errors clustered two ways (A. C. Cameron, J. B.
Gelbach, D. L. Miller, "Robust Inference With Multiway Clustering", Journal of Business & Economic Statistics
29, 2011). Rounds are inside a text of a process, whose distance from its neighbours already holds their
noise. Processes are few, and resampling five values cannot leave their range: their level is Student's
interval over each process's own figure.

A figure that a process has only once (loading, its first call, its memory) has that level alone, and an
interval takes MIN_PROCESSES pairs. Two to four processes get the factor of five, so that they widen the other
figures' intervals as far as they can know, and cover less than 95 % if processes differ by much.

**Drift.** Rounds inside one process are not independent either: a core gets slow for some seconds, a process finds
itself in another state, and a difference stays for several turns. What a pair has in common with the next, beyond its
text and who came first in its turn, is read off their order in time, and the interval grows as for a first-order
autoregressive series, whose mean has (1 + r) / (1 - r) times the variance of independent pairs with that correlation r
(D. W. K. Andrews, J. C. Monahan, Econometrica 60, 1992). It never shrinks, and it stays where r is within a standard
error of none. Few pairs do not tell their r: of intervals from six that correlate by 0.4, 80 % hold the truth instead
of 79, from twelve 84 instead of 78, from sixty 92 instead of 79 (`tests/test_stats.py` has the series). Several
processes need none of it: each drifts by itself, and they differ by that.

**Power.** "No detectable change" says little without the change that would have been detected:
`smallest_detectable` reads it off the interval's own width, `rounds_for` says how many rounds it would take.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

CONFIDENCE = 0.95
Z = float(special.ndtri((1 + CONFIDENCE) / 2))
"""Standard errors of a normal estimate to each side of its interval."""
ALPHA = 0.05
MIN_PAIRS = 6
MIN_PROCESSES = 5
POWER = 0.8
RESAMPLES = 9999

NO_CHANGE = "no detectable change"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Metric:
    """How two variants are compared in one figure.

    `kind`: "ratio" (neutral at 1) or "delta" (neutral at 0). `threshold`: the smallest change that counts,
    relative for a ratio. `below` and `above` are the verdicts for a change in that direction.
    """

    kind: str
    threshold: float
    below: str
    above: str

    @property
    def neutral(self) -> float:
        return 1.0 if self.kind == "ratio" else 0.0


def _time() -> Metric:
    return Metric("ratio", 0.03, below="faster", above="slower")


def _memory() -> Metric:
    return Metric("ratio", 0.02, below="less", above="more")


METRICS = {
    "rtf": _time(),
    "generation_time_s": _time(),
    "first_audio_s": _time(),
    "first_call_s": _time(),
    "load_s": _time(),
    "peak_memory_mb": _memory(),
    "model_memory_mb": _memory(),
    "energy_j_per_audio_s": Metric("ratio", 0.03, below="less", above="more"),
    "wer": Metric("delta", 0.02, below="better", above="worse"),
    "wer_timed": Metric("delta", 0.02, below="better", above="worse"),
    "watermark": Metric("delta", 0.02, below="worse", above="better"),
}
SIMILARITY = Metric("delta", 0.02, below="worse", above="better")
GOOD = ("faster", "less", "better")
BAD = ("slower", "more", "worse")


def metric(name: str) -> Metric:
    """Every name that begins with sim_ is a similarity; KeyError for an unknown name."""
    return SIMILARITY if name.startswith("sim_") else METRICS[name]


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval from n pairs; the bounds are None when n does not allow one."""

    estimate: float
    low: float | None
    high: float | None
    n: int

    @property
    def bounds(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)

    def map(self, monotone: Callable[[float], float]) -> "Interval":
        """The interval of an increasing function of the estimate."""
        low, high = self.bounds or (None, None)
        return Interval(
            monotone(self.estimate),
            None if low is None else monotone(low),
            None if high is None else monotone(high),
            self.n,
        )


def verdict(low: float | None, high: float | None, threshold: float, measure: Metric) -> str:
    """One of the metric's two words if the whole interval is beyond the threshold on that side."""
    if low is None or high is None:
        return NOT_MEASURED
    if high < measure.neutral - threshold:
        return measure.below
    if low > measure.neutral + threshold:
        return measure.above
    return NO_CHANGE


def proves_no_worse(low: float | None, high: float | None, threshold: float, measure: Metric) -> bool:
    """Whether the whole interval stays clear of a change for the worse that counts.

    More than "no detectable change", which a wide interval gets as well: that finds no loss, this rules it out.
    """
    if low is None or high is None:
        return False
    if measure.above in BAD:
        return high <= measure.neutral + threshold
    return low >= measure.neutral - threshold


# ------------------------------------------------------------------------------------- the bootstrap

Statistic = Callable[[np.ndarray], np.ndarray]
"""Maps resampled units [..., units, columns] to the statistic [...]."""


def paired_bootstrap(
    columns: np.ndarray,
    texts: Sequence[str],
    statistic: Statistic,
    combine: Callable[..., np.ndarray] = np.sum,
    resamples: int = RESAMPLES,
    seed: int = 0,
    processes: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    positive: bool = False,
) -> Interval:
    """The statistic of `columns` [pairs, figures] and its interval, by text where there are enough texts.

    `combine` (np.sum or np.max, along axis 0) turns a text's pairs into one unit; the statistic must give
    the same answer for units as for pairs, as sums and maxima do. Seeded: the same rows, the same interval.

    `processes` names the pair of processes that each pair of rows comes from; with two or more, they are
    resampled too (see above). `positions` says of pairs in the order of time who came first in each; what drifts then
    widens the interval of a single process. `positive` says that the statistic cannot be 0 or less: half-widths of
    several levels then add up on the log scale.
    """
    columns = np.asarray(columns, dtype=np.float64)
    pairs = len(columns)
    if pairs == 0:
        raise ValueError("a bootstrap needs at least one pair")
    estimate = float(statistic(columns))
    if pairs < MIN_PAIRS:
        return Interval(estimate, None, None, pairs)

    def bounds(keys: Sequence[Hashable]) -> tuple[float, float]:
        return _resample(_units(columns, keys, combine), statistic, resamples, seed)

    work: Sequence[Hashable] = texts if len(set(texts)) >= MIN_PAIRS else range(pairs)
    by_work = bounds(work)
    if processes is None or len(set(processes)) < 2:
        if positions is not None:
            drift = _drift(_shares(columns, statistic, positive), (texts, positions))
            by_work = _widened(estimate, by_work, drift, positive)
        return Interval(estimate, *by_work, pairs)
    by_both = bounds(list(zip(processes, work, strict=True)))
    own = statistic(_units(columns, processes, combine)[:, None, :])
    if positive and min(estimate, by_work[0], by_both[0], own.min()) > 0:
        logs = (math.log(estimate), np.log(own), _logs(by_work), _logs(by_both))
        low, high = map(math.exp, _clustered_two_ways(*logs))
    else:
        low, high = _clustered_two_ways(estimate, own, by_work, by_both)
    return Interval(estimate, low, high, pairs)


def _resample(units: np.ndarray, statistic: Statistic, resamples: int, seed: int) -> tuple[float, float]:
    """The bounds of the expanded percentile interval over `units` [units, figures]."""
    rng = np.random.default_rng(seed)
    draws = np.concatenate(
        [
            statistic(units[rng.integers(len(units), size=(batch, len(units)))])
            for batch in _batches(resamples, units.size)
        ]
    )
    tail = expanded_tail(len(units))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def _units(columns: np.ndarray, keys: Sequence[Hashable], combine: Callable[..., np.ndarray]) -> np.ndarray:
    """The pairs of each key as one unit, in the order of first appearance."""
    members: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)
    if len(members) == len(columns):
        return columns
    return np.stack([combine(columns[rows], axis=0) for rows in members.values()])


def _shares(columns: np.ndarray, statistic: Statistic, positive: bool) -> np.ndarray:
    """Each pair's share in the figure, in its logarithm if positive: what leaving it out changes (the jackknife)."""
    whole = columns.sum(axis=0)
    figure, without = statistic(whole[None]), statistic((whole - columns)[:, None, :])
    if positive and min(figure, without.min()) > 0:
        figure, without = np.log(figure), np.log(without)
    return np.asarray((len(columns) - 1) * (figure - without))


def _drift(shares: np.ndarray, alike: Sequence[Sequence[Hashable]]) -> float:
    """Half-width that pairs in the order of time add because neighbours resemble each other.

    What they have in common by kind, such as their text, is no drift: each of `alike` names a kind of each pair.
    """
    for kinds in alike:
        _, index = np.unique(np.array(kinds), return_inverse=True)
        shares = shares - (np.bincount(index, shares) / np.bincount(index))[index]
    # Without their mean, independent ones correlate by -1/n on average; without what alternates, by 1/n more.
    n, free = len(shares), len(shares) - sum(len(set(kinds)) - 1 for kinds in alike) - 1
    squares = float(shares @ shares)
    if free < 1 or squares == 0 or not math.isfinite(squares):
        return 0.0
    correlation = min(float(shares[1:] @ shares[:-1]) / squares, MOST_CORRELATED)
    if correlation < free**-0.5:  # as independent ones may, by one standard error
        return 0.0
    half_width = float(special.stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * math.sqrt(squares / free / n)
    return half_width * math.sqrt(2 * correlation / (1 - correlation))  # beyond what independent ones have


MOST_CORRELATED = 0.95
"""Beyond it neighbours are one and the same, and pairs too few to say how many there really are."""


def _widened(estimate: float, bounds: tuple[float, float], by: float, positive: bool) -> tuple[float, float]:
    """Bounds further away by a half-width, in squares; on the log scale if positive."""
    if positive and min(estimate, *bounds) > 0:
        low, high = _widened(math.log(estimate), _logs(bounds), by, False)
        return math.exp(low), math.exp(high)
    return estimate - math.hypot(estimate - bounds[0], by), estimate + math.hypot(bounds[1] - estimate, by)


def _clustered_two_ways(
    estimate: float,
    processes: np.ndarray,
    work: tuple[float, float],
    both: tuple[float, float],
) -> tuple[float, float]:
    """Bounds for two crossed levels, from each process's own statistic, and the bounds by work and by both at once.

    On each side the squared half-widths add up, less that of the intersection, which is in both; never narrower
    than either level alone.
    """
    one = _student(processes)

    def half_width(side: int) -> float:
        other, shared = abs(work[side] - estimate), abs(both[side] - estimate)
        return math.sqrt(max(one**2 + other**2 - shared**2, one**2, other**2))

    return estimate - half_width(0), estimate + half_width(1)


def _logs(bounds: tuple[float, float]) -> tuple[float, float]:
    return math.log(bounds[0]), math.log(bounds[1])


def _student(values: np.ndarray) -> float:
    """Half-width of Student's interval for the mean of so few values that resampling could not leave their range.

    Of fewer than MIN_PROCESSES values, with the factor for that many: two alone would take 12.7 standard errors.
    """
    n = len(values)
    factor = float(special.stdtrit(max(n, MIN_PROCESSES) - 1, (1 + CONFIDENCE) / 2))
    return factor * float(np.std(values, ddof=1)) / math.sqrt(n)


def _batches(total: int, unit_size: int, budget: int = 4_000_000) -> list[int]:
    """Sizes that add up to `total`, so that one batch of resamples stays within some 32 MB."""
    size = max(1, budget // unit_size)
    return [min(size, total - start) for start in range(0, total, size)]


def expanded_tail(n: int, confidence: float = CONFIDENCE) -> float:
    """Tail probability of the percentile interval for n resampled units (Hesterberg 2015, section 3.2)."""
    student = special.stdtrit(n - 1, (1 + confidence) / 2)
    return float(special.ndtr(-np.sqrt(n / (n - 1)) * student))


def ratio_of_sums(
    baseline: Sequence[float],
    variant: Sequence[float],
    texts: Sequence[str],
    baseline_per: Sequence[float] | None = None,
    variant_per: Sequence[float] | None = None,
    *,
    processes: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    resamples: int = RESAMPLES,
) -> Interval:
    """(sum of variant / sum of variant_per) / (sum of baseline / sum of baseline_per), paired.

    With generation times and audio seconds this is the ratio of two real-time factors; without the
    denominators it is the ratio of two mean times. All arguments have one entry per pair.
    """
    ones = np.ones(len(baseline))
    columns = np.column_stack(
        [
            baseline,
            ones if baseline_per is None else baseline_per,
            variant,
            ones if variant_per is None else variant_per,
        ]
    )

    def statistic(units: np.ndarray) -> np.ndarray:
        base, base_per, var, var_per = np.moveaxis(units.sum(axis=-2), -1, 0)
        return (var / var_per) / (base / base_per)

    return paired_bootstrap(
        columns, texts, statistic, resamples=resamples, processes=processes, positions=positions, positive=True
    )


def ratio_over_processes(baseline: Sequence[float], variant: Sequence[float]) -> Interval:
    """variant / baseline of a figure that a process has once, one entry per pair of processes: the geometric mean.

    Loading, the first call, model memory, peak resident memory; all above 0. Fewer than MIN_PROCESSES pairs give no
    interval: what one process took says nothing about the next.
    """
    ratios = np.log(np.asarray(variant, dtype=np.float64) / np.asarray(baseline, dtype=np.float64))
    mean, n = float(ratios.mean()), len(ratios)
    if n < MIN_PROCESSES:
        return Interval(math.exp(mean), None, None, n)
    half_width = _student(ratios)
    return Interval(math.exp(mean), math.exp(mean - half_width), math.exp(mean + half_width), n)


def ratio_of_peaks(
    baseline: Sequence[float],
    variant: Sequence[float],
    texts: Sequence[str],
    *,
    processes: Sequence[int] | None = None,
    resamples: int = RESAMPLES,
) -> Interval:
    """max(variant) / max(baseline), paired: the ratio of two memory peaks."""

    def statistic(units: np.ndarray) -> np.ndarray:
        base, var = np.moveaxis(units.max(axis=-2), -1, 0)
        return var / base

    return paired_bootstrap(
        np.column_stack([baseline, variant]),
        texts,
        statistic,
        combine=np.max,
        resamples=resamples,
        processes=processes,
        positive=True,
    )


def mean_delta(
    baseline: Sequence[float],
    variant: Sequence[float],
    texts: Sequence[str],
    *,
    processes: Sequence[int] | None = None,
    resamples: int = RESAMPLES,
) -> Interval:
    """mean(variant - baseline), paired: the change of a word error rate or a similarity."""
    difference = np.asarray(variant, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    return mean(difference, texts, processes=processes, resamples=resamples)


def mean(
    values: Sequence[float] | np.ndarray,
    texts: Sequence[str],
    *,
    processes: Sequence[int] | None = None,
    resamples: int = RESAMPLES,
) -> Interval:
    """The mean of one variant's own values."""
    return per_unit(values, np.ones(len(values)), texts, processes=processes, resamples=resamples)


def per_unit(
    amounts: Sequence[float] | np.ndarray,
    per: Sequence[float] | np.ndarray,
    texts: Sequence[str],
    *,
    processes: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    resamples: int = RESAMPLES,
) -> Interval:
    """sum(amounts) / sum(per) of one variant: its own real-time factor, say."""

    def statistic(units: np.ndarray) -> np.ndarray:
        total, total_per = np.moveaxis(units.sum(axis=-2), -1, 0)
        return total / total_per

    return paired_bootstrap(
        np.column_stack([amounts, per]), texts, statistic, resamples=resamples, processes=processes, positions=positions
    )


def contrast(first: Interval, second: Interval, kind: str) -> Interval:
    """How the second of two independent comparisons differs from the first: quotient or difference.

    Each was made against its own baseline, in its own job, so nothing is left to pair. Their half-widths add
    in quadrature, for ratios on the log scale, as for independent errors.
    """
    if kind == "ratio":
        return contrast(first.map(math.log), second.map(math.log), "delta").map(math.exp)
    estimate, n = second.estimate - first.estimate, min(first.n, second.n)
    if first.bounds is None or second.bounds is None:
        return Interval(estimate, None, None, n)
    (first_low, first_high), (second_low, second_high) = first.bounds, second.bounds
    below = math.hypot(second.estimate - second_low, first_high - first.estimate)
    above = math.hypot(second_high - second.estimate, first.estimate - first_low)
    return Interval(estimate, estimate - below, estimate + above, n)


def pooled(changes: Sequence[Interval], kind: str) -> Interval:
    """One change out of several jobs that measured the same.

    A weighted mean, for ratios on the log scale, with a random effect: what the jobs differ by beyond their own errors
    counts as what yet another job would differ by (R. DerSimonian, N. Laird, Controlled Clinical Trials 7, 1986). Jobs
    without bounds count only where no other does.
    """
    if kind == "ratio":
        return pooled([change.map(math.log) for change in changes], "delta").map(math.exp)
    known = [change for change in changes if change.bounds is not None]
    if len(known) < 2:
        return (known or list(changes))[0]
    means = np.array([change.estimate for change in known])
    bounds = np.array([change.bounds for change in known])
    variances = np.maximum((bounds[:, 1] - bounds[:, 0]) / (2 * Z), LEAST_ERROR) ** 2
    weights = 1 / variances
    excess = weights @ (means - weights @ means / weights.sum()) ** 2 - (len(known) - 1)
    between = max(0.0, excess / (weights.sum() - (weights**2).sum() / weights.sum()))
    weights = 1 / (variances + between)
    estimate, half_width = float(weights @ means / weights.sum()), Z * float(weights.sum()) ** -0.5
    return Interval(estimate, estimate - half_width, estimate + half_width, sum(change.n for change in known))


LEAST_ERROR = 1e-6
"""What never varied within a job, as memory may not, is known this well, so that jobs can still be weighed."""


def inverse(change: Interval, kind: str) -> Interval:
    """The same change seen from the other side: 1 / ratio, or -delta."""
    low, high = change.bounds or (None, None)
    if kind == "ratio":
        low, high = (None if high is None else 1 / high), (None if low is None else 1 / low)
        return Interval(1 / change.estimate, low, high, change.n)
    return Interval(-change.estimate, None if high is None else -high, None if low is None else -low, change.n)


# ------------------------------------------------------------------------------------ many at a time


def p_value(change: Interval, threshold: float, measure: Metric) -> float | None:
    """How probable a change as large as this one is where the true one is no larger than the threshold.

    Read off the interval, so that it is 5 % or less exactly where `verdict` names a change. None without bounds.
    """
    if change.bounds is None:
        return None
    scale: Callable[[float], float] = math.log if measure.kind == "ratio" else float
    above = change.estimate > measure.neutral
    edge = scale(measure.neutral + (threshold if above else -threshold))
    estimate, towards = scale(change.estimate), scale(change.bounds[0 if above else 1])
    distance, half_width = abs(estimate - edge), abs(estimate - towards)
    if (estimate > edge) != above or distance == 0:
        return 1.0
    return 0.0 if half_width == 0 else float(2 * special.ndtr(distance / half_width * special.ndtri(ALPHA / 2)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """The p values of a family, corrected for its size (S. Holm, Scandinavian Journal of Statistics 6, 1979).

    The chance that any change of the family is named wrongly stays below 5 %. None stays None and does not count.
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[index] = largest
    return corrected


# --------------------------------------------------------------------------------------------- power


def resolution(interval: Interval, kind: str, power: float = POWER) -> float | None:
    """How large a true change has to be for an interval of this width to leave out "none", with that power.

    The interval is some 1.96 standard errors to each side, so

        resolution = (1 + z(power) / 1.96) * half-width,    1.43 half-widths for a power of 80 %

    on the log scale for a ratio, where it is given as a rate (0.04 is 4 %). Small samples widen the interval by
    more than their standard error, so the power is rather higher. None for an interval without bounds.
    """
    if interval.bounds is None:
        return None
    low, high = interval.bounds
    half_width = (math.log(high / low) if kind == "ratio" else high - low) / 2
    reach = (1 + float(special.ndtri(power) / Z)) * half_width
    return math.expm1(reach) if kind == "ratio" else reach


def smallest_detectable(interval: Interval, threshold: float, measure: Metric, power: float = POWER) -> float | None:
    """The smallest true change for the worse that such a run gives its verdict, with that power.

    A verdict needs the whole interval beyond the threshold, so the change is the threshold and, on top of it, the
    interval's `resolution`; for a ratio they multiply: (1 + threshold) (1 + resolution) - 1. Relative for a ratio
    (0.052: 5.2 % slower), absolute for a delta. None for an interval without bounds.
    """
    beyond = resolution(interval, measure.kind, power)
    if beyond is None:
        return None
    return (1 + threshold) * (1 + beyond) - 1 if measure.kind == "ratio" else threshold + beyond


def rounds_for(change: float, interval: Interval, rounds: int, kind: str, power: float = POWER) -> int | None:
    """How many rounds of the same kind would tell a true change of that size from none, with that power.

    Standard errors shrink with the root of the rounds: rounds * (resolution / change)^2, on the log scale for a
    ratio. That holds for the noise of single runs; where texts or processes differ in effect, it takes more of those.
    None for an interval without bounds, and for a change of nothing, which no number of rounds finds.
    """
    reach = resolution(interval, kind, power)
    if reach is None or change <= 0:
        return None
    share = math.log1p(reach) / math.log1p(change) if kind == "ratio" else reach / change
    return max(1, math.ceil(rounds * share**2))


# ------------------------------------------------------------------------------- spread and outliers


SPREAD = 0.10  # standard deviation of repeated runs of the same work, above which a warning is due
MILD, SEVERE = 1.5, 3.0  # Tukey's fences, in interquartile ranges beyond the quartiles


@dataclass(frozen=True)
class Noise:
    """How far repeated runs of the same work lie apart, relative to their median; None if none repeat."""

    spread: float | None
    mild: int
    severe: int
    n: int


def noise(values: Sequence[float], work: Sequence[object]) -> Noise:
    """Spread and outliers of `values` after dividing each by the median of its group in `work`.

    Tukey's fences classify (criterion's reading of them: mild beyond 1.5, severe beyond 3 interquartile
    ranges); nothing is removed. Groups of one value say nothing about spread and are left out of it.
    """
    groups: dict[object, list[float]] = {}
    for value, key in zip(values, work, strict=True):
        groups.setdefault(key, []).append(value)
    repeated = [np.asarray(group) / np.median(group) for group in groups.values() if len(group) > 1]
    if not repeated:
        return Noise(None, 0, 0, len(values))
    squares = sum(float(np.sum((group - group.mean()) ** 2)) for group in repeated)
    freedom = sum(len(group) - 1 for group in repeated)
    relative = np.concatenate(repeated)
    lower, upper = np.quantile(relative, [0.25, 0.75])
    beyond = np.maximum(lower - relative, relative - upper)
    severe = int(np.sum(beyond > SEVERE * (upper - lower)))
    mild = int(np.sum(beyond > MILD * (upper - lower))) - severe
    return Noise(float(np.sqrt(squares / freedom)), mild, severe, len(values))


def noise_warnings(name: str, found: Noise) -> list[str]:
    """What a person should know about it, in plain language."""
    messages = []
    if found.spread is not None and found.spread > SPREAD:
        messages.append(
            f"{name}: repeated runs of the same text spread by {found.spread:.0%} (standard deviation); "
            "close other programs and measure again, or take more rounds."
        )
    if found.severe:
        messages.append(
            f"{name}: {found.severe} of {found.n} runs lie far out (more than {SEVERE:g} interquartile "
            f"ranges), {found.mild} more beyond {MILD:g}; they are kept in every figure."
        )
    return messages
