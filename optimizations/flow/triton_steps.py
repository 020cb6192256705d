"""The solver's steps in the flat estimator's own layout.

Upstream's solver hands the estimator a mel, the encoder's, the speaker and the prompt in each step, and gets a velocity
back. That is some forty small kernels around the estimator's layers, which embed the time, join and turn the inputs,
and put both sides of guidance together. Here a step's inputs stay where they are: all that changes of them is the mel
on its way, which the last kernel of a step writes for the next one; and what times add in each ResNet is worked out
for all steps at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import triton
from torch import Tensor

from optimizations.common.launching import launch
from optimizations.common.memory import Reused
from optimizations.flow import triton_kernels
from optimizations.flow.estimator import Product
from optimizations.flow.state import State

ROWS, DEPTH = 16, 64
"""Frames of a program, and inputs at a time: few frames, so that there are some programs for one utterance, too."""


class Layers(Protocol):
    """What the steps ask of a `TritonEstimator`."""

    time_sizes: list[int]
    out: Product
    overlap: bool
    n_calls: int
    inputs: Reused

    @property
    def half(self) -> Tensor: ...

    @property
    def n_inputs(self) -> int: ...

    def time_shares(self, t: Tensor, r: Tensor | None) -> Tensor: ...

    def by_resnet(self, shares: Tensor) -> tuple[Tensor, ...]: ...

    def through(self, frames: Tensor, lengths: Tensor, times: tuple[Tensor, ...]) -> Tensor: ...


@dataclass
class TritonSteps:
    """What the steps over one `State` read and write, R rows of T frames."""

    estimator: Layers
    state: State
    frames: Tensor  # [R, T, inputs], half
    lengths: Tensor  # [R] int32
    shares: Tensor  # [1, all ResNets' channels] float32: what the step's time adds in them
    span: Tensor  # [1] float32: until the next step's time

    @classmethod
    def over(cls, estimator: Layers, state: State) -> TritonSteps:
        rows, n_inputs, length = len(state.mask), estimator.n_inputs, state.x.shape[2]
        return cls(
            estimator=estimator,
            state=state,
            frames=estimator.inputs.take((rows, length, n_inputs), estimator.half.dtype),
            lengths=torch.zeros(rows, dtype=torch.int32, device=state.x.device),
            shares=state.x.new_zeros(1, sum(estimator.time_sizes), dtype=torch.float32),
            span=state.time.new_zeros(1, dtype=torch.float32),
        )

    def begin(self, times: Tensor) -> Tensor:
        """The first step's inputs, as the state has them; and for each of `times` [n + 1] but the last what it adds in
        the ResNets [n, channels]."""
        state = self.state
        beside = state.mu, state.speaker[:, :, None].expand_as(state.mu), state.prompt
        inputs = torch.cat((state.x.repeat(state.sides, 1, 1), *beside), dim=1)
        self.frames.copy_(inputs.transpose(1, 2))
        self.lengths.copy_(state.mask[:, 0].sum(dim=-1))
        return self.estimator.time_shares(times[:-1].float(), times[1:].float())

    def step(self, rate: float) -> None:
        """One Euler step, guided at that rate if the state has two sides."""
        estimator, state = self.estimator, self.state
        estimator.n_calls += 1
        rows, length, n_inputs = self.frames.shape
        times = estimator.by_resnet(self.shares.expand(rows, -1))
        hidden = estimator.through(self.frames, self.lengths, times)
        weight, bias = estimator.out.weight.flatten(1), estimator.out.bias
        utterances, n_mels, _ = state.x.shape
        launch(
            triton_kernels.euler_step,
            (utterances * triton.cdiv(length, ROWS),),
            *(hidden, weight, bias, self.span, state.x, self.frames, length, rate, utterances),
            N=n_mels,
            C=weight.shape[1],
            IN=n_inputs,
            GUIDED=state.sides == 2,
            OUTPUTS=triton.next_power_of_2(n_mels),
            ROWS=ROWS,
            DEPTH=min(DEPTH, weight.shape[1]),
            PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
            OVERLAP=estimator.overlap,
            num_warps=4,
            launch_pdl=estimator.overlap,
        )
