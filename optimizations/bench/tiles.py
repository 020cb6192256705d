"""Times each kernel of a stage in candidate tiles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from typing import Any, Protocol

import torch
from triton.runtime.errors import OutOfResources

from optimizations.flow.tiles import Tile, Tiled

Candidates = Mapping[str, Sequence[Tile]]


class Bench(Protocol):
    """Launches by kernel over `rows` of `frames`, through `flat`."""

    flat: Any
    rows: int
    frames: int

    def launch(self, name: str, i: int) -> None:
        """The kernel with the i-th layer's weights."""
        ...

    def time(self, name: str) -> float:
        """Microseconds of what `launch` does."""
        ...


def print_tiles(benches: Sequence[Bench], candidates: Candidates) -> None:
    """Of each kernel and size what is launched, and the candidates, fastest first."""
    compile_all(benches[0], candidates)
    print("| kernel | rows | frames | us | tile: us |\n|---|---|---|---|---|")
    for bench in benches:
        for name, tiles in candidates.items():
            launched, times = bench.time(name), {}
            for tile in with_tiles(bench.flat, name, tiles):
                with suppress(OutOfResources):
                    times[tile] = bench.time(name)
            told = [f"{short(tile)}: {times[tile]:.1f}" for tile in sorted(times, key=lambda tile: times[tile])]
            print(f"| {name} | {bench.rows} | {bench.frames} | {launched:.1f} | {', '.join(told)} |")
    print("\nA tile is rows x columns x depth, warps, stages, running.\n")


def with_tiles(flat: Tiled, name: str, tiles: Sequence[Tile]) -> Iterator[Tile]:
    """Each tile, while it is what the kernel takes for any number of frames; then what was before."""
    before = flat.tiles
    for tile in tiles:
        flat.tiles = {**before, name: (tile,)}
        yield tile
    flat.tiles = before


def compile_all(bench: Bench, candidates: Candidates) -> None:
    """Launch every candidate once, in threads, as a compilation takes seconds."""

    def launch(task: tuple[str, Tile]) -> None:
        name, tile = task
        own = copy(bench)
        own.flat = copy(bench.flat)
        own.flat.tiles = {name: (tile,)}
        with suppress(OutOfResources), torch.inference_mode():
            own.launch(name, 0)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(launch, [(name, tile) for name, tiles in candidates.items() for tile in tiles]))
    torch.cuda.synchronize()


def short(tile: Tile) -> str:
    return f"{tile.rows}x{tile.columns}x{tile.depth} w{tile.warps} s{tile.stages} r{tile.running}"
