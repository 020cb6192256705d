"""Triton kernels for one decode step of a Llama: a few rows against every weight.

At 2 to 16 rows a product with a matrix is bound by reading the matrix: all else has to hide behind that stream. So

- each program keeps one small tile of weights, all of its columns, in registers and takes the rows two by two (with
  guidance there is an even number of them; without, the last one may go by its own side): every weight is read once,
  however many rows there are; sums are float32;
- what surrounds a product (normalization, rotation, cache write, activation, residual) is computed by the programs of
  that product: the rows are a few kilobytes, and a launch of its own would cost more than computing them many times;
- a kernel starts before the one in front of it has ended (programmatic dependent launch, Hopper and later): it lets its
  follower start, loads its weights, which no kernel writes, and only then waits for the rows. So several kernels are
  on the device at once, the later ones with their weights in registers already, and the stream of weights does not
  stop between kernels. Every program waits, so whoever has waited knows that all kernels before are complete.
- weights may be 8-bit numbers with a scale for each output (`int8.py`), four to a word: half the
  bytes again. The four belong to the same place in four quarters of the columns, so that a row is read in four pieces,
  each laid out over the threads as the words are. The scale comes after the sum.

Five launches a layer; C is the model's width, M the MLP's, R the rows, L the filled slots, b the bytes of a weight:

    rmsnorm_qkv_rope      3 C² b        normalization, three products, rotation, cache write
    attention             2 R L C b     the filled part of the cache, a few programs for each row's head
    product_residual      C² b          output product, residual
    rmsnorm_gate_up_silu  2 C M b       normalization, both products, silu(gate) * up
    product_residual      C M b         down product, residual

and two at the end: `final_rmsnorm` and, where the head is, `speech_head`.

The order of summation does not depend on timing: a step repeats bit for bit.

A step's first kernel reads what the one before has just written, `position` too, after its wait, and then lets its
follower start; so all others may read before theirs what an earlier step wrote: `position`, the cache's old slots.
"""

# ruff: noqa: N803, RET505 (a size in capitals is known when its kernel is compiled; only an `else` is left out then)
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

NEVER = tl.constexpr(-1e30)
"""The score of a slot that a row does not see: no real one is as low, and its exponential is zero."""


@triton.jit
def _weights(weight, rows, n_columns: tl.constexpr, SCALED: tl.constexpr):
    """The tile [len(rows), n_columns] of a row-major matrix, in its own dtype; of 8-bit weights the words."""
    width: tl.constexpr = n_columns // 4 if SCALED else n_columns
    return tl.load(weight + rows[:, None] * width + tl.arange(0, width)[None, :])


