"""The keys and values of many rows in 8 bits, read as they are by the decode kernel."""

from __future__ import annotations

from typing import Any

import torch

from harness.pipeline import Pipeline
from optimizations.base import Evidence, Optimization, register
from optimizations.common.kernels import for_device
from optimizations.t3.decoder import Decoder, decoder_of
from optimizations.t3.engines import MANY_ROWS, StaticEngine
from optimizations.t3.int8 import rounded

KERNELS = "optimizations.t3.triton_engine"


@register
class Int8Cache(Optimization):
    """Keys and values of T3 as 8-bit numbers with a scale for each slot of each head, in batches.

    Baseline: keys and values in the dtype of the weights, in float32 246 KB for each slot of each row. At 128 rows and
    350 slots a step reads five times as many bytes of them as of T3's weights.
    This: what a head keeps in a slot, 64 numbers, is divided by the largest of them and rounded to one of 255 steps
    where it is written: the prompt's by PyTorch, a step's in the kernel that attends. That kernel reads the numbers as
    they are and multiplies scores and weights by the scales; sums are float32. What is new in a prompt or a step is
    seen unrounded in it, later rounded.
    Why: half of bfloat16's bytes, and four more for each slot's head: half the memory for the same batch, and half as
    much to read.
    Where not: up to 16 rows, which are eight utterances with guidance. They keep floats: their time is the weights'.
    With `int8_weights`, whose batches go through the layers; with the multilingual guard, which reads the cache; on a
    CPU. `continuous_batching` has a cache of its own, of floats.
    Not lossless: rounding moves a number by up to half a step, a 254th of the largest in its slot's head. The evidence
    says by how much in all; quality decides. A comparison of stages takes this way from nine texts on:
    `quality.fidelity_texts=9`.
    The campaign had nothing of the kind.
    Evidence: batches that were kept in 8 bits, a slot's bytes in both forms, and the relative error of a voice's keys
    and values.
    """

    name = "int8_cache"
    extra = True
    lossless = False
    requires = ("kv_cache", "compile")
    only_on_gpu = True

    def unavailable(self, pipeline: Pipeline) -> str | None:
        stage = pipeline.stages["generate_tokens"]
        if not isinstance(stage, Decoder) or not isinstance(stage.engine, StaticEngine):
            return "8 bits are read by the decode kernels over a static cache: switch kv_cache and compile on"
        kernels = for_device(KERNELS, pipeline.device)
        if kernels is None:
            return f"on {pipeline.device} no kernel reads a cache in 8 bits: use device=cuda, and the package triton"
        if not isinstance(stage.engine, kernels.TritonEngine):
            return "8 bits are read by the Triton kernels: switch compile on, with compile.decode=triton"
        if stage.guarded:
            return "the multilingual guard reads the cache, which it cannot in 8 bits: leave int8_cache out"
        if stage.engine.scaled:
            return "with int8_weights batches go through the layers, which read floats: switch one of the two off"
        return None

    def apply(self, pipeline: Pipeline) -> None:
        self._decoder = decoder_of(pipeline, self.name)
        pipeline.swap(self._decoder.engine, "int8_cache", True)

    def evidence(self, pipeline: Pipeline) -> Evidence:
        decoder, loop = self._decoder, self._decoder.captured_loop
        engine: Any = decoder.engine
        rows = [decoder.sides * (loop.n_rows(n) if loop else n) for n in decoder.batches]
        packed = [n for n in rows if engine.packs(n)]
        facts: dict[str, Any] = {
            "batches_in_8_bits_count": len(packed),
            "slot_in_floats_bytes": engine.slot_bytes(MANY_ROWS),
            "slot_in_8_bits_bytes": engine.slot_bytes(MANY_ROWS + 1),
            **self._errors(pipeline),
        }
        reason = f"no batch had more than {MANY_ROWS} rows: try batching with workload.scenario=offline"
        return Evidence(bool(packed), facts, None if packed else reason)

    @torch.inference_mode()
    def _errors(self, pipeline: Pipeline) -> dict[str, float]:
        """How far rounding takes the keys and values of a voice's opening, relative to them."""
        voice = next(iter(pipeline.voices.values()))
        engine: Any = self._decoder.engine
        layers = engine.prefix(pipeline.model.t3.prepare_conditioning(voice.t3))
        errors = {}
        for name, kind in zip(("keys", "values"), zip(*layers, strict=True), strict=True):
            exact = torch.stack(kind).float()
            numbers, scales = rounded(exact)
            errors[f"{name}_relative_error"] = float((numbers * scales[..., None] - exact).norm() / exact.norm())
        return errors
