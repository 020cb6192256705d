"""Recorded GPU work: a function's kernels captured once and launched again as one.

A CUDA graph holds the kernels that a function launched, with the addresses they worked on; replaying it launches them
all with a single call and runs no Python. So a function can be captured if

    it reads its inputs from, and leaves its state in, buffers that stay where they are;
    its shapes are the same in every run;
    it never asks the device for a number (`.item()`, a tensor in an `if`), nor copies from ordinary host memory.

All graphs here share one memory pool: what one of them computes on the way lies where another's did. A result is
therefore good until the next replay of any of them; who needs it longer copies it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from harness.pipeline import gpu_generator

Body = Callable[[], Any]


class Uncaptured:
    """In the place of a graph where nothing can be captured: every call runs the function over the same buffers."""

    def __init__(self, body: Body) -> None:
        self._body = body

    def __call__(self) -> Any:
        return self._body()


class Capturer:
    """Makes graphs that share a stream and a pool of memory."""

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device, priority)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Body) -> Body:
        return Graph(body, self)

    @property
    def n_bytes(self) -> int:
        """Memory that the pool holds."""
        segments = torch.cuda.memory_snapshot(include_traces=False)
        return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == self.pool)


class Graph:
    """`body`, captured.

    The first call runs the function in earnest, which loads kernels and sets up libraries, and then captures it, which
    computes nothing; every later call replays. So no call's work is done twice, whenever it is captured.
    """

    def __init__(self, body: Body, capturer: Capturer) -> None:
        self._body: Body | None = body
        self._capturer = capturer
        self._graph = torch.cuda.CUDAGraph()
        self._output: Any = None

    def __call__(self) -> Any:
        if self._body is None:
            self._graph.replay()
            return self._output
        body, self._body = self._body, None
        here, aside = torch.cuda.current_stream(self._capturer.device), self._capturer.stream
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            output = body()
        here.wait_stream(aside)
        # Other threads (a memory meter, say) may go on asking the driver for things.
        with torch.cuda.graph(self._graph, pool=self._capturer.pool, stream=aside, capture_error_mode="thread_local"):
            self._output = body()
        return output


class Graphs:
    """Graphs by stage and shape, made when first called for, and counted."""

    def __init__(self, make: Callable[[Body], Body] = Uncaptured) -> None:
        self.captured: Counter[str] = Counter()
        """Captures by stage, those that were dropped since included."""
        self.replays: Counter[str] = Counter()
        self.unprepared: Counter[str] = Counter()
        """Captures that an utterance had to wait for, by stage."""
        self.is_preparing = False
        """Nobody waits for what runs now, nor listens to it: one repetition of a graph is as good as all."""
        self._make = make
        self._apart: dict[str, Callable[[Body], Body]] = {}
        self._graphs: dict[str, dict[Hashable, Body]] = {}
        self._rehearsed: dict[tuple[str, Hashable], Any] | None = None

    def run(self, stage: str, shape: Hashable, body: Body) -> Any:
        """What `body` returns, from the stage's graph for that shape."""
        if self._rehearsed is not None:
            if (stage, shape) not in self._rehearsed:
                self._rehearsed[stage, shape] = body()
            return self._rehearsed[stage, shape]
        graphs = self._graphs.setdefault(stage, {})
        if shape in graphs:
            self.replays[stage] += 1
        else:
            graphs[shape] = self._apart.get(stage, self._make)(body)
            self.captured[stage] += 1
            if not self.is_preparing:
                self.unprepared[stage] += 1
        return graphs[shape]()

    def keep_apart(self, stage: str, make: Callable[[Body], Body]) -> None:
        """Have `make` capture a stage from now on: graphs of one pool must not run at the same time."""
        self.forget(stage)
        self._apart[stage] = make

    def forget(self, stage: str) -> None:
        """Drop a stage's graphs: the buffers that they know have moved."""
        self._graphs.pop(stage, None)

    def clear(self) -> None:
        """Drop all graphs, and with them their memory."""
        self._graphs.clear()

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Captures in here keep nobody waiting."""
        self.is_preparing = True
        try:
            yield
        finally:
            self.is_preparing = False

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """In here nothing is captured or counted: a body runs once a shape, and its output stands for later ones."""
        self._rehearsed = {}
        try:
            yield
        finally:
            self._rehearsed = None


class DelayedFlag:
    """A truth value on the device, read by the host one look later.

    Asking right away would make the host wait for all that it has queued, and the device wait for the host after that.
    Each look starts a copy into page-locked memory and answers with what the look before had copied, which is there
    by now; so the host stays at most two looks ahead. On a CPU the answer is as old, so that both behave alike.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._copy = torch.zeros(1, dtype=torch.bool, pin_memory=self._on_gpu)
        self._copied = torch.cuda.Event() if self._on_gpu else None
        self._looked = False

    def reset(self) -> None:
        """Forget the last look."""
        self._looked = False

    def look(self, value: Tensor) -> bool:
        """`value`, of one element, as it was at the look before this one; False at the first."""
        if self._looked and self._copied is not None:
            self._copied.synchronize()
        seen = self._looked and bool(self._copy)
        self._copy.copy_(value, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._looked = True
        return seen


class Draws:
    """Random draws of one decode, to give back those of steps that turned out to be beyond its end.

    What is drawn afterwards, such as the flow's noise, is then the same however far the host had run ahead. A CPU's
    generator cannot step back; nothing is captured there.
    """

    def __init__(self, device: torch.device) -> None:
        self._generator = None
        if device.type == "cuda":
            self._generator = gpu_generator(device)
            self._start = self._generator.get_offset()

    def keep(self, wanted: int, made: int) -> None:
        """Keep the draws of the first `wanted` of `made` equal steps."""
        if self._generator is not None:
            each = (self._generator.get_offset() - self._start) // made
            self._generator.set_offset(self._start + each * wanted)
