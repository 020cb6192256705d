"""Triton kernels for the flow's estimator, in one layout: frames [R * T, C], the rows one behind the other.

The estimator's arithmetic is products of matrices, and its layers spend two thirds of their time on what lies between:
norms, activations, masks, and moving the channels to where the next layer wants them. Here

- the layout never changes, so nothing is moved; a convolution over the last three frames is a product whose kernel
  reads three shifted tiles, so its windows are never written;
- norms, activations, biases and sums with the residual are computed by the products next to them, whose tiles hold
  whole frames or never leave the registers;
- what enters a product is half precision; its sums, norms, activations and the residual stream x are float32.

Convolutions look back only, and padding lies behind a row's end: no frame of a row ever sees padding except through
attention, and that alone is told the lengths. Behind a row's end the kernels compute something finite, nobody reads it.

Launches, with M = R * T frames, C channels, I the width of all heads together, F the feed-forward net's:

    convolution      6 M C²        three frames, bias; norm and Mish, the time's share, a ResNet's 1x1 shortcut
    norm_product     6 M C I       layer norm, queries, keys and values in one product
    row_attention    4 M T I       flash attention, within a row's length
    add_product      2 M C I       output product, bias, into the residual
    norm_product     2 M C F       layer norm, bias, GELU
    add_product      2 M C F       bias, into the residual

the last five once a transformer block. Every element is written by one program, and sums have one order: a step repeats
bit for bit. As in T3's decode step (`t3/triton_decode.py`), a kernel may start before the one in front of it has ended:
it waits before it reads what another kernel has written, and writes nothing before.

M is any number of frames; the last tile may be partly empty. Offsets within a tile are 32 bits wide, a tile's own 64.
Lengths are not specialized: a new one must not mean another compilation.
"""

# ruff: noqa: N803 (a size in capitals is known when its kernel is compiled)
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOOK_BACK = tl.constexpr(2)
"""Frames that a convolution sees besides its own."""
PART = tl.constexpr(64)
"""Channels of a frame, or all if they are fewer, whose sum and sum of squares are known to the norm behind."""


@triton.jit
def _normalized(x, gain, shift, epsilon, C: tl.constexpr):
    """Layer norm of whole frames x [B, C], float32."""
    mean = tl.sum(x, axis=1) / C
    x -= mean[:, None]
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / C + epsilon)
    return x * scale[:, None] * gain[None, :] + shift[None, :]


