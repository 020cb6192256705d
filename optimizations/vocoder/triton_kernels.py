"""HiFT's convolutions, and the two transforms at its ends, as Triton kernels with the channels innermost: [B, T, C].

HiFT is 72 pairs of a snake and a convolution, and what takes its time is bytes: cuDNN wants the channels innermost,
its neighbours want time there, and snakes and sums are passes of their own over up to 15 MB. Here the layout never
changes, and a convolution does on its way out what its successors need: it adds the residual and the bias, leaves zeros
behind a row's end, and stores, as asked for, the sum itself and the sum as each reader's own snake bends it. So a snake
is computed once a value, and what a convolution reads is ready for the matrix units.

What a matrix unit reads is an "operand". It is float16, float32, or float32 rounded to TF32's 10 bits of mantissa,
which a matrix unit would else cut off, and so make all sums a little too small. Sums and what is added up are float32.

The three residual blocks of a level read the same signal and differ in their kernels' sizes: 3, 7 and 11. Each of
their steps is one launch with three branches, the longest first, as it takes longest. Their last convolutions are one
as well: it runs over the taps of all three and leaves their mean. A transposed convolution by s is an ordinary one with
s times as many outputs: neighbouring outputs of a position are neighbouring steps.

Launches a level: upsampling, the source's downsampling, 6 of its residual block and 6 of the three blocks. Every
element is written by one program, and sums have one order: a wave repeats bit for bit. As in T3's decode step
(`t3/triton_decode.py`), a kernel may start before the one in front of it has ended: it waits before it reads what
another has written, and writes nothing before.

T has any size; offsets within a tile are 32 bits wide, those of a tile 64. Lengths are not specialized: a new one must
not mean another compilation.
"""

# ruff: noqa: N803 (a size in capitals is known when its kernel is compiled)
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INVERSE_PI = tl.constexpr(0.3183098861837907)
PI_HIGH, PI_LOW = tl.constexpr(3.140625), tl.constexpr(9.67653589793e-4)
"""Pi in two parts, the first of so few bits that multiples of it up to 65,536 are exact."""
HALF_MOST = tl.constexpr(65504.0)
NUMBERS = [
    "rows",
    "steps_in",
    "steps_out",
    "positions",
    "taps_0",
    "taps_1",
    "taps_2",
    "dilation",
    "stride",
    "offset",
    "back",
    "residual_stride",
    "rate",
    "more",
]


@triton.jit
def _half_turns(x):
    """The multiple of pi nearest to x, as a float32, and what is left of x, at most pi / 2."""
    n = tl.floor(x * INVERSE_PI + 0.5)
    return n, (x - n * PI_HIGH) - n * PI_LOW


@triton.jit
def _near_sine(x):
    """sin(x) to 3e-9, for x between -pi / 2 and pi / 2, in a third of an exact one's instructions."""
    square = x * x
    sine = ((2.59048708e-6 * square - 1.98008970e-4) * square + 8.33289981e-3) * square - 1.66666476e-1
    return (sine * square + 9.99999977e-1) * x


@triton.jit
def _snake(x, alpha, EPSILON: tl.constexpr):
    """x + sin²(a x) / a of x [T, C], alpha [C]. As the sine is squared, its sign does not matter."""
    _, rest = _half_turns(x * alpha[None, :])
    sine = _near_sine(rest)
    inverse = 1.0 / (alpha + EPSILON)
    return x + sine * sine * inverse[None, :]


@triton.jit
def _operand(x, dtype: tl.constexpr, TF32: tl.constexpr):
    """x as the matrix units read it: the nearest number that they know."""
    if dtype == tl.float16:
        x = tl.minimum(tl.maximum(x, -HALF_MOST), HALF_MOST)
    elif TF32:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _pick(branch, first, second, third):
    """The branch's own of three numbers."""
    return tl.where(branch == 0, first, tl.where(branch == 1, second, third))


