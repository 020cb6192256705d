"""The flow's encoder through the kernels of `encoder_kernels.py`: five launches a layer, and nine beside them."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from chatterbox.models.s3gen.transformer.attention import RelPositionMultiHeadedAttention
from chatterbox.models.s3gen.transformer.embedding import EspnetRelPositionalEncoding
from chatterbox.models.s3gen.transformer.encoder_layer import ConformerEncoderLayer
from chatterbox.models.s3gen.transformer.subsampling import LinearNoSubsampling
from chatterbox.models.s3gen.transformer.upsample_encoder import (
    PreLookaheadLayer,
    Upsample1D,
    UpsampleConformerEncoder,
)
from torch import Tensor, nn

from optimizations.common.launching import LOG2_E, shared_bytes
from optimizations.common.padding import power_of_two, within
from optimizations.flow import encoder_kernels
from optimizations.flow.tiles import ANY, SHARED_BYTES, Tile, Tiled, Tiles

NAMES = ("encoder_product", "relative_attention")
"""The kernels as the profiler names them."""


class Precision(NamedTuple):
    """In which dtype the matrix units read, and how they multiply what is float32."""

    dtype: torch.dtype
    product: str


FULL = Precision(torch.float32, "tf32x3")
HALF = Precision(torch.float16, "tf32")


def allowed() -> Precision:
    """What PyTorch's switch for TF32 in products of matrices asks for; where it is on, float16.

    float16 has the 10 bits of mantissa that TF32 has, so its products are as exact, at half the bytes and twice the
    speed. Where it is off, three products of TF32 are summed to what float32 has.
    """
    return HALF if torch.backends.cuda.matmul.allow_tf32 else FULL


TILES = {
    "convolution": (
        Tile(64, 64, 128, warps=4, at_once=2, kilobytes=160),
        Tile(64, 128, 64, warps=4, stages=4, at_once=ANY, kilobytes=160),
        Tile(64, 64, 64, warps=4, stages=4),
    ),
    "norm_qkv": (
        Tile(64, 128, 64, stages=4, at_once=1, kilobytes=160),
        Tile(64, 256, 64, at_once=ANY, kilobytes=160),
        Tile(64, 128, 64),
    ),
    "relative_attention": (Tile(64, 64, warps=4),),
    "add_attended": (
        Tile(64, 64, 128, warps=4, at_once=0.5),
        Tile(64, 128, 64, warps=4, stages=4),
    ),
    "norm_inner": (
        Tile(64, 128, 64, stages=4, at_once=1, kilobytes=160),
        Tile(64, 256, 64, at_once=ANY, kilobytes=160),
        Tile(64, 128, 64),
    ),
    "add_outer": (
        Tile(64, 64, 64, warps=4, stages=4, at_once=0.5),
        Tile(64, 64, 128, warps=4, at_once=1),
        Tile(64, 128, 64, warps=4, stages=4),
    ),
}
"""For float16: the first whose programs are few enough, and which the GPU has shared memory for; the last for any
number.

