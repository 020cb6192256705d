"""Times the flow's kernels on a full-size estimator with random weights, and whole steps of its solver.

    python -m optimizations.bench flow

Every figure is a CUDA graph's, in which each launch has the weights of another block. Prints tables in Markdown: tiles,
kernels, steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass

import torch
from triton.runtime.errors import OutOfResources

import optimizations
from harness import checkpoints
from harness.pipeline import Pipeline
from optimizations.bench.timing import microseconds
from optimizations.common.graphs import Graphs, Uncaptured
from optimizations.flow.static_shape import State, StaticSolver
from optimizations.flow.triton_estimator import MANY, TILES, Buffers, Tile, TritonEstimator

FRAMES = 1024
ROWS = 2, 128
"""One utterance with its unguided side, and a batch of 64: one of each choice of tiles."""
MANY_LAUNCHES = 8
"""Launches in a graph of MANY frames; few go through all weights."""
CANDIDATES = {
    "convolution": (
        [Tile(16, depth=64, stages=4), Tile(32, depth=64, stages=4), Tile(32, depth=128), Tile(64, depth=64)],
        [Tile(64, depth=64), Tile(64, depth=64, stages=4), Tile(64, depth=32, stages=4), Tile(128, depth=64)],
    ),
    "norm_qkv": (
        [
            *(Tile(64, 64, turns=turns, warps=warps, stages=2) for turns in (3, 6) for warps in (4, 8)),
            Tile(128, 64, turns=3, stages=2),
        ],
        [
            *(Tile(128, 64, turns=turns, stages=2) for turns in (12, 24)),
            Tile(128, 128, turns=12, warps=16, stages=2),
            *(Tile(64, 64, turns=24, warps=warps, stages=2) for warps in (4, 8)),
        ],
    ),
    "row_attention": (
        [Tile(128, 64), Tile(128, 128, stages=2), Tile(64, 64, warps=4), Tile(64, 128, warps=4, stages=2)],
        [
            *(Tile(128, 64, stages=stages) for stages in (2, 3)),
            Tile(128, 128, stages=2),
            Tile(64, 64, warps=4),
            Tile(64, 128, warps=4, stages=2),
        ],
    ),
    "norm_inner": (
        [
            *(Tile(64, 64, turns=turns, warps=warps, stages=2) for turns in (2, 4) for warps in (4, 8)),
            Tile(128, 64, turns=2, stages=2),
        ],
        [
            *(Tile(128, 64, turns=turns, stages=2) for turns in (8, 16)),
            Tile(128, 128, turns=8, warps=16, stages=2),
            *(Tile(64, 64, turns=16, warps=warps, stages=2) for warps in (4, 8)),
        ],
    ),
} | dict.fromkeys(
    ("add_attended", "add_outer"),
    (
        [
            Tile(64, 64, 128, warps=4),
            Tile(64, 64, 64, warps=4, stages=4),
            Tile(64, 32, 128, warps=4),
            Tile(128, 64, 128),
        ],
        [Tile(128, 128, 64), Tile(128, 64, 128), Tile(128, 64, 64, warps=4, stages=4), Tile(64, 256, 64)],
    ),
)


@dataclass
class Bench:
    """Launches by kernel over `rows` rows: the i-th with the weights of the i-th block or ResNet."""

    flat: TritonEstimator
    rows: int

    def __post_init__(self) -> None:
        self.blocks = [block for stack in self.flat.stacks for block in stack.blocks]
        self.times = self.flat._times(torch.full((self.rows,), 0.5), None)
        lengths = torch.full((self.rows,), FRAMES, dtype=torch.int32)
        self.buffers = b = Buffers.blank(lengths, self.rows * FRAMES, self.blocks[0])
        for buffer in (b.x, b.hidden, b.entering, b.joined, b.qkv, b.attended, b.inner):
            buffer.normal_()

    @property
    def few(self) -> bool:
        return self.rows * FRAMES < MANY

    def launch(self, name: str, i: int) -> None:
        flat, b, block = self.flat, self.buffers, self.blocks[i]
        if name == "convolution":
            resnet = flat.stacks[1 + i % (len(flat.stacks) - 2)].resnet
            first, second = resnet.first, resnet.second
            flat.convolve(first.convolution, b.entering, b.hidden, b, first.norm, time=self.times[0][:, 0])
            flat.convolve(second.convolution, b.hidden, b.x, b, second.norm, beside=(resnet.beside, b.entering))
        elif name == "norm_qkv":
            flat.norm_product(name, block.norm1, block.qkv, b.x, b.qkv)
        elif name == "row_attention":
            flat.attend(b, block.heads)
        elif name == "add_attended":
            flat.add_product(name, block.out, b.attended, b.x)
        elif name == "norm_inner":
            flat.norm_product(name, block.norm3, block.inner, b.x, b.inner, gelu=True)
        else:
            flat.add_product(name, block.outer, b.inner, b.x)

    def time(self, name: str) -> float:
        """Microseconds of what `launch` does."""
        n = len(self.blocks) if self.few else MANY_LAUNCHES

        def chain() -> None:
            for i in range(n):
                self.launch(name, i)

        return microseconds(chain, 30 if self.few else 5) / n

    def arithmetic(self, name: str) -> float:
        """Floating-point operations of what `launch` does."""
        block, frames = self.blocks[0], self.rows * FRAMES
        width, inner = block.outer.weight.shape
        attended = len(block.qkv.weight) // 3
        each = {
            "convolution": 7 * width * width,
            "norm_qkv": 3 * width * attended,
            "row_attention": 2 * FRAMES * attended,
            "add_attended": width * attended,
            "norm_inner": width * inner,
            "add_outer": width * inner,
        }
        return 2.0 * frames * each[name]


def main() -> None:
    pipeline = checkpoints.load("random", "cuda")
    optimizations.create("mixed_precision", {"parts": ["flow"]}).apply(pipeline)
    estimator = pipeline.model.s3gen.flow.decoder.estimator
    layers = estimator.forward
    with torch.device("cuda"), torch.inference_mode():
        flat = TritonEstimator(estimator, layers, dict(TILES))
        print(f"{torch.cuda.get_device_name()}, {FRAMES} frames a row\n")
        benches = [Bench(flat, rows) for rows in ROWS]
        choose_tiles(benches)
        print_kernels(benches)
        del benches
        print("| rows | estimator | ms a solver step | TFLOP/s |\n|---|---|---|---|")
        print_step(pipeline, flat, ROWS[0], "layers")
        pipeline.swap(estimator, "forward", flat.forward)
        for rows in ROWS:
            print_step(pipeline, flat, rows, "kernels")


def choose_tiles(benches: list[Bench]) -> None:
    """Of each kernel the tile with which it is fastest, for few frames and for many; they stay in place."""
    flat = benches[0].flat
    compile_all(benches)
    print("| kernel | rows | tile: us |\n|---|---|---|")
    for bench in benches:
        for name, candidates in CANDIDATES.items():
            times = {}
            for tile in with_tiles(flat, name, candidates[not bench.few]):
                try:
                    times[tile] = bench.time(name)
                except OutOfResources:
                    times[tile] = float("inf")
            print(f"| {name} | {bench.rows} | {', '.join(f'{short(tile)}: {t:.1f}' for tile, t in times.items())} |")
            best = min(times, key=lambda tile: times[tile])
            chosen = dict(zip((True, False), flat.tiles[name], strict=True)) | {bench.few: best}
            flat.tiles = {**flat.tiles, name: (chosen[True], chosen[False])}
    print("\nA tile is rows x columns x depth, turns, warps, stages. Fastest, for few frames and for many:\n")
    for name, (few, many) in flat.tiles.items():
        print(f"    {name}: {few}, {many}")
    print()


def with_tiles(flat: TritonEstimator, name: str, candidates: list[Tile]) -> Iterator[Tile]:
    """Each candidate, while it is what the kernel takes for any number of frames; then what was before."""
    before = flat.tiles
    for tile in candidates:
        flat.tiles = {**before, name: (tile, tile)}
        yield tile
    flat.tiles = before


def compile_all(benches: list[Bench]) -> None:
    """Launch every candidate once, in threads, as a compilation takes seconds."""

    def launch(task: tuple[Bench, str, Tile]) -> None:
        bench, name, tile = copy(task[0]), *task[1:]
        bench.flat = copy(bench.flat)
        bench.flat.tiles = {name: (tile, tile)}
        try:
            with torch.inference_mode():
                bench.launch(name, 0)
        except OutOfResources:
            pass  # said again where it is timed

    tasks = [
        (bench, name, tile)
        for name, candidates in CANDIDATES.items()
        for bench, tiles in zip(benches, candidates, strict=True)
        for tile in tiles
    ]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(launch, tasks))
    torch.cuda.synchronize()


def short(tile: Tile) -> str:
    return f"{tile.rows}x{tile.columns}x{tile.depth} t{tile.turns} w{tile.warps} s{tile.stages}"


def print_kernels(benches: list[Bench]) -> None:
    """Each kernel by itself, overlapping with the next of its kind."""
    print("| kernel | rows | us a launch | TFLOP/s |\n|---|---|---|---|")
    for bench in benches:
        for name in CANDIDATES:
            time, launches = bench.time(name), 2 if name == "convolution" else 1
            print(f"| {name} | {bench.rows} | {time / launches:.2f} | {bench.arithmetic(name) / time / 1e6:.0f} |")
    print()


def print_step(pipeline: Pipeline, flat: TritonEstimator, rows: int, way: str) -> None:
    """A whole step of the solver, captured, with the estimator as it is."""
    solver = StaticSolver(pipeline.model.s3gen.flow.decoder, Graphs(Uncaptured), bucket=64)
    n_mels = flat.out.weight.shape[0]
    state = State.blank(rows // 2, 2, n_mels, n_mels, FRAMES, torch.zeros(0))
    signal = torch.randn(rows // 2, n_mels, FRAMES)
    state.fill(signal, torch.ones(rows // 2, 1, FRAMES), signal, torch.randn(rows // 2, n_mels), signal)
    time = microseconds(lambda: solver._step(state), 10 if rows == ROWS[0] else 3)
    bench = Bench(flat, rows)
    n_resnets, n_blocks = len(flat.stacks), len(bench.blocks)
    total = n_resnets * bench.arithmetic("convolution")
    total += n_blocks * sum(bench.arithmetic(name) for name in CANDIDATES if name != "convolution")
    print(f"| {rows} | {way} | {time / 1000:.2f} | {total / time / 1e6:.0f} |")