@triton.jit
def _numbers(row, n: tl.constexpr, SCALED: tl.constexpr):
    """A row's n numbers in float32, as the weights want them: [n], or four of [n / 4]."""
    if SCALED:
        k = tl.arange(0, n // 4)
        return (
            tl.load(row + k).to(tl.float32),
            tl.load(row + n // 4 + k).to(tl.float32),
            tl.load(row + n // 2 + k).to(tl.float32),
            tl.load(row + n // 2 + n // 4 + k).to(tl.float32),
        )
    else:
        return tl.load(row + tl.arange(0, n)).to(tl.float32)


@triton.jit
def _times(row, gain, SCALED: tl.constexpr):
    """Number by number."""
    if SCALED:
        return row[0] * gain[0], row[1] * gain[1], row[2] * gain[2], row[3] * gain[3]
    else:
        return row * gain


@triton.jit
def _squares(row, SCALED: tl.constexpr):
    """A row's numbers squared; of 8-bit weights' four the sums."""
    if SCALED:
        return row[0] * row[0] + row[1] * row[1] + row[2] * row[2] + row[3] * row[3]
    else:
        return row * row


@triton.jit
def _square_sums(row, other, R: tl.constexpr, SCALED: tl.constexpr):
    """Of two rows at once, which are one and the same if there is but one."""
    if R == 1:
        squares = tl.sum(_squares(row, SCALED), axis=0)
        return squares, squares
    else:
        return tl.split(tl.sum(tl.join(_squares(row, SCALED), _squares(other, SCALED)), axis=0))


@triton.jit
def _weighted(tile, row, SCALED: tl.constexpr):
    """Weights [B, K] times a row, in float32; of 8-bit weights' four the sums."""
    if SCALED:
        a = ((tile << 24) >> 24).to(tl.float32)
        b = ((tile << 16) >> 24).to(tl.float32)
        c = ((tile << 8) >> 24).to(tl.float32)
        d = (tile >> 24).to(tl.float32)
        return a * row[0][None, :] + b * row[1][None, :] + c * row[2][None, :] + d * row[3][None, :]
    else:
        return tile.to(tl.float32) * row[None, :]


@triton.jit
def _dots(tile, row, other, R: tl.constexpr, SCALED: tl.constexpr):
    """Products of a tile [B, K] of weights with two rows, in float32 -> two [B]; the same one if there is but one row.

    One sum for both rows: what takes time here is not the arithmetic but the threads' waiting for one another.
    """
    if R == 1:
        y = tl.sum(_weighted(tile, row, SCALED), axis=1)
        return y, y
    else:
        return tl.split(tl.sum(tl.join(_weighted(tile, row, SCALED), _weighted(tile, other, SCALED)), axis=1))


@triton.jit
def _scales(scale, outputs, SCALED: tl.constexpr):
    """The outputs' scales, float32; 1 where the weights are no 8-bit numbers."""
    if SCALED:
        return tl.load(scale + outputs)
    else:
        return tl.full(outputs.shape, 1.0, tl.float32)


@triton.jit
def _beside(r, R: tl.constexpr):
    """The row that goes with row r: the next one, or r itself where an odd number of rows ends."""
    if R == 1:
        return r
    elif R % 2 == 0:
        return r + 1
    else:
        return tl.minimum(r + 1, R - 1)


@triton.jit
def _normed_dots(first, second, x, gain, r, beside, epsilon, R: tl.constexpr, C: tl.constexpr, SCALED: tl.constexpr):
    """Products of two tiles with the RMSNorm of two rows of the residual stream: two of each tile.

    A product is linear, so the norm's scale comes after it: then neither sum waits for the other.
    """
    row = _numbers(x + r * C, C, SCALED)
    other = _numbers(x + beside * C, C, SCALED)
    squares, others = _square_sums(row, other, R, SCALED)
    row = _times(row, gain, SCALED)
    other = _times(other, gain, SCALED)
    a, other_a = _dots(first, row, other, R, SCALED)
    b, other_b = _dots(second, row, other, R, SCALED)
    scale = tl.rsqrt(squares / C + epsilon)
    other_scale = tl.rsqrt(others / C + epsilon)
    return a * scale, other_a * other_scale, b * scale, other_b * other_scale


@triton.jit
def _angles(cos, sin, pad, r, slot, i, D: tl.constexpr):
    """Cosines and sines for the pairs i of row r's new token."""
    angle = tl.maximum(slot - tl.load(pad + r), 0) * D + D // 2 + i
    return tl.load(cos + angle).to(tl.float32), tl.load(sin + angle).to(tl.float32)


@triton.jit
def _put(a, b, r, part, head, i, slot, c, s, q, keys, values, capacity, C: tl.constexpr, D: tl.constexpr):
    """Row r's pairs (a, b) to where they belong: q and k rotated, k and v into the cache."""
    half = D // 2
    cached = ((r * (C // D) + head) * capacity + slot) * D + i
    if part == 2:
        tl.store(values + cached, a.to(values.dtype.element_ty))
        tl.store(values + cached + half, b.to(values.dtype.element_ty))
    else:
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
    FIRST: tl.constexpr,
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
    first = _weights(weight, head * D + i, C, SCALED)
    second = _weights(weight, head * D + half + i, C, SCALED)
    first_scale = _scales(scales, head * D + i, SCALED)
    second_scale = _scales(scales, head * D + half + i, SCALED)
    gain = _numbers(norm, C, SCALED)
    if OVERLAP and FIRST:
        gdc_wait()
    slot = tl.load(position)
    cosine, sine = _angles(cos, sin, pad, 0, slot, i, D)
    other_cosine, other_sine = _angles(cos, sin, pad, _beside(0, R), slot, i, D)
    if OVERLAP:
        gdc_wait()
        # Only now: followers that start while the layer before still works are in its way.
        gdc_launch_dependents()
    for r in tl.range(0, R, 2):
        beside = _beside(r, R)
        a, other_a, b, other_b = _normed_dots(first, second, x, gain, r, beside, epsilon, R, C, SCALED)
        _put(
            *(a * first_scale, b * second_scale, r, part, head, i, slot, cosine, sine),
            *(q, keys, values, capacity, C, D),
        )
        _put(
            *(other_a * first_scale, other_b * second_scale, beside, part, head, i, slot, other_cosine, other_sine),
            *(q, keys, values, capacity, C, D),
        )
        if r + 2 < R:
            cosine, sine = _angles(cos, sin, pad, r + 2, slot, i, D)
            other_cosine, other_sine = _angles(cos, sin, pad, _beside(r + 2, R), slot, i, D)


@triton.jit
def _slots(cache, slots, end, D: tl.constexpr):
    """A head's keys or values at those of the slots that are filled [len(slots), D]; zeros at the others."""
    inside = slots[:, None] < end
    return tl.load(cache + slots[:, None] * D + tl.arange(0, D)[None, :], mask=inside, other=0.0)


@triton.jit
def _together(peaks, totals, sums, left, start, n_splits, D: tl.constexpr, TOGETHER: tl.constexpr):
    """What TOGETHER of a head's programs left, from the one at `start` on, as one of them would have left it."""
    s = start + tl.arange(0, TOGETHER)
    parts = left + s
    # Past the first-level cache, which may hold what lay there in the layer before.
    peak_of = tl.load(peaks + parts, mask=s < n_splits, other=NEVER, cache_modifier=".cg")
    total_of = tl.load(totals + parts, mask=s < n_splits, other=0.0, cache_modifier=".cg")
    at = parts[:, None] * D + tl.arange(0, D)[None, :]
    sum_of = tl.load(sums + at, mask=s[:, None] < n_splits, other=0.0, cache_modifier=".cg")
    peak = tl.max(peak_of, axis=0)
    share = tl.exp(peak_of - peak)
    return peak, tl.sum(share * total_of, axis=0), tl.sum(share[:, None] * sum_of, axis=0)


@triton.jit
def attention(
    q,  # [R, C] float32
    keys,  # [R, H, capacity, D], as the next
    values,
    position,  # [1] int64
    valid,  # [R, capacity] uint8: 0 where a row's padding is
    peaks,  # [R, H, S] float32: what the programs of a head leave for the last of them, as the next two
    totals,
    sums,  # [R, H, S, D]
    arrived,  # [R, H] int32: 0 before and after
    attended,  # out: [R, C] float32
    capacity,
    splits,  # S: for how many programs of a head there is room
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BLOCK slots of one row's head (the grid's second axis); whichever program comes last puts the head together.

    It does so in the order of the slots, TOGETHER programs' at a time, whoever it is and however many stand ready, so
    that the sum depends on the position alone: the same token is said whichever graph its step is part of. Slots before
    `position` were written in earlier steps and are loaded before the wait. The newest slot belongs to the first
    program.
    """
    row_head = tl.program_id(0)
    split = tl.program_id(1)
    d = tl.arange(0, D)
    slots = split * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(position).to(tl.int32)
    n_splits = tl.maximum((end + BLOCK - 1) // BLOCK, 1)
    row_keys = keys + row_head.to(tl.int64) * capacity * D
    row_values = values + row_head.to(tl.int64) * capacity * D
    if OVERLAP:
        gdc_launch_dependents()
    k = _slots(row_keys, slots, end, D)
    v = _slots(row_values, slots, end, D)
    visible = tl.load(valid + row_head // H * capacity + slots, mask=slots < end, other=0) != 0
    if OVERLAP:
        gdc_wait()
    if split < n_splits:
        query = tl.load(q + row_head * D + d) * scale
        newest = tl.sum(query * tl.load(row_keys + end * D + d).to(tl.float32), axis=0)
        newest = tl.where(split == 0, newest, NEVER)
        newest_value = tl.load(row_values + end * D + d).to(tl.float32)
        scores = tl.where(visible, tl.sum(k.to(tl.float32) * query[None, :], axis=1), NEVER)
        peak = tl.maximum(newest, tl.max(scores, axis=0))
        p = tl.exp(scores - peak)
        newest_p = tl.exp(newest - peak)
        total = tl.sum(p, axis=0) + newest_p
        row = tl.sum(p[:, None] * v.to(tl.float32), axis=0) + newest_p * newest_value
        if n_splits == 1:
            tl.store(attended + row_head * D + d, row / total)
        else:
            own = row_head * splits + split
            tl.store(peaks + own, peak)
            tl.store(totals + own, total)
            tl.store(sums + own * D + d, row)
            tl.debug_barrier()  # all threads' stores, before one of them says that they are made
            if tl.atomic_add(arrived + row_head, 1, sem="acq_rel", scope="gpu") == n_splits - 1:
                tl.store(arrived + row_head, 0)
                left = row_head * splits
                peak, total, row = _together(peaks, totals, sums, left, 0, n_splits, D, TOGETHER)
                for start in range(TOGETHER, n_splits, TOGETHER):
                    own_peak, own_total, own_row = _together(peaks, totals, sums, left, start, n_splits, D, TOGETHER)
                    highest = tl.maximum(peak, own_peak)
                    fade = tl.exp(peak - highest)
                    share = tl.exp(own_peak - highest)
                    total = total * fade + own_total * share
                    row = row * fade + own_row * share
                    peak = highest
                tl.store(attended + row_head * D + d, row / total)


@triton.jit
def product_residual(
    rows,  # [R, K]
    weight,  # [C, K]
    scale,  # [C] float32: scales of 8-bit weights
    bias,  # [C]: not read without BIAS
    residual,  # [R, C]
    x,  # out: [R, C] float32; may be `residual`
    R: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """B outputs of residual + weight @ rows + bias."""
    outputs = tl.program_id(0) * B + tl.arange(0, B)
    if OVERLAP:
        gdc_launch_dependents()
    tile = _weights(weight, outputs, K, SCALED)
    scales = _scales(scale, outputs, SCALED)
    added = tl.load(bias + outputs).to(tl.float32) if BIAS else 0.0
    if OVERLAP:
        gdc_wait()
    for r in tl.range(0, R, 2):
        beside = _beside(r, R)
        first = r * C + outputs
        second = beside * C + outputs
        before = tl.load(residual + first).to(tl.float32)
        other_before = tl.load(residual + second).to(tl.float32)
        row = _numbers(rows + r * K, K, SCALED)
        other = _numbers(rows + beside * K, K, SCALED)
        y, other_y = _dots(tile, row, other, R, SCALED)
        tl.store(x + first, before + y * scales + added)
        if R > 1:
            tl.store(x + second, other_before + other_y * scales + added)


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
    gate_tile = _weights(gate, outputs, C, SCALED)
    up_tile = _weights(up, outputs, C, SCALED)
    gate_scales = _scales(gate_scale, outputs, SCALED)
    up_scales = _scales(up_scale, outputs, SCALED)
    gain = _numbers(norm, C, SCALED)
    if OVERLAP:
        gdc_wait()
    for r in tl.range(0, R, 2):
        beside = _beside(r, R)
        g, other_g, u, other_u = _normed_dots(gate_tile, up_tile, x, gain, r, beside, epsilon, R, C, SCALED)
        y = _gated(g * gate_scales, u * up_scales)
        other_y = _gated(other_g * gate_scales, other_u * up_scales)
        tl.store(activated + r * M + outputs, y.to(activated.dtype.element_ty))
        tl.store(activated + beside * M + outputs, other_y.to(activated.dtype.element_ty))


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
    gain = _numbers(norm, C, False)
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
    scale,  # [V] float32: scales of 8-bit weights
    bias,  # [V]: not read without BIAS
    logits,  # out: [R, V] float32
    V,
    R: tl.constexpr,
    C: tl.constexpr,
    B: tl.constexpr,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """B logits; V need not be a multiple of B."""
    outputs = tl.program_id(0) * B + tl.arange(0, B)
    inside = outputs < V
    there = tl.minimum(outputs, V - 1)
    if OVERLAP:
        gdc_launch_dependents()
    tile = _weights(weight, there, C, SCALED)
    scales = _scales(scale, there, SCALED)
    added = tl.load(bias + there).to(tl.float32) if BIAS else 0.0
    if OVERLAP:
        gdc_wait()
    for r in tl.range(0, R, 2):
        beside = _beside(r, R)
        row = _numbers(hidden + r * C, C, SCALED)
        other = _numbers(hidden + beside * C, C, SCALED)
        y, other_y = _dots(tile, row, other, R, SCALED)
        tl.store(logits + r * V + outputs, y * scales + added, mask=inside)
        if R > 1:
            tl.store(logits + beside * V + outputs, other_y * scales + added, mask=inside)
