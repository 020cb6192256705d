"""HiFT: first its pitch predictor learns to read the pitch off a mel, then the generator to speak with it.

HiFT (Li et al. 2023) hums before it speaks: a sine at the predicted pitch, with harmonics, enters at every layer, and
the convolutions only have to colour it. A wrong pitch cannot be coloured right, so the predictor is trained first,
against an estimate from the wave, and then held fixed.
"""

from __future__ import annotations

from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from chatterbox.models.s3gen import hifigan
from chatterbox.models.s3gen.f0_predictor import ConvRNNF0Predictor
from chatterbox.models.s3gen.hifigan import HiFTGenerator
from torch import Tensor

from harness.mini import models
from harness.mini.inverse_stft import inverse_stft
from harness.mini.training.run import Run, learning_rate
from harness.mini.training.speech import Corpus
from harness.mini.training.vocoder import (
    HELD_OUT,
    HOP16,
    MARGIN,
    Recipe,
    SpeechCrops,
    adam,
    distance,
    fit,
    mel_and_wave,
    polish,
    roughened,
    set_rate,
)

STEPS = 2_740
POLISH_STEPS = 6_000
PITCH_STEPS = 1_500
SAMPLE_RATE = 16_000
PITCH_WINDOW = 1024  # 64 ms: more than three periods of the lowest voice
SHORTEST, LONGEST = 40, 267  # lags in samples: 400 Hz down to 60 Hz
PERIODIC = 0.55  # least normalized autocorrelation of a voiced frame
AUDIBLE = 3e-3  # least root mean square of a voiced frame: about -50 dB


def pitch(wave: Tensor) -> Tensor:
    """Pitch in Hz, 0 where unvoiced: [B, samples / 320] of a 16 kHz wave [B, samples], aligned with upstream's mel.

    Normalized cross-correlation of each 64 ms frame with itself, lag by lag (Talkin 1995). A periodic frame also
    correlates at twice its period, and noise may put that second peak a little higher; so the first peak that
    comes near the best one wins. Samples must be a multiple of 320.
    """
    border = (PITCH_WINDOW - HOP16) // 2  # frame i is centred on sample 320 i + 160, as the mel's is
    frames = F.pad(wave, (border, border)).unfold(1, PITCH_WINDOW, HOP16)
    frames = frames - frames.mean(-1, keepdim=True)
    length = PITCH_WINDOW - LONGEST - 1
    spectrum = torch.fft.rfft(frames, 2 * PITCH_WINDOW)
    head = torch.fft.rfft(frames[..., :length], 2 * PITCH_WINDOW)
    products = torch.fft.irfft(spectrum * head.conj())[..., : LONGEST + 2]
    total = F.pad(frames.square().cumsum(-1), (1, 0))
    energies = total[..., length : length + LONGEST + 2] - total[..., : LONGEST + 2]
    similarity = products / (energies[..., :1] * energies).clamp(min=1e-12).sqrt()

    before, here, after = (similarity[..., SHORTEST + k : LONGEST + 1 + k] for k in (-1, 0, 1))
    is_peak = (here >= before) & (here > after)
    peaks = here.masked_fill(~is_peak, -1.0)
    best, _ = peaks.max(-1, keepdim=True)
    first = (peaks >= 0.92 * best).float().argmax(-1, keepdim=True)
    # A parabola through the peak and its neighbours places it between two samples.
    b, h, a = (values.gather(-1, first) for values in (before, here, after))
    offset = 0.5 * (b - a) / (b - 2 * h + a).clamp(max=-1e-6)
    hertz = SAMPLE_RATE / (SHORTEST + first + offset.clamp(-0.5, 0.5))

    loud = (total[..., -1:] / PITCH_WINDOW).sqrt() > AUDIBLE
    hertz = hertz.masked_fill((best < PERIODIC) | ~loud, 0.0).squeeze(-1)
    return F.pad(hertz, (2, 2), mode="replicate").unfold(1, 5, 1).median(-1).values  # single slips go


