"""Fidelity: how far each stage is from the reference's when it is given the reference's own inputs.

It needs no ear, so it tells something of any weights, random ones too, and it tells in which stage a difference arises.
What is compared (`harness.quality.replay` makes it):

    generate_tokens   T3 made to say the reference's tokens: its guided logits at each, as distributions over speech ids
    tokens_to_mel     the mel of the reference's tokens, from the same noise
    mel_to_wave       the wave of the reference's mel. Its source is drawn by chance, and an optimization may draw it
                      elsewhere; so the reference says it once more from another seed, which tells what chance does
    watermark         the reference's wave marked, and what the detector says of it

Whether a figure counts is a matter of limits (`LIMITS`). They are read off a curve that `harness.calibrate` makes: at
what fidelity word error rate or similarity starts to move (docs/fidelity.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness import stats
from harness.quality.signals import log_spectral_distance, relative_error

FAITHFUL, DIFFERS, NOT_MEASURED = "faithful", "differs", stats.NOT_MEASURED
DB_PER_LOG = 20 / math.log(10)
"""Of an amplitude's natural logarithm, which a mel holds."""
SAME_SOURCE = 0.9
"""Two waves of one mel that are nearer to each other than this, relative to what chance does, have the same source."""

LIMITS: dict[str, dict[str, float]] = {
    "generate_tokens": {"kl_mean": 0.0029, "kl_p99": 0.015},
    "tokens_to_mel": {"mel_error": 0.028, "mel_distance_db": 1.2},
    "mel_to_wave": {"wave_distance_db": 3.6},
    "watermark": {"mark_lost": 0.5},
}
"""By stage and figure, what still counts as the same: the curve's largest amount that is proved to harm neither words
nor voice, rounded down (docs/calibration/curve.json); the mark's is where the detector's answer turns. How often the
likeliest token is another has none: where the next token is open, as with random weights, it takes next to nothing."""


@dataclass(frozen=True)
class Trace:
    """What a pipeline's stages made of one text's inputs; None where a stage gave nothing that can be compared.

    `chance` is the wave of the same mel from another seed, `mark` the detector's confidence in `marked`.
    """

    logits: NDArray[np.float32] | None = None  # [n, V], guided, over speech ids
    mel: NDArray[np.float32] | None = None  # [80, T], natural logarithms of amplitudes
    wave: NDArray[np.float32] | None = None  # [samples]
    chance: NDArray[np.float32] | None = None  # [samples]
    marked: NDArray[np.float32] | None = None  # [samples]
    mark: float | None = None


def compare(reference: Trace, other: Trace) -> dict[str, dict[str, float]]:
    """One text's figures by stage; a stage that one of the two has nothing of is left out."""
    found: dict[str, dict[str, float]] = {}
    if reference.logits is not None and other.logits is not None:
        found["generate_tokens"] = compare_logits(reference.logits, other.logits)
    if reference.mel is not None and other.mel is not None:
        found["tokens_to_mel"] = compare_mels(reference.mel, other.mel)
    if reference.wave is not None and other.wave is not None and reference.chance is not None:
        found["mel_to_wave"] = compare_waves(reference.wave, other.wave, reference.chance)
    if reference.mark is not None and other.mark is not None:
        found["watermark"] = {"mark_lost": max(0.0, reference.mark - other.mark)}
    return found


def compare_logits(reference: NDArray, other: NDArray) -> dict[str, float]:
    """Kullback-Leibler divergence [nats] of the other's next token from the reference's, and how often the likeliest
    is another one, over steps; both [n, V]. Logits that are not finite are infinitely far."""
    if reference.shape != other.shape or not np.isfinite(other).all():
        return {"kl_mean": math.inf, "kl_p99": math.inf, "top1_changed": 1.0}
    p, q = _log_softmax(reference), _log_softmax(other)
    divergence = np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0.0)
    return {
        "kl_mean": float(divergence.mean()),
        "kl_p99": float(np.quantile(divergence, 0.99)),
        "top1_changed": float((p.argmax(axis=1) != q.argmax(axis=1)).mean()),
    }


def compare_mels(reference: NDArray, other: NDArray) -> dict[str, float]:
    """Relative error of a mel, and its mean distance in dB over frames; both [80, T]. Other shapes are infinitely far,
    and so is what is not finite."""
    if reference.shape != other.shape or not np.isfinite(other).all():
        return {"mel_error": math.inf, "mel_distance_db": math.inf}
    frames = np.sqrt(np.mean((DB_PER_LOG * (other - reference)) ** 2, axis=0))
    return {
        "mel_error": float(np.linalg.norm(other - reference) / np.linalg.norm(reference)),
        "mel_distance_db": float(frames.mean()),
    }


def compare_waves(reference: NDArray, other: NDArray, chance: NDArray) -> dict[str, float]:
    """Log-spectral distance in dB, apart from what another source makes, and relative error; all [samples].

    Where the source is the same the distance is taken as it is. Where it is not, the distance that `chance` has from
    the reference is taken out, as distances that know nothing of each other add up in squares.
    """
    if reference.shape != other.shape or not np.isfinite(other).all():
        return {"wave_distance_db": math.inf, "wave_error": math.inf}
    distance, by_chance = (log_spectral_distance(wave, reference) for wave in (other, chance))
    if distance > SAME_SOURCE * by_chance:
        distance = math.sqrt(max(0.0, distance**2 - by_chance**2))
    return {"wave_distance_db": distance, "wave_error": relative_error(other, reference)}


def _log_softmax(logits: NDArray) -> NDArray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


# -- over texts ------------------------------------------------------------------------------------------------------


def summarize(compared: Sequence[dict[str, dict[str, float]]], text_ids: Sequence[str]) -> dict[str, Any]:
    """By stage a verdict and each figure's mean over texts with its interval, and its limit where it has one.

    Faithful is what stays within all limits with the whole interval, or with every text where they are too few for one.
    """
    return {stage: _stage(stage, [text.get(stage) for text in compared], text_ids) for stage in LIMITS}


def _stage(stage: str, texts: Sequence[dict[str, float] | None], text_ids: Sequence[str]) -> dict[str, Any]:
    known = [(figures, text_id) for figures, text_id in zip(texts, text_ids, strict=True) if figures is not None]
    if not known or len(known) < len(texts):
        return {"verdict": NOT_MEASURED, "figures": {}}
    found: dict[str, Any] = {}
    for name in known[0][0]:
        values = [figures[name] for figures, _ in known]
        interval = stats.mean(values, [text_id for _, text_id in known]) if np.isfinite(values).all() else None
        low, high = (interval and interval.bounds) or (min(values), max(values))
        found[name] = {"mean": float(np.mean(values)), "low": low, "high": high}
    return judged({stage: {"figures": found}})[stage]


def judged(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Stages with the verdicts and the limits of today, which may be others than when their figures were measured.

    A bound that is not finite may have been stored as None.
    """
    found = {}
    for stage, record in stages.items():
        limits = LIMITS.get(stage, {})
        figures = {name: {**figure, "limit": limits.get(name)} for name, figure in record["figures"].items()}
        limited = [figure for figure in figures.values() if figure["limit"] is not None]
        within = all(figure["high"] is not None and figure["high"] <= figure["limit"] for figure in limited)
        verdict = (FAITHFUL if within else DIFFERS) if limited else NOT_MEASURED
        found[stage] = {"verdict": verdict, "figures": figures}
    return found
