"""Speaker encoders, the judges of whose voice it is.

A cosine means something only beside another of the same encoder, so the metric bears its encoder's name:
sim_resemblyzer, sim_wavlm_base_plus_sv, sim_wavlm_large_sv.

An encoder gives anything a vector, silence and noise too, and that vector is near enough to a voice's. So it is shown
only what is a voice: at one rate and one level, long silences cut out, and nothing of a sound that holds on as no voice
does. The reference clip and the clip that is judged go the same way.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from harness.quality.asr import SAMPLE_RATE, load_pretrained, resample
from harness.quality.judges import WAVLM, WAVLM_ELSE, check_encoder
from harness.quality.signals import flaw, frame_levels_db, with_level

LEVEL_DBFS = -23.0
"""Resemblyzer's answer depends on the level. At this one it tells the miniature's four voices apart best: five standard
deviations between the same voice and another."""
MIN_RANGE_DB = 8.0
"""Between the loud and the soft frames of a voice are 20 dB and more; of noise, a hum or a tone 6 dB and less."""
FRAME_S = 0.025


class SpeakerEncoder(Protocol):
    """Hears voices."""

    @property
    def metric_name(self) -> str:
        """The column that similarities by this encoder stand in."""
        ...

    def embed(self, voice: NDArray[np.float32]) -> NDArray[np.float32]:
        """Whose voice it is, of what `voice_in` gave and is not empty [samples]: a vector of unit length."""
        ...


def voice_in(wave: NDArray[np.float32], sample_rate: int) -> NDArray[np.float32]:
    """What somebody says in a mono wave [samples], at 16 kHz and a set level, long silences cut out; may be empty."""
    from resemblyzer.audio import trim_long_silences  # by WebRTC's voice activity detector

    if flaw(wave):
        return np.zeros(0, dtype=np.float32)
    speech = trim_long_silences(with_level(resample(wave, sample_rate), LEVEL_DBFS).clip(-1, 1))
    levels = frame_levels_db(speech, round(FRAME_S * SAMPLE_RATE))
    if not levels.size or np.subtract(*np.quantile(levels, [0.9, 0.1])) < MIN_RANGE_DB:
        return np.zeros(0, dtype=np.float32)
    return with_level(speech, LEVEL_DBFS)


def create_encoder(name: str, model: str | None = None) -> SpeakerEncoder:
    """The encoder that `quality.speaker` names. Raises UserError for an unknown one, or one that does not load."""
    check_encoder(name, model)
    return WavLMEncoder(model or WAVLM) if name == "wavlm" else ResemblyzerEncoder()


def similarity(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Cosine of two embeddings of unit length, from -1 to 1."""
    return float(np.clip(one @ other, -1.0, 1.0))


class ResemblyzerEncoder:
    """Resemblyzer's LSTM, whose weights ship in its wheel, on the CPU. 256 dimensions."""

    metric_name = "sim_resemblyzer"

    def __init__(self) -> None:
        from resemblyzer import VoiceEncoder

        self._network = VoiceEncoder("cpu", verbose=False)

    def embed(self, voice: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._network.embed_utterance(voice)


class WavLMEncoder:
    """A WavLM with a speaker-verification head, from the hub or a local folder, in fp32."""

    def __init__(self, model: str) -> None:
        import torch
        from transformers import AutoFeatureExtractor, WavLMForXVector

        self.metric_name = metric_name(model)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._extractor = load_pretrained(AutoFeatureExtractor, model, *WAVLM_ELSE)
        network = load_pretrained(WavLMForXVector, model, *WAVLM_ELSE)
        self._network = network.to(device=self._device, dtype=torch.float32).eval()

    def embed(self, voice: NDArray[np.float32]) -> NDArray[np.float32]:
        import torch

        features = self._extractor(voice, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        with torch.inference_mode():
            embedding = self._network(**features.to(self._device)).embeddings[0]
            return torch.nn.functional.normalize(embedding, dim=0).cpu().numpy()


def metric_name(model: str) -> str:
    """`sim_` and the model's own name, as in microsoft/wavlm-base-plus-sv: sim_wavlm_base_plus_sv."""
    return "sim_" + re.sub(r"[^a-z0-9]+", "_", Path(model).name.lower()).strip("_")
