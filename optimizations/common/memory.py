"""Memory for buffers that stay where they are, as captured work wants them, and are never in use at the same time."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


class Reused:
    """The same memory for everybody: whoever takes some undoes what others left there.

    What is largest should come first; where it comes later, what was taken before keeps the old memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._bytes = torch.zeros(0, dtype=torch.uint8, device=device)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor whose numbers are anybody's."""
        size = prod(shape) * dtype.itemsize
        if size > len(self._bytes):
            self._bytes = self._bytes.new_zeros(size)
        return self._bytes[:size].view(dtype).view(shape)
