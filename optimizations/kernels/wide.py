"""One decode step of a Llama for many rows: cuBLAS multiplies, Triton kernels do what lies between.

From some twenty rows on, a product with a matrix is work for matrix units, and nobody feeds those better than cuBLAS.
What is left is the cache: at 128 rows and 350 slots it is five times as many bytes as the weights. So attention reads
the filled slots and nothing else, and everything around it is kept to few launches. Eight a layer; C is the model's
width, M the MLP's, R the rows, L the filled slots, b the bytes of a number:

    add_rmsnorm        the sum of what came before, normalized
    product            3 C² b           queries, keys and values at once
    rope_attention     2 R L C b        rotation, cache write, attention: one program for each row's head
    product            C² b
    add_rmsnorm
    product            2 C M b          gate and up at once
    silu_product                        silu(gate) * up
    product            C M b

The residual stream and all sums outside the products are float32, whatever the weights are.

Two matrices make one product only where they lie one behind the other in memory. `join` moves a layer's parameters
together, once; they stay parameters, and each has its values as before. Whether they still lie so is read off their
addresses, so that nothing has to be told when somebody casts or restores them.
"""

# ruff: noqa: N803 (a size in capitals is known when its kernel is compiled)
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from optimizations.kernels.decode import NEVER

if TYPE_CHECKING:
    from transformers import LlamaModel

    from optimizations.kernels.engine import FusedEngine

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Loop:
    """How a program of attention goes through a row's slots: that many at once, `stages` - 1 blocks on their way."""

    slots: int
    warps: int
    stages: int


LOOP = Loop(64, 4, 3)
"""With bfloat16, 48 KB of shared memory a program: four of them on a multiprocessor, 128 KB on their way to it."""


@triton.jit
def add_rmsnorm(
    before,  # [R, C]
    y,  # [R, C]: what to add
    norm,  # [C]
    x,  # out: [R, C] float32: the sum; may be `before`
    h,  # out: [R, C]: its RMSNorm
    epsilon,
    C: tl.constexpr,
    ADD: tl.constexpr,
):
    """One row. Without ADD there is nothing to add, and `y` is not read."""
    k = tl.arange(0, C)
    at = tl.program_id(0) * C + k
    row = tl.load(before + at).to(tl.float32)
    gain = tl.load(norm + k).to(tl.float32)
    if ADD:
        row += tl.load(y + at).to(tl.float32)
    tl.store(x + at, row)
    scale = tl.rsqrt(tl.sum(row * row, axis=0) / C + epsilon)
    tl.store(h + at, (row * scale * gain).to(h.dtype.element_ty))


@triton.jit
def _turned(part, cos, sin, D: tl.constexpr):
    """A head's queries or keys, rotated: float32 [D]. The halves change places for the sines' part."""
    d = tl.arange(0, D)
    swapped = (d + D // 2) % D
    return tl.load(part + d).to(tl.float32) * cos + tl.load(part + swapped).to(tl.float32) * sin


@triton.jit
def rope_attention(
    qkv,  # [R, 3 C]: queries, keys, values
    cos,  # [capacity, D]
    sin,  # [capacity, D]; its first half carries the rotation's minus
    keys,  # written at `position`: [R, H, capacity, D], as the next
    values,
    position,  # [1] int64: the slot of the new token
    pad,  # [R] int64: slots of a row that hold no token of its own
    valid,  # [R, capacity] uint8: 0 where a row's padding is
    attended,  # out: [R, C]
    queries,  # out with KEEP: [R, C] float32: rotated
    capacity,
    scale,  # of the scores, which are logarithms to the base of 2
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    KEEP: tl.constexpr,
):
    """One row's head, over BLOCK slots at a time while the next ones are on their way.

    Each of the BLOCK places in a block keeps sums and a peak of its own, over the slots that come by there, and they
    are put together behind the loop: in it, no thread waits for another's maximum.
    """
    row_head = tl.program_id(0)
    r = row_head // H
    head = row_head % H
    d = tl.arange(0, D)
    end = tl.load(position).to(tl.int32)
    angle = tl.maximum(end - tl.load(pad + r).to(tl.int32), 0) * D + d
    c = tl.load(cos + angle).to(tl.float32)
    s = tl.load(sin + angle).to(tl.float32)
    own = qkv + r * (3 * H * D) + head * D
    query = _turned(own, c, s, D)
    key = _turned(own + H * D, c, s, D).to(keys.dtype.element_ty)
    value = tl.load(own + 2 * H * D + d)
    row_keys = keys + row_head.to(tl.int64) * capacity * D
    row_values = values + row_head.to(tl.int64) * capacity * D
    tl.store(row_keys + end * D + d, key)
    tl.store(row_values + end * D + d, value)
    if KEEP:
        tl.store(queries + row_head * D + d, query)
    query *= scale

    place = tl.arange(0, BLOCK)
    peak = tl.full([BLOCK], NEVER, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, D], tl.float32)
    for start in tl.range(0, end, BLOCK, num_stages=STAGES):
        slots = start + place
        filled = slots < end
        at = slots[:, None] * D + d[None, :]
        k = tl.load(row_keys + at, mask=filled[:, None], other=0.0)
        v = tl.load(row_values + at, mask=filled[:, None], other=0.0)
        visible = tl.load(valid + r * capacity + slots, mask=filled, other=0) != 0
        scores = tl.where(visible, tl.sum(k.to(tl.float32) * query[None, :], axis=1), NEVER)
        highest = tl.maximum(peak, scores)
        fade = tl.exp2(peak - highest)
        p = tl.exp2(scores - highest)
        total = total * fade + p
        sums = sums * fade[:, None] + p[:, None] * v.to(tl.float32)
        peak = highest

    newest = tl.sum(query * key.to(tl.float32), axis=0)
    highest = tl.maximum(newest, tl.max(peak, axis=0))
    share = tl.exp2(peak - highest)
    newest = tl.exp2(newest - highest)
    total_of_all = tl.sum(total * share, axis=0) + newest
    row = tl.sum(sums * share[:, None], axis=0) + newest * value.to(tl.float32)
    tl.store(attended + row_head * D + d, (row / total_of_all).to(attended.dtype.element_ty))


@triton.jit
def silu_product(
    gate_up,  # [R, 2 M]
    activated,  # out: [R, M]
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK numbers of one row, of which M is a multiple."""
    r = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + r * 2 * M + i).to(tl.float32)
    up = tl.load(gate_up + r * 2 * M + M + i).to(tl.float32)
    tl.store(activated + r * M + i, (gate / (1 + tl.exp(-gate)) * up).to(activated.dtype.element_ty))
