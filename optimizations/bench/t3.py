"""Times the decode step's kernels on a full-size transformer with random weights, next to what memory allows.

    python -m optimizations.bench t3

Every figure is a CUDA graph's: 30 layers one after the other, so that no weight is still in the cache when its turn
comes again. Prints tables in Markdown, for bfloat16 and for 8-bit weights: tiles, kernels, steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from chatterbox.models.t3.llama_configs import LLAMA_CONFIGS
from torch import nn
from transformers import LlamaConfig, LlamaModel

from optimizations.bench.timing import BANDWIDTH, microseconds
from optimizations.common.launching import can_overlap
from optimizations.t3.int8 import in_8_bits
from optimizations.t3.triton_engine import Buffers, Tile, Tiles, TritonEngine, head_logits

VOCABULARY = 8194
ROWS, FILLED, CAPACITY = 2, 300, 1280
"""Rows of guided decoding at batch 1, and filled slots: the middle of ten seconds of speech."""
EXTENT = 512
"""Slots for which attention's programs stand ready, or a multiple: a captured step has whole buckets of them."""
CANDIDATES = {
    "rmsnorm_qkv_rope": [Tile(1, 1), Tile(2, 1), Tile(2, 2), Tile(4, 2)],
    "attention": [Tile(32, 1), Tile(64, 2), Tile(64, 4), Tile(128, 4), Tile(128, 8), Tile(256, 8)],
    "o_residual": [Tile(1, 1), Tile(2, 1), Tile(4, 2), Tile(8, 4)],
    "rmsnorm_gate_up_silu": [Tile(2, 1), Tile(4, 2), Tile(8, 4)],
    "down_residual": [Tile(1, 2), Tile(1, 4), Tile(2, 4), Tile(2, 8), Tile(4, 8)],
    "speech_head": [Tile(4, 4), Tile(8, 4), Tile(8, 8)],
}


def main() -> None:
    torch.manual_seed(0)
    with torch.device("cuda"), torch.inference_mode():
        tfmr = full_size()
        head = nn.Linear(len(tfmr.norm.weight), VOCABULARY, bias=False, dtype=torch.bfloat16)
        for name in ("bfloat16", "int8"):
            if name == "int8":
                in_8_bits(tfmr)
            print(f"{torch.cuda.get_device_name()}, {name}, {ROWS} rows, {FILLED} filled slots\n")
            tiles = best_tiles(tfmr, head)
            print_kernels(tfmr, head, tiles)
            print_steps(tfmr, head, tiles)


def full_size() -> LlamaModel:
    """T3's transformer with random weights in bfloat16."""
    tfmr = LlamaModel(LlamaConfig(**LLAMA_CONFIGS["Llama_520M"])).eval()
    for parameter in tfmr.parameters():
        parameter.data = parameter.data.bfloat16()
    return tfmr


def engine_at(tfmr: LlamaModel, rows: int, filled: int, tiles: Tiles, overlap: bool | None = None) -> TritonEngine:
    """An engine with room for CAPACITY slots that writes the slot `filled` next."""
    engine = TritonEngine(tfmr, tiles=tiles, overlap=overlap)
    engine.reserve(rows, CAPACITY - 1)
    engine.position.fill_(filled)
    return engine


def step_of(engine: TritonEngine, head: nn.Linear, rows: int) -> Callable[[], object]:
    """One step with the head, without sampling."""
    embeds = torch.randn(rows, 1, head.in_features)
    extent = triton.cdiv(int(engine.position) + 1, EXTENT) * EXTENT
    return lambda: head_logits(head, engine.static_step(embeds, extent), engine.tiles["speech_head"])


def best_tiles(tfmr: LlamaModel, head: nn.Linear) -> dict[str, Tile]:
    """Of each kernel in turn the tile with which the whole step is fastest."""
    chosen = dict(TritonEngine(tfmr).tiles)
    print("| kernel | outputs x warps: step, us |\n|---|---|")
    for kernel, candidates in CANDIDATES.items():
        times = {}
        for tile in candidates:
            engine = engine_at(tfmr, ROWS, FILLED, chosen | {kernel: tile})
            times[tile] = microseconds(step_of(engine, head, ROWS))
        chosen[kernel] = min(times, key=lambda tile: times[tile])
        print(f"| {kernel} | {', '.join(f'{t.outputs}x{t.warps}: {time:.1f}' for t, time in times.items())} |")
    print(f"\nFastest: {', '.join(f'{name} {t.outputs}x{t.warps}' for name, t in chosen.items())}\n")
    return chosen