def train_pitch(predictor: ConvRNNF0Predictor, crops: SpeechCrops, batch: int, run: Run) -> None:
    """Teach the pitch predictor to give the wave's pitch from (roughened) mels; L1, in units of 100 Hz."""
    # The output is |linear|, in Hz: from zero, a small learning rate would take long to climb to a voice's pitch.
    predictor.classifier.bias.data.fill_(100.0)
    peak, steps = 1e-3, run.steps(PITCH_STEPS)
    optimizer = adam(predictor.parameters(), peak)
    for step in range(steps):
        set_rate(optimizer, learning_rate(step, steps, peak))
        mel, target = mel_and_pitch(crops, batch, 100)
        loss = F.l1_loss(predictor(roughened(mel, crops.rng)), target) / 100
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            run.log("hift_pitch", step, loss=float(loss.detach()))


def mel_and_pitch(crops: SpeechCrops, n: int, frames: int) -> tuple[Tensor, Tensor]:
    """Mel [n, 80, frames] and pitch [n, frames] of random crops."""
    wave16 = crops.draw16(n, frames)
    mel, _ = mel_and_wave(wave16)
    return mel, pitch(wave16)[:, MARGIN:-MARGIN]


@torch.no_grad()
def pitch_errors(predictor: ConvRNNF0Predictor, crops: SpeechCrops, n: int) -> dict[str, float]:
    """How often voicing is judged wrongly, and the mean relative error of the pitch where both say voiced."""
    mel, target = mel_and_pitch(crops, n, 100)
    predicted = predictor(mel)
    voiced = predicted > 10  # upstream's nsf_voiced_threshold
    both = voiced & (target > 0)
    relative = ((predicted - target).abs() / target.clamp(min=1))[both]
    return {
        "voicing_error": float((voiced != (target > 0)).float().mean()),
        "pitch_error": float(relative.mean()) if both.any() else float("nan"),
    }


class Uniform:
    """`torch.distributions.Uniform` for two plain numbers, without its checks and copies from the CPU."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def sample(self, sample_shape: tuple[int, ...]) -> Tensor:
        return self.low + (self.high - self.low) * torch.rand(sample_shape)


def speak(hift: HiFTGenerator, mel: Tensor) -> Tensor:
    """Upstream's forward pass with gradients: mel [B, 80, T] -> wave [B, T * 480].

    Upstream makes the source's sines and phases on the CPU and copies them over in every call; here they are made
    where they are needed, and the inverse transform asks the device nothing, so that nothing waits and the step can be
    recorded.
    """
    pitch = hift.f0_upsamp(hift.f0_predictor(mel)[:, None]).mT
    with mel.device, mock.patch.object(hifigan, "Uniform", Uniform):
        source, _, _ = hift.m_source(pitch)
    with mock.patch.object(hift, "_istft", partial(inverse_transform, hift)):
        return hift.decode(x=mel, s=source.mT)


def inverse_transform(hift: HiFTGenerator, magnitude: Tensor, phase: Tensor) -> Tensor:
    """`HiFTGenerator._istft`: magnitudes and phases [B, bins, T] -> wave [B, (T - 1) * hop]."""
    n_fft, hop = hift.istft_params["n_fft"], hift.istft_params["hop_len"]
    spectrum = torch.polar(magnitude.clip(max=1e2), phase)
    return inverse_stft(spectrum, hift.stft_window.to(magnitude.device), hop, n_fft // 2)


def train(corpus: Corpus, run: Run) -> dict[str, float]:
    """Train mel2wav on the corpus's speech; writes its state to run.path("hift").

    Returns held-out spectral distances (`stft`, `mel`) and the pitch predictor's errors.
    """
    torch.manual_seed(run.seed)
    rng = torch.Generator(run.device).manual_seed(run.seed)
    crops, held_out = (SpeechCrops.of(part, rng) for part in corpus.split(HELD_OUT))
    recipe = Recipe(run.steps(STEPS))
    hift = models.build_s3gen().mel2wav.to(run.device)
    hift.stft_window = hift.stft_window.to(run.device)  # no buffer: upstream copies it over in every call
    train_pitch(hift.f0_predictor, crops, recipe.batch, run)
    hift.f0_predictor.requires_grad_(False)
    generate = partial(speak, hift)
    fit("hift", hift, generate, crops, recipe, rng, run)
    fit("hift_polish", hift, generate, crops, polish(Recipe(run.steps(POLISH_STEPS))), rng, run)
    run.save("hift", hift.eval().state_dict())
    spectrum = distance(generate, held_out, recipe.batch)
    return spectrum | pitch_errors(hift.f0_predictor, held_out, recipe.batch)
