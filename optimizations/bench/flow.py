"""Times the flow's kernels on a full-size estimator with random weights, and whole steps of its solver.

    python -m optimizations.bench flow

Every figure is a CUDA graph's. Prints tables in Markdown: whole steps by one kernel's tile, since kernels overlap, and
one that is faster by itself may leave the next one less room to start in; kernels by themselves, each launch with the
weights of another block; steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import optimizations
from harness import checkpoints
from optimizations.bench.tiles import print_tiles
from optimizations.bench.timing import microseconds
from optimizations.common.memory import Reused
from optimizations.flow.layer_steps import LayerSteps, Steps
from optimizations.flow.tiles import Tile
from optimizations.flow.triton_estimator import Buffers, TritonEstimator

SIZES = (2, 640), (2, 1024), (2, 1056), (2, 1088), (2, 1536), (4, 1024), (8, 576), (1, 1024), (32, 1024)
"""Rows and frames of each: an utterance with its unguided side, a few of them, one of Turbo, and as many as a batch is
solved in."""
TOLD = (2, 1024), (128, 1024)
"""Of which kernels and steps are timed."""
RATE = 0.7
"""Of guidance."""
MANY_FRAMES, MANY_LAUNCHES = 16384, 8
"""Beyond so many frames launches are long, and so many are in a graph, which do not go through all weights."""
NORMED = [
    *(Tile(64, 128, 64, warps=4, stages=stages) for stages in (3, 4)),
    *(Tile(64, 64, 64, warps=4, stages=stages) for stages in (3, 4)),
    *(Tile(128, 64, 64, warps=4, stages=stages) for stages in (3, 4)),
    *(Tile(128, 128, 64, warps=warps, running=running) for warps, running in ((8, 0), (4, 2), (8, 2))),
    *(Tile(128, 256, 64, running=running) for running in (0, 1)),
]
ADDED = [
    *(Tile(64, 64, 128, warps=4, stages=stages) for stages in (2, 3, 4)),
    *(Tile(64, 64, 64, warps=4, stages=stages) for stages in (3, 4, 5)),
    Tile(64, 64, 256, warps=4, stages=2),
    Tile(128, 64, 128),
    Tile(128, 64, 64, warps=4, stages=4),
    Tile(128, 128, 64),
]
CANDIDATES = {
    "convolution": [
        *(Tile(rows, depth=128) for rows in (16, 32)),
        *(Tile(rows, depth=64, stages=stages) for rows, stages in ((16, 4), (32, 3), (32, 4), (64, 3), (64, 4))),
        Tile(128, depth=64),
    ],
    "norm_qkv": NORMED,
    "row_attention": [
        *(Tile(64, 128, warps=4, stages=stages) for stages in (2, 3)),
        *(Tile(64, 64, warps=4, stages=stages) for stages in (3, 4, 5)),
        *(Tile(128, 64, stages=stages) for stages in (3, 4)),
        *(Tile(128, 128, stages=stages) for stages in (2, 3)),
    ],
    "add_attended": ADDED,
    "norm_inner": NORMED,
    "add_outer": ADDED,
}


@dataclass
class Bench:
    """Launches by kernel over `rows` of `frames`: the i-th with the weights of the i-th block or ResNet."""

    flat: TritonEstimator
    rows: int
    frames: int

    def __post_init__(self) -> None:
        self.blocks = [block for blocks in self.flat.blocks for block in blocks]
        self.times = self.flat.by_resnet(self.flat.time_shares(torch.full((self.rows,), 0.5), None))
        lengths = torch.full((self.rows,), self.frames, dtype=torch.int32)
        self.buffers = b = Buffers.blank(lengths, self.rows * self.frames, self.blocks[0])
        for buffer in (b.x, b.halved, b.moments, b.hidden, b.entering, b.joined, b.qkv, b.attended, b.inner):
            buffer.normal_()
        self.steps = self.flat.solver_steps(*self.shape, Reused(self.flat.half.device))
        begin(self.steps)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, sides and frames; one row alone is Turbo's, which has no unguided side."""
        sides = min(self.rows, 2)
        return self.rows // sides, sides, self.frames

    def launch(self, name: str, i: int) -> None:
        flat, b, block = self.flat, self.buffers, self.blocks[i]
        if name == "convolution":
            resnet = flat.stacks[1 + i % (len(flat.stacks) - 2)].resnet
            first, second = resnet.first, resnet.second
            flat.convolve(first.convolution, b.entering, b.hidden, b, first.norm, time=self.times[0][:, 0])
            flat.convolve(
                second.convolution, b.hidden, b.x, b, second.norm, None, (resnet.beside, b.entering), b.halved
            )
        elif name == "norm_qkv":
            flat.norm_product(name, block.qkv, b, b.qkv)
        elif name == "row_attention":
            flat.attend(b, block.heads)
        elif name == "add_attended":
            flat.add_product(name, block.out, b.attended, b, b.halved)
        elif name == "norm_inner":
            flat.norm_product(name, block.inner, b, b.inner, gelu=True)
        else:
            flat.add_product(name, block.outer, b.inner, b, b.halved)

    def time(self, _name: str) -> float:
        """Microseconds of a step of the solver, whichever kernel's tile is tried in it."""
        return microseconds(lambda: self.steps.step(RATE), 10 if self.rows * self.frames < MANY_FRAMES else 3)

    def alone(self, name: str) -> float:
        """Microseconds of what `launch` does, overlapping with the next of its kind."""
        n = MANY_LAUNCHES if self.rows * self.frames > MANY_FRAMES else len(self.blocks)

        def chain() -> None:
            for i in range(n):
                self.launch(name, i)

        return microseconds(chain, 5 if n == MANY_LAUNCHES else 30) / n

    def arithmetic(self, name: str) -> float:
        """Floating-point operations of what `launch` does."""
        block, frames = self.blocks[0], self.rows * self.frames
        width, inner = block.outer.weight.shape
        attended = len(block.qkv.weight) // 3
        each = {
            "convolution": 7 * width * width,
            "norm_qkv": 3 * width * attended,
            "row_attention": 2 * self.frames * attended,
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
        flat = TritonEstimator(estimator, layers)
        print(f"{torch.cuda.get_device_name()}\n")
        print_tiles([Bench(flat, *size) for size in SIZES], CANDIDATES)
        print_kernels([Bench(flat, *size) for size in TOLD])
        print("| rows | frames | estimator | ms a solver step | TFLOP/s |\n|---|---|---|---|---|")
        bench = Bench(flat, *TOLD[0])
        n_mels = flat.out.weight.shape[0]
        rows, sides, frames = bench.shape
        usual = LayerSteps.blank(estimator, rows, sides, n_mels, n_mels, frames, Reused(flat.half.device))
        begin(usual)
        print_step(bench, "layers", microseconds(lambda: usual.step(RATE), 10))
        for size in TOLD:
            bench = Bench(flat, *size)
            print_step(bench, "kernels", bench.time("all"))


def begin(steps: Steps) -> None:
    """With noise for everything."""
    signal = torch.randn_like(steps.x)
    steps.begin(signal, signal[:, :1] ** 0, signal, signal[..., 0], signal, torch.linspace(0, 1, 11))


def print_kernels(benches: list[Bench]) -> None:
    """Each kernel by itself."""
    print("| kernel | rows | frames | us a launch | TFLOP/s |\n|---|---|---|---|---|")
    for bench in benches:
        for name in CANDIDATES:
            time, launches = bench.alone(name), 2 if name == "convolution" else 1
            speed = bench.arithmetic(name) / time / 1e6
            print(f"| {name} | {bench.rows} | {bench.frames} | {time / launches:.2f} | {speed:.0f} |")
    print()


def print_step(bench: Bench, way: str, time: float) -> None:
    """A step of the solver, which took so many microseconds."""
    n_resnets, n_blocks = len(bench.flat.stacks), len(bench.blocks)
    total = n_resnets * bench.arithmetic("convolution")
    total += n_blocks * sum(bench.arithmetic(name) for name in CANDIDATES if name != "convolution")
    print(f"| {bench.rows} | {bench.frames} | {way} | {time / 1000:.2f} | {total / time / 1e6:.0f} |")
