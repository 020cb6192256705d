"""Speaker encoders, the judges of whose voice it is.

A cosine means something only beside another of the same encoder, so the metric bears its encoder's name:
sim_resemblyzer, sim_wavlm_base_plus_sv, sim_wavlm_large_sv.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from harness.errors import UserError
from harness.quality.asr import SAMPLE_RATE, check_pretrained, load_pretrained, resample

WAVLM = "microsoft/wavlm-base-plus-sv"
WAVLM_ELSE = ("quality.speaker_model", "quality.speaker=resemblyzer")


class SpeakerEncoder(Protocol):
    """Hears voices."""

    @property
    def metric_name(self) -> str:
        """The column that similarities by this encoder stand in."""
        ...

    def embed(self, wave: NDArray[np.float32], sample_rate: int) -> NDArray[np.float32]:
        """The voice in a mono wave [samples] as a vector of unit length; zeros if there is no voice in it."""
        ...


def create_encoder(name: str, model: str | None = None) -> SpeakerEncoder:
    """The encoder that `quality.speaker` names. Raises UserError for an unknown one, or one that does not load."""
    check_encoder(name, model)
    return WavLMEncoder(model or WAVLM) if name == "wavlm" else ResemblyzerEncoder()


def check_encoder(name: str, model: str | None = None) -> None:
    """Whether `create_encoder` has a chance, found out without loading weights. Raises UserError if not."""
    if name not in ("resemblyzer", "wavlm"):
        raise UserError(f"quality.speaker={name}: there is resemblyzer and wavlm")
    if name == "wavlm":
        check_pretrained(model or WAVLM, *WAVLM_ELSE)


def similarity(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Cosine of two embeddings of unit length, from -1 to 1."""
    return float(np.clip(one @ other, -1.0, 1.0))


class ResemblyzerEncoder:
    """Resemblyzer's LSTM, whose weights ship in its wheel, on the CPU. 256 dimensions."""

    metric_name = "sim_resemblyzer"

    def __init__(self) -> None:
        from resemblyzer import VoiceEncoder

        self._network = VoiceEncoder("cpu", verbose=False)

    def embed(self, wave: NDArray[np.float32], sample_rate: int) -> NDArray[np.float32]:
        from resemblyzer import preprocess_wav

        voiced = preprocess_wav(resample(wave, sample_rate), source_sr=SAMPLE_RATE)  # cuts long silences out
        if not len(voiced):
            return np.zeros(256, dtype=np.float32)
        return self._network.embed_utterance(voiced)


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

    def embed(self, wave: NDArray[np.float32], sample_rate: int) -> NDArray[np.float32]:
        import torch

        features = self._extractor(resample(wave, sample_rate), sampling_rate=SAMPLE_RATE, return_tensors="pt")
        with torch.inference_mode():
            embedding = self._network(**features.to(self._device)).embeddings[0]
            return torch.nn.functional.normalize(embedding, dim=0).cpu().numpy()


def metric_name(model: str) -> str:
    """`sim_` and the model's own name, as in microsoft/wavlm-base-plus-sv: sim_wavlm_base_plus_sv."""
    return "sim_" + re.sub(r"[^a-z0-9]+", "_", Path(model).name.lower()).strip("_")
