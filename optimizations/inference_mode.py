"""Autograd switched off around the whole pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from chatterbox.models.t3.modules.cond_enc import T3Cond
from chatterbox.tts import Conditionals
from torch import Tensor

from harness.pipeline import STAGES, Pipeline, Stage
from optimizations.base import Evidence, Optimization, register
from optimizations.common.probe import probe, watched_stages


@register
class InferenceMode(Optimization):
    """One `torch.inference_mode` region around everything, conditioning included.

    Baseline: upstream enters inference mode for T3 and S3Gen only. What it does to a reference clip before that, in
    the speech tokenizer and two speaker encoders, runs with autograd on and records a graph that nobody uses; the
    conditionals are normal tensors whose views and versions are tracked in every later operation that touches them.
    Change: every synthesis is one region, from the text to the watermarked wave, and the built-in voices'
    conditionals are copied once as inference tensors.
    Why: an inference tensor has no version counter and no autograd metadata; each operation saves a microsecond or
    so on the host, and conditioning keeps no activations.
    Where not: where a GPU or the arithmetic sets the pace. With built-in voices little is left to gain, since
    upstream already covers the two large stages.
    The campaign rolled it back: upstream writes in place (a cached prompt embedding, the conditionals' dtype), and an
    inference tensor must not be written to outside the region. Here nothing that the region made is written to
    outside it: the copies serve inside, and the originals come back when the pipeline is reset.
    Evidence: for each stage of a probe, how many tensors it gave, how many of them are inference tensors (all, if
    active), and how many autograd nodes hang on them (none). `split_text` gives text and `watermark` arrays: no
    tensors. The condition stage's tensors are the voice's conditionals.
    """

    name = "inference_mode"

    def apply(self, pipeline: Pipeline) -> None:
        for voice in pipeline.voices.values():
            copy = _inference_copy(voice)
            pipeline.swap(voice, "t3", copy.t3)
            pipeline.swap(voice, "gen", copy.gen)
        pipeline.enter_around(torch.inference_mode)

    def evidence(self, pipeline: Pipeline) -> Evidence:
        seen: dict[str, list[Tensor]] = {stage: [] for stage in STAGES}

        def watch(name: str, stage: Stage) -> Stage:
            def run(*args: Any) -> Any:
                result = stage(*args)
                seen[name] += _tensors(result)
                return result

            return run

        with watched_stages(pipeline, watch):
            probe(pipeline)
        facts = {
            stage: {
                "tensors_count": len(tensors),
                "inference_tensors_count": sum(t.is_inference() for t in tensors),
                "autograd_nodes_count": sum(t.grad_fn is not None for t in tensors if not t.is_inference()),
            }
            for stage, tensors in seen.items()
        }
        normal = [stage for stage, f in facts.items() if f["inference_tensors_count"] < f["tensors_count"]]
        reason = f"normal tensors came out of {', '.join(normal)}" if normal else None
        return Evidence(active=not normal, facts={"stages": facts}, reason=reason)


@torch.inference_mode()
def _inference_copy(voice: Conditionals) -> Conditionals:
    """Tensors cloned inside the region are inference tensors."""
    t3 = {name: _clone(value) for name, value in vars(voice.t3).items()}
    return Conditionals(T3Cond(**t3), {name: _clone(value) for name, value in voice.gen.items()})


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _tensors(result: Any) -> list[Tensor]:
    """The tensors in a stage's output."""
    return list(_walk(result))


def _walk(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _walk(item)
    elif isinstance(value, dict):
        yield from _walk(list(value.values()))
    elif isinstance(value, (Conditionals, T3Cond)):
        yield from _walk(vars(value))
