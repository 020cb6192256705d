"""Vocos learns what HiFT learns, by the same lessons: the spectrum first, then what a critic hears."""

from __future__ import annotations

import torch

from harness.mini.training.run import Run
from harness.mini.training.speech import Corpus
from harness.mini.training.vocoder import HELD_OUT, Recipe, SpeechCrops, distance, fit, polish
from harness.mini.vocos import build, save

STEPS = 1_500
POLISH_STEPS = 6_000


def train(corpus: Corpus, run: Run) -> dict[str, float]:
    """Train on the corpus's speech; writes run.path("vocos"). Returns spectral distances on held-out speech."""
    torch.manual_seed(run.seed)
    rng = torch.Generator(run.device).manual_seed(run.seed)
    crops, held_out = (SpeechCrops.of(part, rng) for part in corpus.split(HELD_OUT))
    vocoder, recipe = build().to(run.device), Recipe(run.steps(STEPS))
    fit("vocos", vocoder, vocoder, crops, recipe, rng, run)
    fit("vocos_polish", vocoder, vocoder, crops, polish(Recipe(run.steps(POLISH_STEPS))), rng, run)
    save(vocoder, run.path("vocos"))
    return distance(vocoder.eval(), held_out, recipe.batch)
