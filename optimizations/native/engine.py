"""The static engine's decode step in one call of C++, see `decode.cpp`."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaModel

from optimizations.engines import StaticEngine
from optimizations.native.library import CompilerError, load

SOURCE = Path(__file__).with_name("decode.cpp")
MAX_ROWS = 16
"""Beyond that PyTorch's products catch up, as they keep more than two rows at hand."""
LANES = 16
"""What every size has to be a multiple of, for the C++ to read vectors."""


class Layer(ctypes.Structure):
    """As in `decode.cpp`."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("input_norm", "q", "k", "v", "o", "post_norm", "gate", "up", "down", "keys", "values")
    ]


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
    config: Any = tfmr.config
    linears = [m for layer in tfmr.layers for m in layer.modules() if "Linear" in type(m).__name__]
    if tfmr.norm.weight.device.type != "cpu":
        return f"the C++ decode step runs on a CPU, and T3 is on {tfmr.norm.weight.device}"
    if any(type(linear) is not nn.Linear or linear.bias is not None for linear in linears):
        return "the C++ decode step reads plain weights, and T3's are quantized: switch quantization off for t3"
    if any(weight.dtype != torch.float32 for weight in tfmr.parameters()):
        return "the C++ decode step computes in float32, and T3's weights are cast: leave t3 out of mixed_precision"
    sizes = (config.hidden_size, config.intermediate_size, config.head_dim)
    if any(size % LANES for size in sizes) or config.num_key_value_heads != config.num_attention_heads:
        return f"the C++ decode step wants sizes that are multiples of {LANES} and keys and values for every head"
    try:
        load(SOURCE)
    except CompilerError as error:
        return str(error)
    return None


class NativeEngine(StaticEngine):
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
        layers = [
            (
                layer.input_layernorm.weight,
                *(getattr(layer.self_attn, f"{name}_proj").weight for name in "qkvo"),
                layer.post_attention_layernorm.weight,
                *(getattr(layer.mlp, f"{name}_proj").weight for name in ("gate", "up", "down")),
                *(keys, values),
            )
            for layer, keys, values in zip(tfmr.layers, self.keys, self.values, strict=True)
        ]
        self._model = Model(
            *(len(layers), config.hidden_size, config.intermediate_size),
            *(config.num_attention_heads, config.head_dim, self.capacity),
            tfmr.norm.variance_epsilon,
            (Layer * len(layers))(*(Layer(*(tensor.data_ptr() for tensor in layer)) for layer in layers)),
            *(tensor.data_ptr() for tensor in (tfmr.norm.weight, self._cos, self._sin)),
        )
