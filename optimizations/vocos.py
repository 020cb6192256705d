"""Another vocoder behind the same mel."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from harness.errors import UserError
from harness.mini import vocos
from harness.mini.models import WEIGHTS
from harness.pipeline import Pipeline
from optimizations.base import Evidence, Optimization, register
from optimizations.common.modules import n_bytes, weights

MINI_CHECKPOINT = WEIGHTS / "vocos.safetensors"
FIRST_LAYER, LAST_LAYER = "backbone.embed.weight", "head.out.weight"


@register
class Vocos(Optimization):
    """Vocos in the place of HiFT.

    Baseline: HiFT predicts a pitch, builds a source signal from it, and climbs from 50 frames to 24,000 samples a
    second through three stages of convolutions that get ever longer. It is one pass, 83 MB at full size.

    This: Vocos (Siuzdak 2023, arXiv 2306.00814) stays at 50 frames a second and leaves the climb to one inverse
    Fourier transform. Mels of the same length go through it as one batch. Upstream's 20 ms fade-in is kept.

    Where it cannot help: the vocoder takes some 5 % of the time; a vocoder that was not trained on this very mel is
    noise. So the mel of the checkpoint is held against the pipeline's before anything is replaced, and nothing is
    put between the two. The loss of quality, if any, is for WER and similarity to judge.

    Campaign: "89 % RTF improvement, 16 % VRAM reduction": its RTF was inverted, and an untrained linear layer stood
    between Chatterbox's 80-bin mel and a vocoder for 100 bins at hop 256, so that what came out was not speech.

    Evidence: calls of either vocoder in the runs (HiFT's must be 0), the mel of both, their sizes. HiFT waits on the
    CPU, so that a GPU's memory shows the exchange.
    """

    name = "vocos"
    lossless = False
    replaces = ("mel_to_wave",)

    @dataclass
    class Config:
        """`checkpoint`: safetensors file of a Vocos for this pipeline's mel; None: the one that came with it."""

        checkpoint: str | None = None

    def unavailable(self, pipeline: Pipeline) -> str | None:
        path, wanted = self._checkpoint(pipeline), pipeline_mel(pipeline)
        if path is None:
            return (
                f"there is no Vocos for this pipeline's mel ({wanted}): train one with "
                "`python -m harness.mini.training vocos` (miniature), or distil one from the pipeline's own HiFT with "
                "`python -m harness.mini.training.distill_vocos`, and name it in optimizations.vocos.checkpoint"
            )
        bins, n_fft = stored_mel(path)
        if (bins, n_fft) != (wanted.bins, wanted.n_fft):
            return (
                f"{path} is a Vocos for a mel of {bins} bins and n_fft {n_fft}; this pipeline's has {wanted}: distil "
                "one from the pipeline's own HiFT with `python -m harness.mini.training.distill_vocos`"
            )
        return None

    def apply(self, pipeline: Pipeline) -> None:
        if reason := self.unavailable(pipeline):
            raise UserError(f"optimizations.vocos: {reason}")
        path = self._checkpoint(pipeline)
        vocoder, wanted = vocos.load(str(path), pipeline.device), pipeline_mel(pipeline)
        if (given := vocoder_mel(vocoder, pipeline.model.sr)) != wanted:
            raise UserError(f"optimizations.vocos.checkpoint={path} reads a mel of {given}, not one of {wanted}")
        hift = pipeline.model.s3gen.mel2wav
        self._stage = VocosStage(vocoder, pipeline.model.s3gen.trim_fade)
        self._hift_calls = 0
        pipeline.on_undo(hift.conv_pre.register_forward_hook(self._count).remove)
        pipeline.on_undo(lambda: hift.to(pipeline.device))
        hift.to("cpu")
        pipeline.replace_stage("mel_to_wave", self._stage, by=self.name)

    def evidence(self, pipeline: Pipeline) -> Evidence:
        vocoder, hift = self._stage.vocoder, pipeline.model.s3gen.mel2wav
        facts = {
            "vocoder": type(vocoder).__name__,
            "vocos_calls_count": self._stage.n_calls,
            "hift_calls_count": self._hift_calls,
            "vocoder_mel": vocoder_mel(vocoder, pipeline.model.sr).facts(),
            "pipeline_mel": pipeline_mel(pipeline).facts(),
            "vocos_parameters_count": _n_parameters(vocoder),
            "hift_parameters_count": _n_parameters(hift),
            "vocos_bytes": n_bytes(weights(vocoder)),
            "hift_bytes": n_bytes(weights(hift)),
        }
        if self._hift_calls or not self._stage.n_calls:
            return Evidence(False, facts, "HiFT made waves" if self._hift_calls else "Vocos made no wave")
        return Evidence(True, facts)

    def _checkpoint(self, pipeline: Pipeline) -> Path | None:
        """The file to load. Raises UserError if the one that was asked for is not there."""
        if self.config.checkpoint is None:
            return MINI_CHECKPOINT if pipeline.name.startswith("mini") and MINI_CHECKPOINT.is_file() else None
        path = Path(self.config.checkpoint)
        if not path.is_file():
            raise UserError(
                f"optimizations.vocos.checkpoint={path}: no such file; `python -m harness.mini.training.distill_vocos`"
            )
        return path

    def _count(self, *_: object) -> None:
        self._hift_calls += 1


class VocosStage:
    """Mels [1, 80, frames] -> waves [frames * 480]; a stage of the pipeline."""

    def __init__(self, vocoder: nn.Module, fade: Tensor) -> None:
        self.vocoder = vocoder.requires_grad_(False)
        self.fade = fade
        self.n_calls = 0

    @torch.inference_mode()
    def __call__(self, mels: list[Tensor]) -> list[Tensor]:
        lengths = [mel.shape[-1] for mel in mels]
        waves: dict[int, Tensor] = {}
        for length in set(lengths):
            same = [i for i, other in enumerate(lengths) if other == length]
            batch = self.vocoder(torch.cat([mels[i] for i in same]).float())
            batch[:, : len(self.fade)] *= self.fade
            self.n_calls += 1
            waves.update(zip(same, batch, strict=True))
        return [waves[i] for i in range(len(mels))]


# -- whose mel? ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mel:
    """What two models must agree on before one can read the other's mel."""

    bins: int
    n_fft: int
    hop: int
    sample_rate: int

    def __str__(self) -> str:
        return f"{self.bins} bins, n_fft {self.n_fft}, hop {self.hop}, {self.sample_rate} Hz"

    def facts(self) -> dict[str, int]:
        return {
            "bins_count": self.bins,
            "n_fft_samples": self.n_fft,
            "hop_samples": self.hop,
            "sample_rate_hz": self.sample_rate,
        }


def pipeline_mel(pipeline: Pipeline) -> Mel:
    """The mel that the flow makes: the defaults of the extractor that it was trained with."""
    extractor = inspect.signature(pipeline.model.s3gen.mel_extractor).parameters
    return Mel(*(extractor[name].default for name in ("num_mels", "n_fft", "hop_size", "sampling_rate")))


def vocoder_mel(vocoder: Any, sample_rate: int) -> Mel:
    """The mel that a loaded Vocos reads, from its own layers; its sample rate is only known by its maker."""
    transform = vocoder.head.istft
    return Mel(vocoder.backbone.embed.in_channels, transform.n_fft, transform.hop_length, sample_rate)


def stored_mel(path: Path) -> tuple[int, int]:
    """Bins and n_fft of a stored Vocos, from the shapes of its first and last layer.

    Raises UserError for a file that holds no Vocos.
    """
    try:
        with safe_open(path, "pt") as file:
            first, last = (file.get_slice(name).get_shape() for name in (FIRST_LAYER, LAST_LAYER))
    except SafetensorError as error:
        raise UserError(f"optimizations.vocos.checkpoint={path} is no Vocos in a safetensors file: {error}") from error
    return first[1], last[0] - 2


def _n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
