"""The flow's estimator through the kernels of `triton_kernels.py`: 22 launches for a ResNet and its four blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from optimizations.common.launching import LOG2_E, shared_bytes
from optimizations.common.memory import Reused
from optimizations.flow import triton_kernels
from optimizations.flow.estimator import Block, ChannelsLastEstimator, Norm, Product, stacks_of
from optimizations.flow.tiles import ANY, SHARED_BYTES, Tile, Tiled, Tiles
from optimizations.flow.triton_steps import TritonSteps

NAMES = ("convolution", "norm_product", "row_attention", "add_product")
"""The kernels as the profiler names them."""
HALF = (torch.bfloat16, torch.float16)

TILES = {
    "convolution": (
        Tile(16, depth=128, at_once=1, kilobytes=152),
        Tile(32, depth=128, at_once=1, kilobytes=160),
        Tile(64, depth=64),
    ),
    "norm_qkv": (
        Tile(64, 128, 64, warps=4, at_once=3),
        Tile(128, 128, 64, at_once=2, kilobytes=112),
        Tile(128, 256, 64, running=1, at_once=ANY, kilobytes=208),
        Tile(64, 128, 64, warps=4),
    ),
    "row_attention": (
        Tile(64, 128, warps=4, at_once=2, kilobytes=104),
        Tile(64, 64, warps=4, stages=4, at_once=3),
        Tile(128, 64),
    ),
    "add_attended": (
        Tile(64, 64, 128, warps=4, stages=4, at_once=1, kilobytes=128),
        Tile(64, 64, 128, warps=4, at_once=2),
        Tile(128, 64, 128, at_once=4),
        Tile(128, 64, 64, warps=4, stages=4),
    ),
    "norm_inner": (
        Tile(64, 64, 64, warps=4, at_once=4),
        Tile(128, 64, 64, warps=4, stages=4, at_once=3, kilobytes=112),
        Tile(128, 256, 64, running=1, at_once=ANY, kilobytes=208),
        Tile(64, 128, 64, warps=4),
    ),
    "add_outer": (
        Tile(64, 64, 128, warps=4, stages=4, at_once=1, kilobytes=128),
        Tile(64, 64, 128, warps=4, at_once=8),
        Tile(128, 128, 64),
    ),
}
"""The first whose programs are few enough, and which the GPU has shared memory for; the last for any number.