@triton.jit
def _store_moments(x, moments, frames, first, inside, C: tl.constexpr, WIDTH: tl.constexpr):
    """Sum and sum of squares of each PART channels of x [ROWS, WIDTH], whose first channel is `first`: see `PART`."""
    part: tl.constexpr = min(PART, C)
    parts: tl.constexpr = WIDTH // part
    rows: tl.constexpr = x.shape[0]
    apart = tl.reshape(x, (rows, parts, part))
    at = frames[:, None] * (2 * (C // part)) + first // part + tl.arange(0, parts)[None, :]
    tl.store(moments + at, tl.sum(apart, axis=2), mask=inside)
    tl.store(moments + at + C // part, tl.sum(apart * apart, axis=2), mask=inside)


@triton.jit
def _mish(x):
    """x * tanh(log(1 + e^x)); where e^x overflows, x."""
    e = tl.exp(x)
    return x - 2 * x / (e * (e + 2) + 2)


@triton.jit
def _gelu(x):
    """x * (1 + erf(x / sqrt 2)) / 2 to 1e-6, in a third of the instructions that an exact erf takes.

    It is max(x, 0) - |x| / 2 * erfc(|x| / sqrt 2), and the logarithm of erfc is nearly a parabola. The polynomial's
    GELU is nowhere further off than that; where it was not fitted, beyond 10, it only falls.
    """
    a = tl.abs(x)
    p = ((-4.881021e-4 * a + 7.198718e-3) * a - 5.214663e-2) * a - 4.5959584e-1
    p = (p * a - 1.1510005) * a
    return tl.maximum(x, 0.0) - 0.5 * a * tl.exp2(p)


@triton.jit(do_not_specialize=["M", "T"])
def convolution(
    frames,  # [M, IN], half; consecutive frames are `stride` apart
    weight,  # [C, 3 * IN], half: frame by frame
    bias,  # [C]
    gain,  # [C] float32, as the next: the norm
    shift,
    time,  # [R, C] float32; consecutive rows are `time_stride` apart
    beside,  # [M, BESIDE], half: what the shortcut reads; consecutive frames are `beside_stride` apart
    beside_weight,  # [C, BESIDE], half
    beside_bias,  # [C]
    out,  # out: [M, C]
    copy,  # out with COPY: [M, C], half
    moments,  # out with COPY: [M, 2, C / PART] float32
    M,
    T,
    stride,
    time_stride,
    beside_stride,
    epsilon,
    IN: tl.constexpr,
    C: tl.constexpr,
    BESIDE: tl.constexpr,
    NORM: tl.constexpr,
    TIME: tl.constexpr,
    COPY: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """ROWS frames, all channels: mish(norm(convolution)) + time + shortcut, as far as asked for (BESIDE = 0: none).

    Before a row's first frame there are zeros.
    """
    if OVERLAP:
        gdc_launch_dependents()
    first = tl.program_id(0) * ROWS
    tile = first.to(tl.int64)
    i = tl.arange(0, ROWS)
    c = tl.arange(0, C)
    k = tl.arange(0, DEPTH)
    left = M - first
    row = (first + i) // T
    t = (first + i) % T
    biases = tl.load(bias + c).to(tl.float32)
    weights = weight + c[None, :] * ((LOOK_BACK + 1) * IN) + k[:, None]
    if OVERLAP:
        gdc_wait()
    here = frames + tile * stride
    steps: tl.constexpr = IN // DEPTH
    sums = tl.zeros((ROWS, C), tl.float32)
    for step in range((LOOK_BACK + 1) * steps):
        back = LOOK_BACK - step // steps
        inside = (i < left) & (t >= back)
        at = (i - back)[:, None] * stride + (step % steps) * DEPTH + k[None, :]
        a = tl.load(here + at, mask=inside[:, None], other=0.0)
        sums = tl.dot(a, tl.load(weights + step * DEPTH), sums)
    y = sums + biases[None, :]
    if NORM:
        y = _mish(_normalized(y, tl.load(gain + c), tl.load(shift + c), epsilon, C))
    if TIME:
        y += tl.load(time + row[:, None] * time_stride + c[None, :], mask=(i < left)[:, None], other=0.0)
    if BESIDE:
        here = beside + tile * beside_stride + i[:, None] * beside_stride + k[None, :]
        weights = beside_weight + c[None, :] * BESIDE + k[:, None]
        for step in range(BESIDE // DEPTH):
            a = tl.load(here + step * DEPTH, mask=(i < left)[:, None], other=0.0)
            y = tl.dot(a, tl.load(weights + step * DEPTH), y)
        y += tl.load(beside_bias + c).to(tl.float32)[None, :]
    at = i[:, None] * C + c[None, :]
    tl.store(out + tile * C + at, y.to(out.dtype.element_ty), mask=(i < left)[:, None])
    if COPY:
        tl.store(copy + tile * C + at, y.to(copy.dtype.element_ty), mask=(i < left)[:, None])
        _store_moments(y, moments, tile + i, 0, (i < left)[:, None], C, C)


@triton.jit(do_not_specialize=["M", "turns"])
def norm_product(
    x,  # [M, C], half
    moments,  # [M, 2, C / PART] float32: what `_store_moments` has left of x
    weight,  # [N, C], half: times the norm's gain
    sums,  # [N] float32: of each output's weights
    bias,  # [N] float32: what the norm's shift adds to it included
    out,  # out: [M, N], half
    M,
    turns,  # tiles of a program, with TURNS; one without
    epsilon,
    N: tl.constexpr,
    C: tl.constexpr,
    GELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TURNS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Tiles of ROWS frames and COLUMNS outputs. The norm comes behind the product, which is linear:

        y = (x W - mean sums) / deviation + bias

    So a product waits for no norm, and whoever wrote x, which was in registers then, has summed it up. Where a program
    takes several tiles, the next one's loads are under way while this one's results are stored.
    """
    if OVERLAP:
        gdc_launch_dependents()
    blocks: tl.constexpr = N // COLUMNS
    parts: tl.constexpr = C // min(PART, C)
    i = tl.arange(0, ROWS)
    k = tl.arange(0, DEPTH)
    part = tl.arange(0, parts)
    if OVERLAP:
        gdc_wait()
    for turn in tl.range(0, turns if TURNS else 1, flatten=True):
        program = turn * tl.num_programs(0) + tl.program_id(0)
        tile = (program // blocks).to(tl.int64) * ROWS
        n = (program % blocks) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (i < (M - tile).to(tl.int32))[:, None]
        rows = x + tile * C + i[:, None] * C + k[None, :]
        weights = weight + n[None, :] * C + k[:, None]
        y = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, C, DEPTH):
            y = tl.dot(tl.load(rows + start, mask=inside, other=0.0), tl.load(weights + start), y)
        known = moments + (tile + i[:, None]) * (2 * parts) + part[None, :]
        mean = tl.sum(tl.load(known, mask=inside, other=0.0), axis=1) / C
        squares = tl.sum(tl.load(known + parts, mask=inside, other=0.0), axis=1) / C
        scale = tl.rsqrt(tl.maximum(squares - mean * mean, 0.0) + epsilon)
        y = (y - mean[:, None] * tl.load(sums + n)[None, :]) * scale[:, None] + tl.load(bias + n)[None, :]
        if GELU:
            y = _gelu(y)
        tl.store(out + tile * N + i[:, None] * N + n[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def add_product(
    a,  # [M, K], half
    weight,  # [C, K], half
    bias,  # [C]
    x,  # in and out: [M, C] float32
    copy,  # out: [M, C], half; consecutive frames are `copy_stride` apart
    moments,  # out: [M, 2, C / PART] float32
    M,
    copy_stride,
    C: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """ROWS frames, COLUMNS channels: x += a @ weight^T + bias."""
    if OVERLAP:
        gdc_launch_dependents()
    blocks: tl.constexpr = C // COLUMNS
    tile = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    first = (tl.program_id(0) % blocks) * COLUMNS
    c = first + tl.arange(0, COLUMNS)
    i = tl.arange(0, ROWS)
    k = tl.arange(0, DEPTH)
    inside = (i < (M - tile).to(tl.int32))[:, None]
    biases = tl.load(bias + c).to(tl.float32)
    weights = weight + c[None, :] * K + k[:, None]
    if OVERLAP:
        gdc_wait()
    rows = a + tile * K + i[:, None] * K + k[None, :]
    residual = x + tile * C + i[:, None] * C + c[None, :]
    before = tl.load(residual, mask=inside, other=0.0)  # here, as nobody has to wait for it at the end
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, DEPTH):
        sums = tl.dot(tl.load(rows + start, mask=inside, other=0.0), tl.load(weights + start), sums)
    y = before + sums + biases[None, :]
    tl.store(residual, y, mask=inside)
    at = copy + tile * copy_stride + i[:, None] * copy_stride + c[None, :]
    tl.store(at, y.to(copy.dtype.element_ty), mask=inside)
    _store_moments(y, moments, tile + i, first, inside, C, COLUMNS)


@triton.jit
def _attend(scores, value, peak, total, sums, scale, seen, PRODUCT: tl.constexpr):
    """One more block of scores [Q, B] and values [B, D] in the running softmax; `seen` [B] is false for no key at all.

    `seen` None hides none.
    """
    if seen is not None:
        scores = tl.where(seen[None, :], scores, -float("inf"))
    highest = tl.maximum(peak, tl.max(scores, axis=1) * scale)
    p = tl.exp2(scores * scale - highest[:, None])
    fade = tl.exp2(peak - highest)
    sums = tl.dot(p.to(value.dtype), value, sums * fade[:, None], input_precision=PRODUCT)
    return highest, total * fade + tl.sum(p, axis=1), sums


@triton.jit(do_not_specialize=["T"])
def row_attention(
    qkv,  # [R, T, 3, H, D], half
    lengths,  # [R] int32, up to T
    attended,  # out: [R, T, H, D], half
    T,
    scale,  # D^-0.5 * log2(e): the softmax is in powers of two
    H: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """QUERIES frames of one row's head against the row's keys; zeros where all of them lie behind the row's end.

    Only the last block of keys may have to be masked. One key at least has its power of two at 1, so a sum of them is
    below 1 where there is no key alone.
    """
    if OVERLAP:
        gdc_launch_dependents()
    blocks = tl.cdiv(T, QUERIES)
    row_head = tl.program_id(0) // blocks
    row = row_head // H
    head = row_head % H
    i = (tl.program_id(0) % blocks) * QUERIES + tl.arange(0, QUERIES)
    d = tl.arange(0, D)
    j = tl.arange(0, KEYS)
    width: tl.constexpr = H * D
    queries = qkv + row.to(tl.int64) * T * (3 * width) + head * D
    keys = queries + width + d[:, None]
    values = queries + 2 * width + d[None, :]
    if OVERLAP:
        gdc_wait()
    length = tl.load(lengths + row)
    length = tl.where((tl.program_id(0) % blocks) * QUERIES < length, length, 0)
    query = tl.load(queries + i[:, None] * (3 * width) + d[None, :], mask=(i < T)[:, None], other=0.0)
    peak = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, D), tl.float32)
    whole = length // KEYS * KEYS
    for start in range(0, whole, KEYS):
        at = (start + j) * (3 * width)
        key = tl.load(keys + at[None, :])
        value = tl.load(values + at[:, None])
        peak, total, sums = _attend(tl.dot(query, key), value, peak, total, sums, scale, None, "tf32")
    if whole < length:
        at = (whole + j) * (3 * width)
        seen = whole + j < length
        key = tl.load(keys + at[None, :], mask=seen[None, :], other=0.0)
        value = tl.load(values + at[:, None], mask=seen[:, None], other=0.0)
        peak, total, sums = _attend(tl.dot(query, key), value, peak, total, sums, scale, seen, "tf32")
    sums /= tl.maximum(total, 1.0)[:, None]
    out = attended + row.to(tl.int64) * T * width + head * D + i[:, None] * width + d[None, :]
    tl.store(out, sums.to(attended.dtype.element_ty), mask=(i < T)[:, None])


@triton.jit(do_not_specialize=["T"])
def euler_step(
    hidden,  # [R, T, C] float32: what the estimator's last product reads
    weight,  # [N, C] float32
    bias,  # [N] float32
    span,  # [1] float32: from this step's time to the next one's
    x,  # in and out: [B, N, T] float32: the mel on its way
    frames,  # out: [R, T, IN], half: the next step's inputs, of which the first N of a frame are its mel
    T,
    rate,  # of guidance
    B,
    N: tl.constexpr,
    C: tl.constexpr,
    IN: tl.constexpr,
    GUIDED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """ROWS frames of one utterance: x += span * velocity, and the mel to where the next step reads it.

    The velocity is linear in what the product reads, so guidance comes before it: one product for both sides. With
    GUIDED the rows from B on are the unguided sides.
    """
    if OVERLAP:
        gdc_launch_dependents()
    blocks = tl.cdiv(T, ROWS)
    b = tl.program_id(0) // blocks
    t = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, OUTPUTS)
    k = tl.arange(0, DEPTH)
    inside = (t < T)[:, None]
    outputs = (n < N)[None, :]
    biases = tl.load(bias + n, mask=n < N, other=0.0)
    weights = weight + n[None, :] * C + k[:, None]
    row = (b.to(tl.int64) * T + t)[:, None]
    other = row + tl.cast(B, tl.int64) * T
    if OVERLAP:
        gdc_wait()
    step = tl.load(span)
    at = x + b.to(tl.int64) * N * T + n[None, :] * T + t[:, None]
    before = tl.load(at, mask=inside & outputs, other=0.0)
    sums = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, C, DEPTH):
        h = tl.load(hidden + row * C + start + k[None, :], mask=inside, other=0.0)
        if GUIDED:
            h = (1 + rate) * h - rate * tl.load(hidden + other * C + start + k[None, :], mask=inside, other=0.0)
        sums = tl.dot(h, tl.load(weights + start, mask=outputs, other=0.0), sums, input_precision=PRECISION)
    y = before + step * (sums + biases[None, :])
    tl.store(at, y, mask=inside & outputs)
    mel = y.to(frames.dtype.element_ty)
    tl.store(frames + row * IN + n[None, :], mel, mask=inside & outputs)
    if GUIDED:
        tl.store(frames + other * IN + n[None, :], mel, mask=inside & outputs)
