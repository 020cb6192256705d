"""What PyTorch's allocator keeps of the GPU's memory, and when it gives some back."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from harness.pipeline import Pipeline
from harness.settings import choice
from optimizations.base import Evidence, Optimization, register

PROFILES = ("conservative", "balanced", "aggressive")
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Both of its names: the second is the old one, but overrules the first wherever somebody has set it."""
SETTINGS = "expandable_segments:True"
FRAGMENTED = 0.25
"""Share of the reserved memory that nothing uses, from which the balanced profile gives it back."""
SHOWN = ("expandable_segments", "garbage_collection_threshold", "max_split_size")


@register
class CudaCache(Optimization):
    """Expandable segments, and a policy for the allocator's cache.

    Baseline: PyTorch asks the driver for segments of fixed size and keeps them. A mel of another length next time
    does not fit the holes that the last one left, so it asks for more: memory is reserved that nothing uses.

    This: segments that grow page by page (`expandable_segments`), so that holes close up. The profiles differ in when
    cached memory goes back to the driver. `conservative`: never. `balanced`: after an utterance that leaves more than
    a quarter of it unused. `aggressive`: garbage collection and `empty_cache` between T3 and S3Gen, which trades time
    (the driver is asked again, for every utterance) for memory that other processes may use meanwhile.

    Where it cannot help: peaks of what is *allocated* stay as they are, for the model needs what it needs; what can
    fall is what is *reserved* beyond that. The allocator's other settings, garbage_collection_threshold and
    max_split_size_mb, are left alone because they do not act on expandable segments.

    Campaign: "11.6 % VRAM reduction for 27-30 % time". It read the driver's figure after `empty_cache`, that is the
    cache and not the use, and emptied it on the hot path.

    Evidence: the settings as the allocator itself reports them; allocated and reserved memory when it was applied and
    after the runs, and the share of the reserved memory that nothing used; how often the cache was emptied.
    """

    name = "cuda_cache"
    only_on_gpu = True

    @dataclass
    class Config:
        """`profile`: conservative, balanced or aggressive."""

        profile: str = choice(*PROFILES, default="balanced")

    def environment(self) -> dict[str, str]:
        return dict.fromkeys(VARIABLES, SETTINGS)

    def unavailable(self, pipeline: Pipeline) -> str | None:
        if pipeline.device.type != "cuda":
            return f"the allocator that this tunes is CUDA's; this pipeline runs on {pipeline.device}: use device=cuda"
        return None

    def apply(self, pipeline: Pipeline) -> None:
        self._device, self._n_emptied = pipeline.device, 0
        self._before = usage(pipeline.device)
        if self.config.profile == "balanced":
            pipeline.enter_around(self._tidied)
        if self.config.profile == "aggressive":
            pipeline.call_between(self._empty_behind_t3)

    def evidence(self, pipeline: Pipeline) -> Evidence:
        settings = torch.cuda.memory._snapshot(pipeline.device)["allocator_settings"]
        after = usage(pipeline.device)
        facts: dict[str, Any] = {
            "allocator": torch.cuda.get_allocator_backend(),
            "settings": {name: settings.get(name) for name in SHOWN},
            "before": self._before,
            "after": after,
            "driver_allocations_count": after["driver_allocations_count"] - self._before["driver_allocations_count"],
            "empty_cache_calls_count": self._n_emptied,
        }
        if not settings.get("expandable_segments"):
            return Evidence(
                False,
                facts,
                "the allocator does not use expandable segments: set PYTORCH_ALLOC_CONF=expandable_segments:True "
                "before the process touches CUDA (not every platform supports them)",
            )
        return Evidence(True, facts)

    @contextmanager
    def _tidied(self) -> Iterator[None]:
        yield
        if usage(self._device)["unused_share"] > FRAGMENTED:
            self._empty()

    def _empty_behind_t3(self, stage: str) -> None:
        if stage == "generate_tokens":
            gc.collect()
            self._empty()

    def _empty(self) -> None:
        torch.cuda.empty_cache()
        self._n_emptied += 1


def usage(device: torch.device) -> dict[str, float]:
    """The allocator's books: what tensors hold, what it holds from the driver, the share of that which is unused."""
    stats = torch.cuda.memory_stats(device)
    allocated, reserved = (stats.get(f"{kind}_bytes.all.current", 0) for kind in ("allocated", "reserved"))
    return {
        "allocated_bytes": allocated,
        "reserved_bytes": reserved,
        "unused_share": round(unused_share(allocated, reserved), 4),
        "driver_allocations_count": stats.get("num_device_alloc", 0),
    }


def unused_share(allocated: int, reserved: int) -> float:
    """Fragmentation, in the widest sense: the part of the reserved memory that no tensor uses.

    >>> unused_share(75, 100)
    0.25
    """
    return 1 - allocated / reserved if reserved else 0.0
