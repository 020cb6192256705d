"""Sound as signal, without a model: level, flaws, and how far one wave is from another."""

import numpy as np
from numpy.typing import NDArray

SILENCE_DBFS = -60.0
"""Speech is 30 dB and more above this; a wave below it says nothing."""
WINDOW, HOP = 1024, 256


def level_dbfs(wave: NDArray) -> float:
    """Root mean square of a wave [samples] in dB relative to full scale (1.0); -inf for digital silence."""
    power = float(np.mean(np.square(wave, dtype=np.float64))) if wave.size else 0.0
    return 10 * float(np.log10(power)) if power > 0 else float("-inf")


def with_level(wave: NDArray[np.float32], level: float) -> NDArray[np.float32]:
    """A wave [samples] that is not silent, brought to a level in dBFS; it may go beyond full scale."""
    return wave * np.float32(10 ** ((level - level_dbfs(wave)) / 20))


def frame_levels_db(wave: NDArray, length: int) -> NDArray:
    """Levels in dBFS of the whole frames [frames] of a wave [samples], one after the other, no less than -120."""
    frames = wave[: len(wave) // length * length].reshape(-1, length)
    return 10 * np.log10(np.maximum(np.mean(np.square(frames, dtype=np.float64), axis=1), 1e-12))


def flaw(wave: NDArray) -> str | None:
    """Why nobody can judge this wave [samples]: it is empty, not finite or silent. None if it can be judged."""
    if not wave.size:
        return "the audio is empty"
    if not np.isfinite(wave).all():
        return "the audio is not finite"
    if level_dbfs(wave) < SILENCE_DBFS:
        return "the audio is silent"
    return None


def relative_error(wave: NDArray, reference: NDArray) -> float:
    """Energy of the difference over energy of the reference, as a ratio of amplitudes; both [samples].

    Waves of different lengths say different things, and raise ValueError.
    """
    if wave.shape != reference.shape:
        raise ValueError(f"waves of shapes {wave.shape} and {reference.shape} cannot be compared sample by sample")
    return float(np.linalg.norm(wave - reference) / np.linalg.norm(reference))


def log_spectral_distance(wave: NDArray, reference: NDArray, floor_db: float = -80.0) -> float:
    """Root mean square difference in dB of two log power spectra, over the frames [1024 samples] both have.

    Phase, which an ear hardly hears and `relative_error` is full of, plays no part. Power is floored at `floor_db`
    below the reference's maximum, so that the noise of silent bins does not count.
    """
    length = min(wave.size, reference.size)
    if length < WINDOW:
        raise ValueError(f"{length} samples in common, and a frame takes {WINDOW}")
    powers = [_power_spectra(signal[:length]) for signal in (wave, reference)]
    floor = powers[1].max() * 10 ** (floor_db / 10)
    own, other = (10 * np.log10(np.maximum(power, floor)) for power in powers)
    return float(np.sqrt(np.mean((own - other) ** 2)))


def _power_spectra(wave: NDArray) -> NDArray:
    """Power [frames, bins] under a Hann window."""
    frames = np.lib.stride_tricks.sliding_window_view(wave, WINDOW)[::HOP]
    return np.abs(np.fft.rfft(frames * np.hanning(WINDOW), axis=1)) ** 2
