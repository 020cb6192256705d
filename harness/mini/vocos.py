"""Vocos for Chatterbox's mel: 80 bins at 50 frames/s in, 24 kHz out (Siuzdak 2023, arXiv 2306.00814).

HiFT climbs from 50 frames to 24,000 samples a second through ever longer layers. Vocos stays at 50 frames a second
to the end, and leaves the climb to one inverse Fourier transform; hence its speed. The classes are those of the
`vocos` package, set to the mel that upstream's flow makes, so nothing stands between the two.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vocos.heads import ISTFTHead
from vocos.models import VocosBackbone
from vocos.spectral_ops import ISTFT

from harness.errors import UserError
from harness.mini.inverse_stft import inverse_stft

HOP = 480  # samples of 24 kHz wave in a mel frame
WINDOW = 4 * HOP  # the window of upstream's mel
# The package's head clips magnitudes at 100, and with windows this long a loud voice's harmonics reach twice that.
# So the head speaks at a quarter of the loudness.
LOUDNESS = 4.0


@dataclass(frozen=True)
class Hparams:
    """Size of a Vocos: 1.3 M parameters by default, 13.9 M as in the paper."""

    dim: int = 160
    intermediate_dim: int = 480
    num_layers: int = 6


PAPER = Hparams(dim=512, intermediate_dim=1536, num_layers=8)


class OverlapAdd(ISTFT):
    """The package's inverse transform without its assertion, whose answer the host would have to wait for."""

    def forward(self, spec: Tensor) -> Tensor:
        """Spectrogram [B, n_fft / 2 + 1, T] -> wave [B, T * hop]."""
        return inverse_stft(spec, self.window, self.hop_length, (self.win_length - self.hop_length) // 2)


class MelVocos(nn.Module):
    """Backbone and inverse-Fourier head: mel [B, 80, T] (natural log, upstream's) -> wave [B, T * 480]."""

    def __init__(self, hparams: Hparams) -> None:
        super().__init__()
        self.hparams = hparams
        self.backbone = VocosBackbone(80, **asdict(hparams))
        self.head = ISTFTHead(hparams.dim, n_fft=WINDOW, hop_length=HOP, padding="same")
        self.head.istft = OverlapAdd(n_fft=WINDOW, hop_length=HOP, win_length=WINDOW, padding="same")

    def forward(self, mel: Tensor) -> Tensor:
        return LOUDNESS * self.head(self.backbone(mel))


def build(hparams: Hparams | None = None) -> MelVocos:
    """A new Vocos with random weights."""
    return MelVocos(hparams or Hparams())


def save(vocoder: MelVocos, path: Path) -> None:
    """Write weights as float16 (a vocoder loses nothing audible by it), and the sizes into the file's metadata."""
    state = {name: t.detach().half().contiguous() for name, t in vocoder.named_parameters()}
    save_file(state, path, metadata={"vocos": json.dumps(asdict(vocoder.hparams))})


def load(path: str | Path, device: str | torch.device = "cpu") -> MelVocos:
    """Read what `save` wrote, ready for inference in float32. Raises UserError for another kind of file."""
    if not Path(path).is_file():
        raise UserError(f"no Vocos weights at {path}: train them with `python -m harness.mini.training.distill_vocos`")
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if "vocos" not in metadata:
        raise UserError(
            f"{path} holds no Vocos for Chatterbox's mel: make one with `python -m harness.mini.training.distill_vocos`"
        )
    vocoder = build(Hparams(**json.loads(metadata["vocos"])))
    weights = {name: t.float() for name, t in load_file(path).items()}
    vocoder.load_state_dict(vocoder.state_dict() | weights)  # the window is not stored
    return vocoder.to(device).eval()
