"""One variant's own figures, from its rows and scores: absolute, and therefore good on one device only."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from harness import stats
from harness.load import FIRST_AUDIO_LIMIT_S, Level, level, most_kept, quantile
from harness.player import heard_of
from harness.records import Child
from harness.results import Measurement, Score, Variant
from harness.scenarios.base import energy_j

MARKED = 0.5
"""The detector's confidence from which on a clip bears the watermark."""
TIMED = "_timed"
"""Ends the name of a quality metric that is about clips which were timed."""
MOSTLY_WRONG = 0.5
"""A word error rate above this: more was misunderstood than understood."""


def figures(
    rows: Sequence[Measurement],
    scores: Sequence[Score],
    children: Sequence[Child],
    n_quality: int,
    first_audio_limit_s: float = FIRST_AUDIO_LIMIT_S,
) -> Variant:
    """All figures of the variant that wrote `rows` and whose clips have `scores`.

    `children` are its processes, its entry of children.json; `n_quality` is the number of clips that the quality pass
    was meant to make.
    """
    speed = timed(rows)
    failed = next((child for child in children if child.status != "ok"), None)
    status, error = (failed.status, failed.error) if failed else ("ok", None)
    unmeasured = next((child.quality_unmeasured_reason for child in children if child.quality_unmeasured_reason), None)
    if status == "ok" and not speed and any(row.pass_name == "speed" for row in rows):
        status, error = "failed", "no utterance of the speed pass succeeded"
    kinds = [*(child.memory_kind for child in children), *(row.memory_kind for row in rows)]
    variant = Variant(
        status=status,
        error=error,
        load_s=_mean(child.load_s for child in children),
        process_to_first_utterance_s=_mean(child.process_to_first_utterance_s for child in children),
        model_memory_mb=_mean(child.model_memory_mb for child in children if (child.model_memory_mb or 0.0) > 0),
        memory_kind=next((kind for kind in kinds if kind), "rss"),
        trained=all(child.trained is not False for child in children),
        first_call_s=_mean_time(rows, "first"),
        warmup_time_s=_mean_time([row for row in rows if row.batch_size == 1], "warmup"),
        n_speed=len(speed),
        n_expected=n_quality,
        repeated_request_ratio=repeated_request_ratio(rows),
        streaming=streaming(rows),
        loaded=loaded(rows, first_audio_limit_s),
        growth=growth(rows),
    )
    if speed:
        _add_speed(variant, speed)
    quality = [row for row in rows if row.pass_name == "quality"]
    free = [score for score in scores if score.pass_name == "quality"]
    variant.quality_note = _quality_note(variant, quality, free, unmeasured)
    variant.similarity = dict.fromkeys(similarities(scores))
    if free and not unmeasured:
        _add_quality(variant, list(judged(quality, free).values()))
    _add_timed_quality(variant, [score for score in scores if score.pass_name == "speed"])
    _add_loaded_quality(variant, [score for score in scores if score.pass_name == "load"])
    marks = [is_marked(score) for score in scores if score.watermark is not None]
    variant.watermark = statistics.fmean(marks) if marks else None
    return variant


def repeated_request_ratio(rows: Iterable[Measurement]) -> float | None:
    """Time of the requests that were spoken a second time, by the time that they took at first."""
    times: dict[str, dict[tuple, float]] = {"speed": {}, "repeat": {}}
    for row in rows:
        if row.pass_name in times and row.ok and row.time_s:
            times[row.pass_name][row.process, *row.work] = row.time_s
    both = [(times["speed"][key], again) for key, again in times["repeat"].items() if key in times["speed"]]
    return sum(again for _, again in both) / sum(first for first, _ in both) if both else None


def outpaces_itself(rows: Iterable[Measurement]) -> bool:
    """Whether each request that was spoken a second time had its audio at a pace that no call before had reached.

    What merely varies rarely does: of ten calls the eleventh is the fastest once in eleven times.
    """
    paces: dict[str, list[float]] = {"speed": [], "repeat": []}
    for row in rows:
        if row.pass_name in paces and row.ok and row.time_s and row.audio_s:
            paces[row.pass_name].append(row.time_s / row.audio_s)
    return all(paces.values()) and max(paces["repeat"]) < min(paces["speed"])


