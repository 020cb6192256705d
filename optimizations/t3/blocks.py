"""The two kinds of transformer that T3 is built on, as what the engines put together: what is around attention.

    Llama    RMSNorm, no bias, rotated queries and keys, silu(gate) * up
    GPT-2    LayerNorm, bias, learned positions that are added to what comes in, gelu(fc)

Attention and its cache are the same in both, and the engines' own. A position's numbers come from `tables`, which a
captured step can index by what is on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Model
from transformers.pytorch_utils import Conv1D

Places = tuple[Tensor, ...]
"""Rows of `Blocks.tables` for the positions in question, each [n, ...] or [R, n, ...]."""


class Blocks(Protocol):
    """A transformer's layers without attention; hidden states are [R, n, C], heads [R, heads, n, head_dim]."""

    layers: Any
    norm: Any
    """The last one, behind all layers."""
    heads: int
    head_dim: int
    inner: int
    """Width of the feed-forward net."""
    epsilon: float
    rotates: bool
    """Whether positions turn queries and keys, and `tables` are cosines and sines; else they add what `tables` has."""

    @property
    def dtype(self) -> torch.dtype:
        """What the layers compute in."""
        ...

    def tables(self, capacity: int, like: Tensor) -> tuple[Tensor, ...]:
        """What depends on positions alone, [capacity, ...] each."""
        ...

    def enter(self, embeds: Tensor, places: Places) -> Tensor:
        """What the first layer reads."""
        ...

    def heads_of(self, layer: Any, x: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        """A layer's queries, keys and values."""
        ...

    def add_attended(self, layer: Any, x: Tensor, attended: Tensor) -> Tensor:
        """The stream after attention, which gave [R, n, C]."""
        ...

    def add_inner(self, layer: Any, x: Tensor) -> Tensor:
        """The stream after the layer's feed-forward net."""
        ...

    def leave(self, x: Tensor) -> Tensor:
        """The last norm."""
        ...


def blocks_of(tfmr: Any) -> Blocks:
    """The blocks of one of T3's transformers."""
    return GPT2Blocks(tfmr) if isinstance(tfmr, GPT2Model) else LlamaBlocks(tfmr)


class LlamaBlocks:
    """Of transformers' `LlamaModel`."""

    rotates = True

    def __init__(self, tfmr: Any) -> None:
        self.layers, self.norm = tfmr.layers, tfmr.norm
        self.heads, self.head_dim = tfmr.config.num_key_value_heads, tfmr.config.head_dim
        self.inner, self.epsilon = tfmr.config.intermediate_size, tfmr.norm.variance_epsilon
        self._rotary = tfmr.rotary_emb

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].input_layernorm.weight.dtype

    def tables(self, capacity: int, like: Tensor) -> tuple[Tensor, ...]:
        """Rotation as x * cos + swapped(x) * sin, with the sign of the swapped first half kept in the table."""
        cos, sin = self._rotary(like, torch.arange(capacity, device=like.device)[None])
        half = sin.shape[-1] // 2
        return cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)

    def enter(self, embeds: Tensor, places: Places) -> Tensor:
        return embeds

    def heads_of(self, layer: Any, x: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        attention, (cos, sin) = layer.self_attn, [table.unsqueeze(-3) for table in places]
        h = _rms_norm(x, layer.input_layernorm)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = [_by_head(project(h), self.head_dim) for project in projections]
        return q * cos + _swap_halves(q) * sin, k * cos + _swap_halves(k) * sin, v

    def add_attended(self, layer: Any, x: Tensor, attended: Tensor) -> Tensor:
        return x + layer.self_attn.o_proj(attended)

    def add_inner(self, layer: Any, x: Tensor) -> Tensor:
        h, mlp = _rms_norm(x, layer.post_attention_layernorm), layer.mlp
        return x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))

    def leave(self, x: Tensor) -> Tensor:
        return _rms_norm(x, self.norm)


class GPT2Blocks:
    """Of transformers' `GPT2Model`."""

    rotates = False

    def __init__(self, tfmr: Any) -> None:
        self.layers, self.norm = tfmr.h, tfmr.ln_f
        self.heads = tfmr.config.num_attention_heads
        self.head_dim = tfmr.config.hidden_size // self.heads
        self.inner, self.epsilon = tfmr.config.n_inner or 4 * tfmr.config.hidden_size, tfmr.ln_f.eps
        self._positions = tfmr.wpe

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].ln_1.weight.dtype

    def tables(self, capacity: int, like: Tensor) -> tuple[Tensor, ...]:
        """The learned positions; a cache may be larger than there are, and never is as full."""
        learned = self._positions.weight
        return (learned[torch.arange(capacity, device=learned.device).clamp_max(len(learned) - 1)].to(like.dtype),)

    def enter(self, embeds: Tensor, places: Places) -> Tensor:
        (learned,) = places
        return embeds + learned

    def heads_of(self, layer: Any, x: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = layer.attn.c_attn(_layer_norm(x, layer.ln_1)).chunk(3, dim=-1)
        return _by_head(q, self.head_dim), _by_head(k, self.head_dim), _by_head(v, self.head_dim)

    def add_attended(self, layer: Any, x: Tensor, attended: Tensor) -> Tensor:
        return x + layer.attn.c_proj(attended)

    def add_inner(self, layer: Any, x: Tensor) -> Tensor:
        inner = layer.mlp.c_fc(_layer_norm(x, layer.ln_2))
        return x + layer.mlp.c_proj(F.gelu(inner, approximate="tanh"))

    def leave(self, x: Tensor) -> Tensor:
        return _layer_norm(x, self.norm)


def _by_head(x: Tensor, head_dim: int) -> Tensor:
    """[R, n, heads * head_dim] -> [R, heads, n, head_dim]"""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _swap_halves(x: Tensor) -> Tensor:
    """The two halves of the last dimension exchanged, in one kernel and without `cat`."""
    return x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)


def _rms_norm(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _layer_norm(x: Tensor, norm: Any) -> Tensor:
    return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)


def products_of(tfmr: nn.Module) -> Iterator[nn.Module]:
    """The products with weights in the layers, whatever they were replaced by."""
    for layer in blocks_of(tfmr).layers:
        for module in layer.modules():
            if isinstance(module, Conv1D) or "Linear" in type(module).__name__:
                yield module


def matrix_of(product: Any) -> Tensor:
    """A product's weights [outputs, inputs], or the words of 8-bit ones, an output behind the other in memory."""
    if not isinstance(product, Conv1D):
        matrix: Tensor = product.weight
        return matrix
    matrix = product.weight.T
    assert matrix.is_contiguous(), "its weights have to be laid out by outputs: see `by_outputs`"
    return matrix


def by_outputs(tfmr: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """The weights [inputs, outputs] of a GPT-2's products that lie by inputs, each with itself laid out by outputs."""
    for module in tfmr.modules():
        if isinstance(module, Conv1D) and not module.weight.T.is_contiguous():
            yield module.weight, module.weight.data.T.contiguous().T
