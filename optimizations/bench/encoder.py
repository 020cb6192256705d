"""Times the kernels of the flow's encoder at full size with random weights, and whole encoders.

    python -m optimizations.bench encoder

Every figure is a CUDA graph's, in which each launch has the weights of another layer. Prints tables in Markdown: how
far off the hidden frames are, whole encoders, the launches of one, tiles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from chatterbox.models.s3gen.transformer.upsample_encoder import UpsampleConformerEncoder
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from optimizations.bench.tiles import print_tiles
from optimizations.bench.timing import microseconds
from optimizations.common.padding import within
from optimizations.flow.static_shape import encode
from optimizations.flow.tiles import Tile
from optimizations.flow.triton_encoder import HALF, TritonEncoder

SIZES = (1, 512), (1, 1024), (1, 256), (8, 512), (8, 1024)
"""Rows and frames that tiles are timed for: prompt and speech at 25 a second, and upsampled."""
TOLD = (1, 500), (1, 263), (8, 500)
"""Rows and tokens of the whole encoders."""
PRODUCTS = [
    Tile(64, 64, 64, warps=4, stages=4),
    Tile(64, 64, 128, warps=4),
    Tile(64, 128, 64, warps=4, stages=4),
    Tile(64, 128, 64, stages=4),
    Tile(64, 256, 64),
    Tile(128, 128, 64),
]
CANDIDATES = {
    "convolution": PRODUCTS[:3],
    "norm_qkv": PRODUCTS[3:],
    "relative_attention": [Tile(64, 64, warps=4), Tile(64, 64, warps=4, stages=2), Tile(32, 128, warps=4, stages=2)],
    "add_attended": PRODUCTS,
    "norm_inner": PRODUCTS[3:],
    "add_outer": PRODUCTS,
}


@dataclass
class Bench:
    """Launches by kernel over `rows` of `frames`: the i-th with the weights of the i-th layer."""

    flat: TritonEncoder
    rows: int
    frames: int

    def __post_init__(self) -> None:
        self.layers = [*self.flat.layers, *self.flat.up_layers]
        self.tables = self.flat._tables_for(0, self.frames) + self.flat._tables_for(1, self.frames)
        self.lengths = torch.full((self.rows,), self.frames, dtype=torch.int32)
        layer, dtype = self.layers[0], self.flat.precision.dtype
        width, inner = layer.outer.weight.shape
        self.x = torch.randn(self.rows, self.frames, width)
        self.up = torch.empty(self.rows, self.frames, len(self.flat.up.bias))
        self.qkv = torch.randn(self.rows, self.frames, 3 * width, dtype=dtype)
        self.attended = torch.randn(self.rows, self.frames, width, dtype=dtype)
        self.inner = torch.randn(self.rows, self.frames, inner, dtype=dtype)

    def launch(self, name: str, i: int) -> None:
        flat, layer, lengths, x = self.flat, self.layers[i], self.lengths, self.x
        if name == "convolution":
            flat.product(name, flat.ahead, x, lengths, self.attended, activation="leaky_relu")
            flat.product(name, flat.back, self.attended, lengths, x, add=True)
            flat.product(name, flat.up, x, lengths, self.up)
        elif name == "norm_qkv":
            flat.product(name, layer.qkv, x, lengths, self.qkv, epsilon=layer.epsilon)
        elif name == "relative_attention":
            flat.attend(layer, self.qkv, self.tables[i], lengths)
        elif name == "add_attended":
            flat.product(name, layer.out, self.attended, lengths, x, add=True)
        elif name == "norm_inner":
            flat.product(name, layer.inner, x, lengths, self.inner, epsilon=layer.epsilon, activation="silu")
        else:
            flat.product(name, layer.outer, self.inner, lengths, x, add=True)

    def time(self, name: str) -> float:
        """Microseconds of what `launch` does."""

        def chain() -> None:
            for i in range(len(self.layers)):
                self.launch(name, i)

        return microseconds(chain, 10) / len(self.layers)


def main() -> None:
    torch.manual_seed(0)
    encoder = UpsampleConformerEncoder().eval().to("cuda")
    print(f"{torch.cuda.get_device_name()}\n")
    with torch.device("cuda"), torch.inference_mode():
        with torch.backends.cudnn.flags(allow_tf32=False):
            exact = [encode(encoder, *rows_of(*size)) for size in TOLD]
        torch.backends.cuda.matmul.allow_tf32 = True
        flat = TritonEncoder(encoder, HALF)
        print_whole(encoder, flat, exact)
        print_launches(flat, *rows_of(*TOLD[0]))
        print_tiles([Bench(flat, *size) for size in SIZES], CANDIDATES)


def rows_of(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Embedded tokens, each row a little shorter than the one before, and their lengths."""
    lengths = tokens - 9 * torch.arange(rows)
    embedded = torch.randn(rows, tokens, 512, generator=torch.Generator("cuda").manual_seed(0))
    return embedded * within(lengths, tokens)[..., None], lengths


def print_whole(encoder: Any, flat: TritonEncoder, exact: list[Tensor]) -> None:
    """Encoders with TF32 allowed: how far off they are, relative to all numbers, and how long they take."""
    print("| rows | tokens | encoder | relative error | ms |\n|---|---|---|---|---|")
    for (rows, tokens), expected in zip(TOLD, exact, strict=True):
        embedded, lengths = rows_of(rows, tokens)
        counts = within(2 * lengths, 2 * tokens)[..., None]
        ways: dict[str, Callable[..., Tensor]] = {"layers": partial(encode, encoder), "kernels": flat.encode}
        for way, encoded in ways.items():
            run = partial(encoded, embedded, lengths)
            error = ((run() - expected) * counts).norm() / (expected * counts).norm()
            print(f"| {rows} | {tokens} | {way} | {error:.1e} | {microseconds(run, 10) / 1000:.3f} |", flush=True)
    print()


def print_launches(flat: TritonEncoder, embedded: Tensor, lengths: Tensor) -> None:
    """Every kernel of one encoder in a graph, with what it takes on the whole."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flat.encode(embedded, lengths)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        graph.replay()
        torch.cuda.synchronize()
    times, launches = Counter[str](), Counter[str]()
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            times[event.name[:60]] += event.time_range.elapsed_us()
            launches[event.name[:60]] += 1
    print("| kernel | launches | us a launch | us |\n|---|---|---|---|")
    for name, time in times.most_common():
        print(f"| {name} | {launches[name]} | {time / launches[name]:.1f} | {time:.0f} |")
    print()
