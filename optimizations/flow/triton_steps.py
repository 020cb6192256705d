"""The solver's steps in the flat estimator's own layout.

Upstream's solver hands the estimator a mel, the encoder's, the speaker and the prompt in each step, and gets a velocity
back. That is some forty small kernels around the estimator's layers, which embed the time, join and turn the inputs,
and put both sides of guidance together. Here a step's inputs stay where they are: all that changes of them is the mel
on its way, which the last kernel of a step writes for the next one; and what times add in each ResNet is worked out
for all steps at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
import triton
from torch import Tensor

from optimizations.common.launching import launch
from optimizations.common.memory import Reused
from optimizations.flow import triton_kernels
from optimizations.flow.estimator import Product

ROWS, DEPTH = 16, 64
"""Frames of a program, and inputs at a time: few frames, so that there are some programs for one utterance, too."""


class Layers(Protocol):
    """What the steps ask of a `TritonEstimator`."""

    time_sizes: list[int]
    out: Product
    overlap: bool
    n_calls: int

    @property
    def half(self) -> Tensor: ...

    @property
    def n_inputs(self) -> int: ...

    def time_shares(self, t: Tensor, r: Tensor | None) -> Tensor: ...

    def by_resnet(self, shares: Tensor) -> tuple[Tensor, ...]: ...

    def through(self, frames: Tensor, lengths: Tensor, times: tuple[Tensor, ...]) -> Tensor: ...


@dataclass
class TritonSteps:
    """What the steps read and write, B rows of T frames on one or two sides."""

    estimator: Layers
    x: Tensor  # [B, 80, T] float32: the mel on its way from noise
    frames: Tensor  # [sides, B, T, inputs], half: mel, the encoder's mel, speaker, prompt
    lengths: Tensor  # [sides, B] int32
    share: Tensor  # [1, all ResNets' channels] float32: what the step's time adds in them
    span: Tensor  # [1] float32: until the next step's time
    times: Tensor  # [steps + 1]: the schedule of which the next two are
    shares: Tensor  # [steps, all ResNets' channels]
    spans: Tensor  # [steps]

    @classmethod
    def blank(cls, estimator: Layers, rows: int, sides: int, frames: int, memory: Reused) -> TritonSteps:
        """What is large of it lies in `memory`: rows are taken and gone through one lot at a time."""
        half, n_mels = estimator.half, estimator.out.weight.shape[0]
        of_x, of_frames = (rows, n_mels, frames), (sides, rows, frames, estimator.n_inputs)
        n_bytes = prod(of_x) * torch.float32.itemsize
        both = memory.take((n_bytes + prod(of_frames) * half.itemsize,), torch.uint8)
        nothing = torch.zeros(0, device=half.device)
        return cls(
            estimator=estimator,
            x=both[:n_bytes].view(torch.float32).view(of_x),
            frames=both[n_bytes:].view(half.dtype).view(of_frames),
            lengths=torch.zeros(sides, rows, dtype=torch.int32, device=half.device),
            share=nothing.new_zeros(1, sum(estimator.time_sizes)),
            span=nothing.new_zeros(1),
            times=nothing,
            shares=nothing,
            spans=nothing,
        )

    def begin(self, noise: Tensor, mask: Tensor, mu: Tensor, speaker: Tensor, prompt: Tensor, times: Tensor) -> None:
        """As `layer_steps.Steps`. What a schedule's times add is worked out when it comes for the first time."""
        (_, n_mels, n), guided = mu.shape, self.frames[0]
        self.x[..., n:] = 0
        self.x[..., :n] = noise
        self.frames.zero_()
        self.frames[:, :, :n, :n_mels] = noise.transpose(1, 2)
        guided[:, :n, n_mels : 2 * n_mels] = mu.transpose(1, 2)
        guided[:, :, 2 * n_mels : -n_mels] = speaker[:, None]
        guided[:, :n, -n_mels:] = prompt.transpose(1, 2)
        self.lengths.copy_(mask[:, 0].sum(dim=-1))
        if times is not self.times:
            self.times, self.spans = times, times.diff().float()
            self.shares = self.estimator.time_shares(times[:-1].float(), times[1:].float())

    def come_to(self, index: int) -> None:
        self.share.copy_(self.shares[index : index + 1])
        self.span.copy_(self.spans[index : index + 1])

    def step(self, rate: float) -> None:
        estimator = self.estimator
        estimator.n_calls += 1
        sides, rows, length, n_inputs = self.frames.shape
        times = estimator.by_resnet(self.share.expand(sides * rows, -1))
        hidden = estimator.through(self.frames.flatten(0, 1), self.lengths.flatten(), times)
        weight, bias = estimator.out.weight.flatten(1), estimator.out.bias
        n_mels = self.x.shape[1]
        launch(
            triton_kernels.euler_step,
            (rows * triton.cdiv(length, ROWS),),
            *(hidden, weight, bias, self.span, self.x, self.frames, length, rate, rows),
            N=n_mels,
            C=weight.shape[1],
            IN=n_inputs,
            GUIDED=sides == 2,
            OUTPUTS=triton.next_power_of_2(n_mels),
            ROWS=ROWS,
            DEPTH=min(DEPTH, weight.shape[1]),
            PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
            OVERLAP=estimator.overlap,
            num_warps=4,
            launch_pdl=estimator.overlap,
        )
