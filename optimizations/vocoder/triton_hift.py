"""HiFT's `decode` through the Triton kernels of `triton_kernels.py`: 46 launches, all with the channels innermost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from chatterbox.models.s3gen.hifigan import ResBlock
from torch import Tensor, nn

from optimizations.common.launching import can_overlap, launch, shared_bytes
from optimizations.common.padding import padded_length
from optimizations.vocoder import triton_kernels

N_BRANCHES = 3


class Precision(NamedTuple):
    """In which dtype the matrix units read, and how they multiply what is float32."""

    dtype: torch.dtype
    product: str


FULL = Precision(torch.float32, "ieee")
TF32 = Precision(torch.float32, "tf32")
HALF = Precision(torch.float16, "tf32")


def allowed() -> Precision:
    """What PyTorch's switch for TF32 in convolutions asks for; where it is on, float16.

    float16 has the 10 bits of mantissa that TF32 has, so its products are as exact. It takes half the bytes, and
    convolutions with 64 to 256 channels wait for bytes. Its range, 6e-8 to 65,504, is more than HiFT's signals need.
    """
    return HALF if torch.backends.cudnn.allow_tf32 else FULL


class Tile(NamedTuple):
    """What one program of a convolution does: positions by outputs, so many inputs a turn."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


class Kind(NamedTuple):
    """What convolutions share a tile: channels of the output, and branches side by side."""

    channels: int
    branches: int


TILES = {
    Kind(512, 1): Tile(64, 64, 32, 4, 4),
    Kind(256, 1): Tile(64, 128, 64, 4, 4),
    Kind(256, 3): Tile(64, 128, 64, 4, 4),
    Kind(128, 1): Tile(64, 128, 64, 4, 4),
    Kind(128, 3): Tile(64, 128, 64, 4, 4),
    Kind(64, 1): Tile(128, 64, 64, 8, 3),
    Kind(64, 3): Tile(128, 64, 64, 8, 3),
}
"""For float16; what is not in here takes OTHERS."""
OTHERS = Tile(128, 64, 64, 8, 3)
SHARED_BYTES = 96 * 1024
"""Shared memory that the largest of these tiles needs for one program."""
FULL_TILE = Tile(64, 64, 16, 4, 2)
"""Without matrix units: larger ones would not fit the registers."""


