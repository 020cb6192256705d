"""From logits to the next step's embedding in one Triton kernel.

In PyTorch's operators, guidance, penalties, min-p, the draw and writing its outcome down are some forty launches over a
few tens of kilobytes: as long as a tenth of the decode step, and nearly all of it launches. Here a row is one program,
which keeps the row's logits in registers from the first operation to the last. It starts while the head still works
(see `triton_decode.py`) and has everything but the logits in registers when they come.

Top-k and top-p need no sort: the last value that stays of the k is found by counting who reaches it, a few times as a
rule, for a normal distribution tells about where it is; and of the nucleus nothing is needed but whether the id that
was drawn belongs to it. What takes time here are sums over all ids, in which all threads wait for one another.

Bytes moved, for B rows of V ids and an embedding C wide: 13 B V + 16 B C, some 110 KB for one row at full size.
"""

# Triton reads annotations and globals in its own way: names in capitals are known when a kernel is compiled.
# ruff: noqa: N803
from __future__ import annotations

from statistics import NormalDist

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from harness.pipeline import HELD_BACK
from optimizations.common.launching import can_overlap, launch
from optimizations.t3.sampling import NO_FILTERS, Filters, SamplingTensors
from optimizations.t3.token_buffers import TokenBuffers

IDS_OF_A_WARP = 1024
"""With more of them fewer threads wait for one another, and each has fewer registers for an id."""
FAR = tl.constexpr(32.0)
"""So far below the likeliest of all there is hardly anything but what is held back."""
LOWEST = tl.constexpr(-3e38)
"""Below every logit."""


@triton.jit
def _ordered(x):
    """A number as an integer in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _between(low, high, guess):
    """The guess, if it lies between the two, or else what lies half way, counted in numbers that a float can be."""
    half_way = ((_ordered(low).to(tl.int64) + _ordered(high).to(tl.int64)) >> 1).to(tl.int32)
    number = (half_way ^ ((half_way >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where((guess > low) & (guess < high), guess, number)


@triton.jit
def _top_k(x, best, place, density, k: tl.constexpr):
    """Without what is less likely than the k-th of the logits, of which `best` is the largest.

    Its value is enclosed: at least k reach `low`, fewer reach `high`. The first guess is where the value would be of a
    normal distribution, `place` deviations from the mean; the next ones reach further and further over to where it
    would be if the `density` were a normal one's, too. Once there is a guess on either side, it is where the value
    would be if logits lay evenly between the two, which soon is next to it, and each fourth time half way, which never
    takes long. Of normal logits five guesses find it.
    """
    low = best * 0 + LOWEST
    high = best
    n_low = tl.sum((x > LOWEST).to(tl.int32), axis=0)
    n_high = n_low * 0 + 1
    below = tl.where(x > best - FAR, x - best, 0.0)
    total, squares = tl.split(tl.sum(tl.join(below, below * below), axis=0))
    mean = total / n_low
    deviation = tl.sqrt(tl.maximum(squares / n_low - mean * mean, 0.0))
    guess = _between(low, high, best + mean + place * deviation)
    reach = deviation * 1.5 / density
    turn = 0
    while (n_low > k) & (guess > low) & (guess < high):
        n = tl.sum((x >= guess).to(tl.int32), axis=0)
        beyond = guess + (n - k + tl.where(n >= k, 5, -5)) * reach
        reach *= 2
        if n >= k:
            low = guess
            n_low = n
        else:
            high = guess
            n_high = n
        evenly = low + (high - low) * (n_low - k).to(tl.float32) / (n_low - n_high).to(tl.float32)
        enclosed = (low > LOWEST) & (high < best)
        guess = _between(low, high, tl.where(enclosed, tl.where(turn % 4 == 3, low, evenly), beyond))
        turn += enclosed.to(tl.int32)
    return tl.where(x >= low, x, -float("inf"))


@triton.jit
def _race(x, best, share, weight, time, spare):
    """Of the ids of a nucleus the one with the most weight by its time.

    The nucleus has no id that together with all less likely ones has no more than `spare` of `share`; the best one is
    in it. Nobody needs its bound: who wins among all has won among those of the nucleus, if it is one of them, and if
    it is not, then neither is anybody less likely.
    """
    lead = weight / time
    winner = tl.argmax(lead, axis=0)
    reached = tl.sum(tl.where(tl.arange(0, x.shape[0]) == winner, x, 0.0), axis=0)
    while (reached < best) & (tl.sum(tl.where(x <= reached, share, 0.0), axis=0) <= spare):
        lead = tl.where(x <= reached, -1.0, lead)
        winner = tl.argmax(lead, axis=0)
        reached = tl.sum(tl.where(tl.arange(0, x.shape[0]) == winner, x, 0.0), axis=0)
    return winner


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
    place,  # of a standard normal distribution what TOP_K of V exceed, as the next
    density,  # and how many of V lie there within 1
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
    best, likeliest = tl.max(x, axis=0, return_indices=True)

    share = tl.exp(x - best)  # of the likeliest id's probability
    if (TOP_K > 0 or NUCLEUS) or PENALIZE_LAST:
        x = tl.where(share < least, -float("inf"), x)
        if TOP_K > 0:
            x = _top_k(x, best, place, density, TOP_K)
        share = tl.where(x > -float("inf"), share, 0.0)
        last = x
        if PENALIZE_LAST:
            last = _penalized(x, repeated, penalty)
        weight = tl.exp(last - tl.max(last, axis=0))
        if NUCLEUS:
            fastest = _race(x, best, share, weight, time, (1 - nucleus) * tl.sum(share, axis=0))
        else:
            fastest = tl.argmax(weight / time, axis=0)
    else:
        fastest = tl.argmax(tl.where(share < least, 0.0, share) / time, axis=0)
    winner = tl.where(greedy, likeliest, fastest).to(tl.int64)

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
    normal = NormalDist()
    place = normal.inv_cdf(1 - min(max(filters.top_k, 1), n_ids - 1) / n_ids)
    block = triton.next_power_of_2(n_ids)
    launch(
        choose,
        (rows,),
        *(logits, times, buffers.seen.view(torch.uint8), buffers.held.view(torch.uint8)),
        *(settings.cfg_weight, settings.repetition_penalty, settings.temperature, settings.min_p, settings.top_p),
        *(buffers.written, position, buffers.token, buffers.tokens, buffers.finished.view(torch.uint8)),
        *(token_table, token_table if position_table is None else position_table),
        *(buffers.embeds, stop, buffers.tokens.shape[1], place, n_ids * normal.pdf(place)),
        B=rows,
        V=n_ids,
        C=width,
        V_BLOCK=block,
        C_BLOCK=triton.next_power_of_2(width),
        BACK=HELD_BACK,
        GUIDED=len(logits) == 2 * rows,
        PLACES=position_table is not None,
        TOP_K=filters.top_k,
        NUCLEUS=filters.nucleus,
        PENALIZE_LAST=filters.penalizes_last,
        COUNT=alone,
        OVERLAP=overlap,
        num_warps=min(max(block // IDS_OF_A_WARP, 4), 32),
        launch_pdl=overlap,
    )
    if not alone:
        buffers.written += 1
        position += 1
