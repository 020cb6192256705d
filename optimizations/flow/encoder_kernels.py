"""Triton kernels for the flow's encoder: a product of any kind, and attention that knows how far apart frames are.

The layout is that of `triton_kernels.py`: frames [R * T, C], the rows one behind the other. At 512 channels a tile of
whole frames is no operand that a program has room for, as it is at the estimator's 256: sums run over the channels, a
few at a time, and a norm is of numbers that are read twice.

A layer is five launches, with M = R * T frames, C channels, F the feed-forward net's:

    encoder_product      6 M C²           layer norm, queries, keys and values in one product
    relative_attention   4 M T C + 2 M T C  flash attention, of which a third is what the distance adds
    encoder_product      2 M C²           bias, into the residual
    encoder_product      2 M C F          layer norm, bias, SiLU
    encoder_product      2 M C F          bias, into the residual

What enters a product has the weights' dtype; its sums, norms, the softmax and the residual stream are float32. In
float16, numbers end at 65,504: what a norm has left is far from it, but convolutions read the stream as it is, and one
reads what another made of it, so there it is clamped. bfloat16 would have the room, and an eighth of the exactness for
all the numbers that never come near; float32 operands are twice the bytes; clamping is two instructions a number. Every
element is written by one program, and sums have one order. Kernels overlap as those of the estimator do.
"""

# ruff: noqa: N803 (a size in capitals is known when its kernel is compiled)
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from optimizations.flow.triton_kernels import _attend