@triton.jit
def _finish(
    y,  # [ROWS, channels]: the sums at steps t [ROWS] and channels `channel`; the rest as in `convolution`
    t,
    channel,
    residual,
    beside,
    alpha,
    total,
    activated,
    slope,
    rows,
    row,
    branch,
    steps,
    end,
    residual_stride,
    C: tl.constexpr,
    JOINED: tl.constexpr,
    RESIDUALS: tl.constexpr,
    BESIDE: tl.constexpr,
    MIRRORED: tl.constexpr,
    TOTAL: tl.constexpr,
    SNAKES: tl.constexpr,
    LEAKY: tl.constexpr,
    EPSILON: tl.constexpr,
    TF32: tl.constexpr,
):
    """Add to the sums what is to be added, and store them as their readers want them."""
    inside = ((t >= 0) & (t < steps))[:, None]
    at = t[:, None] * C + channel[None, :]
    size = steps.to(tl.int64) * C
    for own in tl.static_range(RESIDUALS):
        here = residual + (branch + own).to(tl.int64) * residual_stride + row.to(tl.int64) * size
        y += tl.load(here + at, mask=inside, other=0.0)
    if BESIDE:
        source = t
        here = beside + row.to(tl.int64) * size
        if MIRRORED:
            source = tl.where(t == 0, 1, t - 1)
            here = beside + row.to(tl.int64) * (size - C)
        y += tl.load(here + source[:, None] * C + channel[None, :], mask=inside, other=0.0)
    if JOINED:
        y *= 1.0 / 3.0
    y = tl.where((t < end)[:, None], y, 0.0)
    if TOTAL:
        tl.store(total + (branch * rows + row).to(tl.int64) * size + at, y, mask=inside)
    for own in tl.static_range(SNAKES):
        bent = _snake(y, tl.load(alpha + (branch + own) * C + channel), EPSILON)
        here = activated + ((branch + own) * rows + row).to(tl.int64) * size
        tl.store(here + at, _operand(bent, activated.dtype.element_ty, TF32), mask=inside)
    if LEAKY:
        bent = tl.where(y > 0, y, slope * y)
        here = activated + (branch * rows + row).to(tl.int64) * size
        tl.store(here + at, _operand(bent, activated.dtype.element_ty, TF32), mask=inside)


