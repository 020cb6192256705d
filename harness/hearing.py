"""What the parent hears in every wave, without understanding a word: level, silence, repetition.

A variant could fill its time with less than it was asked for: silence, the same words twice, a wave that it had kept.
Whatever is odd here is odd only beside the reference's wave of the same request, which is heard in the same way
(`harness.checks`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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


class Listener:
    """Hears one variant's waves, one after the other, and remembers what each item sounded like."""

    def __init__(self) -> None:
        self._heard: dict[Item, list[NDArray[np.float32]]] = {}

    def columns(self, item: Item, wave: Wave, sample_rate: int) -> dict[str, Any]:
        """Columns of a row: level, share of silent frames, and likeness to itself and to earlier waves of the item."""
        found = Spectrogram.of(wave, sample_rate)
        earlier = self._heard.setdefault(item, [])
        likest = max((likeness(found.bands, other) for other in earlier), default=None)
        earlier.append(found.bands)
        return {
            **level(wave),
            "silent_share": found.silent_share,
            "repetition": repetition(found.bands),
            "likeness": likest,
        }
