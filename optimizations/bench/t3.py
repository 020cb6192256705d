"""Times the decode step's kernels on a full-size transformer with random weights, next to what memory allows.

    python -m optimizations.bench t3
    python -m optimizations.bench t3-turbo

Every figure is a CUDA graph's: all layers one after the other, so that no weight is still in the cache when its turn
comes again. Prints tables in Markdown, for bfloat16 and for 8-bit weights: tiles, kernels, steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from chatterbox.models.t3.llama_configs import LLAMA_CONFIGS
from torch import nn
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from optimizations.bench.timing import BANDWIDTH, microseconds
from optimizations.common.launching import can_overlap
from optimizations.t3.blocks import by_outputs
from optimizations.t3.int8 import in_8_bits
from optimizations.t3.triton_batched import Layer
from optimizations.t3.triton_engine import Buffers, Tile, Tiles, TritonEngine, engine_for, head_logits

CAPACITY = 1280
EXTENT = 512
"""Slots for which attention's programs stand ready, or a multiple: a captured step has whole buckets of them."""


@dataclass(frozen=True)
class Kind:
    """A transformer, and what a step of one utterance is for it."""

    make: Callable[[], Any]
    vocabulary: int
    has_bias: bool
    qkv: str
    inner: str
    """The names of the two kernels that it has to itself."""
    rows: int
    filled: int
    """Filled slots: the middle of ten seconds of speech."""
    sizes: list[tuple[int, int]]
    """Rows and filled slots of further steps."""

    @property
    def candidates(self) -> dict[str, list[Tile]]:
        """Tiles to choose from, for each kernel."""
        pairs = self.qkv == "rmsnorm_qkv_rope"
        return {
            self.qkv: [Tile(1, 1), Tile(2, 1), Tile(2, 2), Tile(4, 2)] + ([] if pairs else [Tile(4, 1), Tile(8, 4)]),
            "attention": [Tile(32, 1), Tile(64, 2), Tile(64, 4), Tile(128, 4), Tile(128, 8), Tile(256, 8)],
            "o_residual": [Tile(1, 1), Tile(2, 1), Tile(4, 2), Tile(8, 4)],
            self.inner: [Tile(2, 1), Tile(4, 1), Tile(4, 2), Tile(8, 4), Tile(8, 2)],
            "down_residual": [Tile(1, 2), Tile(1, 4), Tile(2, 4), Tile(2, 8), Tile(4, 8)],
            "speech_head": [Tile(4, 4), Tile(8, 4), Tile(8, 8)],
        }


def llama() -> LlamaModel:
    return LlamaModel(LlamaConfig(**LLAMA_CONFIGS["Llama_520M"]))


def gpt2() -> GPT2Model:
    return GPT2Model(GPT2Config(**LLAMA_CONFIGS["GPT2_medium"]))


ENGLISH = Kind(
    make=llama,
    vocabulary=8194,
    has_bias=False,
    qkv="rmsnorm_qkv_rope",
    inner="rmsnorm_gate_up_silu",
    rows=2,
    filled=300,
    sizes=[(2, 100), (2, 600), (2, 1200), (4, 300), (8, 300), (16, 300)],
)
"""Two rows, for guidance."""
TURBO = Kind(
    make=gpt2,
    vocabulary=6563,
    has_bias=True,
    qkv="layernorm_qkv",
    inner="layernorm_gelu",
    rows=1,
    filled=600,
    sizes=[(1, 400), (1, 800), (2, 600), (4, 600), (16, 600)],
)


def main(kind: Kind = ENGLISH) -> None:
    torch.manual_seed(0)
    with torch.device("cuda"), torch.inference_mode():
        tfmr = full_size(kind)
        width = tfmr.config.hidden_size
        head = nn.Linear(width, kind.vocabulary, bias=kind.has_bias, dtype=torch.bfloat16)
        for name in ("bfloat16", "int8"):
            if name == "int8":
                in_8_bits(tfmr)
            print(f"{torch.cuda.get_device_name()}, {name}, {kind.rows} rows, {kind.filled} filled slots\n")
            tiles = best_tiles(kind, tfmr, head)
            print_kernels(kind, tfmr, head, tiles)
            print_steps(kind, tfmr, head, tiles)


def full_size(kind: Kind) -> Any:
    """T3's transformer with random weights in bfloat16."""
    tfmr = kind.make().eval()
    for parameter in tfmr.parameters():
        parameter.data = parameter.data.bfloat16()
    for weight, laid_out in by_outputs(tfmr):
        weight.data = laid_out
    return tfmr


def engine_at(tfmr: Any, rows: int, filled: int, tiles: Tiles | None, overlap: bool | None = None) -> TritonEngine:
    """An engine with room for CAPACITY slots that writes the slot `filled` next.

    Without tiles its steps are one launch where that can be.
    """
    engine = engine_for(tfmr, tiles=tiles)
    engine.overlap = engine.overlap if overlap is None else overlap
    engine.reserve(rows, CAPACITY - 1)
    engine.position.fill_(filled)
    return engine