GROWN = {"memory_mb": 0.02, "threads": 0.0, "files": 0.0, "hooks": 0.0, "time": 0.05}
"""What may grow call by call, and the share of it by which a third of the calls has to exceed the one before."""
LEAST_GROWN = 0.9
"""And the least amount of what is counted; two thirds of a run may differ by one thread."""


def growth(rows: Sequence[Measurement]) -> dict[str, float]:
    """What grows on and on in a process during the speed pass: of the processes the median, where all of them grow.

    Per call, and of time, as a share, per round. Warming up ends; so each third of the calls has to exceed the one
    before.
    """
    speed = timed(rows)
    found: dict[str, list[float | None]] = {name: [] for name in GROWN}
    for process in dict.fromkeys(row.process for row in speed):
        spoken = calls([row for row in speed if row.process == process])
        for name in GROWN:
            values = _paces(spoken) if name == "time" else [call[0].counts.get(name) for call in spoken]
            n_rounds = len({row.round for call in spoken for row in call})
            per_call = grown([value for value in values if value is not None], GROWN[name], name != "time")
            found[name].append(per_call and per_call * (len(spoken) / n_rounds if name == "time" else 1))
    steady = {name: [one for one in slopes if one] for name, slopes in found.items() if slopes and all(slopes)}
    return {name: statistics.median(slopes) for name, slopes in steady.items()}


def grown(values: Sequence[float], share: float, counted: bool) -> float | None:
    """The growth per value, if every third of them exceeds the one before by that share; None if it does not.

    >>> grown([7, 10, 13, 16, 19, 22], 0.0, True)
    3.0
    """
    n = len(values) // 3
    if n < 2:
        return None
    first, second, third = (statistics.median(values[at : at + n]) for at in (0, len(values) - 2 * n, len(values) - n))
    least = max(share * abs(first), LEAST_GROWN if counted else 0.0)
    if second - first <= least or third - second <= least:
        return None
    return (third - first) / (len(values) - n)


def _paces(spoken: Sequence[Sequence[Measurement]]) -> list[float]:
    """Seconds per second of audio of each call, as a share of the median for what it spoke."""
    paces = [sum(row.time_s or 0.0 for row in call) / sum(row.audio_s or 0.0 for row in call) for call in spoken]
    usual: dict[tuple[str, ...], list[float]] = {}
    for call, pace in zip(spoken, paces, strict=True):
        usual.setdefault(tuple(row.text_id for row in call), []).append(pace)
    return [
        pace / statistics.median(usual[tuple(row.text_id for row in call)])
        for call, pace in zip(spoken, paces, strict=True)
    ]


def is_marked(score: Score) -> bool:
    """Whether the watermark was found in the clip; only of those that were asked about it."""
    return (score.watermark or 0.0) >= MARKED


def timed(rows: Iterable[Measurement]) -> list[Measurement]:
    """Rows of the speed pass that have something to say about time."""
    speed = [row for row in rows if row.pass_name == "speed" and row.ok]
    return [row for row in speed if row.time_s and row.audio_s]


def calls(rows: Sequence[Measurement]) -> list[list[Measurement]]:
    """Rows by the call that spoke them: one each, but for batches, whose rows share one measurement."""
    found: dict[tuple, list[Measurement]] = {}
    for row in rows:
        found.setdefault(row.call, []).append(row)
    return list(found.values())


def judged(rows: Iterable[Measurement], scores: Iterable[Score]) -> dict[tuple[str, str, int], Score]:
    """Scores by work; a clip that was judged missing, or that failed to be made, has word error rate 1."""
    known = {score.work: replace(score, wer=1.0) if score.missing else score for score in scores}
    for row in rows:
        if not row.ok and row.work not in known:
            known[row.work] = Score(
                variant=row.variant,
                text_id=row.text_id,
                voice=row.voice,
                seed=row.seed,
                reference=row.text,
                wer=1.0,
                deletions=len(row.text.split()),
                missing=True,
                reason=row.error,
            )
    return known


def similarities(scores: Iterable[Score]) -> list[str]:
    """The names of the similarity metrics that were measured; of timed clips, under names of their own."""
    names = (f"{name}{TIMED if score.pass_name == 'speed' else ''}" for score in scores for name in score.similarity)
    return sorted(dict.fromkeys(names), key=lambda name: name.endswith(TIMED))


