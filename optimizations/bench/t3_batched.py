"""Times the decode step for many rows on a full-size transformer with random weights, next to what memory allows.

    python -m optimizations.bench t3-batched

Every figure is a CUDA graph's, as in `python -m optimizations.bench t3`. Prints tables in Markdown: attention's loops,
kernels, steps, each over a cache in bfloat16 and over one in 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from optimizations.bench.t3 import ENGLISH, full_size
from optimizations.bench.timing import BANDWIDTH, microseconds
from optimizations.t3 import triton_batched
from optimizations.t3.triton_batched import LOOP, Loop
from optimizations.t3.triton_engine import TritonEngine

ROWS, FILLED, CAPACITY = 128, 350, 640
"""64 utterances with guidance, and filled slots: the middle of ten seconds of speech, voice and text included."""
SIZES = [(rows, filled) for rows in (32, 64, 128) for filled in (150, 350, 600)]
LOOPS = [LOOP, Loop(64, 4, 4), Loop(64, 4, 5), Loop(64, 2, 3), Loop(32, 2, 5), Loop(128, 8, 3), Loop(128, 4, 3)]


def main() -> None:
    torch.manual_seed(0)
    with torch.device("cuda"), torch.inference_mode():
        tfmr = full_size(ENGLISH)
        print(f"{torch.cuda.get_device_name()}, bfloat16; loops and kernels: {ROWS} rows, {FILLED} filled slots")
        for int8_cache in (False, True):
            print("\n## The cache in 8 bits\n" if int8_cache else "\n## The cache in bfloat16\n")
            engine = TritonEngine(tfmr)
            engine.int8_cache = int8_cache
            triton_batched.join(engine.blocks)
            engine.reserve(ROWS, CAPACITY - 1)
            loop = fastest_loop(engine)
            print_kernels(engine, loop)
            print_steps(engine, loop)


def over_layers(engine: TritonEngine, launch: Callable[[int], object]) -> Callable[[], None]:
    """`launch` of every layer's number: a layer's weights and cache are out of the GPU's cache by its next turn."""

    def run() -> None:
        for index in range(len(engine.tfmr.layers)):
            launch(index)

    return run


def fastest_loop(engine: TritonEngine) -> Loop:
    """Of all candidates the one with which attention by itself takes the least time."""
    engine.position.fill_(FILLED)
    width, n_layers = engine.tfmr.config.hidden_size, len(engine.tfmr.layers)
    qkv = torch.randn(ROWS, 3 * width, dtype=engine.dtype)
    queries = torch.empty(ROWS, width)
    size = cache_bytes(engine, ROWS, FILLED)
    times = {}
    print("| slots | warps | stages | us | share of 4.3 TB/s |\n|---|---|---|---|---|")
    for loop in LOOPS:
        attend = partial(triton_batched.attend, engine, qkv=qkv, queries=queries, loop=loop)
        times[loop] = microseconds(over_layers(engine, attend)) / n_layers
        print(f"| {loop.slots} | {loop.warps} | {loop.stages} | {times[loop]:.1f} | {share(size, times[loop])} |")
    fastest = min(times, key=lambda loop: times[loop])
    print(f"\nFastest: {fastest}\n")
    return fastest


def print_kernels(engine: TritonEngine, loop: Loop) -> None:
    """Each launch of a layer by itself; the bytes are those that have to come from memory."""
    engine.position.fill_(FILLED)
    layers: Any = engine.tfmr.layers
    width, inner = engine.tfmr.config.hidden_size, engine.tfmr.config.intermediate_size
    h, y, activated, x = (torch.randn(ROWS, n, dtype=engine.dtype) for n in (width, width, inner, width))
    qkv, gate_up = (torch.randn(ROWS, n, dtype=engine.dtype) for n in (3 * width, 2 * inner))
    x, queries = x.float(), torch.empty(ROWS, width)
    square, oblong = width * width * h.element_size(), width * inner * h.element_size()

    def product_qkv(index: int) -> None:
        attention = layers[index].self_attn
        triton_batched.product(h, attention.q_proj, attention.k_proj, attention.v_proj)

    def product_gate_up(index: int) -> None:
        triton_batched.product(h, layers[index].mlp.gate_proj, layers[index].mlp.up_proj)

    attend = partial(triton_batched.attend, engine, qkv=qkv, queries=queries, loop=loop)
    launches: dict[str, tuple[Callable[[int], object], int]] = {
        "normed_sum": (lambda index: triton_batched.add_norm(x, y, layers[index].input_layernorm, x), 0),
        "product: q, k, v": (product_qkv, 3 * square),
        "step_attention": (attend, cache_bytes(engine, ROWS, FILLED)),
        "product: o": (lambda index: triton_batched.product(h, layers[index].self_attn.o_proj), square),
        "product: gate, up": (product_gate_up, 2 * oblong),
        "silu_product": (lambda _index: triton_batched.gated(gate_up), 0),
        "product: down": (lambda index: triton_batched.product(activated, layers[index].mlp.down_proj), oblong),
    }
    print("| launch | MB | us | share of 4.3 TB/s |\n|---|---|---|---|")
    for name, (launch, size) in launches.items():
        time = microseconds(over_layers(engine, launch)) / len(layers)
        print(f"| {name} | {size / 1e6:.2f} | {time:.2f} | {share(size, time) if size else ''} |")
    print()


def print_steps(engine: TritonEngine, loop: Loop) -> None:
    """Whole steps without head and sampling, over rows and filled slots; a token takes two rows."""
    print("| rows | filled | us a step | tokens/s | share of 4.3 TB/s |\n|---|---|---|---|---|")
    layers: Any = engine.tfmr.layers
    weights = sum(parameter.nbytes for parameter in layers.parameters())
    for rows, filled in SIZES:
        engine.reserve(rows, CAPACITY - 1)
        engine.position.fill_(filled)
        embeds = torch.randn(rows, 1, engine.tfmr.config.hidden_size)
        time = microseconds(partial(triton_batched.step, engine, embeds, CAPACITY, loop))
        size = weights + len(layers) * cache_bytes(engine, rows, filled)
        print(f"| {rows} | {filled} | {time:.0f} | {rows / 2 / time * 1e6:,.0f} | {share(size, time)} |")


def cache_bytes(engine: TritonEngine, rows: int, filled: int) -> int:
    """Keys and values of one layer in the filled slots."""
    return 2 * rows * filled * engine.slot_bytes(rows)


def share(size: int, time: float) -> str:
    """Of the memory's speed: `size` bytes in `time` microseconds."""
    return f"{size / time * 1e6 / BANDWIDTH:.0%}"
