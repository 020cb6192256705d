"""The watermark, read back from a clip by its own detector.

Upstream marks all that it speaks with Perth: one small network adds the mark to a spectrum's bins below 2 kHz, another
finds it again. Its answer is a confidence, which rounds to whether there is a mark. On the miniature's speech, stored
in 16 bits, cut to half a second, resampled or 20 dB quieter, a marked clip is answered with more than 0.9 and an
unmarked one with less than 0.4.
"""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Detector(Protocol):
    """Finds a watermark."""

    def read(self, wave: NDArray[np.float32], sample_rate: int) -> float:
        """The confidence, from 0 to 1, that a mono wave [samples] with speech in it bears the mark."""
        ...


def create_detector() -> Detector | None:
    """Perth's detector, on the CPU; None where Perth could not import what it needs (`pkg_resources`, as a rule)."""
    import perth

    if not perth.PerthImplicitWatermarker:
        return None
    with contextlib.redirect_stdout(io.StringIO()):  # it prints which step of its training it comes from
        return PerthDetector(perth.PerthImplicitWatermarker())


class PerthDetector:
    """The detector that ships with Perth; a clip takes it tens of milliseconds."""

    def __init__(self, watermarker: Any) -> None:
        self._watermarker = watermarker

    def read(self, wave: NDArray[np.float32], sample_rate: int) -> float:
        if len(wave) / sample_rate < self._window_s:
            return 0.0  # not one frame of a spectrum, so no room for a mark
        confidence = float(self._watermarker.get_watermark(wave, sample_rate=sample_rate, round=False))
        return 0.0 if math.isnan(confidence) else confidence

    @property
    def _window_s(self) -> float:
        settings = self._watermarker.perth_net.hp
        return settings.n_fft / settings.sample_rate
