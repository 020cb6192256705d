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
    """In the catalogue's order; nothing is captured on a CPU: a "replay" runs the function over the same buffers."""
    applied = []
    for name in (name for name in optimizations.names() if name in plugins):
        if name == CudaGraphs.name:
            plugin = optimizations.create(name, plugins[name])
            plugin.apply_with(pipeline, Uncaptured)
        else:
            plugin = apply_one(pipeline, name, **plugins[name])
        applied.append(plugin)
    return applied


def spoken(pipeline: Pipeline, n_tokens: int) -> list[int]:
    """Speech tokens of one text, as the pipeline's own stage decodes them."""
    voice = next(iter(pipeline.voices))
    torch.manual_seed(0)
    segment = Segment(TEXT, pipeline.stages["condition"](voice), 0, n_tokens)
    return pipeline.stages["generate_tokens"]([segment])[0].tolist()
