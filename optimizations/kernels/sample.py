"""Sampling in one kernel: what `sampling.sample_by` launches two dozen for, each over a few kilobytes."""

# ruff: noqa: N803 (a size in capitals is known when its kernel is compiled)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimizations import sampling
from optimizations.sampling import Dials

WARPS = 16


@triton.jit
def sample_token(
    logits,  # [B, V] float32, after guidance
    seen,  # [B, V] uint8: 1 for ids that the row has produced
    noise,  # [B, V] float32: exponentially distributed
    token,  # out: [B] int64
    penalty,  # [1] float32, as the next two
    temperature,
    min_p,
    V,
    BLOCK: tl.constexpr,
):
    """One row: repetition penalty, temperature, min-p, and the race of `sampling.draw`.

    Only who wins counts, so probabilities stay logarithms and need no sum: p / noise is largest where log p - log noise
    is, and p against the best one's is exp of a difference.
    """
    r = tl.program_id(0)
    ids = tl.arange(0, BLOCK)
    inside = ids < V
    x = tl.load(logits + r * V + ids, mask=inside, other=float("-inf"))
    known = tl.load(seen + r * V + ids, mask=inside, other=0) != 0
    rival = tl.load(noise + r * V + ids, mask=inside, other=1.0)
    factor = tl.load(penalty)
    x = tl.where(known, tl.where(x < 0, x * factor, x / factor), x)
    degrees = tl.load(temperature)
    x = x / tl.where(degrees == 0, 1.0, degrees)
    kept = tl.exp(x - tl.max(x, axis=0)) >= tl.load(min_p)
    drawn = tl.where(kept, x - tl.log(rival), float("-inf"))
    winner = tl.argmax(tl.where(degrees == 0, x, drawn), axis=0)
    tl.store(token + r, winner.to(tl.int64))


def sample_by(dials: Dials, logits: Tensor, seen: Tensor, nucleus: bool) -> Tensor:
    """As `sampling.sample_by`, with the same random numbers; a nucleus needs a sort and goes through PyTorch."""
    if nucleus:
        return sampling.sample_by(dials, logits, seen, nucleus)
    rows, n_ids = logits.shape
    noise = torch.empty_like(logits).exponential_()
    token = torch.empty(rows, 1, dtype=torch.long, device=logits.device)
    sample_token[(rows,)](
        logits.contiguous(),
        seen.view(torch.uint8),
        noise,
        token,
        dials.repetition_penalty,
        dials.temperature,
        dials.min_p,
        n_ids,
        BLOCK=triton.next_power_of_2(n_ids),
        num_warps=WARPS,
    )
    return token
