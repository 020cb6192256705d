"""The same watermark, made on the device and for a whole batch at once."""

from __future__ import annotations

from typing import Any

from harness.pipeline import Pipeline
from optimizations.base import Evidence, Optimization, register
from optimizations.watermark.perth import Marker

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
        net = pipeline.model.watermarker.perth_net
        home = net.device
        net.to(pipeline.device)
        pipeline.on_undo(lambda: net.to(home))
        self._marker = Marker(net, pipeline.model.sr)
        pipeline.replace_stage("watermark", self._marker, by=self.name)

    def evidence(self, pipeline: Pipeline) -> Evidence:
        calls = len(self._marker.marked)
        spoken = pipeline.synthesize(PROBE_TEXT, next(iter(pipeline.voices)), seed=0, n_tokens=PROBE_TOKENS)
        detect = pipeline.model.watermarker.get_watermark
        facts: dict[str, Any] = {
            "network_device": str(pipeline.model.watermarker.perth_net.device),
            "batches_marked_count": calls,
            "detector_on_marked": float(detect(spoken.wave, sample_rate=pipeline.model.sr, round=False)),
        }
        if not calls:
            return Evidence(False, facts, "it marked nothing")
        if round(facts["detector_on_marked"]) != 1:
            return Evidence(False, facts, "Perth's detector does not find the mark")
        return Evidence(True, facts)
