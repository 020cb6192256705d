"""One decode step for many rows: cuBLAS multiplies, Triton kernels do what lies between.

From some twenty rows on, a product with a matrix is work for matrix units, and nobody feeds those better than cuBLAS.
What is left is the cache: at 128 rows and 350 slots it is five times as many bytes as the weights. So attention reads
the filled slots and nothing else, and everything around it is kept to few launches. Eight a layer; C is the model's
width, M the MLP's, R the rows, L the filled slots, b the bytes of a number:

    normed_sum         the sum of what came before, normalized
    product            3 C² b           queries, keys and values at once
    step_attention     2 R L C b        rotation, cache write, attention: one program for each row's head
    product            C² b
    normed_sum
    product            2 C M b          gate and up at once; a GPT-2's half as much
    silu_product                        silu(gate) * up; a GPT-2's gelu is PyTorch's
    product            C M b

A GPT-2's products add their bias themselves, its norms are centred and shifted, and nothing is rotated: what its places
add, the first sum adds.

The residual stream and all sums outside the products are float32, whatever the weights are.

Two matrices make one product only where they lie one behind the other in memory. `join` moves a layer's parameters
together, once; they stay parameters, and each has its values as before. Whether they still lie so is read off their
addresses, so that nothing has to be told when somebody casts or restores them.
"""

# ruff: noqa: N803 (a size in capitals is known when its kernel is compiled)
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from optimizations.common.launching import LOG2_E, launch
from optimizations.t3 import triton_int8
from optimizations.t3.blocks import Blocks, matrix_of
from optimizations.t3.engines import StaticEngine
from optimizations.t3.int8 import LARGEST as LARGEST_NUMBER
from optimizations.t3.int8 import Int8Linear
from optimizations.t3.triton_decode import NEVER

LARGEST = tl.constexpr(LARGEST_NUMBER)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class Loop:
    """How a program of attention goes through a row's slots: that many at once, `stages` - 1 blocks on their way."""

    slots: int
    warps: int
    stages: int


LOOP = Loop(64, 4, 3)
"""In bfloat16 32 KB of shared memory a program, so that several of them are on a multiprocessor and two blocks of each
on their way to it. Memory that gives 4.3 TB/s and answers within a microsecond wants some 35 KB, whenever one looks.
"""
LOOP_OF_8_BITS = Loop(64, 4, 4)
"""Half the bytes a block, so one more of them is on its way; of 105 registers a thread come four programs a
multiprocessor, of which 128 rows of 16 heads are four rounds, nearly."""


