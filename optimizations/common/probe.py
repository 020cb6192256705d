"""A look inside one call: which operators and kernels ran, how often, and what was copied between host and device.

Profiling slows everything down, so a probe is a short synthesis of its own and never part of a timed run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from harness.pipeline import STAGES, Pipeline, Stage, Utterance

PROBE_TEXT, PROBE_TOKENS = "Yes.", 8
ATTENTION = re.compile(r"_scaled_dot_product|flash|fmha|mem_eff|cudnn.*(sdpa|attention)", re.IGNORECASE)


@dataclass(frozen=True)
class Profile:
    """Calls by name: `ops` of PyTorch on the host (`aten::cat`), `kernels` on the device, copies among them."""

    ops: Counter[str]
    kernels: Counter[str]

    @property
    def n_cat(self) -> int:
        """Concatenations, each of which allocates and copies."""
        return self.ops["aten::cat"]

    @property
    def n_host_reads(self) -> int:
        """Single numbers read by the host (`.item()`, a tensor in an `if`); on a GPU each one waits for the device."""
        return self.ops["aten::_local_scalar_dense"]

    @property
    def copies(self) -> dict[str, int]:
        """Copies between host and device, by direction."""
        directions = {"HtoD": "host_to_device_count", "DtoH": "device_to_host_count"}
        copies = dict.fromkeys(directions.values(), 0)
        for name, count in self.kernels.items():
            for mark, direction in directions.items():
                if name.startswith(f"Memcpy {mark}"):
                    copies[direction] += count
        return copies

    @property
    def attention(self) -> dict[str, int]:
        """Fused attention by name: the operators that PyTorch dispatched to, and the device's kernels."""
        found = {name: n for name, n in (self.ops + self.kernels).items() if ATTENTION.search(name)}
        return {_short(name): n for name, n in found.items()}


def _short(kernel: str) -> str:
    """A device kernel's name without the parameters of its C++ template."""
    return kernel.removeprefix("void ").split("<")[0].split("(")[0]


def profile(call: Callable[..., Any], *args: Any) -> tuple[Any, Profile]:
    """Run `call(*args)` under PyTorch's profiler; returns its result and what ran."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        result = call(*args)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    ops: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for event in profiler.events():
        (ops if event.device_type == DeviceType.CPU else kernels)[event.name] += 1
    return result, Profile(ops, kernels)


def probe(pipeline: Pipeline) -> Utterance:
    """One short synthesis with the pipeline as it is now."""
    return pipeline.synthesize(PROBE_TEXT, next(iter(pipeline.voices)), seed=0, n_tokens=PROBE_TOKENS)


@contextmanager
def watched_stages(pipeline: Pipeline, watch: Callable[[str, Stage], Stage]) -> Iterator[None]:
    """Wrap every stage as `watch(name, stage)` for a while.

    A permanent wrapper would hide a replaced stage from the plugin that looks for it.
    """
    stages = dict(pipeline.stages)
    pipeline.stages.update({name: watch(name, stage) for name, stage in stages.items()})
    try:
        yield
    finally:
        pipeline.stages.update(stages)


def profile_stages(pipeline: Pipeline, names: Collection[str] = STAGES) -> dict[str, Profile]:
    """What runs inside each of the named stages during one probe."""
    profiles: dict[str, Profile] = {}

    def watch(name: str, stage: Stage) -> Stage:
        def run(*args: Any) -> Any:
            result, profiles[name] = profile(stage, *args)
            return result

        return run if name in names else stage

    with watched_stages(pipeline, watch):
        probe(pipeline)
    return profiles
