"""Train a Vocos for any Chatterbox checkpoint, from nothing but the checkpoint and some text.

    python -m harness.mini.training.distill_vocos --texts sentences.txt --out vocos.safetensors --checkpoint-dir DIR

The pipeline speaks the sentences; every mel that its flow makes goes to its own vocoder, HiFT, and the pair of mel
and wave is a lesson for Vocos. So the student learns the mels it will meet, in the voice that it shall replace, and
no recording is needed. `optimizations.vocos.checkpoint=vocos.safetensors` then puts the student to work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from harness import checkpoints
from harness.errors import UserError
from harness.mini import vocos
from harness.mini.training.run import Run
from harness.mini.training.vocoder import Recipe, crop_starts, distance, fit
from harness.mini.vocos import HOP
from harness.pipeline import Pipeline

FADE = 2  # mel frames at an utterance's start that upstream silences after HiFT
HELD_OUT = 0.05
SIZES = {"small": vocos.Hparams(), "paper": vocos.PAPER}


@dataclass
class SpokenPairs:
    """What a pipeline said: mels and HiFT's waves, one utterance after the other."""

    mel: Tensor  # [frames, 80]
    wave: Tensor  # [frames * 480]
    starts: Tensor  # int64 [utterances], in frames
    lengths: Tensor  # int64 [utterances], in frames
    rng: torch.Generator

    @classmethod
    def of(cls, utterances: Sequence[tuple[Tensor, Tensor]], rng: torch.Generator) -> SpokenPairs:
        """From (mel [80, T], wave [T * 480]) per utterance."""
        lengths = torch.tensor([mel.shape[1] for mel, _ in utterances], device=rng.device)
        mels, waves = zip(*utterances, strict=True)
        return cls(torch.cat(mels, 1).T, torch.cat(waves), lengths.cumsum(0) - lengths, lengths, rng)

    def draw(self, n: int, frames: int) -> tuple[Tensor, Tensor]:
        """Mel [n, 80, frames] and wave [n, frames * 480] of random crops."""
        frames = min(frames, len(self.mel))
        starts = crop_starts(self.starts, self.lengths, n, frames, self.rng).clamp(max=len(self.mel) - frames)
        at = starts[:, None] + torch.arange(frames, device=starts.device)
        waves = self.wave.view(-1, HOP)[at].flatten(1)
        return self.mel[at].mT, waves


def speak(
    pipeline: Pipeline, texts: Sequence[str], seed: int, tell: Callable[[str], None]
) -> list[tuple[Tensor, Tensor]]:
    """Mel [80, T] and HiFT's wave [T * 480] of each text, spoken by the pipeline's voices in turn."""
    lessons: list[tuple[Tensor, Tensor]] = []

    def recording(vocode: Callable[[list[Tensor]], list[Tensor]]) -> Callable[[list[Tensor]], list[Tensor]]:
        def vocode_and_record(mels: list[Tensor]) -> list[Tensor]:
            waves = vocode(mels)
            for mel, wave in zip(mels, waves, strict=True):
                lessons.append((mel[0, :, FADE:].float(), wave[FADE * HOP :].float()))
            return waves

        return vocode_and_record

    pipeline.wrap_stage("mel_to_wave", recording)
    voices = list(pipeline.voices)
    try:
        for index, text in enumerate(texts):
            pipeline.synthesize(text, voices[index % len(voices)], seed + index)
            if (index + 1) % 10 == 0 or index + 1 == len(texts):
                tell(f"spoken: {index + 1} of {len(texts)} texts")
    finally:
        pipeline.reset()
    return lessons


def distill(
    pipeline: Pipeline, texts: Sequence[str], out: Path, recipe: Recipe, hparams: vocos.Hparams, seed: int = 0
) -> dict[str, float]:
    """Train a Vocos on what `pipeline` says and write it to `out`; gives its distances to HiFT on held-out texts."""
    rng = torch.Generator(pipeline.device).manual_seed(seed)
    lessons = speak(pipeline, texts, seed, print)
    held = max(1, round(HELD_OUT * len(lessons)))
    train, held_out = SpokenPairs.of(lessons[:-held], rng), SpokenPairs.of(lessons[-held:], rng)
    torch.manual_seed(seed)
    student = vocos.build(hparams).to(pipeline.device)
    out.parent.mkdir(parents=True, exist_ok=True)
    run = Run(out.with_suffix(".training"), device=str(pipeline.device), seed=seed)
    fit("vocos", student, student, train, recipe, rng, run)
    vocos.save(student, out)
    figures = distance(student.eval(), held_out, recipe.batch)
    run.finish("vocos", figures)
    return figures


def read_texts(path: Path) -> list[str]:
    """Non-empty lines of a text file; raises UserError if there are too few to learn from."""
    if not path.is_file():
        raise UserError(f"--texts {path}: no such file; give one sentence a line, some hundreds of them")
    texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(texts) < 2:
        raise UserError(f"--texts {path}: {len(texts)} line(s) of text; give one sentence a line, some hundreds")
    return texts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Distill a Vocos from a Chatterbox pipeline's own vocoder.")
    parser.add_argument("--pipeline", default="chatterbox", help="checkpoint: chatterbox, multilingual or mini")
    parser.add_argument("--checkpoint-dir", type=Path, help="folder of the checkpoint's files, instead of the hub")
    parser.add_argument("--texts", type=Path, required=True, help="text file, one sentence a line")
    parser.add_argument("--out", type=Path, required=True, help="where the .safetensors goes")
    parser.add_argument("--size", choices=SIZES, default="paper", help="paper: 13.9 M parameters; small: 1.3 M")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=Recipe.batch)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    try:
        texts = read_texts(options.texts)
        pipeline = checkpoints.load(options.pipeline, options.device, options.checkpoint_dir)
        recipe = Recipe(options.steps, options.batch)
        figures = distill(pipeline, texts, options.out, recipe, SIZES[options.size])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.out}:", *(f"{name} {value:.3f}" for name, value in figures.items()), "from HiFT's, held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
