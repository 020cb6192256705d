"""Numbers in 8 bits that share a scale: linear layers, a scale an output, and the cache, a scale for each slot's head.

Kernels in Triton and in C++ read them as they are.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Model
from transformers.pytorch_utils import Conv1D

from optimizations.common.kernels import for_device

LARGEST = 127


def linear_paths(tfmr: nn.Module) -> list[str]:
    """The products of the transformer's blocks: a Llama's, which have no bias, and a GPT-2's."""
    root = "h" if isinstance(tfmr, GPT2Model) else "layers"
    return [f"{root}.{name}" for name, module in tfmr.get_submodule(root).named_modules() if _fits(module)]


def _fits(module: Any) -> bool:
    if type(module) is Conv1D:
        return module.nx % 4 == 0
    return type(module) is nn.Linear and module.bias is None and module.in_features % 4 == 0


def in_8_bits(tfmr: Any) -> Any:
    """The transformer with its layers in 8 bits, for good."""
    for path in linear_paths(tfmr):
        tfmr.set_submodule(path, Int8Linear.of(tfmr.get_submodule(path)))
    return tfmr


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., n] as numbers, int8, and what they are to be multiplied by [...], float32."""
    largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, dtype=torch.float32)
    scale = largest.clamp_min_(torch.finfo(torch.float32).tiny) / LARGEST
    return (x / scale[..., None]).round_().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer: `weight` [outputs, inputs / 4] int32, `scale` and, where there is one, `bias` [outputs] float32.

    A word holds four weights, the lowest byte first: those at its own place in each quarter of the inputs.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, product: Any) -> Int8Linear:
        weight = product.weight.detach()
        return cls(weight.T if type(product) is Conv1D else weight, product.bias)

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        numbers, scale = rounded(weight)
        quarters = numbers.unflatten(1, (4, -1)).transpose(1, 2).contiguous()
        self.register_buffer("weight", quarters.flatten(1).view(torch.int32))
        self.register_buffer("scale", scale)
        self.was_called = False

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] in any floating dtype, which holds the 8-bit numbers exactly."""
        self.was_called = True
        if (kernels := _kernels(x.device)) and kernels.fits(x) and not torch.compiler.is_compiling():
            product: Tensor = kernels.product(x, self)
            return product
        y = F.linear(x, self._numbers(x.dtype)) * self.scale
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def unpacked(self) -> Tensor:
        """The weights that it stands for, float32 [outputs, inputs]."""
        return self._numbers(torch.float32) * self.scale[:, None]

    def _numbers(self, dtype: torch.dtype) -> Tensor:
        quarters = self.weight.view(torch.int8).unflatten(1, (-1, 4)).transpose(1, 2)
        return quarters.to(dtype, memory_format=torch.contiguous_format).flatten(1)


@cache
def _kernels(device: torch.device) -> Any:
    return for_device("optimizations.t3.triton_int8", device)
