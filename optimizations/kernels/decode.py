"""Triton kernels for one decode step of a Llama: a few rows against every weight.

At 2 to 16 rows a product with a matrix is bound by reading the matrix: all else has to hide behind that stream. So

- each program keeps one small tile of weights, all of its columns, in registers and takes the rows two by two (with
  guidance there is an even number of them): every weight is read once, however many rows there are; sums are float32;
- what surrounds a product (normalization, rotation, cache write, activation, residual) is computed by the programs of
  that product: the rows are a few kilobytes, and a launch of its own would cost more than computing them many times;
- a kernel starts before the one in front of it has ended (programmatic dependent launch, Hopper and later): it loads
  its weights, which no kernel writes, then waits for the rows. So the stream of weights does not stop between kernels.

Five launches a layer; C is the model's width, M the MLP's, R the rows, L the filled slots, b the bytes of a weight:

    rmsnorm_qkv_rope      3 C² b        normalization, three products, rotation, cache write
    attention             2 R L C b     the filled part of the cache, one program for each row's head
    product_residual      C² b          output product, residual
    rmsnorm_gate_up_silu  2 C M b       normalization, both products, silu(gate) * up
    product_residual      C M b         down product, residual

and two at the end: `final_rmsnorm` and, where the head is, `speech_head`.

The order of summation does not depend on timing: a step repeats bit for bit.
"""

# ruff: noqa: N803 (a size in capitals is known when its kernel is compiled)
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

NEVER = tl.constexpr(-1e30)
"""The score of a slot that a row does not see: no real one is as low, and its exponential is zero."""


@triton.jit
def _weights(weight, rows, n_columns: tl.constexpr):
    """The tile [len(rows), n_columns] of a row-major matrix, in its own dtype."""
    return tl.load(weight + rows[:, None] * n_columns + tl.arange(0, n_columns)[None, :])


@triton.jit
def _dots(tile, row, other):
    """Products of a tile [B, K] of weights with two rows [K], in float32 -> two [B].

    One sum for both rows: what takes time here is not the arithmetic but the threads' waiting for one another.
    """
    weights = tile.to(tl.float32)
    both = tl.join(weights * row[None, :], weights * other[None, :])
    return tl.split(tl.sum(both, axis=1))


@triton.jit
def _gain(norm, C: tl.constexpr):
    """The norm's weight, float32 [C]."""
    return tl.load(norm + tl.arange(0, C)).to(tl.float32)


@triton.jit
def _unscaled(x, gain, r, epsilon, C: tl.constexpr):
    """RMSNorm of the rows r and r + 1 of the residual stream: (row, row, scale, scale), row * scale being the norm.

    A product is linear, so the scale may come after it: then neither sum waits for the other.
    """
    k = tl.arange(0, C)
    row = tl.load(x + r * C + k)
    other = tl.load(x + (r + 1) * C + k)
    squares, others = tl.split(tl.sum(tl.join(row * row, other * other), axis=0))
    return row * gain, other * gain, tl.rsqrt(squares / C + epsilon), tl.rsqrt(others / C + epsilon)


