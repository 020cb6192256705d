"""The keys and values of many rows in 8 bits, read as they are by the decode kernel."""

from __future__ import annotations

from typing import Any

import torch

from harness.pipeline import Pipeline
from optimizations.base import Evidence, Optimization, register
from optimizations.common.kernels import for_device
from optimizations.t3.decoder import Decoder, decoder_of
from optimizations.t3.int8 import rounded

KERNELS = "optimizations.t3.triton_engine"


@register
class Int8Cache(Optimization):
    """Keys and values of T3 as 8-bit numbers with a scale for each slot of each head, in batches.

    Baseline: keys and values in the dtype of the weights, 246 KB a slot in float32. At 128 rows and 350 slots a step
    reads five times as many bytes of them as of T3's weights.
    This: what a slot holds of a head, 64 numbers, is divided by the largest of them and rounded to one of 255 steps,
    where it is written: the prompt's by PyTorch, a step's in the kernel that attends. That kernel reads the numbers
    and multiplies what it has summed up by the scales. A prompt's own positions see one another unrounded.
    Why: half of bfloat16's bytes and four more a slot's head: half as much memory for the same batch, and less to read.
    Where not: up to 16 rows, which are eight utterances with guidance. They keep floats: their time is the weights'.
    With `int8_weights`, whose batches go through the layers; for the multilingual guard, which reads the cache; on a
    CPU. `continuous_batching` has a cache of its own, of floats.
    Not lossless: rounding moves a number by up to a 254th of the largest in its slot's head.
    The campaign had nothing of the kind.
    Evidence: batches that were large enough, a slot's bytes in both, and the relative error of a voice's keys and
    values.
    """

    name = "int8_cache"
    extra = True
    lossless = False
    requires = ("kv_cache", "compile")

    def unavailable(self, pipeline: Pipeline) -> str | None:
        kernels, stage = for_device(KERNELS, pipeline.device), pipeline.stages["generate_tokens"]
        if kernels is None:
            return f"on {pipeline.device} nothing reads a cache in 8 bits: use device=cuda, and the package triton"
        if not isinstance(stage, Decoder) or not isinstance(stage.engine, kernels.TritonEngine):
            return "the Triton kernels of compile.decode=triton read such a cache: switch compile and kv_cache on"
        if stage.guarded:
            return "the multilingual guard reads the cache, which it cannot in 8 bits: leave int8_cache out"
        if stage.engine.scaled:
            return "with int8_weights batches go through the layers, which read floats: switch one of the two off"
        return None

    def apply(self, pipeline: Pipeline) -> None:
        self._kernels: Any = for_device(KERNELS, pipeline.device)
        self._decoder = decoder_of(pipeline, self.name)
        pipeline.wrap(self._decoder, "engine", lambda e: self._kernels.engine_for(e.tfmr, e.bucket, int8_cache=True))

    def evidence(self, pipeline: Pipeline) -> Evidence:
        decoder, few = self._decoder, self._kernels.few
        loop = decoder.captured_loop
        large = [n for n in decoder.batches if not few(decoder.sides * (loop.n_rows(n) if loop else n))]
        engine: Any = decoder.engine
        few_rows, many_rows = self._kernels.MAX_ROWS, self._kernels.MAX_ROWS + 1
        facts: dict[str, Any] = {
            "batches_in_8_bits_count": len(large),
            "slot_of_floats_bytes": engine.slot_bytes(few_rows),
            "slot_in_8_bits_bytes": engine.slot_bytes(many_rows),
            **self._errors(pipeline),
        }
        reason = "no batch had more than 16 rows: try workload.scenario=offline with batching"
        return Evidence(bool(large), facts, None if large else reason)

    @torch.inference_mode()
    def _errors(self, pipeline: Pipeline) -> dict[str, float]:
        """How far rounding takes the keys and values of a voice's opening, relative to them."""
        voice = next(iter(pipeline.voices.values()))
        layers = self._decoder.engine.prefix(pipeline.model.t3.prepare_conditioning(voice.t3))
        errors = {}
        for name, kind in zip(("keys", "values"), zip(*layers, strict=True), strict=True):
            exact = torch.stack(kind).float()
            numbers, scales = rounded(exact)
            errors[f"{name}_relative_error"] = float((numbers * scales[..., None] - exact).norm() / exact.norm())
        return errors