def print_kernels(tfmr: LlamaModel, head: nn.Linear, tiles: Tiles) -> None:
    """Each kernel by itself, overlapping with the next of its kind."""
    engine = engine_at(tfmr, ROWS, FILLED, tiles)
    buffers = engine.buffers(torch.randn(ROWS, head.in_features), EXTENT)
    for left_by_another in (buffers.x, buffers.attended, buffers.activated, buffers.hidden):
        left_by_another.zero_()
    n_layers = len(tfmr.layers)

    def chain(launch: Callable[[int, Buffers], None]) -> Callable[[], None]:
        def run() -> None:
            for index in range(n_layers):
                launch(index, buffers)

        return run

    chains: dict[str, Callable[[], object]] = {
        "rmsnorm_qkv_rope": chain(engine.qkv),
        "attention": chain(engine.attend),
        "o_residual": chain(engine.output),
        "rmsnorm_gate_up_silu": chain(engine.gate_up),
        "down_residual": chain(engine.down),
        "speech_head": lambda: [head_logits(head, buffers.hidden, tiles["speech_head"]) for _ in range(n_layers)],
    }
    print("| kernel | MB a launch | us | GB/s | share of 4.3 TB/s |\n|---|---|---|---|---|")
    for name, size in bytes_moved(tfmr, head, ROWS, FILLED).items():
        time = microseconds(chains[name]) / n_layers
        rate = size / time * 1e6
        print(f"| {name} | {size / 1e6:.2f} | {time:.2f} | {rate / 1e9:,.0f} | {rate / BANDWIDTH:.0%} |")
    print("\n`speech_head` is one matrix over and over, which stays in the cache.\n")


def print_steps(tfmr: LlamaModel, head: nn.Linear, tiles: Tiles) -> None:
    """Whole steps with the head, without sampling, over rows, filled slots and what hides the waiting."""
    print("| rows | filled | overlap | us a step | tokens/s | share of 4.3 TB/s |")
    print("|---|---|---|---|---|---|")
    cases: list[tuple[int, int, bool | None]] = [
        (ROWS, FILLED, False),
        (ROWS, FILLED, can_overlap(tfmr.norm.weight.device)),
    ]
    cases += [(*size, None) for size in [(2, 100), (2, 600), (2, 1200), (4, 300), (8, 300), (16, 300)]]
    for rows, filled, overlap in cases:
        engine = engine_at(tfmr, rows, filled, tiles, overlap)
        time = microseconds(step_of(engine, head, rows))
        sizes = bytes_moved(tfmr, head, rows, filled)
        total = len(tfmr.layers) * sum(sizes.values()) - (len(tfmr.layers) - 1) * sizes["speech_head"]
        tokens, share = rows // 2 / time * 1e6, total / time * 1e6 / BANDWIDTH
        how = "yes" if engine.overlap else "no"
        print(f"| {rows} | {filled} | {how} | {time:.1f} | {tokens:,.0f} | {share:.0%} |")


def bytes_moved(tfmr: LlamaModel, head: nn.Linear, rows: int, filled: int) -> dict[str, int]:
    """Bytes that each kernel has to read from memory: weights, and what is filled of the cache."""
    layers: Any = tfmr.layers
    attention, mlp, width = layers[0].self_attn, layers[0].mlp, len(tfmr.norm.weight)
    cached = 2 * rows * (filled + 1) * width * tfmr.norm.weight.element_size()
    return {
        "rmsnorm_qkv_rope": 3 * attention.q_proj.weight.nbytes,
        "attention": cached,
        "o_residual": attention.o_proj.weight.nbytes,
        "rmsnorm_gate_up_silu": 2 * mlp.up_proj.weight.nbytes,
        "down_residual": mlp.down_proj.weight.nbytes,
        "speech_head": head.weight.nbytes,
    }
