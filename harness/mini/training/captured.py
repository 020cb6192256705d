"""A training step that a GPU repeats by itself.

A small model's step is a few thousand kernels of microseconds each, and Python needs longer to ask for one than the
GPU to run it. Since shapes never change, the whole step (forward, backward, optimizer) is recorded once as a CUDA
graph and from then on launched as one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EAGER_STEPS = 3
"""Steps before the recording: libraries choose their kernels, optimizers make their state."""

Step = Callable[..., dict[str, Tensor]]


class CapturedStep:
    """`step(*inputs)`, recorded on a GPU and replayed; on a CPU simply called.

    The step must do the same work in every call: no answer from the device may steer it, learning rates are tensors,
    gradients are set to None before they are computed. Random numbers come from the device's default generator.
    What it returns is overwritten by the next call.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._results: dict[str, Tensor] = {}

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        if not inputs[0].is_cuda:
            return self._step(*inputs)
        self._calls += 1
        if self._calls <= EAGER_STEPS:
            return self._on_side_stream(inputs)
        if self._graph is None:
            self._record(inputs)
        assert self._graph is not None
        for place, value in zip(self._inputs, inputs, strict=True):
            place.copy_(value)
        self._graph.replay()
        return self._results

    def _on_side_stream(self, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """As the recording will run it: autograd remembers the stream on which it first met a parameter."""
        side, here = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            results = self._step(*inputs)
        here.wait_stream(side)
        return results

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = [value.clone() for value in inputs]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._results = {name: value.detach() for name, value in self._step(*self._inputs).items()}
        self._graph = graph
