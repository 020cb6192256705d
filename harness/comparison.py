"""The combo against its reference: pairs of rows that did the same work in the same round."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from harness import stats
from harness.checks import Pair
from harness.figures import TIMED, is_marked, judged, timed
from harness.records import Child
from harness.results import Comparison, Measurement, Score, Variant
from harness.scenarios.base import Figure

LOST_SHARE, LOST_CLIPS = 0.05, 1.5
"""The watermark is lost where it is found in a share of clips that is smaller by so much, and more than a clip."""


def compare(
    rows: Sequence[Measurement],
    scores: Sequence[Score],
    variants: dict[str, Variant],
    children: Mapping[str, Sequence[Child]],
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
    both = (reference, candidate)
    intervals: dict[str, tuple[stats.Interval, int]] = {}
    base, other = variants[reference], variants[candidate]
    if base.status == other.status == "ok":
        paired = pairs(rows, reference, candidate)
        intervals |= speed(paired, compared)
        intervals |= _once(rows, children, both)
        if base.memory_kind == other.memory_kind:
            intervals |= _peaks(paired, base.memory_kind)
            intervals |= _model_memory(children, both, base.memory_kind)
    intervals |= _quality(rows, scores, both)
    return found | {
        name: _judge(name, interval, thresholds[name], rounds)
        for name, (interval, rounds) in intervals.items()
        if name in thresholds
    }


def not_measured(name: str) -> Comparison:
    """The entry of a metric that has no figures."""
    kind = stats.metric(name).kind
    return Comparison(kind=kind, value=None, low=None, high=None, verdict=stats.NOT_MEASURED, n=0)


def free_pairs(rows: Iterable[Measurement], reference: str, candidate: str) -> list[Pair]:
    """Rows of the quality pass that both variants have, the reference's first."""
    free = [row for row in rows if row.pass_name == "quality" and row.ok]
    known = {row.work: row for row in free if row.variant == reference}
    return [(known[row.work], row) for row in free if row.variant == candidate and row.work in known]


def pairs(rows: Iterable[Measurement], reference: str, candidate: str) -> list[Pair]:
    """Rows of the speed pass that both variants have, the reference's first."""
    speed = timed(rows)
    known = {row.pair: row for row in speed if row.variant == reference}
    return [(known[row.pair], row) for row in speed if row.variant == candidate and row.pair in known]


def speed(
    pairs: Sequence[Pair], compared: Sequence[Figure], resamples: int = stats.RESAMPLES
) -> dict[str, tuple[stats.Interval, int]]:
    """The scenario's figures, call by call, each with its interval and the rounds behind it."""
    if not pairs:
        return {}
    spoken = _calls(pairs)
    texts = [call[0][0].text_id for call in spoken]
    processes, positions = ([getattr(call[0][0], name) for call in spoken] for name in ("process", "position"))
    base, other = ([[pair[side] for pair in call] for call in spoken] for side in (0, 1))
    found = {}
    for figure in compared:
        amount, amount_after = ([a for rows in side if (a := figure.amount(rows))] for side in (base, other))
        if len(amount) != len(base) or len(amount_after) != len(other):
            continue
        per, per_after = ([figure.per(rows) for rows in side] if figure.per else None for side in (base, other))
        interval = stats.ratio_of_sums(
            amount, amount_after, texts, per, per_after, processes=processes, positions=positions, resamples=resamples
        )
        found[figure.name] = interval, _rounds(pairs)
    return found


def withdrawn(record: Comparison, reason: str | None) -> Comparison:
    """A gain in time that was got by something which nobody asked for; any other verdict stands."""
    if reason is None or record.verdict not in stats.GOOD:
        return record
    return replace(record, verdict=f"withdrawn: {reason}")


def objection(comparison: dict[str, Comparison]) -> str | None:
    """Why what was timed does not count as the work that was asked for, in a few words; None if it does."""
    reasons = []
    for name, record in comparison.items():
        if name.endswith(TIMED) and record.verdict == "worse":
            what = "their similarity" if name.startswith("sim_") else "their word error rate"
            reasons.append(f"the timed clips are worse than the reference's: {what} by {record.value:+.3f}")
    return "; ".join(reasons) or None


def watermark_loss(scores: Sequence[Score], reference: str, candidate: str) -> str | None:
    """Whether the candidate's clips bear the watermark less often than the reference's."""
    before, after = (
        [is_marked(score) for score in scores if score.variant == name and score.watermark is not None]
        for name in (reference, candidate)
    )
    if not before or not after:
        return None
    was, now = sum(before) / len(before), sum(after) / len(after)
    if was - now <= max(LOST_SHARE, LOST_CLIPS / len(after)):
        return None
    return (
        f"the watermark is lost: it was found in {sum(after)} of {len(after)} judged clips, and in {sum(before)} of "
        f"{len(before)} of {reference}'s."
    )


# -- figures, each with its interval and the rounds behind it ------------------------------------------------------


