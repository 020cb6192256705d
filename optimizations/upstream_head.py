"""What upstream's main branch changed in T3's loop after 0.1.7."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import LlamaModel

from harness.pipeline import Pipeline
from harness.sampling import MULTILINGUAL
from optimizations.base import Evidence, Optimization, register
from optimizations.common.probe import probe

PENALTY = 1.2
"""The multilingual class's default for repetitions on upstream's main branch; in 0.1.7 it is 2.0."""


@register
class UpstreamHead(Optimization):
    """A second baseline: upstream as its main branch is, rather than as 0.1.7 was released.

    Baseline: `T3.inference` of chatterbox-tts 0.1.7 asks every step for the attentions of all layers, which nobody
    reads (the multilingual guard looks at three heads through hooks of its own), and the multilingual class penalizes
    repetitions by 2.0.
    Change: no attentions are asked for, and that penalty is 1.2, where it was left at the class's default. All else is
    0.1.7's, its loop and its cache included.
    Why: so that a speed-up is also told against what upstream would be without any of this project's work:
    `+combo=production baseline=upstream_head`.
    Where not: with this project's own decode loop (`alignment_analyzer`, `kv_cache`), which asks for no attentions
    either and does not call upstream's. Turbo's loop did not change.
    The campaign had nothing of the kind.
    Evidence: steps of a probe through the transformer, how many of them upstream's loop asked for attentions (all), how
    many gave some (none); the penalty.
    """

    name = "upstream_head"
    extra = True
    lossless = False

    def unavailable(self, pipeline: Pipeline) -> str | None:
        if not isinstance(pipeline.model.t3.tfmr, LlamaModel):
            return "upstream's main branch left Turbo as it was"
        return None

    def apply(self, pipeline: Pipeline) -> None:
        self._steps: list[tuple[bool, bool]] = []
        pipeline.wrap(pipeline.model.t3.tfmr, "forward", self._unasked)
        if pipeline.is_multilingual and pipeline.sampling.repetition_penalty == MULTILINGUAL.repetition_penalty:
            pipeline.swap(pipeline, "sampling", replace(pipeline.sampling, repetition_penalty=PENALTY))

    def _unasked(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs | {"output_attentions": False})
            self._steps.append((bool(kwargs.get("output_attentions")), bool(output.attentions)))
            return output

        return run

    def evidence(self, pipeline: Pipeline) -> Evidence:
        self._steps.clear()
        probe(pipeline)
        asked, given = ([step[i] for step in self._steps] for i in range(2))
        facts = {
            "steps_count": len(self._steps),
            "steps_asked_for_attentions_count": sum(asked),
            "steps_with_attentions_count": sum(given),
            "repetition_penalty": pipeline.sampling.repetition_penalty,
        }
        if not any(asked):
            return Evidence(False, facts, "upstream's loop did not run: leave out what replaces it")
        reason = "attentions were given all the same" if any(given) else None
        return Evidence(reason is None, facts, reason)
