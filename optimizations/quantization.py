"""Linear layers in 8 or 4 bits, by bitsandbytes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers import GPT2Model

from harness.pipeline import Pipeline
from harness.settings import choice
from optimizations.base import Evidence, Optimization, register
from optimizations.common.modules import Weights, n_bytes, replace_module, weights, weights_by_part

INT8, NF4, NF4_DOUBLE = "int8", "nf4", "nf4_double"
STRATEGIES = {
    "conservative": {"attention": INT8, "mlp": INT8},
    "mixed": {"attention": INT8, "mlp": NF4},
    "aggressive": {"attention": NF4_DOUBLE, "mlp": NF4_DOUBLE},
}
PARTS = ("t3", "flow")
BLOCKS = {"t3": ("t3.tfmr.layers",), "flow": ("s3gen.flow.encoder", "s3gen.flow.decoder.estimator")}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "to_q", "to_k", "to_v", "to_out.0"}
ATTENTION |= {"linear_q", "linear_k", "linear_v", "linear_out", "linear_pos"}
MLP = {"gate_proj", "up_proj", "down_proj", "net.0.proj", "net.2", "w_1", "w_2"}
OUTLIER = 6.0
"""LLM.int8()'s threshold: input columns that reach it are multiplied in half precision."""
UNTOUCHED = ("t3_embeddings", "t3_heads", "vocoder")


@register
class Quantization(Optimization):
    """INT8 or NF4 weights for the linear layers of the transformer blocks.

    Baseline: float32 weights, of which T3's linear layers hold 2.0 GB.
    Change: those of `parts` become bitsandbytes layers. `conservative`: INT8 for all, with LLM.int8()'s detour for
    outliers. `mixed`: INT8 for attention, NF4 for the MLPs, which hold three quarters of T3's weights. `aggressive`:
    NF4 for all, and the scales quantized once more. `flow` stands for the attention and feed-forward layers of the
    flow's encoder and estimator. Norms, embeddings, heads, convolutions and the vocoder are left alone.
    Why: a quarter or an eighth of the bytes; and decoding one token reads every weight of T3 once.
    Where not: speed at batch 1. INT8 quantizes its input anew in every layer and asks the host whether there were
    outliers, so it waits for the GPU seven times a layer; prompts and the flow are multiplied after unpacking. It is a
    way to fit, not a way to hurry. A CUDA graph cannot capture the INT8 layers. On a CPU both run, slowly.
    The campaign claimed 29 to 64 % less VRAM; it had estimated that and never run it.
    Evidence: quantized layers by kind and how many of them have been called, their bytes before and now, bytes of
    every part before and now, and that embeddings, heads and vocoder weigh what they weighed.
    Compute stays in the dtype of what comes in (bitsandbytes goes through float16 for INT8): the layers work under
    float32 as under mixed precision.
    """

    name = "quantization"
    lossless = False

    @dataclass
    class Config:
        strategy: str = choice("conservative", "mixed", "aggressive")
        parts: list[str] = choice(listed=PARTS, default=["t3"])

    config: Config

    def unavailable(self, pipeline: Pipeline) -> str | None:
        try:
            import_module("bitsandbytes")
        except ImportError as error:
            return f"bitsandbytes cannot be imported ({error}): install it, or switch quantization off"
        if "t3" in self.config.parts and isinstance(pipeline.model.t3.tfmr, GPT2Model):
            return (
                "T3 is a GPT-2 here, whose transposed layers bitsandbytes does not have: set quantization.parts=[flow]"
            )
        for kind in sorted(set(STRATEGIES[self.config.strategy].values())):
            try:
                layer = quantized(nn.Linear(64, 64), kind, pipeline.device)
                with torch.inference_mode():
                    layer(torch.ones(1, 1, 64, device=pipeline.device))
            except (RuntimeError, AttributeError, OSError) as error:
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                return f"bitsandbytes has no {kind} kernel for {pipeline.device} ({first}): use another device"
        return None

    def apply(self, pipeline: Pipeline) -> None:
        self._before = weights_by_part(pipeline)
        self._layers_before = 0
        kinds = STRATEGIES[self.config.strategy]
        _hush(pipeline)
        for part in self.config.parts:
            for path, role in linear_layers(pipeline, part):
                self._layers_before += n_bytes(weights(_model(pipeline).get_submodule(path)))
                replace_module(
                    pipeline,
                    _model(pipeline),
                    path,
                    partial(quantized, kind=kinds[role], device=pipeline.device),
                )

    def evidence(self, pipeline: Pipeline) -> Evidence:
        now = weights_by_part(pipeline)
        layers = [layer for layer in _model(pipeline).modules() if _kind(layer)]
        used = [layer for layer in layers if _was_called(layer)]
        facts = {
            "linear_layers_replaced_count": dict(Counter(_kind(layer) for layer in layers)),
            "linear_layers_called_count": len(used),
            "linear_layers_before_bytes": self._layers_before,
            "linear_layers_now_bytes": sum(n_bytes(weights(layer)) for layer in layers),
            "parts_before_bytes": _bytes(self._before),
            "parts_now_bytes": _bytes(now),
            "untouched": {part: now[part] == self._before[part] for part in UNTOUCHED},
        }
        reason = None if used else "no quantized layer has been called"
        return Evidence(active=bool(used), facts=facts, reason=reason)


