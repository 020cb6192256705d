"""Times HiFT's kernels on a full-size HiFT with random weights, next to PyTorch's operators and cuDNN.

    python -m optimizations.bench vocoder

Every figure is a CUDA graph's, of a mel of 512 frames (10 s). Prints Markdown tables: tiles, convolutions, inference.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from chatterbox.models.s3gen.f0_predictor import ConvRNNF0Predictor
from chatterbox.models.s3gen.hifigan import HiFTGenerator
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from optimizations.bench.timing import microseconds
from optimizations.vocoder import static_shape
from optimizations.vocoder.hift import folded
from optimizations.vocoder.triton_hift import (
    HALF,
    N_BRANCHES,
    TF32,
    TILES,
    ChannelsLastHiFT,
    End,
    Kind,
    Pair,
    Tile,
    pairs,
)

FRAMES = 512
CANDIDATES = {
    256: [(128, 128, 8, 4), (128, 128, 8, 3), (128, 64, 8, 4), (64, 128, 4, 4), (128, 64, 8, 1)],
    128: [(128, 128, 8, 4), (128, 128, 8, 3), (256, 128, 8, 3), (64, 128, 4, 4), (128, 128, 8, 1)],
    64: [(128, 64, 8, 3), (256, 64, 8, 3), (128, 64, 4, 4), (64, 64, 4, 4), (128, 64, 8, 1), (256, 64, 8, 1)],
}
"""Rows, columns, warps and stages by channels. With one stage a window is read through the first-level cache, where
the next tap finds it again; with more it is fetched ahead, around that cache."""
DEPTH = 64
N_THREADS = 12


def main() -> None:
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    with torch.inference_mode():
        hift = full_size()
        print(f"{torch.cuda.get_device_name()}, {FRAMES} frames\n")
        tiles = fastest_tiles(hift)
        print_convolutions(hift, tiles)
        print_inference(hift, tiles)


def full_size() -> Any:
    """Chatterbox's HiFT with random weights, the weight norm folded in."""
    hift = HiFTGenerator(
        sampling_rate=24000,
        upsample_rates=[8, 5, 3],
        upsample_kernel_sizes=[16, 11, 7],
        source_resblock_kernel_sizes=[7, 7, 11],
        source_resblock_dilation_sizes=[[1, 3, 5]] * 3,
        f0_predictor=ConvRNNF0Predictor(),
    )
    for path, module in list(hift.named_modules()):
        if is_parametrized(module, "weight"):
            hift.set_submodule(path, folded(module))
    hift.stft_window = hift.stft_window.cuda()
    return hift.cuda().eval().requires_grad_(False)


def steps_of(hift: Any, level: int) -> tuple[int, int]:
    """Steps of a level's signal a frame, and one more at the last level."""
    rate = 1
    for up in hift.ups[: level + 1]:
        rate *= up.stride[0]
    return rate, int(level == hift.num_upsamples - 1)


def pair_of(flat: ChannelsLastHiFT, pair: Pair, level: int) -> Callable[[], object]:
    """Two convolutions with what belongs to them, on random numbers."""
    rate, more = steps_of(flat.hift, level)
    steps, branches, channels = rate * FRAMES + more, len(pair.alpha), pair.first.channels
    end = End(torch.full((1,), FRAMES, device="cuda"), rate, more)
    signal = torch.randn(branches, 1, steps, channels, device="cuda")
    active = signal.to(flat.precision.dtype)

    @torch.inference_mode()  # which is a thread's own
    def run() -> None:
        _, between = flat.run(pair.first, active, steps, end, alpha=pair.second_alpha)
        flat.run(pair.second, between, steps, end, total=True, residual=signal.clone(), alpha=pair.alpha)

    return run


