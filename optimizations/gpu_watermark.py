"""The same watermark, made on the device and for a whole batch at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchaudio.functional import resample as windowed_sinc

from harness.pipeline import Pipeline
from optimizations.base import Evidence, Optimization, register

PROBE_TEXT, PROBE_TOKENS = "This sentence carries a mark that nobody hears.", 50


@register
class GpuWatermark(Optimization):
    """Perth where the wave already is.

    Baseline: the wave is copied to the host, resampled to 32 kHz by libsoxr, marked by a small network on the CPU,
    and resampled back.
    This: the same network and the same spectrogram on the pipeline's device, with a windowed-sinc resampler, for all
    waves of a batch together; one copy to the host at the end.
    Why: on a GPU the marking itself is a few small convolutions, while the CPU takes tens of milliseconds.
    Where not: on a CPU only the resampler is another one.
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
        self._marked.append(len(waves))
        marked: list[np.ndarray] = [np.empty(0)] * len(waves)
        # Padding would change the network's mask of loud frames, so only waves of one length go together.
        for length in {len(wave) for wave in waves}:
            rows = [i for i, wave in enumerate(waves) if len(wave) == length]
            batch = self._mark(pad_sequence([waves[i] for i in rows], batch_first=True)).cpu().numpy()
            for i, wave in zip(rows, batch, strict=True):
                marked[i] = wave
        return marked

    def _mark(self, waves: Tensor) -> Tensor:
        """Waves [B, samples] at the pipeline's rate -> the same, marked, float32."""
        hp = self._net.hp
        signal = resampled(waves.to(self._net.device).float(), self._rate, hp.sample_rate)
        magnitude, phase = self._net.ap.signal_to_magphase(signal)
        magnitude, _ = self._net.encoder(magnitude)
        signal = self._net.ap.magphase_to_signal(magnitude, phase)
        return _fit(resampled(signal, hp.sample_rate, self._rate), waves.shape[1])

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


def resampled(waves: Tensor, rate: int, new_rate: int) -> Tensor:
    """Band-limited resampling with a filter steep enough to pass what libsoxr passes."""
    return windowed_sinc(
        waves, rate, new_rate, lowpass_filter_width=64, rolloff=0.97, resampling_method="sinc_interp_kaiser", beta=14.77
    )


def _fit(waves: Tensor, length: int) -> Tensor:
    """Exactly `length` samples: resampling there and back may round up by one."""
    return torch.nn.functional.pad(waves, (0, max(0, length - waves.shape[1])))[:, :length]
