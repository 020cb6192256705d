"""The flow's estimator as one function over [rows, frames, channels], in PyTorch's operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from chatterbox.models.s3gen.decoder import CausalConv1d
from diffusers.models.activations import GELU
from torch import Tensor, nn

from optimizations.common.memory import Reused
from optimizations.flow.layer_steps import Steps


def is_known(estimator: Any) -> bool:
    """Whether it is built as upstream builds it for Chatterbox: causal, one resolution, plain weights, GELU."""
    convolutions = [m for m in estimator.modules() if isinstance(m, nn.Conv1d)]
    blocks = [b for _, blocks in stacks_of(estimator) for b in blocks]
    linears = [m for m in estimator.modules() if "Linear" in type(m).__name__]
    return (
        estimator.causal
        and estimator.static_chunk_size == 0
        and all(isinstance(c, CausalConv1d) or c.kernel_size == (1,) for c in convolutions)
        and all(isinstance(block.ff.net[0], GELU) and block.attn2 is None for block in blocks)
        and all(isinstance(linear, nn.Linear) and linear.weight.is_floating_point() for linear in linears)
    )


def stacks_of(estimator: Any) -> list[tuple[Any, Any]]:
    """Each ResNet with the transformer blocks behind it, from the input to the output."""
    groups = (*estimator.down_blocks, *estimator.mid_blocks, *estimator.up_blocks)
    return [(group[0], group[1]) for group in groups]


class ChannelsLastEstimator:
    """Upstream's `ConditionalDecoder.forward`; `masked` is what a mask that counts is left to."""

    def __init__(self, estimator: Any, masked: Callable[..., Tensor]) -> None:
        self.estimator, self.masked = estimator, masked
        self.n_calls = self.n_masked = 0
        stacks = stacks_of(estimator)
        self.stacks = [Stack(ResNet.of(resnet), [Block.of(block) for block in blocks]) for resnet, blocks in stacks]
        self.n_down = len(estimator.down_blocks)
        self.down = [Product.of(group[2]) for group in estimator.down_blocks]
        self.up = [Product.of(group[2]) for group in estimator.up_blocks]
        self.last = NormedConvolution.of(estimator.final_block)
        self.out = Product.of(estimator.final_proj)
        times = [resnet.mlp[1] for resnet, _ in stacks]
        self.time = torch.cat([t.weight.float() for t in times]), torch.cat([t.bias.float() for t in times])
        self.time_sizes = [t.out_features for t in times]

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        mu: Tensor,
        t: Tensor,
        spks: Tensor | None = None,
        cond: Tensor | None = None,
        r: Tensor | None = None,
    ) -> Tensor:
        """x, mu and cond [R, 80, T], mask [R, 1, T], t and r [R] or [1], spks [R, 80] -> velocity [R, 80, T], float32.

        `r`, where the step ends, is known to a meanflow estimator alone.
        """
        if spks is None or cond is None or not self.bears(mask):
            self.n_masked += 1
            return self.masked(x=x, mask=mask, mu=mu, t=t, spks=spks, cond=cond, r=r)
        self.n_calls += 1
        inputs = torch.cat((x, mu, spks[:, :, None].expand_as(x), cond), dim=1)
        shares = self.time_shares(t.expand(len(x)), None if r is None else r.expand(len(x)))
        return self.velocity(inputs, mask, self.by_resnet(shares))

    def bears(self, mask: Tensor) -> bool:
        """Whether this can do without a mask, or with one that counts."""
        return bool(mask.all())

    def velocity(self, inputs: Tensor, mask: Tensor, times: tuple[Tensor, ...]) -> Tensor:
        """All inputs [R, 320, T], of which the mask may hide none -> velocity [R, 80, T]."""
        return self._layers(inputs.transpose(1, 2), times).transpose(1, 2)

    def solver_steps(self, rows: int, sides: int, frames: int, memory: Reused) -> Steps | None:
        """A way through the solver's steps that is this estimator's own, where it has one: `layer_steps.Steps` of so
        many rows, of which what is large lies in `memory`."""
        return None

    def time_shares(self, t: Tensor, r: Tensor | None) -> Tensor:
        """What the times [n] and, for a meanflow, the steps' ends [n] add in the ResNets [n, channels]."""
        embedded = self._embedded(t)
        if self.estimator.meanflow:
            assert r is not None
            embedded = self.estimator.time_embed_mixer.forward(torch.cat((embedded, self._embedded(r)), dim=1))
        return F.linear(mish(embedded), *self.time)

    def by_resnet(self, shares: Tensor) -> tuple[Tensor, ...]:
        """`time_shares` [R, channels] as the ResNets take them, [R, 1, C] each."""
        return shares[:, None].split(self.time_sizes, dim=-1)

    def _embedded(self, t: Tensor) -> Tensor:
        estimator = self.estimator
        # Not called as a module, whose hook would round it as the other layers want it.
        return estimator.time_mlp.forward(estimator.time_embeddings(t))

    def _layers(self, x: Tensor, times: tuple[Tensor, ...]) -> Tensor:
        """Frames [R, T, C] through all layers."""
        first_up = len(self.stacks) - len(self.up)
        skips: list[Tensor] = []
        for index, (stack, time) in enumerate(zip(self.stacks, times, strict=True)):
            if index >= first_up:
                x = torch.cat((x, skips.pop()), dim=-1)
            x = stack(x, time)
            if index < self.n_down:
                skips.append(x)
                x = self.down[index](x)
            elif index >= first_up:
                x = self.up[index - first_up](x)
        return self.out(self.last(x)).float()