def fastest_tiles(hift: Any) -> dict[Kind, Tile]:
    """Of all candidates those with which a pair of convolutions takes the least time."""
    works: dict[Kind, dict[Tile, Callable[[], object]]] = {}
    for level in range(hift.num_upsamples):
        sides = [hift.source_resblocks[level]], hift.resblocks[level * N_BRANCHES : (level + 1) * N_BRANCHES]
        for blocks in sides:
            channels = hift.ups[level].out_channels
            kind, pair = Kind(channels, len(blocks)), pairs(list(blocks)[::-1], HALF)[1]
            works[kind] = {}
            for rows, columns, warps, stages in CANDIDATES[channels]:
                tile = Tile(rows, columns, DEPTH, warps, stages)
                works[kind][tile] = pair_of(ChannelsLastHiFT(hift, HALF, TILES | {kind: tile}), pair, level)
    with ThreadPoolExecutor(N_THREADS) as pool:  # compiled side by side
        list(pool.map(lambda work: work(), [work for tried in works.values() for work in tried.values()]))
    chosen = dict(TILES)
    print("A pair of convolutions, and a copy of what is added to it:\n")
    print("| channels | branches | rows x columns, warps, stages: us |\n|---|---|---|")
    for kind, tried in works.items():
        times = {tile: microseconds(work) for tile, work in tried.items()}
        chosen[kind] = min(times, key=lambda tile: times[tile])
        shown = ", ".join(f"{t.rows}x{t.columns} w{t.warps} s{t.stages}: {time:.1f}" for t, time in times.items())
        print(f"| {kind.channels} | {kind.branches} | {shown} |")
    print(f"\nFastest: {chosen}\n")
    return chosen


def print_convolutions(hift: Any, tiles: dict[Kind, Tile]) -> None:
    """Single convolutions, snake included, next to cuDNN's without it."""
    flat = ChannelsLastHiFT(hift, HALF, tiles)
    print("| channels | kernel | us | TFLOP/s | GB/s | cuDNN's conv1d in TF32, us |\n|---|---|---|---|---|---|")
    for index, block in enumerate(hift.resblocks):
        level = index // N_BRANCHES
        rate, more = steps_of(hift, level)
        (pair, *_), layer, steps = pairs([block], HALF), block.convs1[0], rate * FRAMES + more
        x = torch.randn(1, 1, steps, layer.in_channels, device="cuda").half()
        end = End(torch.full((1,), FRAMES, device="cuda"), rate, more)
        time = microseconds(partial(flat.run, pair.first, x, steps, end, alpha=pair.second_alpha))
        signal = torch.randn(1, layer.in_channels, steps, device="cuda")
        theirs = microseconds(partial(F.conv1d, signal, layer.weight, layer.bias, padding=layer.padding))
        flops, size = 2 * steps * layer.weight.numel(), 2 * x.nbytes + pair.first.weight.nbytes
        print(
            f"| {layer.in_channels} | {layer.kernel_size[0]} | {time:.1f} | {flops / time / 1e6:.0f} | "
            f"{size / time / 1e3:,.0f} | {theirs:.1f} |"
        )
    print()


def print_inference(hift: Any, tiles: dict[Kind, Tile]) -> None:
    """From mel to wave as a whole, and what it is off from float32."""
    mel = torch.randn(1, 80, FRAMES, device="cuda")
    frames = torch.full((1,), FRAMES, device="cuda")
    excitation = static_shape.source(hift, mel, frames)
    torch.backends.cudnn.allow_tf32 = False
    exact = static_shape.decode(hift, mel, excitation, frames)
    torch.backends.cudnn.allow_tf32 = True
    ways: dict[str, static_shape.Decode] = {
        "PyTorch's operators, TF32": partial(static_shape.decode, hift),
        "kernels, TF32": ChannelsLastHiFT(hift, TF32).decode,
        "kernels, float16": ChannelsLastHiFT(hift, HALF).decode,
        "kernels, float16, fastest tiles": ChannelsLastHiFT(hift, HALF, tiles).decode,
    }

    def whole(decode: static_shape.Decode) -> Tensor:
        return decode(mel, static_shape.source(hift, mel, frames), frames)

    print("| way | decode, us | source and decode, us | relative error of decode |\n|---|---|---|---|")
    for name, decode in ways.items():
        error = (decode(mel, excitation, frames) - exact).norm() / exact.norm()
        times = microseconds(partial(decode, mel, excitation, frames)), microseconds(partial(whole, decode))
        print(f"| {name} | {times[0]:.0f} | {times[1]:.0f} | {error:.1e} |")
