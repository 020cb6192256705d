"""What tests of streams listen with: is a text understood, a voice itself, the mark there?"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import jiwer
import numpy as np

from harness.quality.asr import create_transcriber
from harness.quality.normalizer import normalize
from harness.quality.scoring import reference_wave
from harness.quality.speaker import create_encoder, similarity, voice_in
from harness.quality.watermark import create_detector


class Judged(NamedTuple):
    """One wave's figures."""

    wer: float
    similarity: float
    mark: float


class Listener:
    """Judges waves that say a text in a voice."""

    def __init__(self) -> None:
        self._transcriber, self._encoder = create_transcriber("pocketsphinx"), create_encoder("resemblyzer")
        detector = create_detector()
        assert detector is not None
        self._detector = detector
        self._voice = cache(self._embedding_of)

    def judge(self, text: str, voice: str, wave: np.ndarray, rate: int) -> Judged:
        words = normalize(self._transcriber.transcribe(wave, rate))
        own = self._encoder.embed(voice_in(wave, rate))
        return Judged(
            jiwer.wer(normalize(text), words), similarity(own, self._voice(voice)), self._detector.read(wave, rate)
        )

    def _embedding_of(self, voice: str) -> np.ndarray:
        reference = reference_wave(voice)
        assert reference is not None
        return self._encoder.embed(voice_in(*reference))