@triton.jit
def _moments(frames, inside, epsilon, C: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Of whole frames, DEPTH channels at a time: the mean, and as a factor what the distance from it is divided by.

    Each part has its own mean, so that nothing large is subtracted from something as large.
    """
    mean = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for step in range(C // DEPTH):
        part = tl.load(frames + step * DEPTH, mask=inside, other=0.0)
        own = tl.sum(part, axis=1) / DEPTH
        away = part - own[:, None]
        apart = own - mean
        mean += apart / (step + 1)
        squares += tl.sum(away * away, axis=1) + apart * apart * (DEPTH * step / (step + 1))
    return mean, tl.rsqrt(squares / C + epsilon)


@triton.jit
def _narrowed(x, dtype: tl.constexpr):
    """x in that dtype. What float16 has no room for becomes the largest number that it has, and not infinity.

    Infinity would be no number at all a norm or a softmax later, in every frame that looks there.
    """
    if x.dtype == tl.float32 and dtype == tl.float16:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return x.to(dtype)


@triton.jit(do_not_specialize=["M", "T"])
def encoder_product(
    x,  # [M, C], float32 or operands
    weight,  # [N, TAPS * C], operands: frame by frame
    bias,  # [N] float32
    lengths,  # [R] int32, up to T; read by a convolution
    out,  # out, with ADD in and out: [M, N], float32 or operands
    M,
    T,
    epsilon,
    N: tl.constexpr,
    C: tl.constexpr,
    TAPS: tl.constexpr,  # frames that one of the result is made of
    BACK: tl.constexpr,  # how many of them lie before it
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADD: tl.constexpr,
    PRODUCT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """ROWS frames, COLUMNS outputs: activation(norm(x) @ weight^T + bias), added to what is there with ADD.

    The norm's own gain and shift are in the weight and the bias. To a convolution, there are zeros before a row's first
    frame and behind its last.
    """
    if OVERLAP:
        gdc_launch_dependents()
    parts: tl.constexpr = N // COLUMNS
    first = (tl.program_id(0) // parts) * ROWS
    tile = first.to(tl.int64)
    n = (tl.program_id(0) % parts) * COLUMNS + tl.arange(0, COLUMNS)
    i = tl.arange(0, ROWS)
    k = tl.arange(0, DEPTH)
    inside = i < M - first
    biases = tl.load(bias + n)
    weights = weight + n[None, :] * (TAPS * C) + k[:, None]
    here = x + tile * C + i[:, None] * C
    at = out + tile * N + i[:, None] * N + n[None, :]
    if OVERLAP:
        gdc_wait()
    if ADD:
        before = tl.load(at, mask=inside[:, None], other=0.0)  # here, as nobody has to wait for it at the end
    if NORM:
        mean, scale = _moments(here + k[None, :], inside[:, None], epsilon, C, ROWS, DEPTH)
    if TAPS > 1:
        t = (first + i) % T
        end = tl.load(lengths + (first + i) // T, mask=inside, other=0)
    steps: tl.constexpr = C // DEPTH
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(TAPS * steps):
        ahead = step // steps - BACK
        seen = inside
        if TAPS > 1:
            seen = inside & (t + ahead >= 0) & (t + ahead < end)
        a = tl.load(here + ahead * C + (step % steps) * DEPTH + k[None, :], mask=seen[:, None], other=0.0)
        b = tl.load(weights + step * DEPTH)
        a = ((a - mean[:, None]) * scale[:, None]).to(b.dtype) if NORM else _narrowed(a, b.dtype)
        sums = tl.dot(a, b, sums, input_precision=PRODUCT)
    y = sums + biases[None, :]
    if ACTIVATION == "silu":
        y *= tl.sigmoid(y)
    elif ACTIVATION == "leaky_relu":
        y = tl.where(y > 0, y, 0.01 * y)
    if ADD:
        y += before
    tl.store(at, _narrowed(y, out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _scores_by_distance(query, table, first, reach, WIDTH: tl.constexpr, KEYS: tl.constexpr, PRODUCT: tl.constexpr):
    """Queries [Q, D] against the KEYS distances from row `first` of the table [2 * reach - 1, WIDTH] on."""
    row = first + tl.arange(0, KEYS)
    inside = (row >= 0) & (row < 2 * reach - 1)
    position = tl.load(table + row[None, :] * WIDTH, mask=inside[None, :], other=0.0)
    return tl.dot(query, position, input_precision=PRODUCT)


@triton.jit(do_not_specialize=["T", "reach"])
def relative_attention(
    qkv,  # [R, T, 3, H, D], operands; to the queries belongs what they meet keys with
    difference,  # [H, D] float32: what else belongs to them where they meet distances
    table,  # [2 * reach - 1, H, D], operands: of distances from reach - 1 frames before a query to as many behind it
    lengths,  # [R] int32, up to T
    attended,  # out: [R, T, H, D], operands
    T,
    reach,
    scale,  # D^-0.5 * log2(e): the softmax is in powers of two
    H: tl.constexpr,
    D: tl.constexpr,
    PRODUCT: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """QUERIES frames of one row's head against the row's keys; zeros where all of them lie behind the row's end.

    A block of KEYS keys is up to QUERIES - 1 frames nearer to one query than to another, so that its distances are two
    blocks of KEYS, of which the nearer one is the next keys' farther one. As QUERIES is KEYS at most, each query takes
    of the two what its keys are away, which in its row of the blocks begins where another's ended: put together they
    are all there, turned by the query's number.
    """
    if OVERLAP:
        gdc_launch_dependents()
    tl.static_assert(QUERIES <= KEYS)
    blocks = tl.cdiv(T, QUERIES)
    row_head = tl.program_id(0) // blocks
    row = row_head // H
    head = row_head % H
    start = (tl.program_id(0) % blocks) * QUERIES
    own = tl.arange(0, QUERIES)
    i = start + own
    d = tl.arange(0, D)
    j = tl.arange(0, KEYS)
    width: tl.constexpr = H * D
    queries = qkv + row.to(tl.int64) * T * (3 * width) + head * D
    keys = queries + width + d[:, None]
    values = queries + 2 * width + d[None, :]
    distances = table + head * D + d[:, None]
    nearest = reach - 1 - start  # the table's row for the first key as the first query sees it
    turned = (j[None, :] - own[:, None]) & (KEYS - 1)
    is_before = j[None, :] >= KEYS - own[:, None]
    more = tl.load(difference + head * D + d)
    if OVERLAP:
        gdc_wait()
    length = tl.load(lengths + row)
    length = tl.where(start < length, length, 0)
    query = tl.load(queries + i[:, None] * (3 * width) + d[None, :], mask=(i < T)[:, None], other=0.0)
    distant = (query.to(tl.float32) + more[None, :]).to(query.dtype)
    peak = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, D), tl.float32)
    before = _scores_by_distance(distant, distances, nearest - KEYS, reach, width, KEYS, PRODUCT)
    for first in range(0, length, KEYS):
        at = (first + j) * (3 * width)
        seen = first + j < length
        key = tl.load(keys + at[None, :], mask=seen[None, :], other=0.0)
        value = tl.load(values + at[:, None], mask=seen[:, None], other=0.0)
        behind = _scores_by_distance(distant, distances, nearest + first, reach, width, KEYS, PRODUCT)
        by_distance = tl.gather(tl.where(is_before, before, behind), turned, axis=1)
        scores = tl.dot(query, key, by_distance, input_precision=PRODUCT)
        peak, total, sums = _attend(scores, value, peak, total, sums, scale, seen, PRODUCT)
        before = behind
    sums /= tl.maximum(total, 1.0)[:, None]
    out = attended + row.to(tl.int64) * T * width + head * D + i[:, None] * width + d[None, :]
    tl.store(out, sums.to(attended.dtype.element_ty), mask=(i < T)[:, None])