def streaming(rows: Sequence[Measurement]) -> dict[str, float | None]:
    """What a listener has of the speed pass's streams; a failed one is infinitely late, and breaks off.

    Quantiles are values that were seen. None where too many failed to tell, or nothing can be told: gaps of streams
    in one chunk.
    """
    streams = [row for row in rows if row.pass_name == "speed"]
    if not any(row.chunks for row in streams):
        return {}
    heard = [heard_of(row) for row in streams]
    whole = [one for one in heard if one]
    first = sorted(one.first_s if one else math.inf for one in heard)
    gaps = sorted(gap for one in whole for gap in one.gaps_s)
    lost = len(whole) < len(heard)
    found = {
        **{f"first_audio_p{100 * share:.0f}_s": quantile(first, share) for share in (0.5, 0.9, 0.99)},
        **{f"gap_p{100 * share:.0f}_s": quantile(gaps, share) for share in (0.5, 0.99)},
        "last_audio_s": statistics.fmean(one.last_s for one in whole) if whole else math.inf,
        "underruns": float(sum(len(one.underruns_s) for one in whole)),
        "underrun_s": math.fsum(silence for one in whole for silence in one.underruns_s),
        "continuous_share": sum(one is not None and one.is_continuous for one in heard) / len(heard),
        "preroll_s": math.inf if lost else max(one.preroll_s for one in whole),
        "chunks_mean": statistics.fmean(one.n_chunks for one in whole) if whole else math.inf,
        "streams": float(len(heard)),
    }
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def loaded(rows: Sequence[Measurement], limit_s: float) -> dict[str, Any]:
    """What callers have in the load pass, size by size, and the largest size that is kept (`harness.load`).

    0 where the smallest is not; None where nothing was asked in that way. The one figure is the smaller of the two.
    """
    visits: dict[tuple[str, float], list[Measurement]] = {}
    for row in rows:
        if row.pass_name == "load" and row.load and row.load_size:
            visits.setdefault((row.load, row.load_size), []).append(row)
    if not visits:
        return {}
    levels = {key: level(key[1], [heard_of(row) for row in here]) for key, here in visits.items()}
    streams: dict[str, float | None] = {}
    for how in ("closed", "open"):
        own = [one for (way, _), one in levels.items() if way == how]
        streams[f"streams_{how}"] = (most_kept(own, limit_s) or 0.0) if own else None
    known = [value for value in streams.values() if value is not None]
    return {
        "first_audio_limit_s": limit_s,
        "streams": min(known) if len(known) == len(streams) else None,
        **streams,
        "levels": [_level(how, one, limit_s) for (how, _), one in sorted(levels.items())],
    }


def _level(how: str, one: Level, limit_s: float) -> dict[str, Any]:
    figures = {name: value if math.isfinite(value) else None for name, value in asdict(one).items()}
    return {"load": how, **figures, "kept": one.keeps(limit_s)}


def _mean_time(rows: Iterable[Measurement], step: str) -> float | None:
    return _mean(row.time_s for row in rows if row.pass_name == step and row.ok)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _add_speed(variant: Variant, rows: Sequence[Measurement]) -> None:
    spoken = calls(rows)
    times = np.array([sum(row.time_s or 0.0 for row in call) for call in spoken])
    audio = np.array([sum(row.audio_s or 0.0 for row in call) for call in spoken])
    texts = [call[0].text_id for call in spoken]
    processes, positions = [call[0].process for call in spoken], [call[0].position for call in spoken]

    def per_unit(amounts: Sequence[float] | np.ndarray, per: Sequence[float] | np.ndarray) -> stats.Interval:
        return stats.per_unit(amounts, per, texts, processes=processes, positions=positions)

    rtf = per_unit(times, audio)
    time = per_unit(times, [float(len(call)) for call in spoken])
    variant.rtf, variant.intervals["rtf"] = rtf.estimate, rtf.bounds
    variant.generation_time_s, variant.intervals["generation_time_s"] = time.estimate, time.bounds
    if all(row.chunks for row in rows):
        starts = per_unit([row.chunks[0][0] for row in rows], [1.0] * len(rows))
        variant.first_audio_s, variant.intervals["first_audio_s"] = starts.estimate, starts.bounds
    joules = [joule for call in spoken if (joule := energy_j(call))]
    if len(joules) == len(spoken):
        energy = per_unit(np.array(joules), audio)
        variant.energy_j_per_audio_s, variant.intervals["energy_j_per_audio_s"] = energy.estimate, energy.bounds
    variant.rtf_p50, variant.rtf_p90 = (float(quantile) for quantile in np.quantile(times / audio, [0.5, 0.9]))
    stages = dict.fromkeys(stage for row in rows for stage in row.stages_s)
    variant.stages_s = {name: statistics.fmean(row.stages_s.get(name, 0.0) for row in rows) for name in stages}
    decoding_s = sum(row.stages_s.get("generate_tokens", 0.0) for row in rows)
    variant.tokens_per_s = sum(row.n_tokens or 0 for row in rows) / decoding_s if decoding_s else None
    peaks = [row.peak_memory_mb for row in rows if row.peak_memory_mb is not None]
    variant.peak_memory_mb = max(peaks, default=None)
    details = dict.fromkeys(name for row in rows for name in row.memory)
    variant.memory = {name: max(row.memory.get(name, 0.0) for row in rows) for name in details}


