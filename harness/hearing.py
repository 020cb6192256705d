"""What the parent hears in every wave, without understanding a word: level, silence, repetition, other words.

A variant could fill its time with less than it was asked for: silence, the same words twice, a wave that it had kept.
Whatever is odd here is odd only beside the reference's wave of the same request, which is heard in the same way
(`harness.checks`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.workload import Item

SILENCE_DBFS = -60.0
FRAME_S = 0.02
BANDS = 24
LEAST_LAG_S = 0.3
"""Sounds last; what is the same after this time was said again."""
LARGEST_SHIFT_S = 0.5
"""A kept wave may be cut at its beginning by as much."""
POOLED = 3
"""Frames that are one where words are compared: 60 ms, about a sound."""
LOUD = 3.0
"""Distance of a frame from the mean spectrum, in the bands' unit, above which its sound is clear."""
REMEMBERED = 2
"""Clips of the reference that an item's later clips are held against."""
QUIETEST = 1e-7
"""Amplitude below which a band holds nothing."""

Wave = NDArray[np.float32]


def level(wave: Wave) -> dict[str, Any]:
    """Level [dBFS, rms], and whether the wave [samples] is silent or holds NaN or infinity."""
    if wave.size == 0:
        return {"level_dbfs": None, "silent": True, "non_finite": False}
    if not np.isfinite(wave).all():
        return {"level_dbfs": None, "silent": False, "non_finite": True}
    rms = float(np.sqrt(np.mean(np.square(wave, dtype=np.float64))))
    decibels = 20 * math.log10(rms) if rms > 0 else None
    return {"level_dbfs": decibels, "silent": decibels is None or decibels < SILENCE_DBFS, "non_finite": False}