A kernel takes as long as the processor with the most programs: 264 of them, two on each of an H200's 132 processors,
end together, and the 265th waits for one of them and takes as long again. So larger tiles take over where the smaller
ones no longer fit at once. Chosen by the time of a whole step on an H100, whose kernels overlap: what is fastest by
itself may take the room that the next kernel would start in. `python -m optimizations.bench flow` measures that.
"""


def unsupported(estimator: Any) -> str | None:
    """Why the kernels cannot run this estimator where it is, in words a user can act on; None if they can.

    It is one that `estimator.is_known`.
    """
    stacks = stacks_of(estimator)
    parts = (estimator.down_blocks, estimator.mid_blocks, estimator.up_blocks, estimator.final_block)
    dtypes = {parameter.dtype for part in parts for parameter in part.parameters()}
    if len(dtypes) > 1 or not dtypes <= set(HALF):
        return "the flow's kernels want weights in half precision: switch mixed_precision on, with the flow among parts"
    if len(stacks) < 3 or any(len(blocks) == 0 for _, blocks in stacks):
        return "the flow's kernels want a ResNet between the first and the last, and transformer blocks behind each"
    attention, net = stacks[0][1][0].attn1, stacks[0][1][0].ff.net
    width, head_dim = attention.to_q.in_features, attention.to_q.out_features // attention.heads
    if any(size < 16 or size & (size - 1) for size in (width, head_dim)):
        return f"the flow's kernels want powers of two from 16 on for width and head size, which are {width, head_dim}"
    if estimator.in_channels % 16 or net[2].in_features % 16:
        return "the flow's kernels want multiples of 16 for the input's channels and the feed-forward nets"
    device = net[2].weight.device
    if device.type == "cuda" and shared_bytes(device) < SHARED_BYTES:
        return (
            f"the flow's kernels need {SHARED_BYTES >> 10} KB of shared memory a program, as GPUs from Ampere on have, "
            f"and this one has {shared_bytes(device) >> 10} KB"
        )
    return None


@dataclass
class NormedProduct:
    """A layer norm and the product behind it, as one product of what the norm reads; see `triton_kernels`."""

    weight: Tensor  # [N, C], half
    sums: Tensor  # [N] float32
    bias: Tensor  # [N] float32
    epsilon: float

    @classmethod
    @torch.no_grad()  # or what they are made of would be kept with them
    def of(cls, norm: Norm, product: Product) -> NormedProduct:
        weight = (product.weight.float() * norm.weight).to(product.weight.dtype)
        bias = product.weight.float() @ norm.bias
        return cls(
            weight=weight,
            sums=weight.float().sum(dim=1),  # as they are rounded, so that what all channels share cancels out
            bias=bias if product.bias is None else bias + product.bias.float(),
            epsilon=norm.epsilon,
        )


@dataclass
class FlatBlock:
    """A `Block` as the kernels take it."""

    qkv: NormedProduct
    heads: int
    out: Product
    inner: NormedProduct
    outer: Product

    @classmethod
    def of(cls, block: Block) -> FlatBlock:
        qkv, inner = NormedProduct.of(block.norm1, block.qkv), NormedProduct.of(block.norm3, block.inner)
        return cls(qkv, block.heads, block.out, inner, block.outer)


@dataclass
class Buffers:
    """What the kernels of one call hand on: R rows of T frames, M = R * T, in a width of C."""

    lengths: Tensor  # [R] int32
    x: Tensor  # [M, C] float32: the residual stream
    halved: Tensor  # [M, C]: the same, which products read,
    moments: Tensor  # [M, 2, parts] float32: and what norms need to know of it
    hidden: Tensor  # [M, C]: between a ResNet's convolutions
    entering: Tensor  # [M, C]: what a ResNet reads
    joined: Tensor  # [M, 2 C]: what the last ResNet reads, with the first one's result on the right
    qkv: Tensor  # [M, 3 I]
    attended: Tensor  # [M, I]
    inner: Tensor  # [M, F]

    @classmethod
    def blank(cls, lengths: Tensor, frames: int, block: FlatBlock) -> Buffers:
        """For M `frames` and blocks of the sizes of `block`."""
        width, inner = block.outer.weight.shape
        half = block.outer.weight.new_empty
        return cls(
            lengths=lengths,
            x=half(frames, width, dtype=torch.float32),
            halved=half(frames, width),
            moments=half(frames, 2, triton.cdiv(width, triton_kernels.PART.value), dtype=torch.float32),
            hidden=half(frames, width),
            entering=half(frames, width),
            joined=half(frames, 2 * width),
            qkv=half(frames, len(block.qkv.weight)),
            attended=half(frames, len(block.qkv.weight) // 3),
            inner=half(frames, inner),
        )


class TritonEstimator(ChannelsLastEstimator, Tiled):
    """The same on a GPU, in half precision, with a float32 residual stream; padded rows are no exception here."""

    def __init__(self, estimator: Any, masked: Callable[..., Tensor], tiles: Tiles = TILES) -> None:
        super().__init__(estimator, masked)
        self.blocks = [[FlatBlock.of(block) for block in stack.blocks] for stack in self.stacks]
        for stack in self.stacks:
            stack.blocks = []  # whose weights would be kept beside these
        self.launch_in(tiles, self.out.weight.device)

    # A compiler that traces this finds one graph break; it has nothing to gain inside.
    forward = torch.compiler.disable(ChannelsLastEstimator.forward)

    def bears(self, mask: Tensor) -> bool:
        return True

    @property
    def half(self) -> Tensor:
        """A weight of the blocks: of the dtype that products are in, and where they are."""
        return self.blocks[0][0].outer.weight

    @property
    def n_inputs(self) -> int:
        """Numbers that a frame comes with: a mel, the encoder's, the speaker and the prompt."""
        return self.stacks[0].resnet.beside.weight.shape[1]

    def solver_steps(self, rows: int, sides: int, frames: int, memory: Reused) -> TritonSteps:
        return TritonSteps.blank(self, rows, sides, frames, memory)

    def velocity(self, inputs: Tensor, mask: Tensor, times: tuple[Tensor, ...]) -> Tensor:
        rows, channels, length = inputs.shape
        lengths = mask[:, 0].sum(dim=-1, dtype=torch.int32)
        frames = self.half.new_empty(rows, length, channels)
        frames.copy_(inputs.transpose(1, 2))
        hidden = self.through(frames, lengths, times)
        return F.linear(hidden, self.out.weight.flatten(1), self.out.bias).view(rows, length, -1).transpose(1, 2)

    def through(self, frames: Tensor, lengths: Tensor, times: tuple[Tensor, ...]) -> Tensor:
        """Half-precision frames [R, T, inputs] and lengths [R] int32 -> [R * T, C], float32, for the last product."""
        b = Buffers.blank(lengths, frames.shape[0] * frames.shape[1], self.blocks[0][0])
        width = b.x.shape[1]
        between = len(self.stacks) - 2

        self.stack(0, frames.flatten(0, 1), times, b, leaving=b.joined[:, width:])
        self.convolve(self.down[0], b.joined[:, width:], b.entering, b)
        for index in range(1, between + 1):
            leaving = b.joined[:, :width] if index == between else b.entering
            self.stack(index, b.entering, times, b, leaving)
        self.stack(between + 1, b.joined, times, b, leaving=b.entering)
        self.convolve(self.up[0], b.entering, b.hidden, b)
        self.convolve(self.last.convolution, b.hidden, b.x, b, self.last.norm)
        return b.x

    def stack(self, index: int, frames: Tensor, times: tuple[Tensor, ...], b: Buffers, leaving: Tensor) -> None:
        """A ResNet and its blocks: half-precision frames [M, in] -> x, and a copy of it to `leaving` [M, C]."""
        resnet, blocks = self.stacks[index].resnet, self.blocks[index]
        first, second = resnet.first, resnet.second
        self.convolve(first.convolution, frames, b.hidden, b, first.norm, time=times[index][:, 0])
        self.convolve(second.convolution, b.hidden, b.x, b, second.norm, beside=(resnet.beside, frames), copy=b.halved)
        for block in blocks:
            self.norm_product("norm_qkv", block.qkv, b, b.qkv)
            self.attend(b, block.heads)
            self.add_product("add_attended", block.out, b.attended, b, b.halved)
            self.norm_product("norm_inner", block.inner, b, b.inner, gelu=True)
            self.add_product("add_outer", block.outer, b.inner, b, leaving if block is blocks[-1] else b.halved)

    # -- one launch each -----------------------------------------------------------------------------------------

    def convolve(
        self,
        product: Product,
        frames: Tensor,
        out: Tensor,
        b: Buffers,
        norm: Norm | None = None,
        time: Tensor | None = None,
        beside: tuple[Product, Tensor] | None = None,
        copy: Tensor | None = None,
    ) -> None:
        """Frames [M, in] -> out [M, C]: norm and Mish of the convolution, plus time [R, C] and the shortcut.

        `copy` [M, C] takes the same in half precision, and then its moments are known, too.
        """
        (n_frames, width), (_, inputs) = frames.shape, product.weight.shape
        unread = product.weight
        gain, shift, epsilon = (norm.weight, norm.bias, norm.epsilon) if norm else (unread, unread, 0.0)
        shortcut, other = beside or (Product(unread, unread), frames)
        time_or_none = unread if time is None else time
        length = n_frames // len(b.lengths)
        tile = self._tile("convolution", lambda tile: triton.cdiv(n_frames, tile.rows))
        args = (
            *(frames, product.weight, product.bias, gain, shift, time_or_none),
            *(other, shortcut.weight, shortcut.bias, out, out if copy is None else copy, b.moments),
            *(n_frames, length, frames.stride(0), time_or_none.stride(0), other.stride(0), epsilon),
        )
        sizes = {
            "IN": width,
            "C": out.shape[1],
            "BESIDE": shortcut.weight.shape[1] if beside else 0,
            "NORM": norm is not None,
            "TIME": time is not None,
            "COPY": copy is not None,
            "ROWS": tile.rows,
            "DEPTH": gcd(width, other.shape[1], tile.depth),
        }
        assert inputs == product.n_frames * width
        self._launch(triton_kernels.convolution, triton.cdiv(n_frames, tile.rows), args, sizes, tile)

    def norm_product(self, name: str, product: NormedProduct, b: Buffers, out: Tensor, gelu: bool = False) -> None:
        """The stream, in half precision -> out [M, N]."""
        (n_frames, width), outputs = b.halved.shape, len(product.weight)

        def n_tiles(tile: Tile) -> int:
            return triton.cdiv(n_frames, tile.rows) * (outputs // gcd(outputs, tile.columns))

        tile = self._tile(name, n_tiles)
        n_programs = n_tiles(tile)
        if tile.running:
            n_programs = min(n_programs, max(1, tile.running * self.n_processors))
        turns = triton.cdiv(n_tiles(tile), n_programs)
        args = (
            *(b.halved, b.moments, product.weight, product.sums, product.bias, out),
            *(n_frames, turns, product.epsilon),
        )
        sizes = {
            "N": outputs,
            "C": width,
            "GELU": gelu,
            "ROWS": tile.rows,
            "COLUMNS": gcd(outputs, tile.columns),
            "DEPTH": gcd(width, tile.depth),
            "TURNS": tile.running > 0,
        }
        self._launch(triton_kernels.norm_product, n_programs, args, sizes, tile)

    def attend(self, b: Buffers, heads: int) -> None:
        """qkv -> attended."""
        n_frames, inner = b.attended.shape
        rows, head_dim = len(b.lengths), inner // heads
        length = n_frames // rows

        def n_programs(tile: Tile) -> int:
            return rows * heads * triton.cdiv(length, tile.rows)

        tile = self._tile("row_attention", n_programs)
        args = b.qkv, b.lengths, b.attended, length, head_dim**-0.5 * LOG2_E
        sizes = {"H": heads, "D": head_dim, "QUERIES": tile.rows, "KEYS": tile.columns}
        self._launch(triton_kernels.row_attention, n_programs(tile), args, sizes, tile)

    def add_product(self, name: str, product: Product, a: Tensor, b: Buffers, copy: Tensor) -> None:
        """a [M, K] into the stream; `copy` [M, C] takes the sum in half precision."""
        (n_frames, inputs), width = a.shape, b.x.shape[1]

        def n_programs(tile: Tile) -> int:
            return triton.cdiv(n_frames, tile.rows) * (width // gcd(width, tile.columns))

        tile = self._tile(name, n_programs)
        args = a, product.weight, product.bias, b.x, copy, b.moments, n_frames, copy.stride(0)
        sizes = {
            "C": width,
            "K": inputs,
            "ROWS": tile.rows,
            "COLUMNS": gcd(width, tile.columns),
            "DEPTH": gcd(inputs, tile.depth),
        }
        self._launch(triton_kernels.add_product, n_programs(tile), args, sizes, tile)
