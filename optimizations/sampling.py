"""From logits to the next speech token, for a batch, without a host round trip.

Upstream runs transformers' processors on one row; these are the same formulas (repetition penalty, temperature,
min-p, top-p, in that order) written for a batch of rows, so that the same logits and the same random numbers give
the same tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.pipeline import Sampling


def guide(logits: Tensor, cfg_weight: float) -> Tensor:
    """Classifier-free guidance: [2B, V] (conditional rows, then unconditional ones) -> [B, V]."""
    conditional, unconditional = logits.chunk(2)
    return conditional + cfg_weight * (conditional - unconditional)


def sample(logits: Tensor, seen: Tensor, sampling: Sampling) -> Tensor:
    """One token per row.

    Args:
        logits: guided logits [B, V], float32.
        seen: which ids each row has produced so far, bool [B, V].
        sampling: temperature 0 means greedy.

    Returns:
        ids [B, 1], int64.
    """
    logits = penalize(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    logits = keep_min_p(logits, sampling.min_p)
    if sampling.top_p < 1.0:
        logits = keep_top_p(logits, sampling.top_p)
    return torch.multinomial(torch.softmax(logits, dim=-1), num_samples=1)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Push the ids a row has produced away from being produced again."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Drop ids whose probability is below `min_p` times the best one's."""
    probabilities = torch.softmax(logits, dim=-1)
    best = probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < min_p * best, -torch.inf)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of ids whose probabilities add up to `top_p`; the best id always stays."""
    ascending, order = torch.sort(logits, dim=-1)
    tail = torch.softmax(ascending, dim=-1).cumsum(dim=-1) <= 1 - top_p
    tail[..., -1] = False
    return logits.masked_fill(tail.scatter(-1, order, tail), -torch.inf)
