"""Optimizations switched on in a test, and what T3 says with them."""

from __future__ import annotations

from typing import Any

import torch

import optimizations
from harness.pipeline import Pipeline, Segment
from optimizations import Optimization
from optimizations.common.graphs import Uncaptured
from optimizations.cuda_graphs import CudaGraphs

TEXT = "Good morning, how are you today?"


def apply_one(pipeline: Pipeline, name: str, **parameters: Any) -> Optimization:
    """One, which has to be available."""
    plugin = optimizations.create(name, parameters)
    assert plugin.unavailable(pipeline) is None
    plugin.apply(pipeline)
    return plugin


def apply_uncaptured(pipeline: Pipeline, **plugins: dict[str, Any]) -> list[Optimization]:
    """In the catalogue's order, each as `apply_one_uncaptured` does."""
    return [apply_one_uncaptured(pipeline, name, **plugins[name]) for name in optimizations.names() if name in plugins]


def apply_one_uncaptured(pipeline: Pipeline, name: str, **parameters: Any) -> Optimization:
    """Nothing is captured on a CPU: a "replay" runs the function over the same buffers."""
    if name != CudaGraphs.name:
        return apply_one(pipeline, name, **parameters)
    plugin = optimizations.create(name, parameters)
    plugin.apply_with(pipeline, Uncaptured)
    return plugin


def spoken(pipeline: Pipeline, n_tokens: int) -> list[int]:
    """Speech tokens of one text, as the pipeline's own stage decodes them."""
    voice = next(iter(pipeline.voices))
    torch.manual_seed(0)
    segment = Segment(TEXT, pipeline.stages["condition"](voice), 0, n_tokens)
    return pipeline.stages["generate_tokens"]([segment])[0].tolist()
