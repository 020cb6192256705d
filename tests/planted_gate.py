"""Two regressions of a known size, planted to see whether the gate finds them: 10 % slower, and WER 0.05 worse.

Their name on the command line: `plugin_modules=[planted_gate] optimizations.planted_slowdown.enabled=true`, with
`tests` on the Python path.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from harness.pipeline import STAGES, Pipeline
from optimizations import Evidence, Optimization, register


@register
class PlantedSlowdown(Optimization):
    """Every stage takes a share longer than it did."""

    name = "planted_slowdown"

    @dataclass
    class Config:
        share: float = 0.10

    def apply(self, pipeline: Pipeline) -> None:
        for stage in STAGES:
            pipeline.wrap_stage(stage, self._slower)

    def _slower(self, stage: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            result = stage(*args)
            time.sleep(self.config.share * (time.perf_counter() - start))
            return result

        return run

    def evidence(self, pipeline: Pipeline) -> Evidence:
        return Evidence(True, {"share": self.config.share})


@register
class PlantedErrors(Optimization):
    """One word in so many is left out: the word error rate rises by `rate`, whatever the text's length.

    Which text loses a word depends on the text and the seed alone, so a request has the same error each time.
    """

    name = "planted_errors"
    lossless = False

    @dataclass
    class Config:
        rate: float = 0.05

    def apply(self, pipeline: Pipeline) -> None:
        pipeline.wrap_stage("split_text", self._forgetful)

    def _forgetful(self, split: Callable[[str], list[str]]) -> Callable[[str], list[str]]:
        def run(text: str) -> list[str]:
            words, chance = text.split(), Random(f"{text} {torch.initial_seed()}")
            if chance.random() < self.config.rate * len(words):
                del words[chance.randrange(len(words))]
            return split(" ".join(words))

        return run

    def evidence(self, pipeline: Pipeline) -> Evidence:
        return Evidence(True, {"rate": self.config.rate})
