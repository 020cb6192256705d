"""Triton kernels for what a GPT-2's decode step has and a Llama's has not; the others are those of `triton_decode.py`.

A LayerNorm goes into the product behind it, as an RMSNorm does there: with gain g, shift b and weights W,

    W . norm(x) = (W . (g x) - mean(x) W . g) / deviation(x) + W . b

of which W . g and W . b wait for no row, and the three sums over a row do not wait for one another.
Five launches a layer: `layernorm_qkv`, `attention`, `product_residual`, `layernorm_gelu`, `product_residual`, and
`final_layernorm` behind the last. The first one of a step also adds what the learned positions have to add.
"""

# ruff: noqa: N803, RET505 (a size in capitals is known when its kernel is compiled; only an `else` is left out then)
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from optimizations.t3.triton_decode import _beside, _dots, _numbers, _scales, _squares, _times, _weights


@triton.jit
def _plus(row, other, SCALED: tl.constexpr):
    """Number by number."""
    if SCALED:
        return row[0] + other[0], row[1] + other[1], row[2] + other[2], row[3] + other[3]
    else:
        return row + other


@triton.jit
def _keep(row, where, n: tl.constexpr, SCALED: tl.constexpr):
    """Store what `_numbers` would load."""
    if SCALED:
        k = tl.arange(0, n // 4)
        tl.store(where + k, row[0])
        tl.store(where + n // 4 + k, row[1])
        tl.store(where + n // 2 + k, row[2])
        tl.store(where + n // 2 + n // 4 + k, row[3])
    else:
        tl.store(where + tl.arange(0, n), row)


@triton.jit
def _at_its_place(row, learned, pad, r, slot, C: tl.constexpr, SCALED: tl.constexpr):
    """Row r's embedding and what the position of its new token adds."""
    place = tl.maximum(slot - tl.load(pad + r), 0)
    return _plus(row, _numbers(learned + place * C, C, SCALED), SCALED)


@triton.jit
def _moments(row, C: tl.constexpr, SCALED: tl.constexpr):
    """A row's mean and variance, by one sum."""
    numbers = row[0] + row[1] + row[2] + row[3] if SCALED else row
    squares, total = tl.split(tl.sum(tl.join(_squares(row, SCALED), numbers), axis=0))
    mean = total / C
    return mean, squares / C - mean * mean


@triton.jit
def _layered_dots(
    tile, of_gain, of_shift, row, other, gain, epsilon, R: tl.constexpr, C: tl.constexpr, SCALED: tl.constexpr
):
    """Products of a tile with the LayerNorm of two rows of the residual stream."""
    mean, variance = _moments(row, C, SCALED)
    y, other_y = _dots(tile, _times(row, gain, SCALED), _times(other, gain, SCALED), R, SCALED)
    y = (y - mean * of_gain) * tl.rsqrt(variance + epsilon) + of_shift
    if R == 1:
        return y, y
    else:
        mean, variance = _moments(other, C, SCALED)
        return y, (other_y - mean * of_gain) * tl.rsqrt(variance + epsilon) + of_shift


@triton.jit
def _put(y, r, part, head, i, slot, q, keys, values, capacity, C: tl.constexpr, D: tl.constexpr):
    """Row r's outputs of one head to where they belong: q to the next kernel, k and v into the cache."""
    cached = ((r * (C // D) + head) * capacity + slot) * D + i
    if part == 0:
        tl.store(q + r * C + head * D + i, y)
    if part == 1:
        tl.store(keys + cached, y.to(keys.dtype.element_ty))
    if part == 2:
        tl.store(values + cached, y.to(values.dtype.element_ty))


@triton.jit
def layernorm_qkv(
    before,  # [R, C]: the residual stream, or the embeddings of the new tokens if FIRST
    learned,  # [positions, C]: read if FIRST
    pad,  # [R] int64: slots of a row that hold no token of its own; read if FIRST
    x,  # out if FIRST: [R, C] float32: the residual stream
    norm,  # [C], as the next
    shift,
    weight,  # [3 C, C]: q, k, v
    scales,  # [3 C] float32: of 8-bit weights
    bias,  # [3 C]
    q,  # out: [R, C] float32
    keys,  # written at `position`: [R, H, capacity, D], as the next
    values,
    position,  # [1] int64: the slot of the new token
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
    """B outputs of one head, of q, k or v."""
    first = tl.program_id(0) * B
    outputs = first + tl.arange(0, B)
    part = first // C
    head = first % C // D
    i = first % D + tl.arange(0, B)
    tile = _weights(weight, outputs, C, SCALED)
    scale = _scales(scales, outputs, SCALED)
    added = tl.load(bias + outputs).to(tl.float32)
    gain = _numbers(norm, C, SCALED)
    of_gain, of_shift = _dots(tile, gain, _numbers(shift, C, SCALED), 2, SCALED)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.load(position)  # of the first kernel in a step, the one before has moved it
    for r in tl.range(0, R, 2):
        beside = _beside(r, R)
        row = _numbers(before + r * C, C, SCALED)
        other = _numbers(before + beside * C, C, SCALED)
        if FIRST:
            row = _at_its_place(row, learned, pad, r, slot, C, SCALED)
            other = _at_its_place(other, learned, pad, beside, slot, C, SCALED)
            if first == 0:
                _keep(row, x + r * C, C, SCALED)
                _keep(other, x + beside * C, C, SCALED)
        y, other_y = _layered_dots(tile, of_gain, of_shift, row, other, gain, epsilon, R, C, SCALED)
        _put(y * scale + added, r, part, head, i, slot, q, keys, values, capacity, C, D)
        if R > 1:
            _put(other_y * scale + added, beside, part, head, i, slot, q, keys, values, capacity, C, D)


@triton.jit
def _gelu(x):
    """GPT-2's, with tanh(u) = 2 / (1 + exp(-2 u)) - 1."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1 + tl.exp(-2 * u))


@triton.jit
def layernorm_gelu(
    x,  # [R, C] float32
    norm,  # [C], as the next
    shift,
    weight,  # [M, C]
    scales,  # [M] float32: of 8-bit weights
    bias,  # [M]
    activated,  # out: [R, M]
    epsilon,
    R: tl.constexpr,
    C: tl.constexpr,
    M: tl.constexpr,
    B: tl.constexpr,
    SCALED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """B inner activations."""
    outputs = tl.program_id(0) * B + tl.arange(0, B)
    if OVERLAP:
        gdc_launch_dependents()
    tile = _weights(weight, outputs, C, SCALED)
    scale = _scales(scales, outputs, SCALED)
    added = tl.load(bias + outputs).to(tl.float32)
    gain = _numbers(norm, C, SCALED)
    of_gain, of_shift = _dots(tile, gain, _numbers(shift, C, SCALED), 2, SCALED)
    if OVERLAP:
        gdc_wait()
    for r in tl.range(0, R, 2):
        beside = _beside(r, R)
        row = _numbers(x + r * C, C, SCALED)
        other = _numbers(x + beside * C, C, SCALED)
        y, other_y = _layered_dots(tile, of_gain, of_shift, row, other, gain, epsilon, R, C, SCALED)
        tl.store(activated + r * M + outputs, _gelu(y * scale + added).to(activated.dtype.element_ty))
        if R > 1:
            other_y = _gelu(other_y * scale + added)
            tl.store(activated + beside * M + outputs, other_y.to(activated.dtype.element_ty))


@triton.jit
def final_layernorm(
    x,  # [R, C] float32
    norm,  # [C], as the next
    shift,
    hidden,  # out: [R, C]
    epsilon,
    C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row."""
    k = tl.arange(0, C)
    if OVERLAP:
        gdc_launch_dependents()
    gain = tl.load(norm + k).to(tl.float32)
    added = tl.load(shift + k).to(tl.float32)
    if OVERLAP:
        gdc_wait()
    row = tl.program_id(0) * C + k
    numbers = tl.load(x + row)
    numbers -= tl.sum(numbers, axis=0) / C
    scale = tl.rsqrt(tl.sum(numbers * numbers, axis=0) / C + epsilon)
    tl.store(hidden + row, (numbers * scale * gain + added).to(hidden.dtype.element_ty))