@triton.jit(do_not_specialize=NUMBERS)
def convolution(
    x,  # [branches, rows, steps_in, IN]: operands
    weight,  # [taps of all branches, OUT, IN]: operands
    bias,  # [branches, OUT] float32; with JOINED [OUT], that of the sum
    residual,  # with RESIDUALS: [rows, steps_out, C] float32 a branch; those are `residual_stride` apart
    beside,  # with BESIDE: [rows, steps_out, C] float32, with MIRRORED a step shorter: what else is added
    alpha,  # with SNAKES: [branches, C]; with three of them for one branch [SNAKES, C]
    length,  # [1] int64: the row's end is at step rate * length + more
    total,  # out with TOTAL: [branches, rows, steps_out, C] float32; may be `residual`
    activated,  # out with SNAKES or LEAKY: [branches or SNAKES, rows, steps_out, C]: operands
    slope,
    rows,
    steps_in,
    steps_out,
    positions,  # at which the taps are applied: steps_out, or for a transposed convolution about OUT // C times fewer
    taps_0,
    taps_1,
    taps_2,
    dilation,
    stride,
    offset,  # how much later than centred the taps lie
    back,  # steps that a transposed convolution's first output lies before the row
    residual_stride,
    rate,
    more,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    C: tl.constexpr,
    JOINED: tl.constexpr,
    RESIDUALS: tl.constexpr,
    BESIDE: tl.constexpr,
    MIRRORED: tl.constexpr,
    TOTAL: tl.constexpr,
    SNAKES: tl.constexpr,
    LEAKY: tl.constexpr,
    EPSILON: tl.constexpr,
    PRODUCT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One branch's, or JOINED all branches', ROWS positions of a row by COLUMNS outputs.

    Outputs n of a position are the channels n % C of the steps (OUT // C) * position + n // C - back. With JOINED the
    mean over three branches is taken. MIRRORED, `beside` enters a step late, and its second step comes first.
    """
    if OVERLAP:
        gdc_launch_dependents()
    program = tl.program_id(0)
    first = (program % (OUT // COLUMNS)) * COLUMNS
    tile = program // (OUT // COLUMNS)
    n_tiles = tl.cdiv(positions, ROWS)
    start = (tile % n_tiles) * ROWS
    row = (tile // n_tiles) % rows
    branch = tile // n_tiles // rows

    n = tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    q = start + tl.arange(0, ROWS)
    chunks: tl.constexpr = IN // DEPTH
    weights = weight + (first + n)[None, :] * IN + k[:, None]
    second, third = taps_0, taps_0 + taps_1  # where these branches' taps begin
    middle_0, middle_1, middle_2 = (taps_0 - 1) // 2, second + (taps_1 - 1) // 2, third + (taps_2 - 1) // 2
    begin = _pick(branch, 0, second, third)
    end = third + taps_2 if JOINED else _pick(branch, second, third, third + taps_2)
    middle = _pick(branch, middle_0, middle_1, middle_2)
    size_in = steps_in.to(tl.int64) * IN
    here = x + (branch * rows + row) * size_in
    if OVERLAP:
        gdc_wait()
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for turn in range(begin * chunks, end * chunks):
        tap = turn // chunks
        chunk = (turn % chunks) * DEPTH
        if JOINED:
            middle = tl.where(tap < second, middle_0, tl.where(tap < third, middle_1, middle_2))
            own = (tap >= second).to(tl.int32) + (tap >= third).to(tl.int32)
            here = x + (own * rows + row) * size_in
        at = q * stride + (tap - middle) * dilation + offset
        inside = (at >= 0) & (at < steps_in)
        a = tl.load(here + at[:, None] * IN + (chunk + k)[None, :], mask=inside[:, None], other=0.0)
        b = tl.load(weights + tap * (OUT * IN) + chunk)
        sums = tl.dot(a, b, sums, input_precision=PRODUCT)

    t = q * (OUT // C) + first // C - back
    end = (rate * tl.load(length)).to(tl.int32) + more
    # In two halves, as a whole tile and all that is added to it would not fit the registers.
    half: tl.constexpr = COLUMNS // 2
    left, right = tl.split(tl.permute(tl.reshape(sums, (ROWS, 2, half)), (0, 2, 1)))
    for part in tl.static_range(2):
        y = left if part == 0 else right
        column = first + part * half + tl.arange(0, half)
        channel = tl.multiple_of(first % C, COLUMNS) + part * half + tl.arange(0, half)
        y += tl.load(bias + branch * OUT + column)[None, :]
        _finish(
            *(y, t, channel, residual, beside, alpha, total, activated),
            *(slope, rows, row, branch, steps_out, end, residual_stride, C),
            *(JOINED, RESIDUALS, BESIDE, MIRRORED, TOTAL, SNAKES, LEAKY, EPSILON, PRODUCT == "tf32"),
        )


@triton.jit(do_not_specialize=["samples", "steps", "per_frame"])
def spectrum(
    signal,  # [rows, samples] float32
    basis,  # [SIZE, WIDTH] float32: windowed cosines and sines, zeros behind them
    length,  # [1] int64, in frames of `per_frame` samples
    out,  # out: [rows, steps, WIDTH]: operands
    samples,
    steps,  # samples / HOP + 1
    per_frame,
    SIZE: tl.constexpr,
    HOP: tl.constexpr,
    WIDTH: tl.constexpr,
    TF32: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """ROWS steps of a row's spectrogram, whose signal is mirrored at both ends; zeros behind the end."""
    if OVERLAP:
        gdc_launch_dependents()
    n_tiles = tl.cdiv(steps, ROWS)
    row = (tl.program_id(0) // n_tiles).to(tl.int64)
    step = (tl.program_id(0) % n_tiles) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, SIZE)
    column = tl.arange(0, WIDTH)
    waves = tl.load(basis + i[:, None] * WIDTH + column[None, :])
    if OVERLAP:
        gdc_wait()
    end = (tl.load(length) * per_frame).to(tl.int32)
    at = tl.abs(step[:, None] * HOP + i[None, :] - SIZE // 2)
    at = tl.where(at < end, at, 2 * (end - 1) - at)
    at = tl.minimum(tl.maximum(at, 0), samples - 1)
    y = tl.dot(tl.load(signal + row * samples + at), waves, input_precision="ieee")
    y = tl.where((step <= end // HOP)[:, None], y, 0.0)
    here = out + row * steps * WIDTH + step[:, None] * WIDTH + column[None, :]
    tl.store(here, _operand(y, out.dtype.element_ty, TF32), mask=(step < steps)[:, None])


@triton.jit(do_not_specialize=["steps", "per_frame"])
def wave(
    x,  # [rows, steps, WIDTH] float32: BINS logarithms of magnitudes, BINS phases' arguments
    cosines,  # [FULL, SIZE] float32: what a bin's real part adds to a step's samples; zeros from BINS on
    sines,  # [FULL, SIZE] float32: the same for its imaginary part; the window is in both
    window,  # [SIZE] float32
    length,  # [1] int64, in frames of `per_frame` samples
    out,  # out: [rows, (steps - 1) * HOP] float32
    steps,
    per_frame,
    limit,
    BINS: tl.constexpr,
    FULL: tl.constexpr,
    SIZE: tl.constexpr,
    HOP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """ROWS times HOP samples of a row: the inverse transform of the SIZE / HOP steps that overlap in each, over the
    sum of their squared windows."""
    if OVERLAP:
        gdc_launch_dependents()
    n_tiles = tl.cdiv(steps - 1, ROWS)
    row = (tl.program_id(0) // n_tiles).to(tl.int64)
    hop = (tl.program_id(0) % n_tiles) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, HOP)
    bins = tl.arange(0, FULL)
    if OVERLAP:
        gdc_wait()
    last = (tl.load(length) * per_frame).to(tl.int32) // HOP
    samples = tl.zeros((ROWS, HOP), tl.float32)
    weights = tl.zeros((ROWS, HOP), tl.float32)
    for part in tl.static_range(SIZE // HOP):
        step = hop + SIZE // 2 // HOP - part
        counts = (step >= 0) & (step < steps) & (step <= last)
        mask = counts[:, None] & (bins < BINS)[None, :]
        here = x + row * steps * WIDTH + step[:, None] * WIDTH + bins[None, :]
        magnitude = tl.minimum(tl.exp(tl.load(here, mask=mask, other=0.0)), 100.0)
        magnitude = tl.where(mask, magnitude, 0.0)
        turns, rest = _half_turns(tl.load(here + BINS, mask=mask, other=0.0))
        phase = _near_sine(rest) * (1 - 2 * (turns - 2 * tl.floor(turns / 2)))
        half = _near_sine(phase / 2)
        columns = bins[:, None] * SIZE + (part * HOP + i)[None, :]
        real, imaginary = magnitude * (1 - 2 * half * half), magnitude * _near_sine(phase)
        samples += tl.sum(real[:, :, None] * tl.load(cosines + columns)[None, :, :], axis=1)
        samples += tl.sum(imaginary[:, :, None] * tl.load(sines + columns)[None, :, :], axis=1)
        share = tl.load(window + part * HOP + i)
        weights += tl.where(counts[:, None], (share * share)[None, :], 0.0)
    samples = samples / tl.maximum(weights, 1e-11)
    samples = tl.minimum(tl.maximum(samples, -limit), limit)
    here = out + row * (steps - 1) * HOP + hop[:, None] * HOP + i[None, :]
    tl.store(here, samples, mask=(hop < steps - 1)[:, None])
