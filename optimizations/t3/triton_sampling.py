"""From logits to the next step's embedding in one Triton kernel.

In PyTorch's operators, guidance, penalties, min-p, the draw and writing its outcome down are some forty launches over a
few tens of kilobytes: as long as a tenth of the decode step, and nearly all of it launches. Here a row is one program,
which keeps the row's logits in registers from the first operation to the last. It starts while the head still works
(see `triton_decode.py`) and has everything but the logits in registers when they come.

Top-k and top-p need no sort: the last value that stays is found two bits at a time, by counting the ids, or adding up
the probabilities, on either side of the three values in question.

Bytes moved, for B rows of V ids and an embedding C wide: 13 B V + 16 B C, some 110 KB for one row at full size.
"""

# Triton reads annotations and globals in its own way: names in capitals are known when a kernel is compiled.
# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from harness.pipeline import HELD_BACK
from optimizations.common.launching import can_overlap, launch
from optimizations.t3.sampling import NO_FILTERS, Filters, SamplingTensors
from optimizations.t3.token_buffers import TokenBuffers

WARPS = 16


@triton.jit
def _ordered(x):
    """Numbers as integers without a sign, in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _sums(a, b, c):
    """Three at once: what takes time is the threads' waiting for one another."""
    first, last = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, c)), axis=0))
    a, b = tl.split(first)
    c, _ = tl.split(last)
    return a, b, c


@triton.jit
def _top_k(x, k: tl.constexpr):
    """Without what is less likely than the k-th of the logits; its value is found two bits at a time."""
    order = _ordered(x)
    lowest = tl.full([], 0, tl.uint32)
    unit = tl.full([], 1 << 30, tl.uint32)
    for _ in tl.range(0, 16):
        first, second, third = _sums(
            (order >= lowest + unit).to(tl.int32),
            (order >= lowest + 2 * unit).to(tl.int32),
            (order >= lowest + 3 * unit).to(tl.int32),
        )
        lowest += unit * ((first >= k).to(tl.uint32) + (second >= k).to(tl.uint32) + (third >= k).to(tl.uint32))
        unit = unit >> 2
    return tl.where(order >= lowest, x, -float("inf"))


@triton.jit
def _top_p(x, top_p):
    """Without the least likely ids that together have no more than 1 - top_p; the best one stays."""
    order = _ordered(x)
    share = tl.exp(x - tl.max(x, axis=0))
    spare = (1 - top_p) * tl.sum(share, axis=0)
    lowest = tl.full([], 0, tl.uint32)
    unit = tl.full([], 1 << 30, tl.uint32)
    for _ in tl.range(0, 16):
        first, second, third = _sums(
            tl.where(order < lowest + unit, share, 0.0),
            tl.where(order < lowest + 2 * unit, share, 0.0),
            tl.where(order < lowest + 3 * unit, share, 0.0),
        )
        stay = (first <= spare).to(tl.uint32) + (second <= spare).to(tl.uint32) + (third <= spare).to(tl.uint32)
        lowest += unit * stay
        unit = unit >> 2
    return tl.where(order >= tl.minimum(lowest, tl.max(order, axis=0)), x, -float("inf"))


@triton.jit
def _penalized(x, repeated, penalty):
    return tl.where(repeated, tl.where(x < 0, x * penalty, x / penalty), x)


