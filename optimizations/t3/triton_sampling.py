"""From logits to the next step's embedding in one Triton kernel.

In PyTorch's operators, guidance, penalties, min-p, the draw and writing its outcome down are some forty launches over a
few tens of kilobytes: as long as a tenth of the decode step, and nearly all of it launches. Here a row is one program,
which keeps the row's logits in registers from the first operation to the last. It starts while the head still works
(see `triton_decode.py`) and has everything but the logits in registers when they come.

Bytes moved, for B rows of V ids and an embedding C wide: 13 B V + 16 B C, some 110 KB for one row at full size.
"""

# Triton reads annotations and globals in its own way: names in capitals are known when a kernel is compiled.
# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from harness.pipeline import HELD_BACK
from optimizations.common.launching import can_overlap, launch
from optimizations.t3.sampling import SamplingTensors
from optimizations.t3.token_buffers import TokenBuffers


@triton.jit
def choose(
    logits,  # [2 B, V] float32: conditional rows, then unconditional ones; [B, V] unless GUIDED
    times,  # [B, V] float32: exponentially distributed
    seen,  # in and out: [B, V] uint8
    held,  # [V] uint8
    cfg_weight,  # [1] float32, as the next three
    repetition_penalty,
    temperature,
    min_p,
    written,  # in and, with COUNT, out: [1] int64: tokens so far
    position,  # in and out with COUNT: [1] int64: the slot of the newest token
    token,  # out: [B] int64
    tokens,  # out: [B, limit] int64, at `written`
    finished,  # in and out: [B] uint8
    token_table,  # [V, C]
    position_table,  # [positions, C]
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
    COUNT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row: `sampling.sample_by` without a nucleus, and what is written down after it."""
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
    column = tl.load(written)
    ended = tl.load(finished + b)
    if OVERLAP:
        gdc_wait()
    x = tl.load(logits + b * V + ids, mask=inside, other=0.0)
    if GUIDED:
        unconditional = tl.load(logits + (B + b) * V + ids, mask=inside, other=0.0)
        x = x + weight * (x - unconditional)
    x = tl.where(held_back, BACK, x)
    x = tl.where(repeated, tl.where(x < 0, x * penalty, x / penalty), x)
    greedy = heat == 0
    x = tl.where(inside, x / tl.where(greedy, 1.0, heat), -float("inf"))

    share = tl.exp(x - tl.max(x, axis=0))  # of the likeliest id's probability
    share = tl.where(share < least, 0.0, share)
    speed = share / time
    winner = tl.where(greedy, tl.argmax(x, axis=0), tl.argmax(speed, axis=0)).to(tl.int64)

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
    place = tl.load(position_table + (column + 1) * C + k, mask=wide, other=0.0)
    tl.store(embeds + b * C + k, identity + place, mask=wide)
    if GUIDED:
        tl.store(embeds + (B + b) * C + k, identity + place, mask=wide)


def choose_tokens(
    logits: Tensor,
    times: Tensor,
    settings: SamplingTensors,
    buffers: TokenBuffers,
    position: Tensor,
    token_table: Tensor,
    position_table: Tensor,
    stop: int,
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
        *(settings.cfg_weight, settings.repetition_penalty, settings.temperature, settings.min_p),
        *(buffers.written, position, buffers.token, buffers.tokens, buffers.finished.view(torch.uint8)),
        *(token_table, position_table, buffers.embeds, stop, buffers.tokens.shape[1]),
        B=rows,
        V=n_ids,
        C=width,
        V_BLOCK=triton.next_power_of_2(n_ids),
        C_BLOCK=triton.next_power_of_2(width),
        BACK=HELD_BACK,
        GUIDED=len(logits) == 2 * rows,
        COUNT=alone,
        OVERLAP=overlap,
        num_warps=16,
        launch_pdl=overlap,
    )
    if not alone:
        buffers.written += 1
        position += 1
