"""What a vocoder is trained to get right: the spectrum at several resolutions, and what a critic hears.

The spectral losses compare magnitudes and say nothing about phase; alone they give an intelligible but buzzing
voice. The discriminators judge the waveform itself and take the buzz away. Both sides are small: they have four
synthetic voices to learn in a few minutes, not the world's speech in a week.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

SAMPLE_RATE = 24_000
# Magnitudes below this count as silence. Speech stands between 0.1 and 100 here; the band above 8 kHz, which
# speech recorded at 16 kHz leaves empty, must not rule the loss through the logarithm of next to nothing.
QUIET = 1e-2


def magnitude(wave: Tensor, n_fft: int) -> Tensor:
    """Magnitude spectrogram [B, n_fft / 2 + 1, frames] of a wave [B, samples], Hann window, hop n_fft / 4."""
    window = torch.hann_window(n_fft, device=wave.device)
    spectrum = torch.stft(wave.float(), n_fft, n_fft // 4, window=window, return_complex=True)
    # sqrt has no derivative at zero: a digital silence would give NaN.
    return (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()


class SpectralLoss(nn.Module):
    """Distance of two waves in magnitude spectrograms of several resolutions, plain and mel-scaled.

    Short windows see when something happens, long ones see at which pitch. For each window length, `stft` adds
    the spectral convergence (Arik et al. 2018: relative error of the magnitudes, ruled by loud places) and the L1
    distance of log magnitudes (ruled by quiet places); `mel` is the L1 distance of log mel energies, which weighs
    frequencies as hearing does. Call with fake and real waves [B, samples]; gives {"stft": , "mel": } scalars.
    """

    def __init__(self, windows: Sequence[int] = (2048, 1024, 512, 256), mels: Sequence[int] = (80, 80, 40, 20)) -> None:
        super().__init__()
        self.windows = tuple(windows)
        for n_fft, n_mels in zip(windows, mels, strict=True):
            bank = torchaudio.functional.melscale_fbanks(
                n_fft // 2 + 1, 0.0, 8000.0, n_mels, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
            )
            # "slaney" filters have unit area in Hz; times the width of a bin they average magnitudes.
            self.register_buffer(f"bank{n_fft}", bank * (SAMPLE_RATE / n_fft), persistent=False)

    def forward(self, fake: Tensor, real: Tensor) -> dict[str, Tensor]:
        stft = fake.new_zeros(())
        mel = fake.new_zeros(())
        for n_fft in self.windows:
            ours, theirs = magnitude(fake, n_fft), magnitude(real, n_fft)
            convergence = torch.linalg.norm(theirs - ours) / torch.linalg.norm(theirs).clamp(min=1.0)
            stft = stft + convergence + F.l1_loss(log(ours), log(theirs))
            bank = self.get_buffer(f"bank{n_fft}")
            mel = mel + F.l1_loss(log(ours.mT @ bank), log(theirs.mT @ bank))
        return {"stft": stft / len(self.windows), "mel": mel / len(self.windows)}


def log(magnitudes: Tensor) -> Tensor:
    """Natural logarithm with everything quieter than QUIET held at QUIET."""
    return magnitudes.clamp(min=QUIET).log()


class Critic(nn.Module):
    """A stack of 2-D convolutions over some picture of the wave; gives its judgement and its inner features."""

    def __init__(self, channels: Sequence[int], kernel: tuple[int, int], stride: tuple[int, int]) -> None:
        super().__init__()
        pad = (kernel[0] // 2, kernel[1] // 2)
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(a, b, kernel, stride if i < len(channels) - 2 else 1, pad))
            for i, (a, b) in enumerate(pairwise(channels))
        )
        self.head = weight_norm(nn.Conv2d(channels[-1], 1, 3, padding=1))

    def forward(self, picture: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for layer in self.layers:
            picture = F.leaky_relu(layer(picture), 0.1)
            features.append(picture)
        return self.head(picture), features


class PeriodCritic(Critic):
    """HiFi-GAN's view: the wave folded into rows of `period` samples, so that a column is every p-th sample.

    Different prime periods see different regularities; a pitch that is slightly off shows in all of them.
    """

    def __init__(self, period: int, channels: Sequence[int] = (1, 16, 32, 64, 128, 128)) -> None:
        super().__init__(channels, kernel=(5, 1), stride=(3, 1))
        self.period = period

    def forward(self, wave: Tensor) -> tuple[Tensor, list[Tensor]]:
        wave = wave[:, : wave.shape[1] // self.period * self.period]
        return super().forward(wave.reshape(wave.shape[0], 1, -1, self.period))


class SpectrumCritic(Critic):
    """UnivNet's view: a magnitude spectrogram as a picture [B, 1, frames, bins], at one window length."""

    def __init__(self, n_fft: int, channels: Sequence[int] = (1, 16, 32, 32, 32)) -> None:
        super().__init__(channels, kernel=(3, 9), stride=(1, 2))
        self.n_fft = n_fft

    def forward(self, wave: Tensor) -> tuple[Tensor, list[Tensor]]:
        return super().forward(log(magnitude(wave, self.n_fft)).mT.unsqueeze(1))


Verdicts = list[tuple[Tensor, list[Tensor]]]


class Critics(nn.Module):
    """Multi-period and multi-resolution discriminators together; call with waves [B, samples]."""

    def __init__(self, periods: Iterable[int] = (2, 3, 5, 7, 11), windows: Iterable[int] = (2048, 1024, 512)) -> None:
        super().__init__()
        self.critics = nn.ModuleList([*map(PeriodCritic, periods), *map(SpectrumCritic, windows)])

    def forward(self, wave: Tensor) -> Verdicts:
        return [critic(wave) for critic in self.critics]


def critic_loss(fake: Verdicts, real: Verdicts) -> Tensor:
    """Hinge loss of the discriminators: real above +1, fake below -1, and no credit for exaggerating."""
    losses = [F.relu(1 - r).mean() + F.relu(1 + f).mean() for (f, _), (r, _) in zip(fake, real, strict=True)]
    return torch.stack(losses).mean()


def deception_loss(fake: Verdicts) -> Tensor:
    """The generator's side of the hinge game: how far each critic is from taking the fake for real."""
    return torch.stack([F.relu(1 - verdict).mean() for verdict, _ in fake]).mean()


def feature_loss(fake: Verdicts, real: Verdicts) -> Tensor:
    """Feature matching: a fake should look to every layer of every critic as the real wave does (L1)."""
    return torch.stack(
        [
            F.l1_loss(ours, theirs.detach())
            for (_, fakes), (_, reals) in zip(fake, real, strict=True)
            for ours, theirs in zip(fakes, reals, strict=True)
        ]
    ).mean()