Small tiles are for few frames, since a kernel wants a program on each of an H200's 132 processors; as soon as there
are more, larger ones take over, which read less for each product. The fastest of what `python -m optimizations.bench
encoder` tried there, for one row and for eight.
"""
FULL_TILES = dict.fromkeys(TILES, (Tile(32, 32, 32, warps=4, stages=2),))


def unsupported(encoder: Any) -> str | None:
    """Why the kernels cannot run this encoder where it is, in words a user can act on; None if they can."""
    if not is_known(encoder):
        return "the flow's encoder has other layers than upstream's, or quantized ones"
    attention, net = encoder.encoders[0].self_attn, encoder.encoders[0].feed_forward
    width, head_dim = attention.linear_q.in_features, attention.d_k
    if any(size < 16 or size & (size - 1) for size in (width, head_dim)) or net.w_1.out_features % 16:
        return (
            "the encoder's kernels want powers of two from 16 on for width and head size, and a multiple of 16 for the "
            f"feed-forward nets, which are {width}, {head_dim} and {net.w_1.out_features}"
        )
    device = net.w_1.weight.device
    if device.type == "cuda" and shared_bytes(device) < SHARED_BYTES:
        return (
            f"the encoder's kernels need {SHARED_BYTES >> 10} KB of shared memory a program, as GPUs from Ampere on "
            f"have, and this one has {shared_bytes(device) >> 10} KB"
        )
    return None


def is_known(encoder: Any) -> bool:
    """Whether it is built as upstream builds it for Chatterbox: norms in front, SiLU, no chunks, plain weights."""
    if type(encoder) is not UpsampleConformerEncoder:
        return False
    layers = [*encoder.encoders, *encoder.up_encoders]
    linears = [
        m for m in encoder.modules() if "Linear" in type(m).__name__ and m not in (encoder.embed, encoder.up_embed)
    ]
    return (
        all(_is_embedding(embed) for embed in (encoder.embed, encoder.up_embed))
        and encoder.normalize_before
        and encoder.global_cmvn is None
        and not encoder.use_dynamic_chunk
        and encoder.static_chunk_size == 0
        and len(encoder.encoders) > 0
        and type(encoder.pre_lookahead_layer) is PreLookaheadLayer
        and type(encoder.up_layer) is Upsample1D
        and all(type(layer) is ConformerEncoderLayer and layer.normalize_before for layer in layers)
        and all(layer.feed_forward_macaron is None and layer.conv_module is None for layer in layers)
        and all(type(layer.self_attn) is RelPositionMultiHeadedAttention for layer in layers)
        and all(isinstance(layer.feed_forward.activation, nn.SiLU) for layer in layers)
        and all(type(linear) is nn.Linear and linear.weight.is_floating_point() for linear in linears)
    )


def _is_embedding(embed: Any) -> bool:
    return isinstance(embed, LinearNoSubsampling) and isinstance(embed.pos_enc, EspnetRelPositionalEncoding)


# -- weights -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """A linear layer, or a convolution over `taps` frames of which `back` lie before the one in question."""

    weight: Tensor  # [N, taps * C]: operands
    bias: Tensor  # [N] float32
    taps: int = 1
    back: int = 0

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, back: int = 0) -> Product:
        """A linear layer's weight [N, C], or a convolution's [N, C, taps]."""
        weight = weight.detach().float()
        taps = 1 if weight.dim() == 2 else weight.shape[2]
        if weight.dim() == 3:
            weight = weight.transpose(1, 2).flatten(1)
        bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().float().contiguous()
        return cls(weight.to(dtype, memory_format=torch.contiguous_format, copy=True), bias, taps, back)

    @classmethod
    def after(cls, norm: Any, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Product:
        """A linear layer behind a norm, whose gain and shift it takes over."""
        weight = weight.detach().float()
        return cls.of(weight * norm.weight.float(), bias.detach() + weight @ norm.bias.float(), dtype)


@dataclass(frozen=True)
class Norm:
    """A layer norm, and a factor behind it."""

    weight: Tensor
    bias: Tensor
    epsilon: float

    @classmethod
    def of(cls, norm: Any, factor: float = 1.0) -> Norm:
        return cls(factor * norm.weight.detach().float(), factor * norm.bias.detach().float(), norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


@dataclass(frozen=True)
class Layer:
    """Upstream's `ConformerEncoderLayer`, without what Chatterbox's has none of."""

    qkv: Product  # of it, what queries meet keys with
    difference: Tensor  # [C] float32: what else they meet distances with
    to_table: nn.Module  # of the distances
    heads: int
    epsilon: float  # of both norms
    out: Product
    inner: Product
    outer: Product

    @classmethod
    def of(cls, layer: Any, dtype: torch.dtype) -> Layer:
        attention, net = layer.self_attn, layer.feed_forward
        linears = attention.linear_q, attention.linear_k, attention.linear_v
        biases = [torch.zeros_like(x.weight[:, 0]) if x.bias is None else x.bias for x in linears]
        u, v = attention.pos_bias_u.detach().flatten(), attention.pos_bias_v.detach().flatten()
        biases[0] = biases[0] + u
        return cls(
            Product.after(layer.norm_mha, torch.cat([x.weight for x in linears]), torch.cat(biases), dtype),
            (v - u).float(),
            attention.linear_pos,
            attention.h,
            layer.norm_mha.eps,
            Product.of(attention.linear_out.weight, attention.linear_out.bias, dtype),
            Product.after(layer.norm_ff, net.w_1.weight, net.w_1.bias, dtype),
            Product.of(net.w_2.weight, net.w_2.bias, dtype),
        )


def upsampled(up: Any, linear: Any, dtype: torch.dtype) -> Product:
    """Each frame repeated `stride` times, a causal convolution, and a linear layer, as one convolution of all three.

    Of the frames that the convolution sees, those that are the same one's repetitions share its weight. Its outputs are
    the `stride` frames that one frame becomes, side by side.
    """
    weight, stride = up.conv.weight.detach().float(), up.stride
    outputs, inputs, taps = weight.shape
    gathered = weight.new_zeros(stride, outputs, inputs, 3)
    for phase in range(stride):
        for tap in range(taps):
            gathered[phase, ..., (phase + tap) // stride] += weight[..., tap]
    together = torch.einsum("no,poit->pnit", linear.weight.detach().float(), gathered)
    bias = linear.bias.detach() + linear.weight.detach() @ up.conv.bias.detach()
    return Product.of(together.flatten(0, 1), bias.repeat(stride), dtype, back=2)


# -- the encoder ---------------------------------------------------------------------------------------------------


class TritonEncoder(Tiled):
    """`encode` and `UpsampleConformerEncoder.forward`, for rows of any length."""

    def __init__(self, encoder: Any, precision: Precision, tiles: Tiles | None = None) -> None:
        self.precision = precision
        self.n_calls = 0
        dtype, lookahead = precision.dtype, encoder.pre_lookahead_layer
        enter, up_enter = encoder.embed.out, encoder.up_embed.out
        self.embed = Product.of(enter[0].weight, enter[0].bias, dtype)
        self.embed_norm = Norm.of(enter[1], encoder.embed.pos_enc.xscale)
        self.ahead = Product.of(lookahead.conv1.weight, lookahead.conv1.bias, dtype)
        self.back = Product.of(lookahead.conv2.weight, lookahead.conv2.bias, dtype, back=2)
        self.layers = [Layer.of(layer, dtype) for layer in encoder.encoders]
        self.stride = encoder.up_layer.stride
        self.up = upsampled(encoder.up_layer, up_enter[0], dtype)
        self.up_norm = Norm.of(up_enter[1], encoder.up_embed.pos_enc.xscale)
        self.up_layers = [Layer.of(layer, dtype) for layer in encoder.up_encoders]
        self.last_norm = Norm.of(encoder.after_norm)
        self._position_encodings = encoder.embed.pos_enc, encoder.up_embed.pos_enc
        self._tables: dict[tuple[int, int], list[Tensor]] = {}
        self.launch_in(tiles or (TILES if precision == HALF else FULL_TILES), self.embed.weight.device)

    def forward(self, xs: Tensor, xs_lens: Tensor, *_chunks: int) -> tuple[Tensor, Tensor]:
        """Embedded tokens [B, n, C] and lengths [B] -> hidden [B, 2 n, C] and mask [B, 1, 2 n], as upstream's."""
        hidden = self.encode(xs, xs_lens)
        return hidden, within(self.stride * xs_lens, hidden.shape[1])[:, None]

    def encode(self, embedded: Tensor, lengths: Tensor) -> Tensor:
        """Embedded tokens [B, n, C] and lengths [B] -> hidden [B, 2 n, C], each row as if it were alone."""
        self.n_calls += 1
        rows, n, width = embedded.shape
        lengths = lengths.to(torch.int32)
        frames = embedded.contiguous()
        x = self.embed_norm(self.product("convolution", self.embed, frames, lengths, frames.new_empty(frames.shape)))
        ahead = x.new_empty(x.shape, dtype=self.precision.dtype)
        self.product("convolution", self.ahead, x, lengths, ahead, activation="leaky_relu")
        self.product("convolution", self.back, ahead, lengths, x, add=True)
        self.run(self.layers, self._tables_for(0, n), x, lengths)
        up = x.new_empty(rows, self.stride * n, width)
        x = self.up_norm(self.product("convolution", self.up, x, lengths, up))
        self.run(self.up_layers, self._tables_for(1, self.stride * n), x, self.stride * lengths)
        return self.last_norm(x)

    def run(self, layers: list[Layer], tables: list[Tensor], x: Tensor, lengths: Tensor) -> None:
        """All layers of one rate over x [B, T, C]."""
        operands = x.new_empty(0, dtype=self.precision.dtype)
        for layer, table in zip(layers, tables, strict=True):
            qkv = operands.new_empty(*x.shape[:2], len(layer.qkv.bias))
            self.product("norm_qkv", layer.qkv, x, lengths, qkv, epsilon=layer.epsilon)
            attended = self.attend(layer, qkv, table, lengths)
            self.product("add_attended", layer.out, attended, lengths, x, add=True)
            inner = operands.new_empty(*x.shape[:2], len(layer.inner.bias))
            self.product("norm_inner", layer.inner, x, lengths, inner, epsilon=layer.epsilon, activation="silu")
            self.product("add_outer", layer.outer, inner, lengths, x, add=True)

    def _tables_for(self, stack: int, longest: int) -> list[Tensor]:
        """What each layer of a rate makes of the distances between up to `longest` frames, [2 reach - 1, C].

        It is weights times a constant, so it is made once for each power of two; all of them together are twice as
        large as the largest. None is let go of, as a captured call may know it.
        """
        reach = power_of_two(longest)
        if (stack, reach) not in self._tables:
            encode = self._position_encodings[stack]
            layers = (self.layers, self.up_layers)[stack]
            _, positions = encode(layers[0].difference.new_zeros(1, reach, 1))
            tables = [layer.to_table(positions[0]).to(self.precision.dtype) for layer in layers]
            self._tables[stack, reach] = tables
        return self._tables[stack, reach]

    # -- one launch each -----------------------------------------------------------------------------------------

    def product(
        self,
        name: str,
        product: Product,
        x: Tensor,
        lengths: Tensor,
        out: Tensor,
        epsilon: float | None = None,
        activation: str = "",
        add: bool = False,
    ) -> Tensor:
        """Frames x [B, T, C] -> out of B T N numbers; `epsilon` asks for a norm of x. Returns `out`."""
        rows, length, width = x.shape
        n_frames, outputs = rows * length, len(product.bias)

        def n_programs(tile: Tile) -> int:
            return triton.cdiv(n_frames, tile.rows) * (outputs // gcd(outputs, tile.columns))

        tile = self._tile(name, n_programs)
        args = x, product.weight, product.bias, lengths, out, n_frames, length, epsilon or 0.0
        sizes = {
            "N": outputs,
            "C": width,
            "TAPS": product.taps,
            "BACK": product.back,
            "NORM": epsilon is not None,
            "ACTIVATION": activation,
            "ADD": add,
            "PRODUCT": self.precision.product,
            "ROWS": tile.rows,
            "COLUMNS": gcd(outputs, tile.columns),
            "DEPTH": gcd(width, tile.depth),
        }
        self._launch(encoder_kernels.encoder_product, n_programs(tile), args, sizes, tile)
        return out

    def attend(self, layer: Layer, qkv: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        """qkv [B, T, 3 C] -> what each frame's heads attend to, [B, T, C]."""
        rows, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        head_dim = width // layer.heads
        attended = qkv.new_empty(rows, length, width)

        def n_programs(tile: Tile) -> int:
            return rows * layer.heads * triton.cdiv(length, tile.rows)

        tile = self._tile("relative_attention", n_programs)
        reach, scale = (len(table) + 1) // 2, head_dim**-0.5 * LOG2_E
        args = qkv, layer.difference, table, lengths, attended, length, reach, scale
        sizes = {
            "H": layer.heads,
            "D": head_dim,
            "PRODUCT": self.precision.product,
            "QUERIES": tile.rows,
            "KEYS": tile.columns,
        }
        self._launch(encoder_kernels.relative_attention, n_programs(tile), args, sizes, tile)
        return attended