@dataclass(frozen=True)
class Spectrogram:
    """Log amplitude per frame of 20 ms and band [frames, bands], each band less its mean."""

    bands: NDArray[np.float32]
    silent_share: float

    @classmethod
    def of(cls, wave: Wave, sample_rate: int) -> Spectrogram:
        size = max(2, round(FRAME_S * sample_rate))
        frames = np.nan_to_num(wave[: len(wave) // size * size]).reshape(-1, size)
        loudness = np.sqrt(np.mean(np.square(frames, dtype=np.float64), axis=1))
        silent = loudness < 10 ** (SILENCE_DBFS / 20)
        spectrum = np.abs(np.fft.rfft(frames * np.hanning(size), axis=1)) / size
        edges = np.unique(np.geomspace(1, spectrum.shape[1] - 1, BANDS + 1).astype(int))
        bands = np.log(np.add.reduceat(spectrum, edges[:-1], axis=1) + QUIETEST)
        share = float(np.mean(silent)) if len(frames) else 1.0
        return cls((bands - bands.mean(axis=0)).astype(np.float32), share) if len(frames) else cls(bands, share)


def repetition(bands: NDArray[np.float32]) -> float:
    """How much a wave is like itself later on: the highest correlation with its own shifted frames, 1 for a copy."""
    least = round(LEAST_LAG_S / FRAME_S)
    lags = np.arange(least, len(bands) // 2 + 1)
    return _highest(bands, bands, lags)


def likeness(bands: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """How much two waves are alike, shifted against each other by half a second at most: 1 for a copy or a part."""
    most = min(round(LARGEST_SHIFT_S / FRAME_S), min(len(bands), len(other)) // 2)
    return max(_highest(bands, other, np.arange(0, most + 1)), _highest(other, bands, np.arange(0, most + 1)))


def stretched_likeness(bands: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """How much two waves are alike, the longer brought to the length of the shorter.

    A wave played faster or slower by 15 % has 0.88 to 0.93, for its pitch has changed, and of 135 pairs of readings of
    a text by one voice 133 have less than 0.86.
    """
    n = min(len(bands), len(other))
    return _highest(_of_length(bands, n), _of_length(other, n), np.zeros(1, dtype=int))


def _of_length(bands: NDArray[np.float32], n: int) -> NDArray[np.float32]:
    """The bands at `n` moments that are equally far apart, between frames as a mixture of both."""
    moments = np.linspace(0, max(0, len(bands) - 1), n)
    before = moments.astype(int)
    share = (moments - before)[:, None].astype(np.float32)
    return bands[before] * (1 - share) + bands[np.minimum(before + 1, len(bands) - 1)] * share


def _highest(first: NDArray[np.float32], second: NDArray[np.float32], lags: NDArray[np.int_]) -> float:
    """The highest correlation of `first` with `second` `lag` frames later, over the frames that overlap."""
    best = 0.0
    for lag in lags:
        n = min(len(first), len(second) - lag)
        if n < 2:
            break
        one, other = first[:n], second[lag : lag + n]
        power = float(np.vdot(one, one)) * float(np.vdot(other, other))
        if power > 0:
            best = max(best, float(np.vdot(one, other)) / math.sqrt(power))
    return min(best, 1.0)


def unlikeness(bands: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """How differently two waves go, each stretched in time to fit the other (dynamic time warping): 0 for a copy.

    Two readings of a text by one voice are about a fifth as unlike as two texts.
    """
    one, two = _sounds(bands), _sounds(other)
    if not len(one) or not len(two):
        return 1.0
    powers = np.square(one).sum(axis=1)[:, None] + np.square(two).sum(axis=1)[None]
    return _cheapest_path(np.maximum(0.0, powers / 2 - one @ two.T)) / (len(one) + len(two))


def _sounds(bands: NDArray[np.float32]) -> NDArray[np.float32]:
    """Pooled frames of about unit length [sounds, bands]; what is near the mean spectrum, as silence is, is short."""
    pooled = bands[: len(bands) // POOLED * POOLED].reshape(-1, POOLED, bands.shape[1]).mean(axis=1)
    return pooled / (np.linalg.norm(pooled, axis=1, keepdims=True) + LOUD)


def _cheapest_path(costs: NDArray[np.float32]) -> float:
    """The least sum on a way from the first cell to the last, one step down, right or both at a time [n, m].

    Cells of one antidiagonal do not depend on each other, so each is one step; `best` is indexed by row.
    """
    n, m = costs.shape
    earlier, best = np.full(n + 1, np.inf), np.full(n + 1, np.inf)
    earlier[0] = 0.0  # before the first cell; row i is kept at i + 1
    for step in range(n + m - 1):
        rows = np.arange(max(0, step - m + 1), min(n, step + 1))
        found = np.full(n + 1, np.inf)
        found[rows + 1] = costs[rows, step - rows] + np.minimum(np.minimum(best[rows], best[rows + 1]), earlier[rows])
        earlier, best = best, found
    return float(best[n])


def apart(bands: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """How far two waves are from each other, moment by moment: of their frames' distances, per band, the median.

    0.01 where one was computed in another order, 0.7 where it was made by another solver, 2.5 of other words.
    """
    n = min(len(bands), len(other))
    return float(np.median(np.sqrt(np.square(bands[:n] - other[:n]).mean(axis=1)))) if n else 0.0


@dataclass
class Memory:
    """What listeners share: by item, the reference's first clips; by request, a clip that the other has not had yet."""

    first: dict[Item, list[NDArray[np.float32]]] = field(default_factory=dict)
    answered: dict[Hashable, NDArray[np.float32]] = field(default_factory=dict)


class Listener:
    """Hears one variant's waves, one after the other, and remembers what each item sounded like."""

    def __init__(self, memory: Memory, is_reference: bool) -> None:
        self._heard: dict[Item, list[NDArray[np.float32]]] = {}
        self._memory, self._is_reference = memory, is_reference

    def columns(self, item: Item, request: Hashable, wave: Wave, sample_rate: int) -> dict[str, Any]:
        """Columns of a row: level, silence, likeness to itself and to earlier waves, unlikeness to the reference's.

        `request` is what was asked for, of both variants; the row of the second has how far apart the two are.
        """
        found = Spectrogram.of(wave, sample_rate)
        earlier, known = self._heard.setdefault(item, []), self._memory.first.setdefault(item, [])
        other = self._memory.answered.pop(request, None)
        if other is None:
            self._memory.answered[request] = found.bands
        likest = max((likeness(found.bands, bands) for bands in earlier), default=None)
        stretched = max((stretched_likeness(found.bands, bands) for bands in earlier), default=None)
        unlike = min((unlikeness(found.bands, bands) for bands in known), default=None)
        earlier.append(found.bands)
        if self._is_reference and len(known) < REMEMBERED:
            known.append(found.bands)
        return {
            **level(wave),
            "silent_share": found.silent_share,
            "repetition": repetition(found.bands),
            "likeness": likest,
            "stretched_likeness": stretched,
            "unlikeness": unlike,
            "apart": None if other is None else apart(found.bands, other),
        }