@triton.jit
def choose(
    logits,  # [2 B, V] float32: conditional rows, then unconditional ones; [B, V] unless GUIDED
    times,  # [B, V] float32: exponentially distributed
    seen,  # in and out: [B, V] uint8
    held,  # [V] uint8
    cfg_weight,  # [1] float32, as the next four
    repetition_penalty,
    temperature,
    min_p,
    top_p,
    written,  # in and, with COUNT, out: [1] int64: tokens so far
    position,  # in and out with COUNT: [1] int64: the slot of the newest token
    token,  # out: [B] int64
    tokens,  # out: [B, limit] int64, at `written`
    finished,  # in and out: [B] uint8
    token_table,  # [V, C]
    position_table,  # [positions, C]; not read without PLACES
    embeds,  # out: [2 B, C]; [B, C] unless GUIDED
    stop,
    limit,
    B: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    V_BLOCK: tl.constexpr,
    C_BLOCK: tl.constexpr,
    BACK: tl.constexpr,
    GUIDED: tl.constexpr,
    PLACES: tl.constexpr,
    TOP_K: tl.constexpr,
    NUCLEUS: tl.constexpr,
    PENALIZE_LAST: tl.constexpr,
    COUNT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row: `sampling.sample_by`, and what is written down after it."""
    b = tl.program_id(0)
    ids = tl.arange(0, V_BLOCK)
    inside = ids < V
    held_back = tl.load(held + ids, mask=inside, other=0) != 0
    repeated = tl.load(seen + b * V + ids, mask=inside, other=0) != 0
    time = tl.load(times + b * V + ids, mask=inside, other=1.0)
    weight = tl.load(cfg_weight)
    penalty = tl.load(repetition_penalty)
    heat = tl.load(temperature)
    least = tl.load(min_p)
    nucleus = tl.load(top_p)
    column = tl.load(written)
    ended = tl.load(finished + b)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(logits + b * V + ids, mask=inside, other=0.0)
    if GUIDED:
        unconditional = tl.load(logits + (B + b) * V + ids, mask=inside, other=0.0)
        x = x + weight * (x - unconditional)
    x = tl.where(held_back, BACK, x)
    if not PENALIZE_LAST:
        x = _penalized(x, repeated, penalty)
    greedy = heat == 0
    x = tl.where(inside, x / tl.where(greedy, 1.0, heat), -float("inf"))
    likeliest = tl.argmax(x, axis=0)

    share = tl.exp(x - tl.max(x, axis=0))  # of the likeliest id's probability
    if (TOP_K > 0 or NUCLEUS) or PENALIZE_LAST:
        x = tl.where(share < least, -float("inf"), x)
        if TOP_K > 0:
            x = _top_k(x, TOP_K)
        if NUCLEUS:
            x = _top_p(x, nucleus)
        if PENALIZE_LAST:
            x = _penalized(x, repeated, penalty)
        share = tl.exp(x - tl.max(x, axis=0))
    else:
        share = tl.where(share < least, 0.0, share)
    winner = tl.where(greedy, likeliest, tl.argmax(share / time, axis=0)).to(tl.int64)

    tl.store(token + b, winner)
    tl.store(tokens + b * limit + column, winner)
    tl.store(seen + b * V + winner, 1)
    tl.store(finished + b, tl.where(winner == stop, 1, ended))
    if COUNT:
        tl.store(written, column + 1)
        tl.store(position, tl.load(position) + 1)

    k = tl.arange(0, C_BLOCK)
    wide = k < C
    identity = tl.load(token_table + winner * C + k, mask=wide, other=0.0)
    if PLACES:
        identity += tl.load(position_table + (column + 1) * C + k, mask=wide, other=0.0)
    tl.store(embeds + b * C + k, identity, mask=wide)
    if GUIDED:
        tl.store(embeds + (B + b) * C + k, identity, mask=wide)


def choose_tokens(
    logits: Tensor,
    times: Tensor,
    settings: SamplingTensors,
    buffers: TokenBuffers,
    position: Tensor,
    token_table: Tensor,
    position_table: Tensor | None,
    stop: int,
    filters: Filters = NO_FILTERS,
) -> None:
    """Sample a token for every row from logits, float32, and write it and its embedding into the buffers.

    The logits are [2 B, V] or, without guidance, [B, V]. `times` [B, V] are exponentially distributed; drawn before the
    step, they are no part of what the head's last sums have to wait for. `position` [1], int64, moves on by one, as the
    number of tokens does.
    """
    rows, n_ids = buffers.seen.shape
    width = token_table.shape[1]
    alone = rows == 1  # several programs would count for one another
    overlap = can_overlap(logits.device)
    launch(
        choose,
        (rows,),
        *(logits, times, buffers.seen.view(torch.uint8), buffers.held.view(torch.uint8)),
        *(settings.cfg_weight, settings.repetition_penalty, settings.temperature, settings.min_p, settings.top_p),
        *(buffers.written, position, buffers.token, buffers.tokens, buffers.finished.view(torch.uint8)),
        *(token_table, token_table if position_table is None else position_table),
        *(buffers.embeds, stop, buffers.tokens.shape[1]),
        B=rows,
        V=n_ids,
        C=width,
        V_BLOCK=triton.next_power_of_2(n_ids),
        C_BLOCK=triton.next_power_of_2(width),
        BACK=HELD_BACK,
        GUIDED=len(logits) == 2 * rows,
        PLACES=position_table is not None,
        TOP_K=filters.top_k,
        NUCLEUS=filters.nucleus,
        PENALIZE_LAST=filters.penalizes_last,
        COUNT=alone,
        OVERLAP=overlap,
        num_warps=WARPS,
        launch_pdl=overlap,
    )
    if not alone:
        buffers.written += 1
        position += 1
