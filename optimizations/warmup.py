"""Pay for what happens once before anybody waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from harness.pipeline import Pipeline, Utterance
from harness.settings import MOST_TOKENS, number
from optimizations.base import Evidence, Optimization, register

SENTENCE = "The quick brown fox jumps over the lazy dog."
SENTENCE_TOKENS = 70
"""Speech tokens that the sentence takes, roughly: at 25 a second."""


@register
class Warmup(Optimization):
    """Speak a little before the first request.

    Baseline: the first call loads CUDA's kernels, sets up cuBLAS and cuDNN, grows the allocator's memory and, where
    other plugins compile or capture graphs, does that too. The first listener waits for all of it.

    This: when everything else is in place, every stage that can prepare itself does (`prepare()`), and utterances of
    typical lengths are spoken to nobody. Level 1 is one short utterance; level 2 is one of every length in `shapes`.

    Where it cannot help: the steady state is the same with and without; a comparison of warm calls shows nothing.
    What it costs is the same seconds, earlier.

    Campaign: "1.06x faster inference after warmup": a cold call averaged into the baseline.

    Evidence: the seconds of the very first call, and of a later call of the same length; the lengths that were
    spoken and the stages that prepared themselves. Random numbers outside are left as they were found.
    """

    name = "warmup"

    @dataclass
    class Config:
        """`levels`: the highest level, or a list. `shapes`: lengths to speak, in speech tokens, 25 a second."""

        levels: int | list[int] = number(2, least=1, most=2)
        shapes: list[int] = number([8, 64, 250], least=1, most=MOST_TOKENS)

    def unavailable(self, pipeline: Pipeline) -> str | None:
        if not pipeline.voices:
            return "a warm-up needs a voice, and this pipeline has none built in"
        return None

    def apply(self, pipeline: Pipeline) -> None:
        levels, shapes = self._levels(), self.config.shapes
        self.seconds: dict[int, float] = {}
        conditionals = pipeline.model.conds
        cuda = [pipeline.device] if pipeline.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            self.prepared = pipeline.prepare()
            for n_tokens in [min(shapes)] * (1 in levels) + sorted(shapes) * (2 in levels):
                if n_tokens not in self.seconds:
                    self.seconds[n_tokens] = _speak(pipeline.rehearse, pipeline, n_tokens)
        pipeline.model.conds = conditionals

    def evidence(self, pipeline: Pipeline) -> Evidence:
        n_tokens, first_s = next(iter(self.seconds.items()))
        facts = {
            "first_call_s": first_s,
            "later_call_s": _speak(pipeline.synthesize, pipeline, n_tokens),
            "tokens_in_that_call_count": n_tokens,
            "first_s_by_tokens": {str(shape): seconds for shape, seconds in self.seconds.items()},
            "stages_prepared": self.prepared,
        }
        return Evidence(True, facts)

    def _levels(self) -> Iterable[int]:
        levels = self.config.levels
        return range(1, levels + 1) if isinstance(levels, int) else levels


def _speak(synthesize: Callable[..., Utterance], pipeline: Pipeline, n_tokens: int) -> float:
    """Seconds of one utterance with that many speech tokens, and text to match."""
    text = " ".join([SENTENCE] * -(-n_tokens // SENTENCE_TOKENS))
    return synthesize(text, next(iter(pipeline.voices)), seed=0, n_tokens=n_tokens).generation_time_s
