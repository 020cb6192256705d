"""A prompt through a transformer's layers: matrix units multiply, Triton kernels do what lies between.

Some hundred positions a row are work for matrix units, but through the layers three quarters of a prompt's time are
what lies between its products: norms, rotations, halves that change places, masks. Here that is few launches a layer:

    normed_sum      the sum of what came before, normalized
    product         queries, keys and values at once
    turn            rotation; keys and values into the cache, of which one in 8 bits takes them rounded, by PyTorch
    attention       PyTorch's, over the cache
    product
    normed_sum
    product         gate and up at once
    silu_product    a GPT-2's gelu is PyTorch's
    product

The layers are `triton_batched.through_layers`, as of a step of many rows, with attention of its own. Products are
cuBLAS's for plain weights, which `triton_batched.join` has laid one behind the other, and `triton_int8.py`'s for those
in 8 bits. The residual stream and all sums are float32, as in a step.
"""

# ruff: noqa: N803 (a size in capitals is known when its kernel is compiled)
from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from optimizations.common.launching import launch
from optimizations.t3.engines import StaticEngine
from optimizations.t3.triton_batched import add_norm, through_layers


@triton.jit
def turn(
    qkv,  # [R * n, 3 H D]: queries, keys, values
    cos,  # [capacity, D]; not read unless ROTATE
    sin,  # [capacity, D]; its first half carries the rotation's minus
    pad,  # [R] int64: slots of a row that hold no token of its own
    queries,  # out: [R * n, H, D], rotated
    keys,  # written from `first` on: [R, H, capacity, D], as the next
    values,
    n,
    start,  # the slot of the first position in the cache,
    first,  # and in `keys` and `values`
    capacity,
    H: tl.constexpr,
    D: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """One position of one row, all heads."""
    at = tl.program_id(0)
    row = at // n
    place = at % n
    h = tl.arange(0, H)[:, None]
    d = tl.arange(0, D)[None, :]
    own = qkv + at.to(tl.int64) * (3 * H * D) + h * D
    query = tl.load(own + d)
    key = tl.load(own + H * D + d)
    if ROTATE:
        angle = tl.maximum(start + place - tl.load(pad + row).to(tl.int32), 0) * D + d
        c = tl.load(cos + angle).to(tl.float32)
        s = tl.load(sin + angle).to(tl.float32)
        swapped = (d + D // 2) % D
        query = query * c + tl.load(own + swapped) * s
        key = key * c + tl.load(own + H * D + swapped) * s
    tl.store(queries + at.to(tl.int64) * (H * D) + h * D + d, query.to(queries.dtype.element_ty))
    cache = (row * H + h).to(tl.int64) * capacity * D + (first + place) * D + d
    tl.store(keys + cache, key.to(keys.dtype.element_ty))
    tl.store(values + cache, tl.load(own + 2 * H * D + d))


def read(engine: StaticEngine, embeds: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Prompts [R, n, C] at the engine's next slots -> the last position's hidden state [R, C].

    Takes transformers that `triton_engine.unsupported` has nothing against. `mask` and `causal` are what
    `scaled_dot_product_attention` takes, of the new positions over the slots so far.
    """
    rows, n, width = embeds.shape
    x, y = through_layers(
        engine.blocks,
        embeds.reshape(rows * n, width),
        _learned(engine, n),
        lambda index, qkv: _attend(engine, index, qkv, rows, mask, causal),
    )
    last, added = [t.view(rows, n, width)[:, -1].contiguous() for t in (x, y)]
    return add_norm(last, added, engine.blocks.norm, last)


def _learned(engine: StaticEngine, n: int) -> Tensor | None:
    """What a GPT-2's places add to n new positions [R * n, C]; None where places turn queries and keys."""
    if engine.blocks.rotates:
        return None
    places = torch.arange(engine.length, engine.length + n, device=engine.pads.device) - engine.pads[:, None]
    return engine.tables[0][places.clamp_min_(0)].flatten(0, 1)


def _attend(engine: StaticEngine, index: int, qkv: Tensor, rows: int, mask: Tensor | None, causal: bool) -> Tensor:
    """What attention gives [M, C] for a layer's qkv [M, 3 C], whose keys and values go into the cache."""
    keys, values, rotates = engine.keys[index], engine.values[index], engine.blocks.rotates
    n, start, (_, heads, _, head_dim), packed = len(qkv) // rows, engine.length, keys.shape, engine.key_scales
    cos, sin = engine.tables if rotates else (keys, keys)
    queries = qkv.new_empty(rows, n, heads, head_dim)
    if packed:  # in 8 bits: these go there from what is turned
        keys, values = qkv.new_empty(2, rows, heads, n, head_dim)
    launch(
        turn,
        (rows * n,),
        *(qkv, cos, sin, engine.pads, queries, keys, values, n, start, 0 if packed else start, keys.shape[2]),
        H=heads,
        D=head_dim,
        ROTATE=rotates,
        num_warps=4,
    )
    if packed:
        keys, values = engine.keep(index, start, keys, values)
    q, k, v = queries.transpose(1, 2), keys[:, :, : start + n], values[:, :, : start + n]
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return attended.transpose(1, 2).reshape(rows * n, heads * head_dim)
