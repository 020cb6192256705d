"""What the flow's solver goes on from step to step with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from optimizations.common.memory import Reused


@dataclass
class State:
    """What a step of the solver reads and writes, for B rows of T frames on one or, with guidance, two sides."""

    x: Tensor  # [B, 80, T]: the mel on its way from noise
    time: Tensor  # [1]
    until: Tensor  # [1]: the next step's time
    mask: Tensor  # [sides B, 1, T]: 1 within a row
    mu: Tensor  # [sides B, 80, T]: the encoder's mel; zero on the unguided side, like the next two
    speaker: Tensor  # [sides B, 80]
    prompt: Tensor  # [sides B, 80, T]
    visible: Tensor  # [sides B, 1, T]: the mask as truth values
    bounds: Tensor  # [2 sides B + 1]: where the pieces of packed attention begin and end

    @classmethod
    def blank(
        cls, rows: int, sides: int, n_mels: int, n_speaker: int, frames: int, like: Tensor, memory: Reused
    ) -> State:
        """What is large of it lies in `memory`: states are filled and gone through one at a time."""
        total = sides * rows
        mels = memory.take((rows + 2 * total, n_mels, frames), like.dtype).split([rows, total, total])
        return cls(
            x=mels[0],
            time=like.new_zeros(1),
            until=like.new_zeros(1),
            mask=like.new_zeros(total, 1, frames),
            mu=mels[1],
            speaker=like.new_zeros(total, n_speaker),
            prompt=mels[2],
            visible=torch.zeros(total, 1, frames, dtype=torch.bool, device=like.device),
            bounds=torch.zeros(2 * total + 1, dtype=torch.int32, device=like.device),
        )

    @property
    def sides(self) -> int:
        return len(self.mask) // len(self.x)

    def fill(self, noise: Tensor, mask: Tensor, mu: Tensor, speaker: Tensor, prompt: Tensor) -> None:
        """Begin: rows of up to T frames; what is behind them is zero."""
        rows, _, frames = self.x.shape
        behind = (0, frames - mu.shape[2])
        self.x.copy_(F.pad(noise, behind))
        self.mask.copy_(F.pad(mask, behind).repeat(self.sides, 1, 1))
        self.mu[:rows] = F.pad(mu, behind)
        self.speaker[:rows] = speaker
        self.prompt[:rows] = F.pad(prompt, behind)
        self.mu[rows:] = 0
        self.prompt[rows:] = 0
        self.visible.copy_(self.mask)
        total = len(self.mask)
        starts = frames * torch.arange(total, device=mu.device)
        ends = starts + self.visible[:, 0].sum(dim=1)
        self.bounds[:-1] = torch.stack((starts, ends), dim=1).flatten()
        self.bounds[-1] = total * frames


class Steps(Protocol):
    """Steps over a state that an estimator takes in its own way."""

    shares: Tensor
    """What `begin` gave of the step at hand, [1, ...]."""
    span: Tensor
    """From the time of the step at hand to the next one's, [1]."""

    def begin(self, times: Tensor) -> Tensor:
        """Take the state as it was filled, for steps between the times [n + 1] -> what they share, [n, ...]."""
        ...

    def step(self, rate: float) -> None:
        """One Euler step, guided at that rate if the state has two sides; it can be captured."""
        ...
