"""Many rows against weights in 8 bits: a Triton kernel that unpacks them on their way to the matrix units.

A prompt of some hundred positions is work for matrix units. Through PyTorch the weights are first written out in half
precision, four launches and five times the bytes a product; here each is read once, as it is, and its scale and bias
come after the sum. Products of the same rows, such as queries, keys and values, are one launch.

A word holds weights from the same place in four quarters of the columns (see `int8.py`), so a tile of words is four
tiles of weights, each for another quarter of the rows.
"""

# ruff: noqa: N803 (a size in capitals is known when its kernel is compiled)
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimizations.common.launching import launch, n_processors, shared_bytes

if TYPE_CHECKING:
    from optimizations.t3.int8 import Int8Linear

MOST_TOGETHER = 3
"""Products in one launch."""


@dataclass(frozen=True)
class Tile:
    """What a program does: so many outputs of so many rows, `depth` words at a time, `stages` loads under way.

    It needs so many `kilobytes` of shared memory; on Hopper, which has it, up to half as much again.
    """

    outputs: int
    rows: int
    depth: int
    warps: int
    stages: int
    kilobytes: int


TILES = (
    Tile(128, 128, 32, 8, 4, kilobytes=144),
    Tile(64, 128, 64, 4, 3, kilobytes=160),
    Tile(64, 64, 64, 4, 3, kilobytes=96),
    Tile(64, 32, 64, 4, 3, kilobytes=64),
)
"""The first that the GPU has the memory for and of which there are more programs than half its processors, or the last:
larger ones unpack and read less. Chosen on an H200, for prompts of 192 to 448 rows."""
DEPTH = max(tile.depth for tile in TILES)


@triton.jit
def _unpacked(words, place: tl.constexpr, kind: tl.constexpr):
    """The weights in the byte `place` of the words, which half precision holds exactly."""
    return ((words << (24 - 8 * place)) >> 24).to(tl.float32).to(kind)


@triton.jit
def int8_product(
    x,  # [M, K], half
    first,  # [N, K / 4] int32, as the next two, which are read where there are as many products
    second,
    third,
    first_scale,  # [N] float32, as the next two
    second_scale,
    third_scale,
    bias,  # [N] float32, the first product's: not read without BIAS
    y,  # out: [M, all outputs]
    M,
    N,
    total,  # outputs of all products
    K: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """OUTPUTS outputs of one product, for ROWS rows."""
    blocks = tl.cdiv(N, OUTPUTS)
    part = tl.program_id(0) // blocks
    weight = first
    scale = first_scale
    if part == 1:
        weight = second
        scale = second_scale
    if part == 2:
        weight = third
        scale = third_scale
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) % blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.arange(0, DEPTH)
    quarter: tl.constexpr = K // 4
    inside = (m < M)[None, :]
    outputs = (n < N)[:, None]
    rows = x + m[None, :].to(tl.int64) * K + k[:, None]
    words = weight + n[:, None] * quarter + k[None, :]
    sums = tl.zeros([OUTPUTS, ROWS], tl.float32)
    kind: tl.constexpr = x.dtype.element_ty
    for start in range(0, quarter, DEPTH):
        tile = tl.load(words + start, mask=outputs, other=0)
        a = tl.load(rows + start, mask=inside, other=0.0)
        b = tl.load(rows + quarter + start, mask=inside, other=0.0)
        c = tl.load(rows + 2 * quarter + start, mask=inside, other=0.0)
        d = tl.load(rows + 3 * quarter + start, mask=inside, other=0.0)
        sums = tl.dot(_unpacked(tile, 0, kind), a, sums)
        sums = tl.dot(_unpacked(tile, 1, kind), b, sums)
        sums = tl.dot(_unpacked(tile, 2, kind), c, sums)
        sums = tl.dot(_unpacked(tile, 3, kind), d, sums)
    sums *= tl.load(scale + n, mask=n < N, other=0.0)[:, None]
    if BIAS:
        sums += tl.load(bias + n, mask=n < N, other=0.0)[:, None]
    at = y + m[None, :].to(tl.int64) * total + part * N + n[:, None]
    tl.store(at, sums.to(y.dtype.element_ty), mask=outputs & inside)


def fits(x: Tensor) -> bool:
    """Whether the kernel multiplies rows like these."""
    return x.dtype in (torch.bfloat16, torch.float16) and x.shape[-1] % (4 * DEPTH) == 0


def product(x: Tensor, *layers: Int8Linear) -> Tensor:
    """x [..., K] -> what the layers make of it, side by side [..., N each], in its dtype.

    Several layers have as many outputs each, and no bias.
    """
    assert len(layers) == 1 or (len(layers) <= MOST_TOGETHER and layers[0].bias is None)
    rows, (n_outputs, words) = x.reshape(-1, x.shape[-1]).contiguous(), layers[0].weight.shape
    total = len(layers) * n_outputs
    y = x.new_empty(len(rows), total)
    tile, grid = _tile(len(rows), n_outputs, len(layers), x.device)
    three = (*layers, layers[0], layers[0])[:MOST_TOGETHER]
    scales, bias = [layer.scale for layer in three], layers[0].bias
    launch(
        int8_product,
        grid,
        *(rows, *(layer.weight for layer in three), *scales, scales[0] if bias is None else bias, y),
        *(len(rows), n_outputs, total),
        K=4 * words,
        BIAS=bias is not None,
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
        DEPTH=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    for layer in layers:
        layer.was_called = True
    return y.view(*x.shape[:-1], total)


def _tile(n_rows: int, n_outputs: int, n_layers: int, device: torch.device) -> tuple[Tile, tuple[int, int]]:
    """What each program does, and the grid of them."""
    room = shared_bytes(device) >> 10
    for tile in TILES:
        grid = n_layers * triton.cdiv(n_outputs, tile.outputs), triton.cdiv(n_rows, tile.rows)
        if tile.kilobytes <= room and 2 * grid[0] * grid[1] > n_processors(device):
            break
    return tile, grid
