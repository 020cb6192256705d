"""The combo against its reference: pairs of rows that did the same work in the same round."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from harness import stats
from harness.figures import judged, similarities, timed
from harness.results import Comparison, Measurement, Score, Variant
from harness.scenarios.base import Figure

DURATION_TOLERANCE = 0.01  # relative; the same speech tokens must give the same length of audio ...
TOKEN_S = 0.04  # ... up to one speech token, which is what joining segments may cost a short clip
Pair = tuple[Measurement, Measurement]
"""What the two variants made of the same work, the reference's first."""
SINGLE = ("first_call_s", "model_memory_mb")
"""Figures that each process has once: their ratio has no interval, and therefore no verdict."""


def compare(
    rows: Sequence[Measurement],
    scores: Sequence[Score],
    variants: dict[str, Variant],
    names: tuple[str, str | None],
    thresholds: dict[str, float],
    compared: Sequence[Figure],
) -> dict[str, Comparison]:
    """Every metric in `thresholds`; what cannot be compared is there as "not measured".

    `names` holds the reference's and the candidate's, `compared` the scenario's figures of the steady state.
    """
    found = {name: not_measured(name) for name in thresholds}
    reference, candidate = names
    if candidate is None:
        return found
    base, other = variants[reference], variants[candidate]
    if base.status == other.status == "ok":
        paired = pairs(rows, reference, candidate)
        found |= _compare_speed(paired, compared, thresholds)
        if base.memory_kind == other.memory_kind:
            found |= _compare_peaks(paired, thresholds)
        for name in SINGLE:
            found[name] = _compare_single(name, base, other, thresholds[name])
    if base.n_scored and other.n_scored:
        found |= _compare_quality(rows, scores, (reference, candidate), thresholds)
    return found


def not_measured(name: str) -> Comparison:
    """The entry of a metric that has no figures."""
    kind = stats.metric(name).kind
    return Comparison(kind=kind, value=None, low=None, high=None, verdict=stats.NOT_MEASURED, n=0)


def pairs(rows: Iterable[Measurement], reference: str, candidate: str) -> list[Pair]:
    """Rows of the speed pass that both variants have, the reference's first."""
    speed = timed(rows)
    known = {row.pair: row for row in speed if row.variant == reference}
    return [(known[row.pair], row) for row in speed if row.variant == candidate and row.pair in known]


def _calls(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Pairs by the calls that spoke them: what shares a measurement is one pair of figures, not many."""
    found: dict[tuple[Any, ...], list[Pair]] = {}
    for base, row in pairs:
        found.setdefault((base.call, row.call), []).append((base, row))
    return list(found.values())


def duration_problem(rows: Iterable[Measurement], reference: str, candidate: str) -> str | None:
    """How the candidate's audio differs in length although both spoke the same number of speech tokens."""

    def off(pair: Pair) -> float:
        base, row = pair
        return abs((row.audio_s or 0.0) - (base.audio_s or 0.0))

    same_work = [
        (base, row)
        for base, row in pairs(rows, reference, candidate)
        if base.pinned_tokens is not None and base.pinned_tokens == row.pinned_tokens
    ]
    wrong = [p for p in same_work if off(p) > max(DURATION_TOLERANCE * (p[0].audio_s or 0.0), TOKEN_S)]
    if not wrong:
        return None
    base, row = max(wrong, key=off)
    return (
        f"for the same {row.pinned_tokens} speech tokens of text {row.text_id} it returned "
        f"{row.audio_s:.2f} s of audio and {reference} {base.audio_s:.2f} s "
        f"({len(wrong)} of {len(same_work)} pairs differ): an error, not a speed-up."
    )


def _compare_speed(
    pairs: Sequence[Pair], compared: Sequence[Figure], thresholds: dict[str, float]
) -> dict[str, Comparison]:
    """The scenario's figures, call by call."""
    if not pairs:
        return {}
    spoken = _calls(pairs)
    texts = [call[0][0].text_id for call in spoken]
    base, other = ([[pair[side] for pair in call] for call in spoken] for side in (0, 1))
    rounds = len({call[0][0].round for call in spoken})
    found = {}
    for figure in compared:
        amount, amount_after = ([figure.amount(rows) for rows in side] for side in (base, other))
        per, per_after = ([figure.per(rows) for rows in side] if figure.per else None for side in (base, other))
        interval = stats.ratio_of_sums(amount, amount_after, texts, per, per_after)
        found[figure.name] = _judge(figure.name, interval, thresholds[figure.name], rounds)
    return found


def _compare_peaks(pairs: Sequence[Pair], thresholds: dict[str, float]) -> dict[str, Comparison]:
    peaks = [(base.peak_memory_mb, row.peak_memory_mb, row.text_id) for (base, row), *_ in _calls(pairs)]
    known = [peak for peak in peaks if peak[0] and peak[1]]
    if not known:
        return {}
    interval, rounds = stats.ratio_of_peaks(*_columns(known)), len({base.round for base, _ in pairs})
    return {"peak_memory_mb": _judge("peak_memory_mb", interval, thresholds["peak_memory_mb"], rounds)}


def _compare_single(name: str, base: Variant, other: Variant, threshold: float) -> Comparison:
    """A ratio of two single figures.

    Bytes that PyTorch has allocated for the model are counted, not sampled: their ratio is its own interval.
    """
    before, after = base.figure(name), other.figure(name)
    if not before or after is None or (name == "model_memory_mb" and base.memory_kind != other.memory_kind):
        return not_measured(name)
    ratio = after / before
    bound = ratio if name == "model_memory_mb" and base.memory_kind == "vram" else None
    return _judge(name, stats.Interval(ratio, bound, bound, 1), threshold)


def _compare_quality(
    rows: Sequence[Measurement], scores: Sequence[Score], names: tuple[str, str], thresholds: dict[str, float]
) -> dict[str, Comparison]:
    """Paired by text, voice and seed."""
    before, after = (
        judged(
            [row for row in rows if row.variant == name and row.pass_name == "quality"],
            [score for score in scores if score.variant == name],
        )
        for name in names
    )
    found = {}
    for name in ("wer", *similarities(scores)):
        values = [(before[w].figure(name), after[w].figure(name), w[0]) for w in before if w in after]
        known = [value for value in values if value[0] is not None and value[1] is not None]
        if known:
            seeds = len({work[2] for work in before if work in after})
            found[name] = _judge(name, stats.mean_delta(*_columns(known)), thresholds[name], seeds)
    return found


def _judge(name: str, interval: stats.Interval, threshold: float, rounds: int = 1) -> Comparison:
    """The metric's verdict, and what the run could have found; `rounds` says how often each work was repeated."""
    if not math.isfinite(interval.estimate):  # of figures so far apart that their quotient is none
        return not_measured(name)
    metric = stats.metric(name)
    return Comparison(
        kind=metric.kind,
        value=interval.estimate,
        low=interval.low,
        high=interval.high,
        verdict=stats.verdict(interval.low, interval.high, threshold, metric),
        n=interval.n,
        smallest_detectable=stats.smallest_detectable(interval, threshold, metric),
        rounds_for_threshold=stats.rounds_for(threshold, interval, rounds, metric.kind),
    )


def _columns(rows: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]