@triton.jit
def normed_sum(
    before,  # [R, C]
    y,  # [R, C]: what to add
    norm,  # [C]
    shift,  # [C]: not read unless CENTRED
    x,  # out: [R, C] float32: the sum; may be `before`
    h,  # out: [R, C]: its RMSNorm, or its LayerNorm if CENTRED
    epsilon,
    C: tl.constexpr,
    ADD: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """One row. Without ADD there is nothing to add, and `y` is not read."""
    k = tl.arange(0, C)
    at = tl.program_id(0) * C + k
    row = tl.load(before + at).to(tl.float32)
    gain = tl.load(norm + k).to(tl.float32)
    if ADD:
        row += tl.load(y + at).to(tl.float32)
    tl.store(x + at, row)
    if CENTRED:
        row -= tl.sum(row, axis=0) / C
    normed = row * tl.rsqrt(tl.sum(row * row, axis=0) / C + epsilon) * gain
    if CENTRED:
        normed += tl.load(shift + k).to(tl.float32)
    tl.store(h + at, normed.to(h.dtype.element_ty))


@triton.jit
def _turned(part, cos, sin, D: tl.constexpr):
    """A head's queries or keys, rotated: float32 [D]. The halves change places for the sines' part."""
    d = tl.arange(0, D)
    swapped = (d + D // 2) % D
    return tl.load(part + d).to(tl.float32) * cos + tl.load(part + swapped).to(tl.float32) * sin


@triton.jit
def _rounded(row):
    """Numbers in 8 bits and their scale, as `int8.rounded` has them."""
    scale = tl.maximum(tl.max(tl.abs(row), axis=0), TINY) / LARGEST
    return tl.floor(row / scale + 0.5).to(tl.int8), scale


@triton.jit
def step_attention(
    qkv,  # [R, 3 C]: queries, keys, values
    cos,  # [capacity, D]; not read unless ROTATE
    sin,  # [capacity, D]; its first half carries the rotation's minus
    keys,  # written at `position`: [R, H, capacity, D], as the next; int8 if SCALED
    values,
    key_scales,  # [R, H, capacity] float32: written at `position`, as the next; not read unless SCALED
    value_scales,
    position,  # [1] int64, or [R] with OWN: the slot of the new token
    pad,  # [R] int64: slots of a row that hold no token of its own
    valid,  # [R, capacity] uint8: 0 where a row's padding is
    attended,  # out: [R, C]
    queries,  # out with KEEP: [R, C] float32: as attention takes them
    capacity,
    scale,  # of the scores, which are logarithms to the base of 2
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    ROTATE: tl.constexpr,
    KEEP: tl.constexpr,
    OWN: tl.constexpr,
    SCALED: tl.constexpr,
):
    """One row's head, over BLOCK slots at a time while the next ones are on their way.

    Each of the BLOCK places in a block keeps sums and a peak of its own, over the slots that come by there, and they
    are put together behind the loop: in it, no thread waits for another's maximum. The new slot's keys and values go
    into the cache from here, and into the sums straight from the registers.
    """
    row_head = tl.program_id(0)
    r = row_head // H
    head = row_head % H
    d = tl.arange(0, D)
    end = tl.load(position + (r if OWN else 0)).to(tl.int32)
    own = qkv + r * (3 * H * D) + head * D
    if ROTATE:
        angle = tl.maximum(end - tl.load(pad + r).to(tl.int32), 0) * D + d
        c = tl.load(cos + angle).to(tl.float32)
        s = tl.load(sin + angle).to(tl.float32)
        query = _turned(own, c, s, D)
        key = _turned(own + H * D, c, s, D).to(qkv.dtype.element_ty)
    else:
        query = tl.load(own + d).to(tl.float32)
        key = tl.load(own + H * D + d)
    value = tl.load(own + 2 * H * D + d)
    row_keys = keys + row_head.to(tl.int64) * capacity * D
    row_values = values + row_head.to(tl.int64) * capacity * D
    row_key_scales = key_scales + row_head * capacity
    row_value_scales = value_scales + row_head * capacity
    if SCALED:
        key_numbers, key_scale = _rounded(key.to(tl.float32))
        value_numbers, value_scale = _rounded(value.to(tl.float32))
        tl.store(row_keys + end * D + d, key_numbers)
        tl.store(row_values + end * D + d, value_numbers)
        tl.store(row_key_scales + end, key_scale)
        tl.store(row_value_scales + end, value_scale)
    else:
        tl.store(row_keys + end * D + d, key)
        tl.store(row_values + end * D + d, value)
    if KEEP:
        tl.store(queries + row_head * D + d, query)
    query *= scale

    place = tl.arange(0, BLOCK)
    row_valid = valid + r * capacity
    peak = tl.full([BLOCK], NEVER, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, D], tl.float32)
    visible = tl.load(row_valid + place, mask=place < end, other=0)
    for start in tl.range(0, end, BLOCK, num_stages=STAGES):
        slots = start + place
        at = slots[:, None] * D + d[None, :]
        k = tl.load(row_keys + at, mask=slots[:, None] < end, other=0.0)
        v = tl.load(row_values + at, mask=slots[:, None] < end, other=0.0)
        next_visible = tl.load(row_valid + slots + BLOCK, mask=slots + BLOCK < end, other=0)
        scores = tl.sum(k.to(tl.float32) * query[None, :], axis=1)
        if SCALED:
            scores *= tl.load(row_key_scales + slots, mask=slots < end, other=0.0)
        scores = tl.where(visible != 0, scores, NEVER)
        highest = tl.maximum(peak, scores)
        fade = tl.exp2(peak - highest)
        p = tl.exp2(scores - highest)
        total = total * fade + p
        if SCALED:
            p *= tl.load(row_value_scales + slots, mask=slots < end, other=0.0)
        sums = sums * fade[:, None] + p[:, None] * v.to(tl.float32)
        peak = highest
        visible = next_visible

    newest = tl.sum(query * key.to(tl.float32), axis=0)
    highest = tl.maximum(newest, tl.max(peak, axis=0))
    share = tl.exp2(peak - highest)
    newest = tl.exp2(newest - highest)
    total_of_all = tl.sum(total * share, axis=0) + newest
    row = tl.sum(sums * share[:, None], axis=0) + newest * value.to(tl.float32)
    tl.store(attended + row_head * D + d, (row / total_of_all).to(attended.dtype.element_ty))


@triton.jit
def silu_product(
    gate_up,  # [R, 2 M]
    activated,  # out: [R, M]
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK numbers of one row, of which M is a multiple."""
    r = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + r * 2 * M + i).to(tl.float32)
    up = tl.load(gate_up + r * 2 * M + M + i).to(tl.float32)
    tl.store(activated + r * M + i, (gate / (1 + tl.exp(-gate)) * up).to(activated.dtype.element_ty))


@dataclass(frozen=True)
class Layer:
    """A layer's norms and products by what they are for, of either kind of transformer."""

    norm: Any
    qkv: tuple[Any, ...]
    out: Any
    inner_norm: Any
    inner: tuple[Any, ...]
    """Gate and up, or what gelu is for."""
    outer: Any

    @classmethod
    def of(cls, layer: Any) -> Layer:
        if isinstance(layer, GPT2Block):
            attention, net = layer.attn, layer.mlp
            return cls(layer.ln_1, (attention.c_attn,), attention.c_proj, layer.ln_2, (net.c_fc,), net.c_proj)
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            norm=layer.input_layernorm,
            qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
            out=attention.o_proj,
            inner_norm=layer.post_attention_layernorm,
            inner=(mlp.gate_proj, mlp.up_proj),
            outer=mlp.down_proj,
        )


def step(engine: StaticEngine, embeds: Tensor, extent: int, loop: Loop | None = None) -> Tensor:
    """One more position [R, 1, C] at the slot `position` -> hidden [R, C], as `StaticEngine.static_step`.

    Takes transformers that `triton_engine.unsupported` has nothing against, with plain weights. `extent` matters to the
    watched heads' rows alone. Parameters that lie apart are joined: run the first step, capture a later one.
    """
    if join(engine.blocks):
        engine.moves += 1
    before = embeds[:, 0].contiguous()
    queries, y = torch.empty_like(before, dtype=torch.float32), None
    if not engine.blocks.rotates:
        y = engine.tables[0][(engine.position - engine.pads).clamp_min(0)]
    engine.rows = [torch.empty(0)] * len(engine.heads)

    def attended(index: int, qkv: Tensor) -> Tensor:
        seen = attend(engine, index, qkv, queries, loop)
        for place, (watched, head) in enumerate(engine.heads):
            if watched == index:
                engine.rows[place] = engine.watched_row(queries, index, head, extent)
        return seen

    x, y = through_layers(engine.blocks, before, y, attended)
    return add_norm(x, y, engine.blocks.norm, x)


def through_layers(
    blocks: Blocks, before: Tensor, y: Tensor | None, attend: Callable[[int, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """before + y [M, C] through all layers: the stream [M, C], float32, and what the last layer would add to it.

    `attend` gives what attention gives [M, C] for a layer's number and its qkv [M, 3 C].
    """
    x = torch.empty_like(before, dtype=torch.float32)
    for index, layer in enumerate(map(Layer.of, blocks.layers)):
        h = add_norm(before, y, layer.norm, x)
        h = add_norm(x, product(attend(index, product(h, *layer.qkv)), layer.out), layer.inner_norm, x)
        inner = product(h, *layer.inner)
        y = product(gated(inner) if len(layer.inner) == 2 else F.gelu(inner, approximate="tanh"), layer.outer)
        before = x
    assert y is not None, "there are layers"
    return x, y


# -- one launch each ---------------------------------------------------------------------------------------------------


def product(h: Tensor, *products: Any) -> Tensor:
    """What the products make of h [R, C], side by side: [R, sum of their outputs]."""
    first, *others = products
    if isinstance(first, Int8Linear):
        together = triton_int8.fits(h)
        return triton_int8.product(h, *products) if together else torch.cat([linear(h) for linear in products], dim=1)
    if first.bias is not None:
        return torch.addmm(first.bias, h, matrix_of(first).T)
    return h @ (joined([linear.weight for linear in products]) if others else first.weight).T


def add_norm(before: Tensor, y: Tensor | None, norm: Any, x: Tensor) -> Tensor:
    """The norm [R, C], in the weights' dtype, of before + y, which is left in `x` [R, C], float32."""
    rows, width = x.shape
    h, centred = norm.weight.new_empty(rows, width), isinstance(norm, nn.LayerNorm)
    shift, epsilon = (norm.bias, norm.eps) if centred else (norm.weight, norm.variance_epsilon)
    args = before, before if y is None else y, norm.weight, shift, x, h, epsilon
    launch(normed_sum, (rows,), *args, C=width, ADD=y is not None, CENTRED=centred, num_warps=4)
    return h


def attend(engine: StaticEngine, index: int, qkv: Tensor, queries: Tensor, loop: Loop | None = None) -> Tensor:
    """What attention gives [R, C] for a layer's qkv [R, 3 C], whose keys and values go into the cache.

    Where a head of the layer is watched, its rotated queries are left in `queries` [R, C], float32.
    """
    keys, values, rotates, scaled = engine.keys[index], engine.values[index], engine.blocks.rotates, engine.key_scales
    cos, sin = engine.tables if rotates else (keys, keys)
    rows, heads, _, head_dim = keys.shape
    attended = qkv.new_empty(rows, heads * head_dim)
    scales = (engine.key_scales[index], engine.value_scales[index]) if scaled else (keys, values)
    loop = loop or (LOOP_OF_8_BITS if scaled else LOOP)
    launch(
        step_attention,
        (rows * heads,),
        *(qkv, cos, sin, keys, values, *scales, engine.position, engine.pads),
        *(engine.valid_slots.view(torch.uint8), attended, queries, engine.capacity, head_dim**-0.5 * LOG2_E),
        H=heads,
        D=head_dim,
        BLOCK=loop.slots,
        STAGES=loop.stages,
        ROTATE=rotates,
        KEEP=any(watched == index for watched, _ in engine.heads),
        OWN=len(engine.position) > 1,
        SCALED=bool(scaled),
        num_warps=loop.warps,
    )
    return attended


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up [R, M] of [R, 2 M], gate first; M is a power of two."""
    rows, inner = len(gate_up), gate_up.shape[1] // 2
    activated = gate_up.new_empty(rows, inner)
    block = min(inner, 1024)
    launch(silu_product, (rows, inner // block), gate_up, activated, M=inner, BLOCK=block, num_warps=4)
    return activated


# -- parameters that lie together --------------------------------------------------------------------------------------


def join(blocks: Blocks) -> bool:
    """Have the matrices of one product lie one behind the other, in all layers; whether any had to move.

    Whoever recorded their addresses has to start again then. Nothing is held twice: the old memory of a product's
    parameters is free as soon as the new one has their values.
    """
    apart = [weights for weights in _products(blocks) if not _together(weights)]
    for weights in apart:
        _move_together(weights)
    return bool(apart)


def joined(weights: Sequence[Tensor]) -> Tensor:
    """Matrices [n, C] that lie one behind the other, as one [sum of n, C] over the same memory."""
    first = weights[0].data
    return first.as_strided((sum(map(len, weights)), first.shape[1]), first.stride())


def _products(blocks: Blocks) -> Iterator[list[nn.Parameter]]:
    for layer in map(Layer.of, blocks.layers):
        for products in (layer.qkv, layer.inner):
            if len(products) > 1:
                yield [linear.weight for linear in products]


def _together(weights: list[nn.Parameter]) -> bool:
    """Whether matrices lie one behind the other in the same piece of memory."""
    storage, at = weights[0].untyped_storage().data_ptr(), weights[0].data_ptr()
    for weight in weights:
        if weight.untyped_storage().data_ptr() != storage or weight.data_ptr() != at or not weight.is_contiguous():
            return False
        at += weight.nbytes
    return True


def _move_together(weights: list[nn.Parameter]) -> None:
    """Give matrices new memory in which they lie one behind the other."""
    # A parameter that takes over an inference tensor becomes one, and nothing could be trained through it any more.
    with torch.inference_mode(weights[0].is_inference()), torch.no_grad():
        whole = torch.cat([weight.data for weight in weights])
        for weight, part in zip(weights, whole.split([len(weight) for weight in weights]), strict=True):
            weight.data = part