@triton.jit
def _put(a, b, r, part, head, i, slot, cos, sin, q, keys, values, pad, capacity, C: tl.constexpr, D: tl.constexpr):
    """Row r's pairs (a, b) to where they belong: q and k rotated, k and v into the cache."""
    half = D // 2
    cached = ((r * (C // D) + head) * capacity + slot) * D + i
    if part == 2:
        tl.store(values + cached, a.to(values.dtype.element_ty))
        tl.store(values + cached + half, b.to(values.dtype.element_ty))
    else:
        angle = tl.maximum(slot - tl.load(pad + r), 0) * D + half + i
        c = tl.load(cos + angle).to(tl.float32)
        s = tl.load(sin + angle).to(tl.float32)
        turned_a = a * c - b * s
        turned_b = b * c + a * s
        if part == 0:
            tl.store(q + r * C + head * D + i, turned_a)
            tl.store(q + r * C + head * D + half + i, turned_b)
        else:
            tl.store(keys + cached, turned_a.to(keys.dtype.element_ty))
            tl.store(keys + cached + half, turned_b.to(keys.dtype.element_ty))


@triton.jit
def rmsnorm_qkv_rope(
    x,  # [R, C] float32
    norm,  # [C]
    wq,  # [C, C], as the next two
    wk,
    wv,
    cos,  # [capacity, D]
    sin,  # [capacity, D]; its first half carries the rotation's minus
    q,  # out: [R, C] float32
    keys,  # written at `position`: [R, H, capacity, D], as the next
    values,
    position,  # [1] int64: the slot of the new token
    pad,  # [R] int64: slots of a row that hold no token of its own
    capacity,
    epsilon,
    R: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    B: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """B pairs of one head's outputs, of q, k or v (the grid's second axis).

    A pair is what a rotation mixes: outputs i and i + D / 2 of a head.
    """
    pair = tl.program_id(0) * B
    part = tl.program_id(1)
    half = D // 2
    head = pair // half
    i = pair % half + tl.arange(0, B)
    weight = wq
    if part == 1:
        weight = wk
    if part == 2:
        weight = wv
    first = _weights(weight, head * D + i, C)
    second = _weights(weight, head * D + half + i, C)
    gain = _gain(norm, C)
    if OVERLAP:
        gdc_wait()
        # Only now: the attention behind it reads old slots of the cache before it waits, and so they have to be
        # complete by the time it starts.
        gdc_launch_dependents()
    slot = tl.load(position)
    for r in tl.range(0, R, 2):
        row, other, scale, other_scale = _unscaled(x, gain, r, epsilon, C)
        a, other_a = _dots(first, row, other)
        b, other_b = _dots(second, row, other)
        _put(a * scale, b * scale, r, part, head, i, slot, cos, sin, q, keys, values, pad, capacity, C, D)
        _put(
            *(other_a * other_scale, other_b * other_scale, r + 1, part, head, i, slot),
            *(cos, sin, q, keys, values, pad, capacity, C, D),
        )


@triton.jit
def _slots(cache, slots, end, D: tl.constexpr):
    """A head's keys or values at those of the slots that are filled [len(slots), D]; zeros at the others."""
    inside = slots[:, None] < end
    return tl.load(cache + slots[:, None] * D + tl.arange(0, D)[None, :], mask=inside, other=0.0)


@triton.jit
def attention(
    q,  # [R, C] float32
    keys,  # [R, H, capacity, D], as the next
    values,
    position,  # [1] int64
    valid,  # [R, capacity] uint8: 0 where a row's padding is
    attended,  # out: [R, C] float32
    capacity,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row's head, over BLOCK slots at a time.

    Slots before `position` were written in earlier steps, so the first block is loaded before the wait. The newest slot
    opens the sums.
    """
    row_head = tl.program_id(0)
    r = row_head // H
    d = tl.arange(0, D)
    slots = tl.arange(0, BLOCK)
    end = tl.load(position)
    row_keys = keys + row_head.to(tl.int64) * capacity * D
    row_values = values + row_head.to(tl.int64) * capacity * D
    k = _slots(row_keys, slots, end, D)
    v = _slots(row_values, slots, end, D)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    query = tl.load(q + row_head * D + d) * scale
    peak = tl.sum(query * tl.load(row_keys + end * D + d).to(tl.float32), axis=0)
    total = 1.0
    sums = tl.load(row_values + end * D + d).to(tl.float32)
    start = 0
    while start < end:
        visible = tl.load(valid + r * capacity + slots, mask=slots < end, other=0) != 0
        scores = tl.where(visible, tl.sum(k.to(tl.float32) * query[None, :], axis=1), NEVER)
        highest = tl.maximum(peak, tl.max(scores, axis=0))
        p = tl.exp(scores - highest)
        fade = tl.exp(peak - highest)
        total = total * fade + tl.sum(p, axis=0)
        sums = sums * fade + tl.sum(p[:, None] * v.to(tl.float32), axis=0)
        peak = highest
        start += BLOCK
        slots += BLOCK
        k = _slots(row_keys, slots, end, D)
        v = _slots(row_values, slots, end, D)
    tl.store(attended + row_head * D + d, sums / total)


@triton.jit
def product_residual(
    rows,  # [R, K]
    weight,  # [C, K]
    x,  # in and out: [R, C] float32
    R: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """B outputs of x + weight @ rows."""
    outputs = tl.program_id(0) * B + tl.arange(0, B)
    tile = _weights(weight, outputs, K)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    k = tl.arange(0, K)
    for r in tl.range(0, R, 2):
        row = tl.load(rows + r * K + k).to(tl.float32)
        other = tl.load(rows + (r + 1) * K + k).to(tl.float32)
        y, other_y = _dots(tile, row, other)
        first = x + r * C + outputs
        tl.store(first, tl.load(first) + y)
        tl.store(first + C, tl.load(first + C) + other_y)


@triton.jit
def _gated(g, u):
    """silu(g) * u"""
    return g / (1 + tl.exp(-g)) * u


@triton.jit
def rmsnorm_gate_up_silu(
    x,  # [R, C] float32
    norm,  # [C]
    gate,  # [M, C], as the next
    up,
    activated,  # out: [R, M]
    epsilon,
    R: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
    B: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """B outputs of both products."""
    outputs = tl.program_id(0) * B + tl.arange(0, B)
    gate_tile = _weights(gate, outputs, C)
    up_tile = _weights(up, outputs, C)
    gain = _gain(norm, C)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    for r in tl.range(0, R, 2):
        row, other, scale, other_scale = _unscaled(x, gain, r, epsilon, C)
        g, other_g = _dots(gate_tile, row, other)
        u, other_u = _dots(up_tile, row, other)
        first = activated + r * M + outputs
        tl.store(first, _gated(g * scale, u * scale).to(activated.dtype.element_ty))
        tl.store(first + M, _gated(other_g * other_scale, other_u * other_scale).to(activated.dtype.element_ty))


@triton.jit
def final_rmsnorm(
    x,  # [R, C] float32
    norm,  # [C]
    hidden,  # out: [R, C]
    epsilon,
    C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row."""
    gain = _gain(norm, C)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * C + tl.arange(0, C)
    values = tl.load(x + row)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / C + epsilon)
    tl.store(hidden + row, (values * scale * gain).to(hidden.dtype.element_ty))


@triton.jit
def speech_head(
    hidden,  # [R, C]
    weight,  # [V, C]
    logits,  # out: [R, V] float32
    V,
    R: tl.constexpr,
    C: tl.constexpr,
    B: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """B logits; V need not be a multiple of B."""
    outputs = tl.program_id(0) * B + tl.arange(0, B)
    inside = outputs < V
    k = tl.arange(0, C)
    tile = tl.load(weight + outputs[:, None] * C + k[None, :], mask=inside[:, None], other=0.0)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    for r in tl.range(0, R, 2):
        row = tl.load(hidden + r * C + k).to(tl.float32)
        other = tl.load(hidden + (r + 1) * C + k).to(tl.float32)
        y, other_y = _dots(tile, row, other)
        tl.store(logits + r * V + outputs, y, mask=inside)
        tl.store(logits + (r + 1) * V + outputs, other_y, mask=inside)
