"""HiFT's convolutions and snakes in C++ with the channels innermost, see `hift.cpp`."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from chatterbox.models.s3gen.hifigan import Snake
from torch import Tensor, nn

from optimizations.common.cpp import load

SOURCE = Path(__file__).with_name("hift.cpp")
OUTPUTS = 16
"""As in `hift.cpp`."""


def fits(module: nn.Module) -> bool:
    """Whether the C++ computes this: a convolution in steps of 1, of one group and with zeros around, or a snake."""
    if isinstance(module, Snake):
        return not module.alpha_logscale and len(module.alpha) % OUTPUTS == 0
    if type(module) is not nn.Conv1d or isinstance(module.padding, str):
        return False
    return module.stride == (1,) and module.groups == 1 and module.padding_mode == "zeros"


class SnakeInCpp:
    """Stands in for `Snake.forward`."""

    def __init__(self, module: Any) -> None:
        self._alpha = module.alpha.detach()
        self._scale = 1 / (self._alpha + module.no_div_by_zero)
        self._snake = load(SOURCE).snake

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, C, T] -> x + scale * sin(alpha x)^2, the channels innermost."""
        x = x.transpose(1, 2).contiguous()
        y = torch.empty_like(x)
        self._snake(
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, self._alpha, self._scale)),
            *(ctypes.c_int64(number) for number in (x.shape[0] * x.shape[1], x.shape[2])),
            ctypes.c_void_p(y.data_ptr()),
            torch.get_num_threads(),
        )
        return y.transpose(1, 2)


class ConvolutionInCpp:
    """Stands in for a convolution's `_conv_forward`; its weights are laid out here, once."""

    def __init__(self, convolution: Any) -> None:
        weight = convolution.weight.detach()  # [O, I, taps]
        self.outputs, self.inputs, self.taps = weight.shape
        spare = -self.outputs % OUTPUTS
        blocks = F.pad(weight, (0, 0, 0, 0, 0, spare)).unflatten(0, (-1, OUTPUTS))
        self._weight = blocks.permute(0, 3, 2, 1).contiguous()  # [blocks, taps, I, OUTPUTS]
        bias = weight.new_zeros(self.outputs) if convolution.bias is None else convolution.bias.detach()
        self._bias = F.pad(bias, (0, spare))
        (dilation,), (padding,) = convolution.dilation, convolution.padding
        self._dilation, self._padding = int(dilation), int(padding)  # upstream has NumPy's integers among them
        self._convolve = load(SOURCE).convolve
        self.n_calls = 0

    def __call__(self, x: Tensor, *_: Any) -> Tensor:
        """x [B, I, T] -> [B, O, T'], the channels innermost; free of a copy where x has them so."""
        x = x.transpose(1, 2).contiguous()
        rows, frames, _inputs = x.shape
        spare = 2 * self._padding - (self.taps - 1) * self._dilation
        if spare:  # the C++ gives as many frames as it gets
            x = F.pad(x, (0, 0, 0, max(spare, 0)))
        y = x.new_empty(rows, x.shape[1], self.outputs)
        numbers = (rows, x.shape[1], self.inputs, self.outputs, self.taps, self._dilation, self._padding)
        self._convolve(
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, self._weight, self._bias)),
            *(ctypes.c_int64(number) for number in numbers),
            ctypes.c_void_p(y.data_ptr()),
            torch.get_num_threads(),
        )
        self.n_calls += 1
        return y[:, : frames + spare].transpose(1, 2)
