"""The same watermark, made on the device and for a whole batch at once."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from perth.perth_net.perth_net_implicit.model import magmask
from perth.perth_net.perth_net_implicit.utils import denormalize_spectrogram, normalize
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchaudio.transforms import Resample

from harness.pipeline import Pipeline
from optimizations.base import Evidence, Optimization, register

PROBE_TEXT, PROBE_TOKENS = "This sentence carries a mark that nobody hears.", 50


@register
class GpuWatermark(Optimization):
    """Perth where the wave already is.

    Baseline: the wave is copied to the host, resampled to 32 kHz by libsoxr, marked by a small network on the CPU,
    and resampled back.
    This: the same network and the same spectrogram on the pipeline's device, with a windowed-sinc resampler, for all
    waves of a batch together; one copy to the host at the end. What the network does not change of a spectrum is not
    taken apart and put together again.
    Why: on a GPU the marking itself is a few small convolutions, while the CPU takes tens of milliseconds, half of them
    for what this leaves out. Waves of any lengths go together, each marked as it would be alone.
    Where not: nowhere, but on a CPU it is no more than that.
    The watermark is never dropped: the wave differs by the resampler's filter alone, and Perth's own detector has the
    last word.
    The campaign left the watermark where it was.
    Evidence: the device of the network, and what upstream's detector answers on a probe's wave and on the same wave
    unmarked.
    """

    name = "gpu_watermark"
    extra = True
    replaces = ("watermark",)
    lossless = False

    def apply(self, pipeline: Pipeline) -> None:
        self._net = pipeline.model.watermarker.perth_net
        self._rate = pipeline.model.sr
        self._marked: list[int] = []
        home = self._net.device
        self._net.to(pipeline.device)
        pipeline.on_undo(lambda: self._net.to(home))
        pipeline.replace_stage("watermark", self._watermark, by=self.name)

    @torch.inference_mode()
    def _watermark(self, waves: list[Tensor]) -> list[np.ndarray]:
        """Waves [samples] at the pipeline's rate -> the same, marked, float32."""
        self._marked.append(len(waves))
        device, rate = self._net.device, self._net.hp.sample_rate
        signals = resampled([wave.to(device).float() for wave in waves], self._rate, rate)
        marked = resampled(mark(self._net, signals), rate, self._rate)
        fitted = pad_sequence([_fit(new, len(old)) for new, old in zip(marked, waves, strict=True)], batch_first=True)
        return [row[: len(wave)].copy() for row, wave in zip(fitted.cpu().numpy(), waves, strict=True)]

    def evidence(self, pipeline: Pipeline) -> Evidence:
        calls = len(self._marked)
        spoken = pipeline.synthesize(PROBE_TEXT, next(iter(pipeline.voices)), seed=0, n_tokens=PROBE_TOKENS)
        detect = pipeline.model.watermarker.get_watermark
        facts: dict[str, Any] = {
            "network_device": str(self._net.device),
            "batches_marked_count": calls,
            "detector_on_marked": float(detect(spoken.wave, sample_rate=self._rate, round=False)),
        }
        if not calls:
            return Evidence(False, facts, "it marked nothing")
        if round(facts["detector_on_marked"]) != 1:
            return Evidence(False, facts, "Perth's detector does not find the mark")
        return Evidence(True, facts)


def mark(net: Any, signals: list[Tensor]) -> list[Tensor]:
    """Signals [samples] of any lengths at the network's rate, marked as each would be alone.

    The network adds decibels to some of a spectrum's bins. Upstream takes the whole spectrum apart into level and phase
    and puts it together again; here those bins are multiplied, and all others stay as they are.

    Spectra are made and undone row by row, because they reflect a signal at its own end; that is little work. The
    network goes over all rows at once, and behind each row's end every layer sees the zeros that it would see alone.
    """
    hp, subband = net.hp, net.subband
    spectra = [net.ap.spectrogram(signal) for signal in signals]
    frames = [spectrum.shape[1] for spectrum in spectra]
    longest = max(frames)
    levels = torch.stack([F.pad(_level(hp, spectrum), (0, longest - spectrum.shape[1])) for spectrum in spectra])
    within = torch.arange(longest, device=levels.device) < torch.tensor(frames, device=levels.device)[:, None]
    valid = within[:, None].to(levels.dtype)
    loud = magmask(levels)[:, None]  # relative to a row's loudest frame; padding is at the floor of the scale
    residual = levels[:, :subband]
    for layer in net.encoder.layers:
        residual = layer(residual) * valid
    decibels = denormalize_spectrogram(hp, 1) - denormalize_spectrogram(hp, 0)  # of 1 on the network's scale
    gains = 10 ** (residual * loud * (decibels / 20))
    for spectrum, gain, n in zip(spectra, gains, frames, strict=True):
        spectrum[:subband] *= gain[:, :n]
    return [net.ap.inv_spectrogram(spectrum) for spectrum in spectra]


def _level(hp: Any, spectrum: Tensor) -> Tensor:
    """What the network sees of a complex spectrum [bins, frames]: decibels, on a scale from silence to loud."""
    return normalize(hp, 20 * torch.log10(spectrum.abs().clip(hp.stft_magnitude_min)))


def resampled(rows: list[Tensor], rate: int, new_rate: int) -> list[Tensor]:
    """Band-limited resampling of rows [samples], with a filter steep enough to pass what libsoxr passes.

    Padding changes nothing: alone, too, the filter sees zeros behind a row's end.
    """
    converted = _resampler(rate, new_rate, rows[0].device)(pad_sequence(rows, batch_first=True))
    return [new[: math.ceil(len(old) * new_rate / rate)] for new, old in zip(converted, rows, strict=True)]


@cache
def _resampler(rate: int, new_rate: int, device: torch.device) -> Resample:
    """Keeps its filter, which would take longer to work out than to apply."""
    steep = Resample(
        rate, new_rate, "sinc_interp_kaiser", lowpass_filter_width=64, rolloff=0.97, beta=14.77, dtype=torch.float32
    )
    return steep.to(device)


def _fit(wave: Tensor, length: int) -> Tensor:
    """Exactly `length` samples: spectra have whole frames, and resampling there and back may round up by one."""
    return F.pad(wave, (0, max(0, length - len(wave))))[:length]
