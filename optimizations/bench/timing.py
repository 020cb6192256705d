"""How kernels are timed, and the speed that they are measured against."""

from __future__ import annotations

from collections.abc import Callable

import torch

BANDWIDTH = 4.3e12
"""Bytes per second that an H200's memory gives in practice; its data sheet says 4.8e12."""


def microseconds(work: Callable[[], object], replays: int = 30) -> float:
    """Time of `work` in a CUDA graph; the median of three measurements."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for _ in range(10):
        graph.replay()
    times = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / replays)
    return sorted(times)[1]
