"""Perth in PyTorch's operators, over waves in whole buckets: resampling, spectrum, network, and the way back."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import torch
from perth.perth_net.perth_net_implicit.model import magmask
from perth.perth_net.perth_net_implicit.utils import denormalize_spectrogram, normalize
from torch import Tensor
from torchaudio.transforms import Resample

from optimizations.common.graphs import Graphs
from optimizations.common.padding import filled, padded_length, within
from optimizations.common.spectra import signal, spectrogram

STAGE = "watermark"
ROWS = 8
"""Waves that are marked at once: their spectra take some 20 MB each for 10 s."""
HOPS = 100
"""Of the spectrum in a bucket on a GPU, a second in all: its work is little, and every new shape costs milliseconds."""


class Marker:
    """The stage: waves [samples] at `rate` -> the same, marked, float32 arrays.

    On a GPU rows lie in whole seconds, and there are a power of two of them, so that few shapes occur: a transform's
    plan and a convolution's choice are made once for each, and `cuda_graphs` can capture them.
    """

    def __init__(self, net: Any, rate: int) -> None:
        self.net, self.rate = net, rate
        hop = net.hp.hop_size * rate // net.hp.sample_rate
        self.fills_up = net.device.type == "cuda"
        """Whether rows are filled up to a power of two."""
        self.bucket = hop * (HOPS if self.fills_up else 1)
        self.graphs = Graphs()
        self.marked: list[int] = []
        self._inputs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._hosts: dict[tuple[int, int], Tensor] = {}

    @torch.inference_mode()
    def __call__(self, waves: list[Tensor]) -> list[np.ndarray]:
        self.marked.append(len(waves))
        marked: list[np.ndarray] = []
        for first in range(0, len(waves), ROWS):
            some = waves[first : first + ROWS]
            rows, lengths = self._laid_out(filled(some) if self.fills_up else some)
            whole = self.graphs.run(STAGE, tuple(rows.shape), partial(self._mark, rows, lengths))
            own = self._on_host(whole[: len(some)])
            marked += [row[: len(wave)].copy() for row, wave in zip(own, some, strict=True)]
        return marked

    def _on_host(self, rows: Tensor) -> np.ndarray:
        """Rows [R, T] on the host, good until the next ones of that shape; fresh memory would take longer to fill."""
        if not rows.is_cuda:
            return rows.numpy()
        key = len(rows), rows.shape[1]
        if key not in self._hosts:
            self._hosts[key] = torch.empty(key, pin_memory=True)
        return self._hosts[key].copy_(rows).numpy()

    def _laid_out(self, waves: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The buffers for that many rows of that length: waves [R, T], filled in, and their lengths [R]."""
        device, longest = self.net.device, padded_length(max(map(len, waves)), self.bucket)
        key = len(waves), longest
        if key not in self._inputs:
            lengths = torch.zeros(len(waves), dtype=torch.long, device=device)
            self._inputs[key] = torch.zeros(key, device=device), lengths
        rows, lengths = self._inputs[key]
        for row, wave in zip(rows, waves, strict=True):
            row[: len(wave)] = wave
            row[len(wave) :] = 0
        for length, wave in zip(lengths, waves, strict=True):
            length.fill_(len(wave))
        return rows, lengths

    def _mark(self, rows: Tensor, lengths: Tensor) -> Tensor:
        """There to the network's rate and back [R, T]."""
        rate = self.net.hp.sample_rate
        signals, lengths = resampled(rows, lengths, self.rate, rate)
        marked, _ = resampled(*mark(self.net, signals, lengths), rate, self.rate)
        return marked


def mark(net: Any, signals: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Signals [R, T] of these lengths [R] at the network's rate, marked as each would be alone, and how long they are.

    T is a whole number of the spectrum's hops; a marked signal ends with the last one that it has whole.

    The network adds decibels to some of a spectrum's bins. Upstream takes the whole spectrum apart into level and phase
    and puts it together again; here those bins are multiplied, and all others stay as they are. Behind each row's end
    every layer sees the zeros that it would see alone.
    """
    hp, window = net.hp, net.ap.spectrogram.window
    spectra = spectrogram(signals, lengths, window, hp.hop_size)
    hops = lengths // hp.hop_size
    valid = within(hops + 1, spectra.shape[1])[:, None].to(signals.dtype)
    levels = _level(hp, spectra).transpose(1, 2) * valid
    loud = magmask(levels)[:, None]  # relative to a row's loudest frame; padding is at the floor of the scale
    residual = levels[:, : net.subband]
    for layer in net.encoder.layers:
        residual = layer(residual) * valid
    decibels = denormalize_spectrogram(hp, 1) - denormalize_spectrogram(hp, 0)  # of 1 on the network's scale
    spectra[..., : net.subband] *= (10 ** (residual * loud * (decibels / 20))).transpose(1, 2)
    marked = signal(spectra * valid.transpose(1, 2), valid[:, 0], window, hp.hop_size)
    ends = hops * hp.hop_size
    return marked * within(ends, marked.shape[1]), ends


def _level(hp: Any, spectrum: Tensor) -> Tensor:
    """What the network sees of a complex spectrum [bins, frames]: decibels, on a scale from silence to loud."""
    return normalize(hp, 20 * torch.log10(spectrum.abs().clip(hp.stft_magnitude_min)))


def resampled(rows: Tensor, lengths: Tensor, rate: int, new_rate: int) -> tuple[Tensor, Tensor]:
    """Band-limited resampling of rows [R, T], zero from their lengths [R] on, which it keeps so.

    The filter is steep enough to pass what libsoxr passes.
    """
    converted = _resampler(rate, new_rate, rows.device)(rows)
    new = (lengths * new_rate + rate - 1) // rate
    return converted * within(new, converted.shape[1]), new


@cache
def _resampler(rate: int, new_rate: int, device: torch.device) -> Resample:
    """Keeps its filter, which would take longer to work out than to apply."""
    steep = Resample(
        rate, new_rate, "sinc_interp_kaiser", lowpass_filter_width=64, rolloff=0.97, beta=14.77, dtype=torch.float32
    )
    return steep.to(device)
