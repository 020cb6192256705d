"""HiFT's activation in one Triton kernel.

Snake, x + sin²(a x) / a, is five of PyTorch's operators, each of which reads and writes the whole signal, 15 MB at the
last rate of 10 s; and HiFT has 72 of them. Here a value is read once and written once: 8 bytes each in float32. Where a
row has ended the kernel leaves zeros, which is what the next convolution has to see.
"""

# Triton reads annotations and globals in its own way: names in capitals are known when a kernel is compiled.
# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def snake(
    x,  # [rows, channels, T]
    alpha,  # [channels]
    length,  # [1] int64
    out,  # [rows, channels, T]
    channels,
    T,
    EPSILON: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK samples of one row's channel."""
    signal = tl.program_id(0)
    t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = signal.to(tl.int64) * T + t
    value = tl.load(x + at, mask=t < tl.load(length), other=0.0)
    a = tl.load(alpha + signal % channels)
    wave = tl.sin(value * a)
    tl.store(out + at, value + wave * wave / (a + EPSILON), mask=t < T)


def masked_snake(x: Tensor, activation: torch.nn.Module, length: Tensor) -> Tensor:
    """Upstream's `Snake` on x [B, C, T], with zeros from `length` [1] on."""
    x = x.contiguous()
    rows, channels, longest = x.shape
    out = torch.empty_like(x)
    grid = rows * channels, triton.cdiv(longest, BLOCK)
    alpha, epsilon = activation.alpha, activation.no_div_by_zero
    snake[grid](x, alpha, length, out, channels, longest, EPSILON=epsilon, BLOCK=BLOCK, num_warps=4)
    return out
