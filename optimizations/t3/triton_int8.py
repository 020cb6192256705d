"""Many rows against weights in 8 bits: a Triton kernel that unpacks them on their way to the matrix units.

A prompt of some hundred positions is work for matrix units. Through PyTorch the weights are first written out in half
precision, four launches and five times the bytes a product; here each is read once, as it is, and its scale and bias
come after the sum.

A word holds weights from the same place in four quarters of the columns (see `int8.py`), so a tile of words is four
tiles of weights, each for another quarter of the rows.
"""

# ruff: noqa: N803 (a size in capitals is known when its kernel is compiled)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimizations.common.launching import launch

FEW_OUTPUTS = 1024
"""Up to so many outputs, a program takes few of them, or there would be too few programs."""
OUTPUTS, DEPTH, WARPS = (16, 64), 64, 4
"""What a program does: so many outputs, of few in all and of many, so many words of each at a time."""
STAGES = (4, 3)
LARGEST_ROWS = 64


@triton.jit
def int8_product(
    x,  # [M, K], half
    weight,  # [N, K / 4] int32
    scale,  # [N] float32
    bias,  # [N] float32: not read without BIAS
    y,  # out: [M, N]
    M,
    N,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """OUTPUTS outputs of ROWS rows."""
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.arange(0, DEPTH)
    quarter: tl.constexpr = K // 4
    inside = (m < M)[:, None]
    outputs = (n < N)[:, None]
    row = x + m[:, None].to(tl.int64) * K + k[None, :]
    words = weight + n[:, None] * quarter + k[None, :]
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for start in range(0, quarter, DEPTH):
        tile = tl.load(words + start, mask=outputs, other=0)
        a = tl.load(row + start, mask=inside, other=0.0)
        b = tl.load(row + quarter + start, mask=inside, other=0.0)
        c = tl.load(row + 2 * quarter + start, mask=inside, other=0.0)
        d = tl.load(row + 3 * quarter + start, mask=inside, other=0.0)
        total = tl.dot(((tile << 24) >> 24).to(tl.float32).to(a.dtype), tl.trans(a), total)
        total = tl.dot(((tile << 16) >> 24).to(tl.float32).to(a.dtype), tl.trans(b), total)
        total = tl.dot(((tile << 8) >> 24).to(tl.float32).to(a.dtype), tl.trans(c), total)
        total = tl.dot((tile >> 24).to(tl.float32).to(a.dtype), tl.trans(d), total)
    total *= tl.load(scale + n, mask=n < N, other=0.0)[:, None]
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0)[:, None]
    at = y + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(at, total.to(y.dtype.element_ty), mask=outputs & (m < M)[None, :])


def fits(x: Tensor) -> bool:
    """Whether the kernel multiplies rows like these."""
    return x.dtype in (torch.bfloat16, torch.float16) and x.shape[-1] % (4 * DEPTH) == 0


def product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] -> [..., N], in its dtype; weight, scale and bias as `Int8Linear` has them."""
    rows, (n_outputs, words) = x.reshape(-1, x.shape[-1]).contiguous(), weight.shape
    y = x.new_empty(len(rows), n_outputs)
    block = min(LARGEST_ROWS, max(16, triton.next_power_of_2(len(rows))))
    many = n_outputs > FEW_OUTPUTS
    launch(
        int8_product,
        (triton.cdiv(n_outputs, OUTPUTS[many]), triton.cdiv(len(rows), block)),
        *(rows, weight, scale, scale if bias is None else bias, y, len(rows), n_outputs),
        K=4 * words,
        BIAS=bias is not None,
        ROWS=block,
        OUTPUTS=OUTPUTS[many],
        DEPTH=DEPTH,
        num_warps=WARPS,
        num_stages=STAGES[many],
    )
    return y.view(*x.shape[:-1], n_outputs)