def _quality_note(
    variant: Variant, rows: Sequence[Measurement], scores: Sequence[Score], unmeasured: str | None
) -> str | None:
    """Why the quality figures are absent, or are not to be taken seriously."""
    if not (unmeasured or scores):
        unmeasured = "the quality pass was not scored" if rows else "there was no quality pass"
    if unmeasured:
        return f"WER and similarity are not measured: {unmeasured.rstrip('.')}."
    return None if variant.trained else "untrained weights: WER and similarity mean nothing yet."


def _add_quality(variant: Variant, scores: Sequence[Score]) -> None:
    variant.n_scored = len(scores)
    variant.n_missing = sum(score.missing for score in scores)
    _add_means(variant, scores, "")
    errors = sum(score.substitutions + score.deletions + score.insertions for score in scores)
    words = sum(score.hits + score.substitutions + score.deletions for score in scores)
    variant.wer_corpus = errors / words if words else None
    variant.heard = heard(scores)


def _add_timed_quality(variant: Variant, scores: Sequence[Score]) -> None:
    """Of the clips that were timed and kept; a missing one has word error rate 1."""
    variant.n_timed = len(scores)
    _add_means(variant, list(judged([], scores).values()), TIMED)


def _add_loaded_quality(variant: Variant, scores: Sequence[Score]) -> None:
    """Of clips that were made under load and kept."""
    known = [score.wer for score in judged([], scores).values() if score.wer is not None]
    if variant.loaded:
        variant.loaded |= {"wer": statistics.fmean(known) if known else None, "n_heard": len(known)}


def _add_means(variant: Variant, scores: Sequence[Score], ending: str) -> None:
    """Mean and interval of every quality metric whose name has that ending."""
    own = [name for name in variant.similarity if name.endswith(TIMED) == bool(ending)]
    for name in ("wer", *(name.removesuffix(TIMED) for name in own)):
        known = [(value, score.text_id) for score in scores if (value := score.figure(name)) is not None]
        if not known:
            continue
        interval = stats.mean([value for value, _ in known], [text for _, text in known])
        variant.intervals[name + ending] = interval.bounds
        if name == "wer":
            setattr(variant, name + ending, interval.estimate)
        else:
            variant.similarity[name + ending] = interval.estimate


def heard(scores: Sequence[Score]) -> dict[str, Any]:
    """What a mean word error rate does not tell of these clips.

    How many were mostly misunderstood and which was worst; the words spoken after a text was over, and those of its end
    that were never said, of all clips together; how long a character took; how many ran into the model's limit.
    """
    known = [score for score in scores if score.wer is not None]
    worst = max(known, key=lambda score: score.wer or 0.0, default=None)
    paces = [score.seconds_per_character for score in scores if score.seconds_per_character is not None]
    letters = [score.cer for score in scores if score.cer is not None]
    return {
        "cer": statistics.fmean(letters) if letters else None,
        "n_mostly_wrong": sum((score.wer or 0.0) > MOSTLY_WRONG for score in known),
        "worst": worst and {key: getattr(worst, key) for key in ("text_id", "voice", "seed", "wer")},
        "tail_insertions": sum(score.tail_insertions for score in scores),
        "tail_deletions": sum(score.tail_deletions for score in scores),
        "seconds_per_character": statistics.fmean(paces) if paces else None,
        "n_hit_token_cap": sum(score.hit_token_cap for score in scores),
    }
