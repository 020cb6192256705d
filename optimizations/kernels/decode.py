"""Triton kernels for one decode step of a Llama: a few rows against every weight.

At 2 to 16 rows a product with a matrix is bound by reading the matrix: all else has to hide behind that stream. So

- each program keeps one small tile of weights, all of its columns, in registers and takes the rows two by two (with
  guidance there is an even number of them): every weight is read once, however many rows there are; sums are float32;
- what surrounds a product (normalization, rotation, cache write, activation, residual) is computed by the programs of
  that product: the rows are a few kilobytes, and a launch of its own would cost more than computing them many times;
- a kernel starts before the one in front of it has ended (programmatic dependent launch, Hopper and later): it lets its
  follower start, loads its weights, which no kernel writes, and only then waits for the rows. So several kernels are
  on the device at once, the later ones with their weights in registers already, and the stream of weights does not
  stop between kernels. Every program waits, so whoever has waited knows that all kernels before are complete.
- weights may be 8-bit numbers with a scale for each output (`optimizations/int8_weights.py`): half the bytes again. The
  scale comes after the sum, so that the products are those of the numbers as they are.

Five launches a layer; C is the model's width, M the MLP's, R the rows, L the filled slots, b the bytes of a weight:

    rmsnorm_qkv_rope      3 C² b        normalization, three products, rotation, cache write
    attention             2 R L C b     the filled part of the cache, one program for each row's head
    product_residual      C² b          output product, residual
    rmsnorm_gate_up_silu  2 C M b       normalization, both products, silu(gate) * up
    product_residual      C M b         down product, residual

and two at the end: `final_rmsnorm` and, where the head is, `speech_head`.

The order of summation does not depend on timing: a step repeats bit for bit.

What a step reads and an earlier one wrote (the cache's old slots, `position`) may be read before the wait as long as
something between the steps is launched in the ordinary way, which starts after all is complete. Drawing the next
token's random numbers is.
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
def _scales(scale, outputs, SCALED: tl.constexpr):
    """The outputs' scales, float32; 1 where the weights are no 8-bit numbers."""
    scales = tl.full(outputs.shape, 1.0, tl.float32)
    if SCALED:
        scales = tl.load(scale + outputs)
    return scales


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
    row = tl.load(x + r * C + k).to(tl.float32)
    other = tl.load(x + (r + 1) * C + k).to(tl.float32)
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
    x,  # [R, C]
    norm,  # [C]
    wq,  # [C, C], as the next two
    wk,
    wv,
    sq,  # [C] float32: scales of 8-bit weights, as the next two
    sk,
    sv,
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
    SCALED: tl.constexpr,
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
    scales = sq
    if part == 1:
        weight = wk
        scales = sk
    if part == 2:
        weight = wv
        scales = sv
    if OVERLAP:
        gdc_launch_dependents()
    first = _weights(weight, head * D + i, C)
    second = _weights(weight, head * D + half + i, C)
    first_scale = _scales(scales, head * D + i, SCALED)
    second_scale = _scales(scales, head * D + half + i, SCALED)
    gain = _gain(norm, C)
    if OVERLAP:
        gdc_wait()
    slot = tl.load(position)
    for r in tl.range(0, R, 2):
        row, other, scale, other_scale = _unscaled(x, gain, r, epsilon, C)
        a, other_a = _dots(first, row, other)
        b, other_b = _dots(second, row, other)
        _put(
            *(a * first_scale * scale, b * second_scale * scale, r, part, head, i, slot),
            *(cos, sin, q, keys, values, pad, capacity, C, D),
        )
        _put(
            *(other_a * first_scale * other_scale, other_b * second_scale * other_scale, r + 1, part, head, i, slot),
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
    if OVERLAP:
        gdc_launch_dependents()
    k = _slots(row_keys, slots, end, D)
    v = _slots(row_values, slots, end, D)
    if OVERLAP:
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
    scale,  # [C] float32: scales of 8-bit weights
    residual,  # [R, C]
    x,  # out: [R, C] float32; may be `residual`
    R: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
    SCALED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """B outputs of residual + weight @ rows."""
    outputs = tl.program_id(0) * B + tl.arange(0, B)
    if OVERLAP:
        gdc_launch_dependents()
    tile = _weights(weight, outputs, K)
    scales = _scales(scale, outputs, SCALED)
    if OVERLAP:
        gdc_wait()
    k = tl.arange(0, K)
    for r in tl.range(0, R, 2):
        row = tl.load(rows + r * K + k).to(tl.float32)
        other = tl.load(rows + (r + 1) * K + k).to(tl.float32)
        first = r * C + outputs
        before = tl.load(residual + first).to(tl.float32)
        other_before = tl.load(residual + first + C).to(tl.float32)
        y, other_y = _dots(tile, row, other)
        tl.store(x + first, before + y * scales)
        tl.store(x + first + C, other_before + other_y * scales)


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
    gate_scale,  # [M] float32: scales of 8-bit weights, as the next
    up_scale,
    activated,  # out: [R, M]
    epsilon,
    R: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
    B: tl.constexpr,
    SCALED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """B outputs of both products."""
    outputs = tl.program_id(0) * B + tl.arange(0, B)
    if OVERLAP:
        gdc_launch_dependents()
    gate_tile = _weights(gate, outputs, C)
    up_tile = _weights(up, outputs, C)
    gate_scales = _scales(gate_scale, outputs, SCALED)
    up_scales = _scales(up_scale, outputs, SCALED)
    gain = _gain(norm, C)
    if OVERLAP:
        gdc_wait()
    for r in tl.range(0, R, 2):
        row, other, scale, other_scale = _unscaled(x, gain, r, epsilon, C)
        g, other_g = _dots(gate_tile, row, other)
        u, other_u = _dots(up_tile, row, other)
        first = activated + r * M + outputs
        y = _gated(g * gate_scales * scale, u * up_scales * scale)
        other_y = _gated(other_g * gate_scales * other_scale, other_u * up_scales * other_scale)
        tl.store(first, y.to(activated.dtype.element_ty))
        tl.store(first + M, other_y.to(activated.dtype.element_ty))


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
    if OVERLAP:
        gdc_launch_dependents()
    gain = _gain(norm, C)
    if OVERLAP:
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
    if OVERLAP:
        gdc_launch_dependents()
    tile = tl.load(weight + outputs[:, None] * C + k[None, :], mask=inside[:, None], other=0.0)
    if OVERLAP:
        gdc_wait()
    for r in tl.range(0, R, 2):
        row = tl.load(hidden + r * C + k).to(tl.float32)
        other = tl.load(hidden + (r + 1) * C + k).to(tl.float32)
        y, other_y = _dots(tile, row, other)
        tl.store(logits + r * V + outputs, y, mask=inside)
        tl.store(logits + (r + 1) * V + outputs, other_y, mask=inside)