def step_of(engine: TritonEngine, head: nn.Linear, rows: int) -> Callable[[], object]:
    """One step with the head, without sampling."""
    embeds = torch.randn(rows, 1, head.in_features)
    extent = triton.cdiv(int(engine.position) + 1, EXTENT) * EXTENT
    return lambda: head_logits(head, engine.static_step(embeds, extent), engine.tiles["speech_head"])


def best_tiles(kind: Kind, tfmr: Any, head: nn.Linear) -> dict[str, Tile]:
    """Of each kernel in turn the tile with which the whole step is fastest."""
    chosen = dict(engine_for(tfmr).tiles)
    print("| kernel | outputs x warps: step, us |\n|---|---|")
    for kernel, candidates in kind.candidates.items():
        times = {}
        for tile in candidates:
            engine = engine_at(tfmr, kind.rows, kind.filled, chosen | {kernel: tile})
            times[tile] = microseconds(step_of(engine, head, kind.rows))
        chosen[kernel] = min(times, key=lambda tile: times[tile])
        print(f"| {kernel} | {', '.join(f'{t.outputs}x{t.warps}: {time:.1f}' for t, time in times.items())} |")
    print(f"\nFastest: {', '.join(f'{name} {t.outputs}x{t.warps}' for name, t in chosen.items())}\n")
    return chosen


def print_kernels(kind: Kind, tfmr: Any, head: nn.Linear, tiles: Tiles) -> None:
    """Each kernel by itself, overlapping with the next of its kind."""
    engine = engine_at(tfmr, kind.rows, kind.filled, tiles)
    buffers = engine.buffers(torch.randn(kind.rows, head.in_features), EXTENT)
    hidden = torch.randn(kind.rows, head.in_features, dtype=torch.bfloat16)
    for left_by_another in (buffers.x, buffers.attended, buffers.activated):
        left_by_another.zero_()
    n_layers = len(engine.blocks.layers)

    def chain(launch: Callable[[int, Buffers], None]) -> Callable[[], None]:
        def run() -> None:
            for index in range(n_layers):
                launch(index, buffers)

        return run

    chains: dict[str, Callable[[], object]] = {
        kind.qkv: chain(engine.qkv),
        "attention": chain(engine.attend),
        "o_residual": chain(engine.output),
        kind.inner: chain(engine.gate_up),
        "down_residual": chain(engine.down),
        "speech_head": lambda: [head_logits(head, hidden, tiles["speech_head"]) for _ in range(n_layers)],
    }
    print("| kernel | MB a launch | us | GB/s | share of 4.3 TB/s |\n|---|---|---|---|---|")
    for name, size in bytes_moved(kind, engine, head, kind.rows, kind.filled).items():
        time = microseconds(chains[name]) / n_layers
        rate = size / time * 1e6
        print(f"| {name} | {size / 1e6:.2f} | {time:.2f} | {rate / 1e9:,.0f} | {rate / BANDWIDTH:.0%} |")
    print("\n`speech_head` is one matrix over and over, which stays in the cache.\n")


def print_steps(kind: Kind, tfmr: Any, head: nn.Linear, tiles: Tiles) -> None:
    """Whole steps with the head, without sampling, over rows, filled slots and what hides the waiting."""
    print("| rows | filled | overlap | us a step | tokens/s | share of 4.3 TB/s | us in one launch |")
    print("|---|---|---|---|---|---|---|")
    cases: list[tuple[int, int, bool | None]] = [
        (kind.rows, kind.filled, False),
        (kind.rows, kind.filled, can_overlap(head.weight.device)),
    ]
    cases += [(*size, None) for size in kind.sizes]
    for rows, filled, overlap in cases:
        engine = engine_at(tfmr, rows, filled, tiles, overlap)
        time = microseconds(step_of(engine, head, rows))
        sizes = bytes_moved(kind, engine, head, rows, filled)
        n_layers = len(engine.blocks.layers)
        total = n_layers * sum(sizes.values()) - (n_layers - 1) * sizes["speech_head"]
        tokens, share = rows // kind.rows / time * 1e6, total / time * 1e6 / BANDWIDTH
        how = "yes" if engine.overlap else "no"
        at_once = engine_at(tfmr, rows, filled, None, overlap)
        one = f"{microseconds(step_of(at_once, head, rows)):.1f}" if not at_once.why_several_launches(rows) else ""
        print(f"| {rows} | {filled} | {how} | {time:.1f} | {tokens:,.0f} | {share:.0%} | {one} |")


def bytes_moved(kind: Kind, engine: TritonEngine, head: nn.Linear, rows: int, filled: int) -> dict[str, int]:
    """Bytes that each kernel has to read from memory: weights, and what is filled of the cache."""
    layer = Layer.of(engine.blocks.layers[0])
    return {
        kind.qkv: sum(product.weight.nbytes for product in layer.qkv),
        "attention": 2 * rows * (filled + 1) * engine.tfmr.config.hidden_size * engine.dtype.itemsize,
        "o_residual": layer.out.weight.nbytes,
        kind.inner: sum(product.weight.nbytes for product in layer.inner),
        "down_residual": layer.outer.weight.nbytes,
        "speech_head": head.weight.nbytes,
    }
