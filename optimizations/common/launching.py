"""How kernels are launched, and how those that a piece of work will need are compiled side by side before it.

A kernel is compiled when it is first launched, which takes about a second, and production launches some sixty.
Compiling is mostly LLVM's work, which waits for nobody: in threads all of them take little longer than the slowest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import triton

LOG2_E = math.log2(math.e)
"""What turns a score into a logarithm to the base of 2, for kernels whose softmax is in powers of two."""
_compiling: ContextVar[bool] = ContextVar("compiling", default=False)


def can_overlap(device: torch.device) -> bool:
    """Whether a kernel may start before the one in front of it has ended: from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may have at most; on a CPU, whose interpreter counts none, 0."""
    if device.type != "cuda":
        return 0
    properties: Any = torch.cuda.get_device_properties(device)
    n_bytes: int = properties.shared_memory_per_block_optin
    return n_bytes


def n_processors(device: torch.device) -> int:
    """Of a GPU, each of which runs a few programs at a time; of a CPU, whose interpreter runs one, none."""
    if device.type != "cuda":
        return 0
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a Triton kernel; within `compiled_together`, have it compiled for these arguments instead."""
    if only_compiling():
        kernel.warmup(*args, grid=grid, **options)
    else:
        kernel[grid](*args, **options)


def only_compiling() -> bool:
    """Whether this is within `compiled_together`, where no kernel of ours runs."""
    return _compiling.get()


@contextmanager
def compiled_together() -> Iterator[None]:
    """Within, no kernel of ours runs, so what they would have written is undefined; after, all of them are ready.

    Raises what the compiler raised, for the first kernel that it could not compile.
    """
    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool):
        outside = _compiling.set(True)
        try:
            yield
        finally:
            _compiling.reset(outside)