@dataclass
class Product:
    """A linear layer, or a convolution over the last frames, in its weight's dtype."""

    weight: Tensor  # [outputs, n_frames * inputs]
    bias: Tensor | None = None
    n_frames: int = 1

    @classmethod
    def of(cls, layer: Any) -> Product:
        weight = layer.weight.detach()
        if weight.dim() == 3:
            return cls(weight.transpose(1, 2).flatten(1), layer.bias, weight.shape[2])
        return cls(weight, layer.bias)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype) if self.n_frames == 1 else windows(x, self.n_frames, self.weight.dtype)
        return F.linear(x, self.weight, self.bias)


def windows(x: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """[R, T, C] -> [R, T, n * C]: each frame behind the n - 1 before it; zeros stand before the first."""
    rows, length, channels = x.shape
    padded = x.new_empty(rows, length + n - 1, channels, dtype=dtype)
    padded[:, : n - 1] = 0
    padded[:, n - 1 :] = x
    return padded.as_strided((rows, length, n * channels), padded.stride()).contiguous()


@dataclass
class Norm:
    """A layer norm, to float32."""

    weight: Tensor
    bias: Tensor
    epsilon: float

    @classmethod
    def of(cls, norm: Any) -> Norm:
        return cls(norm.weight.float(), norm.bias.float(), norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.epsilon)


@dataclass
class NormedConvolution:
    """Upstream's `CausalBlock1D`."""

    convolution: Product
    norm: Norm

    @classmethod
    def of(cls, block: Any) -> NormedConvolution:
        return cls(Product.of(block.block[0]), Norm.of(block.block[2]))

    def __call__(self, x: Tensor) -> Tensor:
        return mish(self.norm(self.convolution(x)))


@dataclass
class ResNet:
    """Upstream's `CausalResnetBlock1D`."""

    first: NormedConvolution
    second: NormedConvolution
    beside: Product

    @classmethod
    def of(cls, resnet: Any) -> ResNet:
        first, second = NormedConvolution.of(resnet.block1), NormedConvolution.of(resnet.block2)
        return cls(first, second, Product.of(resnet.res_conv))

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        return self.second(self.first(x) + time) + self.beside(x)


@dataclass
class Block:
    """Upstream's `BasicTransformerBlock`: self-attention and a feed-forward net."""

    norm1: Norm
    qkv: Product
    heads: int
    out: Product
    norm3: Norm
    inner: Product
    outer: Product

    @classmethod
    def of(cls, block: Any) -> Block:
        attention, net = block.attn1, block.ff.net
        weights = [layer.weight for layer in (attention.to_q, attention.to_k, attention.to_v)]
        return cls(
            Norm.of(block.norm1),
            Product(torch.cat(weights).detach()),
            attention.heads,
            Product.of(attention.to_out[0]),
            Norm.of(block.norm3),
            Product.of(net[0].proj),
            Product.of(net[2]),
        )

    def __call__(self, x: Tensor) -> Tensor:
        x = x + self.out(self._attend(self.norm1(x)))
        return x + self.outer(F.gelu(self.inner(self.norm3(x))))

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@dataclass
class Stack:
    """A ResNet and its transformer blocks."""

    resnet: ResNet
    blocks: list[Block] = field(default_factory=list)

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        x = self.resnet(x, time)
        for block in self.blocks:
            x = block(x)
        return x


def mish(x: Tensor) -> Tensor:
    """x * tanh(log(1 + e^x)); where e^x overflows, x."""
    e = x.exp()
    return x.addcdiv(x, (e + 2).mul_(e).add_(2), value=-2)
