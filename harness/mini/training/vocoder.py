"""What HiFT and Vocos share: pairs of mel and wave to learn from, and the adversarial training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from harness.mini.training import features
from harness.mini.training.captured import CapturedStep
from harness.mini.training.losses import Critics, SpectralLoss, critic_loss, deception_loss, feature_loss
from harness.mini.training.run import Run, learning_rate
from harness.mini.vocos import HOP

if TYPE_CHECKING:
    from harness.mini.training.speech import Corpus

HOP16 = 320  # the same 20 ms at 16 kHz
# A mel frame's window is four hops long. Cropped speech is cut this many frames wider at each side, so that no
# frame which is kept has seen the artificial border.
MARGIN = 3
HELD_OUT = 0.01  # share of the utterances, for validation
CHECKPOINT_EVERY = 1000  # steps


class Pairs(Protocol):
    """A source of training pairs: `draw(n, frames)` gives mel [n, 80, frames] and wave [n, frames * 480]."""

    def draw(self, n: int, frames: int) -> tuple[Tensor, Tensor]: ...


@dataclass
class SpeechCrops:
    """Random crops of recorded speech: the mel of what was said, and what was said.

    A crop may reach past a short utterance into the next: a vocoder looks at some tenths of a second, and a pause
    between two voices teaches it nothing wrong. Hence there is nothing to pad.
    """

    audio: Tensor  # int16 [samples] at 16 kHz; all tensors on the device that trains
    starts: Tensor  # int64 [utterances]
    lengths: Tensor  # int64 [utterances]
    rng: torch.Generator

    @classmethod
    def of(cls, corpus: Corpus, rng: torch.Generator) -> SpeechCrops:
        """Crops of a corpus, on the device of `rng`."""
        arrays = (np.array(a) for a in (corpus.audio, corpus.starts, corpus.lengths))
        audio, starts, lengths = (torch.from_numpy(a).to(rng.device) for a in arrays)
        return cls(audio, starts, lengths, rng)

    def draw16(self, n: int, frames: int) -> Tensor:
        """Crops at 16 kHz with their margins, float in [-1, 1]: [n, (frames + 2 * MARGIN) * 320]."""
        length = (frames + 2 * MARGIN) * HOP16
        starts = crop_starts(self.starts, self.lengths, n, length, self.rng).clamp(max=len(self.audio) - length)
        return self.audio[starts[:, None] + torch.arange(length, device=starts.device)].float() / 32768

    def draw(self, n: int, frames: int) -> tuple[Tensor, Tensor]:
        """Mel [n, 80, frames] and wave [n, frames * 480] at 24 kHz."""
        return mel_and_wave(self.draw16(n, frames))


def crop_starts(starts: Tensor, lengths: Tensor, n: int, length: int, rng: torch.Generator) -> Tensor:
    """Where n random crops of `length` begin, each inside a random one of the utterances, if it fits there."""
    chosen = torch.randint(len(starts), (n,), generator=rng, device=starts.device)
    room = (lengths[chosen] - length + 1).clamp(min=0)
    return starts[chosen] + (torch.rand(n, generator=rng, device=starts.device) * room).long()


def mel_and_wave(wave16: Tensor) -> tuple[Tensor, Tensor]:
    """Mel and 24 kHz wave of 16 kHz crops [B, samples], both without the crops' margins."""
    wave = features.wav24(wave16)
    mel = features.mel80(wave)
    return mel[..., MARGIN:-MARGIN], wave[:, MARGIN * HOP : -MARGIN * HOP]


def roughened(mel: Tensor, rng: torch.Generator, most: float = 0.15) -> Tensor:
    """Mel with white noise of a random strength up to `most` (in natural-log units), different for each row.

    A flow's mels are never as exact as measured ones. A vocoder that has only met exact ones turns their small
    errors into rough speech; one that has met noise learns to look past it.
    """
    strength = most * torch.rand(mel.shape[0], 1, 1, generator=rng, device=mel.device)
    return mel + strength * torch.randn(mel.shape, generator=rng, device=mel.device)


@dataclass
class Recipe:
    """How long and how hard to train. As in HiFi-GAN, the spectrum weighs most and the critics refine it."""

    steps: int
    batch: int = 48
    frames: int = 40  # 0.8 s
    learning_rate: float = 5e-4
    # The critics join after this part of the steps: before it the fakes are too poor to learn taste from.
    critics_from: float = 0.4
    mel_weight: float = 15.0
    stft_weight: float = 2.0
    deception_weight: float = 1.0
    feature_weight: float = 4.0


