"""Which part of its work one program of the flow's kernels does, by how many programs the device runs at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from optimizations.common.launching import can_overlap, launch, n_processors, shared_bytes

SHARED_BYTES = 96 * 1024
"""Shared memory that each kernel's last tile needs for one program; on Hopper, which has it, a quarter more."""

ANY = math.inf


@dataclass(frozen=True)
class Tile:
    """What one program of a kernel does.

    `rows` frames against `columns` outputs (keys for attention), `depth` inputs at a time. `stages`: loads that are
    under way at once. `running`: programs a processor, which for `norm_product` take one tile after the other; 0 is as
    many as there are tiles. It is taken for up to `at_once` programs a processor (`ANY`: however many), where a program
    may have so many `kilobytes` of shared memory.
    """

    rows: int
    columns: int = 0
    depth: int = 0
    warps: int = 8
    stages: int = 3
    running: int = 0
    at_once: float = 0
    kilobytes: int = SHARED_BYTES >> 10


Tiles = Mapping[str, tuple[Tile, ...]]


class Tiled:
    """Launches kernels, each in the first of its tiles that the device has room for."""

    def launch_in(self, tiles: Tiles, device: torch.device) -> None:
        """Take those of `tiles` that the device has the shared memory for; the last of each kernel in any case."""
        room = shared_bytes(device) >> 10
        self.tiles = {name: (*(t for t in few if t.kilobytes <= room), last) for name, (*few, last) in tiles.items()}
        self.overlap = can_overlap(device)
        self.n_processors = n_processors(device)

    def _tile(self, name: str, n_programs: Callable[[Tile], int]) -> Tile:
        *few, last = self.tiles[name]
        return next((tile for tile in few if n_programs(tile) <= tile.at_once * self.n_processors), last)

    def _launch(self, kernel: Any, n_programs: int, args: tuple, sizes: dict[str, Any], tile: Tile) -> None:
        options = {"num_warps": tile.warps, "num_stages": tile.stages, "launch_pdl": self.overlap}
        launch(kernel, (n_programs,), *args, **sizes, OVERLAP=self.overlap, **options)
