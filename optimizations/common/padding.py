"""Lengths in whole buckets, so that few shapes occur, and which positions count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def padded_length(length: int, bucket: int) -> int:
    """`length` rounded up to whole buckets."""
    return -(-length // bucket) * bucket


def within(lengths: Tensor, longest: int) -> Tensor:
    """[B, longest], true within each row's length."""
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


def power_of_two(n: int) -> int:
    """The smallest one that `n` rows fit into."""
    return 1 << (n - 1).bit_length()


def filled(rows: list[Any]) -> list[Any]:
    """The rows, and the last one again up to a power of two.

    >>> filled([1, 2, 3])
    [1, 2, 3, 3]
    """
    return rows + [rows[-1]] * (power_of_two(len(rows)) - len(rows))
