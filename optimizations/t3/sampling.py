"""From logits to the next speech token, for a batch, without a host round trip.

Upstream runs transformers' processors on one row; these are the same formulas (repetition penalty, temperature,
min-p, top-k, top-p, in that order, or with the penalty last) written for a batch of rows, so that the same logits and
the same random numbers give the same tokens. The draw itself is the one that `torch.multinomial` makes, without the
checks for which it asks the device.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    if not sampling.penalizes_last:
        logits = penalize(logits, seen, sampling.repetition_penalty)
    if sampling.greedy:
        return logits.argmax(dim=-1, keepdim=True)
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    logits = keep_min_p(logits, sampling.min_p)
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1.0:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.penalizes_last:
        logits = penalize(logits, seen, sampling.repetition_penalty)
    return draw(torch.softmax(logits, dim=-1))


@dataclass(frozen=True)
class Filters:
    """What of a `Sampling` decides which operators there are, and so is fixed in a captured step."""

    nucleus: bool
    """Whether there is one at all (top-p below 1): it costs a sort, which most do without."""
    top_k: int
    penalizes_last: bool

    @classmethod
    def of(cls, sampling: Sampling) -> Filters:
        return cls(sampling.top_p < 1, sampling.top_k, sampling.penalizes_last)

    @property
    def none(self) -> bool:
        """Whether each token is judged by itself and by the likeliest one alone."""
        return not (self.nucleus or self.top_k or self.penalizes_last)


NO_FILTERS = Filters(nucleus=False, top_k=0, penalizes_last=False)


def sample_by(
    settings: SamplingTensors, logits: Tensor, seen: Tensor, filters: Filters, times: Tensor | None = None
) -> Tensor:
    """`sample`, by numbers that may change between replays, and by `times` [B, V] as `draw` takes them."""
    if not filters.penalizes_last:
        logits = penalize(logits, seen, settings.repetition_penalty)
    best = logits.argmax(dim=-1, keepdim=True)
    greedy = settings.temperature == 0
    logits = logits / (settings.temperature + greedy)  # by 1 where there is nothing to draw
    logits = keep_min_p(logits, settings.min_p)
    if filters.top_k:
        logits = keep_top_k(logits, filters.top_k)
    if filters.nucleus:
        logits = keep_top_p(logits, settings.top_p)
    if filters.penalizes_last:
        logits = penalize(logits, seen, settings.repetition_penalty)
    return torch.where(greedy, best, draw(torch.softmax(logits, dim=-1), times))


def draw(probabilities: Tensor, times: Tensor | None = None) -> Tensor:
    """One id [B, 1] per row of probabilities [B, V].

    A race: each id's time is exponentially distributed with its probability as the rate, and the fastest one wins
    with just that probability. `times` are those of rate 1; None draws them from PyTorch's generator.
    """
    if times is None:
        times = torch.empty_like(probabilities).exponential_()
    return (probabilities / times).argmax(dim=-1, keepdim=True)


_MIXERS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
"""SplitMix64's constants, as signed numbers."""


def times_of(seeds: Tensor, steps: Tensor, n_ids: int) -> Tensor:
    """A step's times [B, n_ids] for `draw`, float32, a function of each row's seed and step [B], int64, alone.

    So what a row draws does not depend on who else draws, nor on how often. A counter goes through SplitMix64's
    finalizer, once for seed and step and once for the ids; 24 bits of it are a uniform number.
    """
    step, first, second = _MIXERS

    def mixed(x: Tensor) -> Tensor:
        for shift, factor in ((30, first), (27, second)):
            x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
        return x ^ (x >> 31 & (1 << 33) - 1)

    rows = mixed(mixed(seeds * step) + steps * step)
    x = mixed(rows[:, None] + torch.arange(n_ids, device=seeds.device) * step)
    uniform = ((x >> 40 & (1 << 24) - 1).float() + 0.5) * 2.0**-24
    return -uniform.log()


def penalize(logits: Tensor, seen: Tensor, penalty: float | Tensor) -> Tensor:
    """Push the ids a row has produced away from being produced again."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_min_p(logits: Tensor, min_p: float | Tensor) -> Tensor:
    """Drop ids whose probability is below `min_p` times the best one's."""
    probabilities = torch.softmax(logits, dim=-1)
    best = probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < min_p * best, -torch.inf)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the `k` likeliest ids, and those as likely as the last of them."""
    last = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < last, -torch.inf)


def keep_top_p(logits: Tensor, top_p: float | Tensor) -> Tensor:
    """Keep the smallest set of ids whose probabilities add up to `top_p`; the best id always stays."""
    ascending, order = torch.sort(logits, dim=-1)
    tail = torch.softmax(ascending, dim=-1).cumsum(dim=-1) <= 1 - top_p
    tail[..., -1] = False
    return logits.masked_fill(tail.scatter(-1, order, tail), -torch.inf)
