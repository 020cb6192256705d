"""HiFT in windows over a mel that grows, each beginning where the last one ended.

A sample of HiFT's wave depends on 16 mel frames to either side and on its source, a sum of sines whose phase adds up
from the first sample on. So a window takes frames with it that were spoken already, and the source goes on: the same
phases, the same noise, the frames' own pitch. Where 16 frames are there on both sides, the wave is that of the whole
mel. Upstream's `cache_source` puts the old source in front of one that begins with phase 0, which clicks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimizations.vocoder.hift import cycles_a_sample, excited, random_phases
from optimizations.vocoder.static_shape import framed_cycles


class ContinuedVocoder:
    """One utterance's mel, window by window. `context` frames of what is final go in front of each window."""

    def __init__(self, hift: Any, context: int) -> None:
        self._hift, self._context = hift, context
        self.per_frame = int(hift.f0_upsamp.scale_factor)
        """Samples of a mel frame."""
        self._generator = hift.m_source.l_sin_gen
        device, harmonics = hift.conv_pre.bias.device, self._generator.harmonic_num + 1
        self._mel = torch.zeros(1, 0, 0, device=device)
        self._source = torch.zeros(1, 1, 0, device=device)
        self._phases = random_phases(1, harmonics, device)
        self._cycles = torch.zeros(1, harmonics, 1, dtype=torch.float64, device=device)
        self._draws = torch.zeros(0, harmonics, self.per_frame, device=device)

    def __call__(self, mel: Tensor, n_final: int) -> tuple[Tensor, int]:
        """New frames [1, 80, n], of which the first `n_final` count and those behind come again.

        Returns the window's wave [samples], and where in it the new frames begin.
        """
        window, source, start = self.window(mel, n_final)
        return self._hift.decode(x=window, s=source)[0], start

    def window(self, mel: Tensor, n_final: int) -> tuple[Tensor, Tensor, int]:
        """All of the same but HiFT's part: its mel [1, 80, m] and its source [1, 1, samples], for whoever decodes."""
        before = self._mel.shape[2]
        window = torch.cat((self._mel, mel), dim=2) if before else mel
        source = torch.cat((self._source, self._excitation(window, before, n_final)), dim=2)
        kept = slice(max(0, before + n_final - self._context), before + n_final)
        self._mel = window[:, :, kept].clone()
        self._source = source[:, :, kept.start * self.per_frame : kept.stop * self.per_frame].clone()
        return window, source, before * self.per_frame

    def _excitation(self, window: Tensor, before: int, n_final: int) -> Tensor:
        """The source [1, 1, samples] of a window's frames from `before` on, after which it has come past `n_final`."""
        m_source = self._hift.m_source
        f0 = self._hift.f0_predictor(window)[:, None, before:]
        each = cycles_a_sample(self._generator, f0)
        cycles = (framed_cycles(each, self.per_frame) + self._cycles.to(each.dtype)) % 1
        fresh = torch.randn(f0.shape[2] - len(self._draws), *self._draws.shape[1:], device=f0.device)
        draws = torch.cat((self._draws, fresh))
        noise = draws.transpose(0, 1).flatten(1)[None]
        waves, _, _ = excited(self._generator, self._hift.f0_upsamp(f0), cycles, self._phases, noise)
        passed = each[:, :, :n_final].double().sum(dim=2, keepdim=True) * self.per_frame
        self._cycles = (self._cycles + passed) % 1
        self._draws = draws[n_final:]
        return m_source.l_tanh(m_source.l_linear(waves.transpose(1, 2))).transpose(1, 2)