def _peaks(pairs: Sequence[Pair], kind: str) -> dict[str, tuple[stats.Interval, int]]:
    """Peak memory: what an allocator counts is compared call by call, a resident set process by process."""
    peaks = [(base.peak_memory_mb, row.peak_memory_mb, row) for (base, row), *_ in _calls(pairs)]
    known = [(before, after, row) for before, after, row in peaks if before and after]
    if not known:
        return {}
    if kind == "vram":
        columns = _columns([(before, after, row.text_id) for before, after, row in known])
        interval = stats.ratio_of_peaks(*columns, processes=[row.process for _, _, row in known])
        return {"peak_memory_mb": (interval, _rounds(pairs))}
    highest: dict[int, tuple[float, float]] = {}
    for before, after, row in known:
        most = highest.get(row.process, (0.0, 0.0))
        highest[row.process] = max(most[0], before), max(most[1], after)
    return {"peak_memory_mb": (stats.ratio_over_processes(*_columns(list(highest.values()))), 1)}


def _once(
    rows: Sequence[Measurement], children: Mapping[str, Sequence[Child]], names: tuple[str, str]
) -> dict[str, tuple[stats.Interval, int]]:
    """What a process has once: loading and its first call."""
    found = {}
    loads = [[child.load_s for child in children.get(name, ())] for name in names]
    firsts = [_first_calls(rows, name) for name in names]
    per_process = {
        "load_s": list(zip(*loads, strict=False)),
        "first_call_s": [(firsts[0][number], after) for number, after in firsts[1].items() if number in firsts[0]],
    }
    for name, values in per_process.items():
        if known := [(before, after) for before, after in values if before and after]:
            found[name] = stats.ratio_over_processes(*_columns(known)), 1
    return found


def _first_calls(rows: Sequence[Measurement], name: str) -> dict[int, float]:
    """Seconds of a variant's first call, by its process."""
    firsts = [row for row in rows if row.variant == name and row.pass_name == "first" and row.ok]
    return {row.process: row.time_s for row in firsts if row.time_s}


def _model_memory(
    children: Mapping[str, Sequence[Child]], names: tuple[str, str], kind: str
) -> dict[str, tuple[stats.Interval, int]]:
    """Bytes that PyTorch has allocated for the model are counted, not sampled: their ratio is its own interval."""
    held = [[child.model_memory_mb for child in children.get(name, ())] for name in names]
    known = [(before, after) for before, after in zip(*held, strict=False) if _positive(before) and _positive(after)]
    if not known:
        return {}
    interval = stats.ratio_over_processes(*_columns(known))
    if kind == "vram" and interval.bounds is None:
        interval = replace(interval, low=interval.estimate, high=interval.estimate)
    return {"model_memory_mb": (interval, 1)}


def _positive(value: float | None) -> bool:
    return value is not None and value > 0


def _quality(
    rows: Sequence[Measurement], scores: Sequence[Score], names: tuple[str, str]
) -> dict[str, tuple[stats.Interval, int]]:
    """Paired by text, voice and seed, the free-running clips and, apart from them, those that were timed."""
    found = {}
    for step, ending in (("quality", ""), ("speed", TIMED)):
        own = [score for score in scores if score.pass_name == step]
        before, after = (
            judged(
                [row for row in rows if row.variant == name and row.pass_name == step],
                [score for score in own if score.variant == name],
            )
            for name in names
        )
        if not any(score.variant == names[0] for score in own):
            continue
        seeds = len({work[2] for work in before if work in after}) if step == "quality" else 1
        for name in ("wer", *dict.fromkeys(name for score in own for name in score.similarity)):
            values = [(before[w].figure(name), after[w].figure(name), w[0]) for w in before if w in after]
            if known := [value for value in values if value[0] is not None and value[1] is not None]:
                found[name + ending] = stats.mean_delta(*_columns(known)), seeds
    marks = {name: {(s.pass_name, *s.work): s for s in scores if s.variant == name} for name in names}
    both = [(marks[names[0]][key], after) for key, after in marks[names[1]].items() if key in marks[names[0]]]
    asked = [(b, a) for b, a in both if b.watermark is not None and a.watermark is not None]
    if asked:
        columns = [(float(is_marked(before)), float(is_marked(after)), after.text_id) for before, after in asked]
        found["watermark"] = stats.mean_delta(*_columns(columns)), 1
    return found


def _calls(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Pairs by the calls that spoke them: what shares a measurement is one pair of figures, not many."""
    found: dict[tuple[Any, ...], list[Pair]] = {}
    for base, row in pairs:
        found.setdefault((base.call, row.call), []).append((base, row))
    return list(found.values())


def _rounds(pairs: Sequence[Pair]) -> int:
    return len({(base.process, base.round) for base, _ in pairs})


def _judge(name: str, interval: stats.Interval, threshold: float, rounds: int) -> Comparison:
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
