"""Lengths in whole buckets, so that few shapes occur, and which positions count."""

from __future__ import annotations

import torch
from torch import Tensor


def padded_length(length: int, bucket: int) -> int:
    """`length` rounded up to whole buckets."""
    return -(-length // bucket) * bucket


def within(lengths: Tensor, longest: int) -> Tensor:
    """[B, longest], true within each row's length."""
    return torch.arange(longest, device=lengths.device) < lengths[:, None]
