"""The static engine's decode step in one call of C++, see `decode.cpp`."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GPT2Model
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.pytorch_utils import Conv1D

from harness.sampling import Sampling
from optimizations.common.cpp import CompilerError, load
from optimizations.t3.blocks import blocks_of, matrix_of, products_of
from optimizations.t3.engines import StaticEngine
from optimizations.t3.int8 import Int8Linear
from optimizations.t3.sampling import sample as sample_by_operators

SOURCE = Path(__file__).with_name("decode.cpp")
MAX_ROWS = 16
"""Beyond that PyTorch's products catch up, as they keep more than two rows at hand."""
LANES = 16
"""What every size has to be a multiple of, for the C++ to read vectors; of 4 times as much with weights in 8 bits."""


class Matrix(ctypes.Structure):
    """As in `decode.cpp`."""

    _fields_ = [("numbers", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("bias", ctypes.c_void_p)]

    @classmethod
    def of(cls, linear: Any, part: slice = slice(None)) -> Matrix:
        """A product, or those of its outputs that `part` names."""
        scale, bias = getattr(linear, "scale", None), linear.bias
        return cls(
            matrix_of(linear)[part].data_ptr(),
            None if scale is None else scale[part].data_ptr(),
            None if bias is None else bias[part].data_ptr(),
        )


class Norm(ctypes.Structure):
    """As in `decode.cpp`."""

    _fields_ = [("weight", ctypes.c_void_p), ("shift", ctypes.c_void_p)]

    @classmethod
    def of(cls, norm: Any) -> Norm:
        bias = getattr(norm, "bias", None)
        return cls(norm.weight.data_ptr(), None if bias is None else bias.data_ptr())


class Layer(ctypes.Structure):
    """As in `decode.cpp`."""

    _fields_ = [
        *((name, Norm) for name in ("input_norm", "post_norm")),
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
    ]

    @classmethod
    def of(cls, layer: Any, keys: Tensor, values: Tensor) -> Layer:
        if isinstance(layer, GPT2Block):
            attention, mlp, width = layer.attn, layer.mlp, len(layer.ln_1.weight)
            norms = layer.ln_1, layer.ln_2
            qkv = [Matrix.of(attention.c_attn, slice(i * width, (i + 1) * width)) for i in range(3)]
            rest = [Matrix.of(attention.c_proj), Matrix.of(mlp.c_fc), Matrix(), Matrix.of(mlp.c_proj)]
        else:
            attention, mlp = layer.self_attn, layer.mlp
            norms = layer.input_layernorm, layer.post_attention_layernorm
            qkv = [Matrix.of(product) for product in (attention.q_proj, attention.k_proj, attention.v_proj)]
            products = (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
            rest = [Matrix.of(product) for product in products]
        return cls(*map(Norm.of, norms), *qkv, *rest, keys.data_ptr(), values.data_ptr())


class Draw(ctypes.Structure):
    """`Filters` in `decode.cpp`."""

    _fields_ = [
        *((name, ctypes.c_float) for name in ("penalty", "temperature", "min_p", "top_p")),
        ("top_k", ctypes.c_int64),
        ("penalizes_last", ctypes.c_bool),
    ]


class Model(ctypes.Structure):
    """As in `decode.cpp`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n_layers", "width", "inner", "heads", "dim", "capacity")),
        ("epsilon", ctypes.c_double),
        ("layers", ctypes.POINTER(Layer)),
        ("norm", Norm),
        *((name, ctypes.c_void_p) for name in ("cos", "sin")),
    ]


def unsupported(tfmr: nn.Module) -> str | None:
    """Why the C++ cannot run this transformer where it is, in words a user can act on; None if it can."""
    blocks = blocks_of(tfmr)
    linears: list[Any] = list(products_of(tfmr))
    kinds: tuple[type, ...] = (Conv1D, Int8Linear) if isinstance(tfmr, GPT2Model) else (nn.Linear, Int8Linear)
    if blocks.norm.weight.device.type != "cpu":
        return f"the C++ decode step runs on a CPU, and T3 is on {blocks.norm.weight.device}"
    if any(type(linear) not in kinds for linear in linears):
        return (
            "the C++ decode step reads plain weights or those of int8_weights, and T3's are bitsandbytes': switch "
            "quantization off for t3"
        )
    if any(weight.dtype != torch.float32 for weight in tfmr.parameters()):
        return "the C++ decode step computes in float32, and T3's weights are cast: leave t3 out of mixed_precision"
    sizes = {size for linear in linears for size in linear.weight.shape}
    # Of 8-bit weights the inputs are words, four to a word.
    grouped = blocks.heads != cast(Any, tfmr.config).num_attention_heads
    if any(size % LANES for size in (*sizes, blocks.head_dim)) or grouped:
        return f"the C++ decode step wants sizes that are multiples of {LANES} and keys and values for every head"
    try:
        load(SOURCE)
    except CompilerError as error:
        return str(error)
    return None


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """`nn.Linear` in float32: x [R, inputs] of few rows -> [R, outputs]."""
    x, out = x.contiguous(), x.new_empty(len(x), layer.out_features)
    library, weight, bias = load(SOURCE), layer.weight, layer.bias
    library.linear(
        ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_void_p(None if bias is None else bias.data_ptr()),
        *(ctypes.c_int64(size) for size in (len(x), layer.in_features, layer.out_features)),
        *(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr())),
        torch.get_num_threads(),
    )
    return out


def sample(logits: Tensor, seen: Tensor, sampling: Sampling) -> Tensor:
    """`sampling.sample` in one call, by the same random numbers; greedy choices are left to it."""
    if sampling.greedy:
        return sample_by_operators(logits, seen, sampling)
    logits = logits.contiguous()
    times, ids = torch.empty_like(logits).exponential_(), torch.zeros(len(logits), 1, dtype=torch.long)
    load(SOURCE).draw(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (logits, seen, times)),
        *(ctypes.c_int64(size) for size in logits.shape),
        ctypes.byref(
            Draw(
                *(sampling.repetition_penalty, sampling.temperature, sampling.min_p, sampling.top_p),
                *(sampling.top_k, sampling.penalizes_last),
            )
        ),
        ctypes.c_void_p(ids.data_ptr()),
    )
    return ids


class CppEngine(StaticEngine):
    """The static engine, its steps in C++ where nobody watches attention and the rows are few."""

    def __init__(self, tfmr: nn.Module, bucket: int = 256) -> None:
        super().__init__(tfmr, bucket)
        self.is_gpt2 = isinstance(tfmr, GPT2Model)
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
        if self.is_gpt2:
            x += self.tables[0][(self.length - self.pads).clamp_min(0)]
        addresses = (self.pads.data_ptr(), self.valid_slots.data_ptr(), x.data_ptr())
        self._decode_step(self._model, rows, self.length, *addresses, torch.get_num_threads())
        self.length += 1
        self.n_steps += 1
        return x

    def _reserve(self, rows: int, length: int, like: Tensor) -> None:
        """Before each prompt, and whenever the cache grows: what is where is written down anew."""
        super()._reserve(rows, length, like)
        blocks = self.blocks
        layers = [Layer.of(*layer) for layer in zip(blocks.layers, self.keys, self.values, strict=True)]
        width = len(blocks.norm.weight)
        self._model = Model(
            *(len(layers), width, blocks.inner, blocks.heads, blocks.head_dim, self.capacity),
            blocks.epsilon,
            (Layer * len(layers))(*layers),
            Norm.of(blocks.norm),
            *((None, None) if self.is_gpt2 else (table.data_ptr() for table in self.tables)),
        )
