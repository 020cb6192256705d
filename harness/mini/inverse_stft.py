"""An inverse short-time Fourier transform that waits for nothing.

PyTorch's own, and the `vocos` package's, ask the device whether the windows' sum vanishes anywhere, and the host waits
for the answer: a step that does so cannot be recorded as a CUDA graph. The windows used here overlap four times.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def inverse_stft(spectrum: Tensor, window: Tensor, hop: int, border: int) -> Tensor:
    """Spectrogram [B, n / 2 + 1, T] -> wave [B, (T - 1) * hop + n - 2 * border], for a window [n].

    `border` samples are cut at each end: n / 2 undoes a centred transform, (n - hop) / 2 gives a hop per frame.
    """
    frames = torch.fft.irfft(spectrum, len(window), dim=1) * window[:, None]
    weights = window.square()[None, :, None].expand(1, -1, spectrum.shape[2])
    return _added(frames, hop, border) / _added(weights, hop, border)


def _added(frames: Tensor, hop: int, border: int) -> Tensor:
    """Frames [B, n, T], each `hop` later than the one before, summed; without the borders."""
    n = frames.shape[1]
    length = (frames.shape[2] - 1) * hop + n
    wave = F.fold(frames, (1, length), (1, n), stride=(1, hop))
    return wave[:, 0, 0, border : length - border]
