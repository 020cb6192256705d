"""Spectrograms and back, of rows that end at a number on the device.

PyTorch's own take the end from a shape, so every length is another shape: another plan for the transform each time, and
nothing that could be captured. (Its `istft` also asks the device whether the sum of windows vanishes anywhere.) Here
rows lie in a buffer of any length, and all that is made of a row is what it gives alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def spectrogram(signal: Tensor, samples: Tensor, window: Tensor, hop: int) -> Tensor:
    """Complex spectra [B, T / hop + 1, bins] of signals [B, T] that end, and are mirrored, at `samples` [1] or [B]."""
    reach, longest = len(window) // 2, signal.shape[1]
    where = torch.arange(-reach, longest + reach, device=signal.device).abs()
    end = samples[:, None]
    where = torch.where(where < end, where, 2 * (end - 1) - where).clamp(0, longest - 1)
    pieces = signal.gather(1, where.expand(len(signal), -1)).unfold(1, len(window), hop)
    return torch.fft.rfft(pieces * window)


def signal(spectrum: Tensor, valid: Tensor, window: Tensor, hop: int) -> Tensor:
    """Waves [B, T] of complex spectra [B, T / hop + 1, bins], of which those with `valid` [1 or B, T / hop + 1] count.

    A window is twice as long as it reaches, and has at least as many bins of overlap as `hop`.
    """
    pieces = torch.fft.irfft(spectrum, n=len(window)) * window
    weights = valid[..., None] * window**2
    reach, length = len(window) // 2, (spectrum.shape[1] - 1) * hop
    wave = _overlapped(pieces, hop) / _overlapped(weights, hop).clamp_min(1e-11)
    return wave[:, reach : reach + length]


def _overlapped(pieces: Tensor, hop: int) -> Tensor:
    """Pieces [B, n, size] added up at `hop` samples' distance: [B, (n - 1) hop + size, rounded up to whole hops]."""
    parts = F.pad(pieces, (0, -pieces.shape[2] % hop)).unflatten(2, (-1, hop))
    last = parts.shape[2] - 1
    shifted = [F.pad(parts[:, :, i], (0, 0, i, last - i)) for i in range(last + 1)]
    return torch.stack(shifted).sum(dim=0).flatten(1)