def tile_of(kind: Kind, inputs: int, precision: Precision, tiles: Mapping[Kind, Tile] = TILES) -> Tile:
    """The kind's tile, cut to what the sizes and the precision bear."""
    tile = FULL_TILE if precision == FULL and tiles is TILES else tiles.get(kind, OTHERS)
    if precision == TF32:
        tile = tile._replace(depth=tile.depth // 2)
    columns = math.gcd(tile.columns, kind.channels)
    return tile._replace(columns=columns, depth=math.gcd(tile.depth, inputs))


def unsupported(hift: Any) -> str | None:
    """Why the kernels cannot stand in for this HiFT's `decode`; None if they can."""
    blocks = [*hift.source_resblocks, *hift.resblocks]
    levels = zip(*[iter(hift.resblocks)] * hift.num_kernels, strict=True)
    size, hop = hift.istft_params["n_fft"], hift.istft_params["hop_len"]
    if hift.num_kernels != N_BRANCHES or not all(isinstance(block, ResBlock) for block in blocks):
        return f"HiFT's levels have other than {N_BRANCHES} residual blocks of upstream's"
    if any(len({dilations(block) for block in level}) > 1 for level in levels):
        return "HiFT's blocks of a level have different dilations"
    if any(c.kernel_size[0] % 2 == 0 for block in blocks for c in (*block.convs1, *block.convs2)):
        return "HiFT's blocks have kernels of even size"
    if any(up.out_channels % 16 for up in hift.ups) or hift.conv_pre.out_channels % 16:
        return "HiFT's channels are no multiples of 16"
    if any(snake.alpha_logscale for block in blocks for snake in (*block.activations1, *block.activations2)):
        return "HiFT's snakes have logarithmic parameters"
    if size & (size - 1) or hop & (hop - 1) or size < 16 or hop > size // 2:
        return f"HiFT's transform has {size} samples every {hop}"
    device = hift.conv_pre.bias.device
    if device.type == "cuda" and shared_bytes(device) < SHARED_BYTES:
        return f"HiFT's kernels need {SHARED_BYTES >> 10} KB of shared memory a program, more than {device} has"
    return None


def dilations(block: Any) -> tuple[int, ...]:
    """Of a residual block's first convolutions; the second ones have none."""
    return tuple(int(convolution.dilation[0]) for convolution in block.convs1)


# -- weights -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Convolution:
    """One launch's convolutions, as `triton_kernels.convolution` describes them."""

    weight: Tensor  # [taps of all branches, OUT, IN]: operands
    bias: Tensor  # [branches, OUT]; of a sum [1, OUT]
    taps: tuple[int, ...]
    channels: int
    dilation: int = 1
    stride: int = 1
    offset: int = 0
    back: int = 0
    joined: bool = False

    @property
    def spread(self) -> int:
        """Steps of the output a position."""
        return self.weight.shape[1] // self.channels


@dataclass(frozen=True)
class Pair:
    """Snake, dilated convolution, snake, convolution, residual: of one block, or of a level's three side by side."""

    alpha: Tensor  # [branches, C]
    first: Convolution
    second_alpha: Tensor
    second: Convolution


@dataclass(frozen=True)
class Level:
    up: Convolution
    down: Convolution
    source: list[Pair]
    blocks: list[Pair]
    mirrored: bool


def operands(x: Tensor, precision: Precision) -> Tensor:
    """x rounded to what the matrix units read, as the kernels do it."""
    if precision == TF32:
        return ((x.float().contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    if precision == HALF:
        x = x.clamp(-65504, 65504)
    return x.to(precision.dtype)


def plain(convolution: Any, inputs: int, precision: Precision) -> Convolution:
    """A convolution by itself, whatever its padding and stride; it reads and writes some channels of zeros more.

    `inputs`: as many as its signal has with those.
    """
    weight, bias = convolution.weight.permute(2, 0, 1), _bias(convolution)  # [taps, OUT, IN]
    spare = padded_length(len(bias), 16) - len(bias)
    weight = F.pad(weight, (0, inputs - weight.shape[2], 0, spare))
    bias = F.pad(bias, (0, spare))
    taps, (padding,), (stride,) = len(weight), convolution.padding, convolution.stride
    return Convolution(
        weight=operands(weight, precision).contiguous(),
        bias=bias[None].contiguous(),
        taps=(taps,),
        channels=weight.shape[1],
        stride=int(stride),
        offset=(taps - 1) // 2 - int(padding),
    )


def branches(convolutions: list[nn.Conv1d], precision: Precision, joined: bool = False) -> Convolution:
    """Convolutions that keep the length, of equal channels and dilation; `joined`: the sum over all of them."""
    weights = [operands(c.weight.permute(2, 0, 1), precision) for c in convolutions]
    biases = torch.stack([_bias(c) for c in convolutions])
    return Convolution(
        weight=torch.cat(weights).contiguous(),
        bias=biases.sum(dim=0, keepdim=True) if joined else biases,
        taps=tuple(map(len, weights)),
        channels=weights[0].shape[1],
        dilation=int(convolutions[0].dilation[0]),
        joined=joined,
    )


def transposed(convolution: nn.ConvTranspose1d, precision: Precision) -> Convolution:
    """y[s q + r - p] = sum over m of W[s m + r] x[q - m], for every r < s: s outputs' channels at each q."""
    weight = convolution.weight.permute(2, 1, 0)  # [taps, OUT, IN]
    stride, padding = int(convolution.stride[0]), int(convolution.padding[0])
    taps = -(-len(weight) // stride)
    weight = F.pad(weight, (0, 0, 0, 0, 0, taps * stride - len(weight))).unflatten(0, (taps, stride))
    return Convolution(
        weight=operands(weight.flip(0).flatten(1, 2), precision).contiguous(),
        bias=_bias(convolution).repeat(stride)[None],
        taps=(taps,),
        channels=convolution.out_channels,
        offset=(taps - 1) // 2 - (taps - 1),
        back=padding,
    )


def _bias(convolution: Any) -> Tensor:
    bias: Tensor | None = convolution.bias
    zeros = convolution.weight.new_zeros(convolution.out_channels)
    return zeros if bias is None else bias.detach().float()


def pairs(blocks: list[Any], precision: Precision, joined: bool = False) -> list[Pair]:
    """Residual blocks' pairs side by side; `joined`: the last convolution gives the blocks' sum."""

    def alphas(name: str, index: int) -> Tensor:
        return torch.stack([getattr(block, name)[index].alpha.detach().float() for block in blocks])

    last = len(blocks[0].convs1) - 1
    return [
        Pair(
            alpha=alphas("activations1", index),
            first=branches([block.convs1[index] for block in blocks], precision),
            second_alpha=alphas("activations2", index),
            second=branches([block.convs2[index] for block in blocks], precision, joined and index == last),
        )
        for index in range(last + 1)
    ]


# -- the way from mel to wave --------------------------------------------------------------------------------------


class End(NamedTuple):
    """Where rows end: at step rate * length + more, length [1] being the mel's frames."""

    length: Tensor
    rate: int
    more: int = 0


class ChannelsLastHiFT:
    """`static_shape.decode` of one HiFT, whose weights are laid out here, once."""

    @torch.no_grad()
    def __init__(self, hift: Any, precision: Precision, tiles: Mapping[Kind, Tile] = TILES) -> None:
        self.hift, self.precision, self.tiles = hift, precision, tiles
        device = hift.conv_pre.bias.device
        self.overlap = can_overlap(device)
        self.pre = plain(hift.conv_pre, padded_length(hift.conv_pre.in_channels, 32), precision)
        self.post = plain(hift.conv_post, hift.conv_post.in_channels, precision)
        self.window = hift.stft_window.to(device)
        self.forward_basis = forward_basis(self.window)
        self.inverse_basis = inverse_basis(self.window)
        self.levels = [self._level(index) for index in range(hift.num_upsamples)]
        self.epsilon = float(hift.resblocks[0].activations1[0].no_div_by_zero)

    def _level(self, index: int) -> Level:
        hift, precision = self.hift, self.precision
        blocks = hift.resblocks[index * N_BRANCHES : (index + 1) * N_BRANCHES]
        longest_first = sorted(blocks, key=lambda block: -block.convs1[0].kernel_size[0])
        return Level(
            up=transposed(hift.ups[index], precision),
            down=plain(hift.source_downs[index], self.forward_basis.shape[1], precision),
            source=pairs([hift.source_resblocks[index]], precision),
            blocks=pairs(longest_first, precision, joined=True),
            mirrored=index == hift.num_upsamples - 1,
        )

    def decode(self, mel: Tensor, excitation: Tensor, frames: Tensor) -> Tensor:
        """Waves [B, samples] of mels [B, 80, F] and sources [B, 1, samples] that end after `frames` [1]."""
        hift, per_frame = self.hift, excitation.shape[2] // mel.shape[2]
        spectrum = self.spectrum(excitation[:, 0], End(frames, per_frame))
        spare = self.pre.weight.shape[2] - mel.shape[1]
        x = operands(F.pad(mel.transpose(1, 2), (0, spare)), self.precision).contiguous()[None]
        _, x = self.run(self.pre, x, mel.shape[2], End(frames, 1), slope=hift.lrelu_slope)
        rate = 1
        for index, level in enumerate(self.levels):
            rate *= level.up.spread
            slope = hift.lrelu_slope if index < len(self.levels) - 1 else 0.01  # of F.leaky_relu, when none is given
            x = self.level(level, x, spectrum, End(frames, rate, int(level.mirrored)), slope)
        coefficients, _ = self.run(self.post, x, x.shape[2], End(frames, rate, 1), total=True)
        return self.wave(coefficients[0], End(frames, per_frame))

    def level(self, level: Level, x: Tensor, spectrum: Tensor, end: End, slope: float) -> Tensor:
        """Operands [1, B, T, 2 C] -> [1, B, up T, C]: upsampled, with the source, through the blocks, leaky."""
        steps = level.up.spread * x.shape[2]
        up, _ = self.run(level.up, x, steps, End(end.length, end.rate), total=True)
        steps += level.mirrored
        x, active = self.run(level.down, spectrum, steps, end, total=True, alpha=level.source[0].alpha)
        for index, pair in enumerate(level.source):
            last = index == len(level.source) - 1
            following, beside = (level.blocks[0].alpha, up) if last else (level.source[index + 1].alpha, None)
            _, active = self.run(pair.first, active, steps, end, alpha=pair.second_alpha)
            x, active = self.run(
                pair.second, active, steps, end, total=True, residual=x, beside=beside, alpha=following
            )
        for pair, following_pair in zip(level.blocks, [*level.blocks[1:], None], strict=True):
            _, active = self.run(pair.first, active, steps, end, alpha=pair.second_alpha)
            if following_pair is None:
                _, active = self.run(pair.second, active, steps, end, residual=x, slope=slope)
            else:
                alpha = following_pair.alpha
                x, active = self.run(pair.second, active, steps, end, total=True, residual=x, alpha=alpha)
        return active

    # -- one launch each -----------------------------------------------------------------------------------------

    def run(
        self,
        convolution: Convolution,
        x: Tensor,
        steps: int,
        end: End,
        *,
        total: bool = False,
        residual: Tensor | None = None,
        beside: Tensor | None = None,
        alpha: Tensor | None = None,
        slope: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Operands [branches, B, T, IN] -> `total` [branches, B, steps, C], and what follows it as operands.

        residual, [branches or 1, B, steps, C], and beside, [1, B, steps, C], are added. What follows: snakes of alpha
        [branches, C] (for one branch of alpha [n, C] n of them), or with `slope` a leaky ReLU. A residual with as many
        branches as the output is overwritten with the total. What was not asked for comes back as some other tensor.
        """
        c, (_, rows, steps_in, inputs) = convolution, x.shape
        n_out = 1 if c.joined else len(c.taps)
        taps = (*c.taps, 0, 0)[:N_BRANCHES]
        outputs = c.weight.shape[1]
        positions = steps if c.spread == 1 else -(-(steps + c.back) // c.spread)
        tile = tile_of(Kind(c.channels, n_out), inputs, self.precision, self.tiles)
        shape = n_out, rows, steps, c.channels
        total_out = activated = x
        if total:
            kept = residual is not None and residual.shape == shape
            total_out = residual if kept and residual is not None else x.new_empty(shape, dtype=torch.float32)
        if alpha is not None or slope is not None:
            copies = n_out if alpha is None else len(alpha)
            activated = x.new_empty((copies, *shape[1:]))
        n_residuals = 0 if residual is None else N_BRANCHES if c.joined else 1
        apart = 0 if residual is None or len(residual) == 1 else residual[0].numel()
        n_programs = n_out * rows * triton.cdiv(positions, tile.rows) * (outputs // tile.columns)
        launch(
            triton_kernels.convolution,
            (n_programs,),
            *(x, c.weight, c.bias),
            *(x if residual is None else residual, x if beside is None else beside, c.bias if alpha is None else alpha),
            *(end.length, total_out, activated, 0.0 if slope is None else slope),
            *(rows, steps_in, steps, positions, *taps, c.dilation, c.stride, c.offset, c.back),
            *(apart, end.rate, end.more),
            IN=inputs,
            OUT=outputs,
            C=c.channels,
            JOINED=c.joined,
            RESIDUALS=n_residuals,
            BESIDE=beside is not None,
            MIRRORED=beside is not None and beside.shape[2] < steps,
            TOTAL=total,
            SNAKES=0 if alpha is None else len(alpha) // n_out,
            LEAKY=slope is not None,
            EPSILON=self.epsilon,
            PRODUCT=self.precision.product,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            OVERLAP=self.overlap,
            num_warps=tile.warps,
            num_stages=tile.stages,
            launch_pdl=self.overlap,
        )
        return total_out, activated

    def spectrum(self, signal: Tensor, end: End) -> Tensor:
        """The source's spectrogram as operands [1, B, T / hop + 1, WIDTH] of signals [B, T]."""
        (rows, samples), (size, width), hop = signal.shape, self.forward_basis.shape, self._hop
        steps = samples // hop + 1
        out = signal.new_empty((1, rows, steps, width), dtype=self.precision.dtype)
        block = 64
        launch(
            triton_kernels.spectrum,
            (rows * triton.cdiv(steps, block),),
            *(signal.contiguous(), self.forward_basis, end.length, out, samples, steps, end.rate),
            SIZE=size,
            HOP=hop,
            WIDTH=width,
            TF32=self.precision == TF32,
            ROWS=block,
            OVERLAP=self.overlap,
            num_warps=4,
            launch_pdl=self.overlap,
        )
        return out

    def wave(self, coefficients: Tensor, end: End) -> Tensor:
        """What `conv_post` gives, [B, steps, WIDTH] -> waves [B, (steps - 1) * hop]."""
        (rows, steps, width), size, hop = coefficients.shape, len(self.window), self._hop
        out = coefficients.new_empty(rows, (steps - 1) * hop)
        cosines, sines = self.inverse_basis
        block = 64
        launch(
            triton_kernels.wave,
            (rows * triton.cdiv(steps - 1, block),),
            *(coefficients, cosines, sines, self.window, end.length, out, steps, end.rate, self.hift.audio_limit),
            BINS=size // 2 + 1,
            FULL=len(cosines),
            SIZE=size,
            HOP=hop,
            WIDTH=width,
            ROWS=block,
            OVERLAP=self.overlap,
            num_warps=4,
            launch_pdl=self.overlap,
        )
        return out

    @property
    def _hop(self) -> int:
        hop: int = self.hift.istft_params["hop_len"]
        return hop


def forward_basis(window: Tensor) -> Tensor:
    """[n, WIDTH]: windowed samples times this are the real and behind them the imaginary parts of their spectrum."""
    n = len(window)
    waves = torch.fft.rfft(torch.eye(n, dtype=torch.float64, device=window.device))
    basis = torch.cat((waves.real, waves.imag), dim=1) * window[:, None]
    return F.pad(basis, (0, -basis.shape[1] % 32)).float().contiguous()


def inverse_basis(window: Tensor) -> tuple[Tensor, Tensor]:
    """[FULL, n] each: real parts times the first and imaginary ones times the second are windowed samples."""
    n = len(window)
    bins = torch.eye(n // 2 + 1, dtype=torch.float64, device=window.device)
    cosines, sines = (torch.fft.irfft(unit * bins, n=n) * window for unit in (1, 1j))
    more = triton.next_power_of_2(len(bins)) - len(bins)
    return tuple(F.pad(basis, (0, 0, 0, more)).float().contiguous() for basis in (cosines, sines))  # type: ignore[return-value]