def linear_layers(pipeline: Pipeline, part: str) -> Iterator[tuple[str, str]]:
    """Paths of a part's linear layers inside transformer blocks, each with its role: attention or mlp."""
    for root in BLOCKS[part]:
        for name, module in list(_model(pipeline).get_submodule(root).named_modules()):
            role = _role(name)
            if role and isinstance(module, nn.Linear):
                yield f"{root}.{name}", role


def _role(name: str) -> str | None:
    for role, ends in (("attention", ATTENTION), ("mlp", MLP)):
        if any(name.endswith(f".{end}") for end in ends):
            return role
    return None


def _model(pipeline: Pipeline) -> nn.ModuleDict:
    """T3 and S3Gen under one root, so that a path says where a layer is."""
    return nn.ModuleDict({"t3": pipeline.model.t3, "s3gen": pipeline.model.s3gen})


def quantized(linear: nn.Module, kind: str, device: torch.device) -> nn.Module:
    """A bitsandbytes layer on `device` with the weights of `linear`, which stays as it is."""
    bnb: Any = import_module("bitsandbytes.nn")
    assert isinstance(linear, nn.Linear)
    size = (linear.in_features, linear.out_features)
    weight = linear.weight.detach().cpu()  # moving to the device is what quantizes
    if kind == INT8:
        new = bnb.Linear8bitLt(*size, bias=False, has_fp16_weights=False, threshold=OUTLIER, device="meta")
        new.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
    else:
        new = bnb.Linear4bit(*size, bias=False, quant_type="nf4", device="meta")
        new.weight = bnb.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=kind == NF4_DOUBLE, module=new
        ).to(device)
    if linear.bias is not None:
        # A copy: bitsandbytes casts a bias in place to the dtype of its input.
        new.bias = nn.Parameter(linear.bias.detach().to(device, copy=True), requires_grad=False)
    return new.eval()


def _kind(module: nn.Module) -> str | None:
    return {"Linear8bitLt": INT8, "Linear4bit": NF4}.get(type(module).__name__)


def _was_called(layer: Any) -> bool:
    """Both kinds settle something at their first call: INT8 hands its weight over, NF4 chooses its compute dtype."""
    return bool(layer.state.CB is not None if _kind(layer) == INT8 else layer.compute_type_is_set)


def _hush(pipeline: Pipeline) -> None:
    """bitsandbytes warns in every call of an INT8 layer that its input is not float16; once, here, is enough."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    level = logger.level
    pipeline.on_undo(lambda: logger.setLevel(level))
    logger.setLevel(logging.ERROR)


def _bytes(held: dict[str, Weights]) -> dict[str, int]:
    return {part: n_bytes(entry) for part, entry in held.items()}
