"""From logits to the next speech token, for a batch, without a host round trip.

Upstream runs transformers' processors on one row; these are the same formulas (repetition penalty, temperature,
min-p, top-p, in that order) written for a batch of rows, so that the same logits and the same random numbers give
the same tokens. The draw itself is the one that `torch.multinomial` makes, without the checks for which it asks the
device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.sampling import Sampling


class SamplingTensors:
    """`Sampling` as numbers [1] on the device, which a captured step reads anew in every replay."""

    def __init__(self, device: torch.device) -> None:
        self.cfg_weight, self.repetition_penalty, self.temperature, self.min_p, self.top_p = torch.ones(
            5, 1, device=device
        )

    def set(self, sampling: Sampling) -> None:
        """Have all steps from now on sample like this."""
        for name, setting in vars(self).items():
            setting.fill_(getattr(sampling, name))


def guide(logits: Tensor, cfg_weight: float | Tensor, sides: int = 2) -> Tensor:
    """Classifier-free guidance: [2B, V] (conditional rows, then unconditional ones) -> [B, V].

    Of one side there is nothing to guide: [B, V] stays.
    """
    if sides == 1:
        return logits
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
    return draw(torch.softmax(logits, dim=-1))


def sample_by(settings: SamplingTensors, logits: Tensor, seen: Tensor, nucleus: bool) -> Tensor:
    """`sample`, by numbers that may change between replays.

    Only whether there is a nucleus at all (top-p below 1) is fixed: it costs a sort, which most do without.
    """
    logits = penalize(logits, seen, settings.repetition_penalty)
    greedy = settings.temperature == 0
    logits = logits / (settings.temperature + greedy)  # by 1 where there is nothing to draw
    logits = keep_min_p(logits, settings.min_p)
    if nucleus:
        logits = keep_top_p(logits, settings.top_p)
    return torch.where(greedy, logits.argmax(dim=-1, keepdim=True), draw(torch.softmax(logits, dim=-1)))


def draw(probabilities: Tensor) -> Tensor:
    """One id [B, 1] per row of probabilities [B, V].

    A race: each id's time is exponentially distributed with its probability as the rate, and the fastest one wins
    with just that probability.
    """
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1, keepdim=True)


def penalize(logits: Tensor, seen: Tensor, penalty: float | Tensor) -> Tensor:
    """Push the ids a row has produced away from being produced again."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_min_p(logits: Tensor, min_p: float | Tensor) -> Tensor:
    """Drop ids whose probability is below `min_p` times the best one's."""
    probabilities = torch.softmax(logits, dim=-1)
    best = probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < min_p * best, -torch.inf)


def keep_top_p(logits: Tensor, top_p: float | Tensor) -> Tensor:
    """Keep the smallest set of ids whose probabilities add up to `top_p`; the best id always stays."""
    ascending, order = torch.sort(logits, dim=-1)
    tail = torch.softmax(ascending, dim=-1).cumsum(dim=-1) <= 1 - top_p
    tail[..., -1] = False
    return logits.masked_fill(tail.scatter(-1, order, tail), -torch.inf)
