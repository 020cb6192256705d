"""Speech recognizers, the judges of intelligibility.

pocketsphinx   its English model ships in the wheel: no hub, a fifth of real time on one core. A weak judge: it
               mishears one word in twenty of clean diphone speech, so only differences between two variants mean
               something. Its search settings stay as they ship: wider beams cost two or three times as much and
               hear hardly better, narrower ones and heavier language weights hear worse.
whisper        the field's judge of zero-shot TTS (seed-tts-eval): openai/whisper-large-v3, in fp32.
"""

from __future__ import annotations

from typing import Any, Protocol

import librosa
import numpy as np
from numpy.typing import NDArray

from harness.quality.judges import WHISPER, WHISPER_ELSE, cannot_load, check_transcriber
from harness.quality.normalizer import primary
from harness.quality.signals import with_level

SAMPLE_RATE = 16_000
LEVEL_DBFS = -26.0
SILENCE_S = 0.2
WHISPER_WINDOW_S = 30.0


class Transcriber(Protocol):
    """Hears words. The same wave gives the same words, whatever was heard before."""

    def understands(self, language: str) -> bool:
        """Whether it can be asked about speech in this language, a code such as en or zh."""
        ...

    def transcribe(self, wave: NDArray[np.float32], sample_rate: int, language: str = "en") -> str:
        """The words in a mono wave [samples], full scale 1.0."""
        ...


def create_transcriber(name: str, model: str | None = None) -> Transcriber:
    """The recognizer that `quality.asr` names. Raises UserError for an unknown one, or one that does not load."""
    check_transcriber(name, model)
    return WhisperTranscriber(model or WHISPER) if name == "whisper" else PocketsphinxTranscriber()


def resample(wave: NDArray[np.float32], sample_rate: int) -> NDArray[np.float32]:
    """The wave at 16 kHz, which all recognizers and speaker models here expect."""
    return librosa.resample(wave.astype(np.float32), orig_sr=sample_rate, target_sr=SAMPLE_RATE)


class PocketsphinxTranscriber:
    """US English, trigram language model, 130,000 words."""

    def __init__(self) -> None:
        from pocketsphinx import Decoder

        self._decoder = Decoder(samprate=SAMPLE_RATE, loglevel="FATAL")

    def understands(self, language: str) -> bool:
        return primary(language) == "en"

    def transcribe(self, wave: NDArray[np.float32], sample_rate: int, language: str = "en") -> str:
        self._decoder.start_utt()
        # the whole utterance at once: its own cepstral mean is removed, and nothing is carried over from the last one
        self._decoder.process_raw(_pcm(resample(wave, sample_rate)), full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return hypothesis.hypstr if hypothesis else ""


def _pcm(wave: NDArray[np.float32]) -> bytes:
    """16-bit samples at a set level, so that a quieter variant is not a worse one, between two short silences."""
    silence = np.zeros(int(SILENCE_S * SAMPLE_RATE), dtype=np.float32)
    padded = np.concatenate([silence, with_level(wave, LEVEL_DBFS), silence])
    return (padded.clip(-1, 1) * 32767).astype("<i2").tobytes()


class WhisperTranscriber:
    """A Whisper checkpoint, from the hub or a local folder, greedy, in fp32, on a GPU where there is one."""

    def __init__(self, model: str) -> None:
        import torch
        from transformers import WhisperForConditionalGeneration, WhisperProcessor

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._processor = load_pretrained(WhisperProcessor, model, *WHISPER_ELSE)
        network = load_pretrained(WhisperForConditionalGeneration, model, *WHISPER_ELSE)
        self._network = network.to(device=self._device, dtype=torch.float32).eval()

    @property
    def _is_multilingual(self) -> bool:
        return getattr(self._network.generation_config, "is_multilingual", False)

    def understands(self, language: str) -> bool:
        languages = getattr(self._network.generation_config, "lang_to_id", None) or {}
        code = primary(language)
        return f"<|{code}|>" in languages if self._is_multilingual else code == "en"

    def transcribe(self, wave: NDArray[np.float32], sample_rate: int, language: str = "en") -> str:
        wave = resample(wave, sample_rate)
        # beyond 30 s Whisper goes window by window, for which it needs its time stamps and the true length
        is_long = len(wave) > WHISPER_WINDOW_S * SAMPLE_RATE
        features = self._processor(
            wave,
            sampling_rate=SAMPLE_RATE,
            return_tensors="pt",
            return_attention_mask=True,
            truncation=False,
            padding="longest" if is_long else "max_length",
        ).to(self._device)
        asked = {"language": primary(language), "task": "transcribe"} if self._is_multilingual else {}
        tokens = self._network.generate(**features, return_timestamps=is_long, do_sample=False, num_beams=1, **asked)
        return self._processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()


def load_pretrained(kind: Any, model: str, setting: str, instead: str) -> Any:
    """A transformers class from a local folder, the cache or the hub; UserError with the ways out if it cannot be."""
    try:
        return kind.from_pretrained(model, local_files_only=True)  # without asking the hub whether it is the newest
    except (OSError, ValueError):
        pass
    try:
        return kind.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise cannot_load(model, reason, setting, instead) from error