def polish(recipe: Recipe) -> Recipe:
    """The recipe to go on with by the spectrum alone, after the critics: a recognizer hears spectra."""
    return replace(recipe, critics_from=1.0)


def adam(
    parameters: Iterable[nn.Parameter], peak: float, betas: tuple[float, float] = (0.9, 0.98)
) -> torch.optim.AdamW:
    """AdamW, in one fused kernel where the device has it; its learning rate is a tensor there (see `set_rate`)."""
    parameters = list(parameters)
    gpu = parameters[0].is_cuda
    rate = torch.tensor(peak, device=parameters[0].device) if gpu else peak
    return torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=0.01, fused=gpu, capturable=gpu)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Change the learning rate where it stands, so that a recorded step sees it too."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@contextmanager
def fast_arithmetic() -> Iterator[None]:
    """Lets a GPU multiply in TF32, and try out which convolution kernels suit shapes that never change."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.benchmark = before[1]


@fast_arithmetic()
def fit(
    stage: str,
    vocoder: nn.Module,
    generate: Callable[[Tensor], Tensor],
    pairs: Pairs,
    recipe: Recipe,
    rng: torch.Generator,
    run: Run,
) -> None:
    """Train those parameters of a vocoder that want a gradient, in place; resumes where a cut-off run stopped.

    `generate` is the vocoder's way from mel [B, 80, T] to wave [B, T * 480].
    """
    device = rng.device
    spectral = SpectralLoss().to(device)
    critics = Critics().to(device)
    learning = [p for p in vocoder.parameters() if p.requires_grad]
    ours = adam(learning, recipe.learning_rate, betas=(0.8, 0.99))
    theirs = adam(critics.parameters(), recipe.learning_rate, betas=(0.8, 0.99))
    modules = {"vocoder": vocoder, "critics": critics}
    optimizers: dict[str, torch.optim.Optimizer] = {"ours": ours, "theirs": theirs}
    first = run.resume(stage, modules, optimizers)
    opening = int(recipe.critics_from * recipe.steps)
    # Critics tolerate bfloat16; the generator's phases and the spectra do not.
    listening = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def learn_spectrum(mel: Tensor, real: Tensor) -> dict[str, Tensor]:
        fake = generate(mel)
        losses = spectral(fake, real)
        follow(recipe.mel_weight * losses["mel"] + recipe.stft_weight * losses["stft"])
        return losses

    def learn_from_critics(mel: Tensor, real: Tensor) -> dict[str, Tensor]:
        fake = generate(mel)
        losses = spectral(fake, real)
        with listening:
            losses["critics"] = critic_loss(critics(fake.detach()), critics(real))
        theirs.zero_grad()
        losses["critics"].backward()
        theirs.step()

        # A critic's own weights need no gradient while it judges for the generator.
        critics.requires_grad_(False)
        with listening:
            verdicts = critics(fake)
            losses["deception"] = deception_loss(verdicts)
            losses["features"] = feature_loss(verdicts, critics(real))
        critics.requires_grad_(True)
        spectrum = recipe.mel_weight * losses["mel"] + recipe.stft_weight * losses["stft"]
        taste = recipe.deception_weight * losses["deception"] + recipe.feature_weight * losses["features"]
        follow(spectrum + taste)
        return losses

    def follow(loss: Tensor) -> None:
        ours.zero_grad()
        loss.backward()
        # One crop of near-silence can throw a spectral convergence far off; it must not throw the weights.
        nn.utils.clip_grad_norm_(learning, 10.0)
        ours.step()

    early, late = CapturedStep(learn_spectrum), CapturedStep(learn_from_critics)
    for step in range(first, recipe.steps):
        for optimizer in (ours, theirs):
            set_rate(optimizer, learning_rate(step, recipe.steps, recipe.learning_rate))
        mel, real = pairs.draw(recipe.batch, recipe.frames)
        losses = (early if step < opening else late)(roughened(mel, rng), real)
        if step % 100 == 0 or step == recipe.steps - 1:
            run.log(stage, step, **{name: float(value.detach()) for name, value in losses.items()})
        if (step + 1) % CHECKPOINT_EVERY == 0:
            run.checkpoint(stage, step + 1, modules, optimizers)


@torch.no_grad()
def distance(generate: Callable[[Tensor], Tensor], pairs: Pairs, n: int, frames: int = 100) -> dict[str, float]:
    """Spectral distances of generated to real speech over n pairs, as `SpectralLoss` names them."""
    mel, real = pairs.draw(n, frames)
    losses = SpectralLoss().to(real.device)(generate(mel), real)
    return {name: float(value) for name, value in losses.items()}
