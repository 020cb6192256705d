"""The static engine's decode step in one call of C++, see `decode.cpp`."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Model, LlamaModel

from harness.sampling import Sampling
from optimizations.common.cpp import CompilerError, load
from optimizations.t3.engines import StaticEngine
from optimizations.t3.int8 import Int8Linear
from optimizations.t3.sampling import Filters
from optimizations.t3.sampling import sample as sample_by_operators

SOURCE = Path(__file__).with_name("decode.cpp")
MAX_ROWS = 16
"""Beyond that PyTorch's products catch up, as they keep more than two rows at hand."""
LANES = 16
"""What every size has to be a multiple of, for the C++ to read vectors; of 4 times as much with weights in 8 bits."""


class Matrix(ctypes.Structure):
    """As in `decode.cpp`."""

    _fields_ = [("numbers", ctypes.c_void_p), ("scale", ctypes.c_void_p)]

    @classmethod
    def of(cls, linear: Any) -> Matrix:
        return cls(linear.weight.data_ptr(), linear.scale.data_ptr() if isinstance(linear, Int8Linear) else None)


class Layer(ctypes.Structure):
    """As in `decode.cpp`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("input_norm", "post_norm")),
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
    ]

    @classmethod
    def of(cls, layer: Any, keys: Tensor, values: Tensor) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            *(norm.weight.data_ptr() for norm in (layer.input_layernorm, layer.post_attention_layernorm)),
            *(Matrix.of(getattr(attention, f"{name}_proj")) for name in "qkvo"),
            *(Matrix.of(getattr(mlp, f"{name}_proj")) for name in ("gate", "up", "down")),
            *(keys.data_ptr(), values.data_ptr()),
        )


class Model(ctypes.Structure):
    """As in `decode.cpp`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n_layers", "width", "inner", "heads", "dim", "capacity")),
        ("epsilon", ctypes.c_double),
        ("layers", ctypes.POINTER(Layer)),
        *((name, ctypes.c_void_p) for name in ("norm", "cos", "sin")),
    ]


def unsupported(tfmr: LlamaModel) -> str | None:
    """Why the C++ cannot run this transformer where it is, in words a user can act on; None if it can."""
    if isinstance(tfmr, GPT2Model):
        return "the C++ decode step is written for a Llama, and T3 is a GPT-2 here"
    config: Any = tfmr.config
    linears: list[Any] = [m for layer in tfmr.layers for m in layer.modules() if "Linear" in type(m).__name__]
    if tfmr.norm.weight.device.type != "cpu":
        return f"the C++ decode step runs on a CPU, and T3 is on {tfmr.norm.weight.device}"
    if any(type(linear) not in (nn.Linear, Int8Linear) or linear.bias is not None for linear in linears):
        return (
            "the C++ decode step reads plain weights or those of int8_weights, and T3's are bitsandbytes': switch "
            "quantization off for t3"
        )
    if any(weight.dtype != torch.float32 for weight in tfmr.parameters()):
        return "the C++ decode step computes in float32, and T3's weights are cast: leave t3 out of mixed_precision"
    sizes = (config.hidden_size, config.intermediate_size, config.head_dim)
    inputs = [linear.weight.shape[1] for linear in linears]  # words, where there are four to a word
    if any(size % LANES for size in (*sizes, *inputs)) or config.num_key_value_heads != config.num_attention_heads:
        return f"the C++ decode step wants sizes that are multiples of {LANES} and keys and values for every head"
    try:
        load(SOURCE)
    except CompilerError as error:
        return str(error)
    return None


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """`nn.Linear` without bias in float32: x [R, inputs] of few rows -> [R, outputs]."""
    x, out = x.contiguous(), x.new_empty(len(x), layer.out_features)
    library, weight = load(SOURCE), layer.weight
    library.linear(
        ctypes.c_void_p(weight.data_ptr()),
        *(ctypes.c_int64(size) for size in (len(x), layer.in_features, layer.out_features)),
        *(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr())),
        torch.get_num_threads(),
    )
    return out


def sample(logits: Tensor, seen: Tensor, sampling: Sampling) -> Tensor:
    """`sampling.sample` in one call, by the same random numbers; greedy choices and a nucleus are left to it."""
    if sampling.greedy or not Filters.of(sampling).none:
        return sample_by_operators(logits, seen, sampling)
    logits = logits.contiguous()
    times, ids = torch.empty_like(logits).exponential_(), torch.zeros(len(logits), 1, dtype=torch.long)
    load(SOURCE).draw(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (logits, seen, times)),
        *(ctypes.c_int64(size) for size in logits.shape),
        *(ctypes.c_float(x) for x in (sampling.repetition_penalty, sampling.temperature, sampling.min_p)),
        ctypes.c_void_p(ids.data_ptr()),
    )
    return ids


class CppEngine(StaticEngine):
    """The static engine, its steps in C++ where nobody watches attention and the rows are few."""

    def __init__(self, tfmr: LlamaModel, bucket: int = 256) -> None:
        super().__init__(tfmr, bucket)
        self.n_steps = 0
        """How many steps the C++ has made."""
        self._decode_step = load(SOURCE).decode_step
        self._decode_step.argtypes = [
            ctypes.POINTER(Model),
            *(ctypes.c_int64, ctypes.c_int64),
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
            ctypes.c_int,
        ]

    def step(self, embeds: Tensor) -> Tensor:
        rows = len(embeds)
        if self.heads or rows > MAX_ROWS:
            return super().step(embeds)
        if self.length == self.capacity:
            self._reserve(rows, self.length + 1, embeds)
        x = embeds.flatten(1).clone()
        addresses = (self.pads.data_ptr(), self.valid_slots.data_ptr(), x.data_ptr())
        self._decode_step(self._model, rows, self.length, *addresses, torch.get_num_threads())
        self.length += 1
        self.n_steps += 1
        return x

    def _reserve(self, rows: int, length: int, like: Tensor) -> None:
        """Before each prompt, and whenever the cache grows: what is where is written down anew."""
        super()._reserve(rows, length, like)
        tfmr, config = self.tfmr, self.tfmr.config
        layers = [Layer.of(*layer) for layer in zip(tfmr.layers, self.keys, self.values, strict=True)]
        self._model = Model(
            *(len(layers), config.hidden_size, config.intermediate_size),
            *(config.num_attention_heads, config.head_dim, self.capacity),
            tfmr.norm.variance_epsilon,
            (Layer * len(layers))(*layers),
            *(tensor.data_ptr() for tensor in (tfmr.norm.weight, *self.tables)),
        )
