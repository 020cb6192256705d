"""T3's linear layers in 8 bits, read as they are by the decode kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from harness.pipeline import Pipeline
from optimizations.base import Evidence, Optimization, register
from optimizations.common.modules import n_bytes, replace_module, weights
from optimizations.t3 import cpp_engine
from optimizations.t3.int8 import Int8Linear, linear_paths


@register
class Int8Weights(Optimization):
    """Weights of T3's transformer as 8-bit numbers with one scale for each output.

    Baseline: float32 weights, 2.0 GB in T3's linear layers, all of which are read for every token.
    This: each row of a matrix is divided by its largest weight and rounded to one of 255 steps. The decode step of
    `compile`, in Triton or in C++, reads these numbers, sums their products with the activations in float32, and
    multiplies the sum by the row's scale; activations are not rounded. Prompts go through the layers, which unpack a
    matrix for the time of a product.
    Why: decoding one token reads every weight once; a quarter of float32's bytes, half of bfloat16's, in memory and on
    the way: a CPU's cache may even hold them all. Unlike bitsandbytes' INT8 (`quantization`) there is no detour for
    outliers, no question to the host, and a CUDA graph can hold it.
    Where not: without `compile`, every step unpacks every matrix, so that only memory is saved; for the same reason on
    a CPU that has no compiler, or with the multilingual guard, whose steps go through the layers there. In batches of
    more than 16 rows, which go through the layers as prompts do.
    Not lossless: rounding moves a weight by up to half a step, one per cent of a typical weight. The evidence says by
    how much in all; quality decides.
    The campaign had nothing of the kind.
    Evidence: layers replaced and called, their bytes before and now, and the relative error of the weights.
    """

    name = "int8_weights"
    extra = True
    lossless = False

    def unavailable(self, pipeline: Pipeline) -> str | None:
        t3 = pipeline.model.t3
        if not linear_paths(t3.tfmr):
            return "T3's linear layers are quantized already: switch quantization off for t3"
        if pipeline.device.type != "cpu":
            return None
        if t3.hp.is_multilingual:
            return (
                "the multilingual guard's decode step goes through the layers on a CPU, which would unpack each weight"
            )
        return cpp_engine.unsupported(t3.tfmr)

    def apply(self, pipeline: Pipeline) -> None:
        tfmr = pipeline.model.t3.tfmr
        self._paths = linear_paths(tfmr)
        self._before = sum(n_bytes(weights(tfmr.get_submodule(path))) for path in self._paths)
        lost = whole = torch.zeros((), device=pipeline.device)

        def build(old: Any) -> nn.Module:
            nonlocal lost, whole  # on the device, which is asked once for all layers
            new = Int8Linear.of(old)
            weight = old.weight.detach().T if isinstance(old, Conv1D) else old.weight.detach()
            lost = lost + (weight.float() - new.unpacked()).square().sum()
            whole = whole + weight.float().square().sum()
            return new

        for path in self._paths:
            replace_module(pipeline, tfmr, path, build)
        self._error = float((lost / whole).sqrt())

    def evidence(self, pipeline: Pipeline) -> Evidence:
        tfmr = pipeline.model.t3.tfmr
        layers: list[Any] = [tfmr.get_submodule(path) for path in self._paths]
        called = sum(layer.was_called for layer in layers)
        facts = {
            "linear_layers_replaced_count": len(layers),
            "linear_layers_called_count": called,
            "linear_layers_before_bytes": self._before,
            "linear_layers_now_bytes": sum(n_bytes(weights(layer)) for layer in layers),
            "weights_relative_error": self._error,
        }
        return Evidence(bool(called), facts, None if called else "no layer has been called")
