"""Upstream's five views of a waveform, batched and on the device: what each part of the model is trained on.

Every function gives what upstream's own code gives for the same audio (tests hold it there), but for a padded batch
on a GPU. Waves are float32 in [-1, 1], shape [batch, samples]; voices speak at 16 kHz, the model at 24 kHz.
"""

from __future__ import annotations

from functools import lru_cache

import librosa
import torch
import torch.nn.functional as F
import torchaudio
from chatterbox.models.s3gen.s3gen import get_resampler
from chatterbox.models.s3gen.utils.mel import mel_spectrogram
from torch import Tensor

CAMPPLUS_FRAME, CAMPPLUS_HOP, CAMPPLUS_FFT = 400, 160, 512
EPSILON = torch.finfo(torch.float32).eps


def wav24(wav16: Tensor) -> Tensor:
    """16 kHz -> 24 kHz through upstream's cached resampler; [B, N] -> [B, ceil(1.5 N)]."""
    return get_resampler(16_000, 24_000, wav16.device)(wav16)


def mel80(wav: Tensor) -> Tensor:
    """The log-mel that flow predicts and the vocoders read: [B, N] at 24 kHz -> [B, 80, N // 480]."""
    return mel_spectrogram(wav.clamp(-1, 1))


def s3_log_mel(wav16: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The speech tokenizer's log-mel: [B, N] -> [B, 128, N // 160].

    Each clip is floored 8 decades below its own loudest bin, as upstream does one clip at a time; frames past
    `lengths` (in samples) are left out of that maximum.
    """
    filters, window = _s3_filters(str(wav16.device))
    power = torch.stft(wav16, 400, 160, window=window, return_complex=True)[..., :-1].abs() ** 2
    log = (filters @ power).clamp(min=1e-10).log10()
    audible = log
    if lengths is not None:
        frames = torch.arange(log.shape[-1], device=log.device)
        audible = log.masked_fill(frames[None, None] >= (lengths // 160)[:, None, None], -10.0)
    loudest = audible.amax(dim=(1, 2), keepdim=True)
    return (torch.maximum(log, loudest - 8.0) + 4.0) / 4.0


def ve_mel(wav16: Tensor) -> Tensor:
    """The voice encoder's 40-bin power mel, unscaled: [B, N] -> [B, 1 + N // 160, 40]."""
    filters, window = _ve_filters(str(wav16.device))
    power = torch.stft(wav16, 400, 160, window=window, pad_mode="reflect", return_complex=True).abs() ** 2
    return (filters @ power).transpose(1, 2)


def campplus_fbank(wav16: Tensor) -> Tensor:
    """Kaldi's 80-bin filter bank with its mean over time removed: [B, N] -> [B, 1 + (N - 400) // 160, 80].

    The same steps as `torchaudio.compliance.kaldi.fbank` with upstream's settings: no dither, per-frame mean removed,
    pre-emphasis 0.97, Povey window, 512-point power spectrum.
    """
    filters, window = _kaldi_filters(str(wav16.device))
    frames = wav16.unfold(-1, CAMPPLUS_FRAME, CAMPPLUS_HOP)
    frames = frames - frames.mean(-1, keepdim=True)
    previous = F.pad(frames, (1, 0), mode="replicate")[..., :-1]
    frames = (frames - 0.97 * previous) * window
    power = torch.fft.rfft(frames, n=CAMPPLUS_FFT).abs() ** 2
    fbank = (power[..., :-1] @ filters.T).clamp(min=EPSILON).log()
    return fbank - fbank.mean(1, keepdim=True)


@lru_cache
def _s3_filters(device: str) -> tuple[Tensor, Tensor]:
    filters = torch.from_numpy(librosa.filters.mel(sr=16_000, n_fft=400, n_mels=128)).float()
    return filters.to(device), torch.hann_window(400, device=device)


@lru_cache
def _ve_filters(device: str) -> tuple[Tensor, Tensor]:
    filters = torch.from_numpy(librosa.filters.mel(sr=16_000, n_fft=400, n_mels=40, fmin=0, fmax=8000)).float()
    return filters.to(device), torch.hann_window(400, device=device)


@lru_cache
def _kaldi_filters(device: str) -> tuple[Tensor, Tensor]:
    banks, _ = torchaudio.compliance.kaldi.get_mel_banks(80, CAMPPLUS_FFT, 16_000.0, 20.0, 0.0, 100.0, -500.0, 1.0)
    window = torch.hann_window(CAMPPLUS_FRAME, periodic=False, device=device) ** 0.85
    return banks.to(device), window
