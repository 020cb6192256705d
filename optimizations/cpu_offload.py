"""Weights wait in host memory while nobody computes with them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from chatterbox.models.t3 import T3
from torch import Tensor, nn

from harness.measure import synchronize
from harness.pipeline import Pipeline
from harness.settings import choice
from optimizations.base import Evidence, Optimization, register
from optimizations.common.modules import CONDITIONING, parts
from optimizations.t3.decoder import Decoder

PROFILES = ("conditioning", "sequential")


@register
class CpuOffload(Optimization):
    """Keep on the GPU only what the current stage computes with.

    Baseline: everything is on the GPU all the time, though the speech tokenizer, the speaker encoder and the voice
    encoder (530 MB at full size) only turn a reference clip into conditionals, and built-in voices bring theirs along.

    This: `conditioning` keeps those three on the CPU and fetches them only while a reference clip is prepared.
    `sequential` also has T3 (2.1 GB), the flow (450 MB) and the vocoder (83 MB) take turns: whichever is called comes
    in, and the others leave. Weights never change, so leaving is free after the first time: the copy on the CPU is
    still good. From pinned memory the copy in runs at the bus's speed.

    Where it cannot help: `conditioning` saves memory, never time. `sequential` copies all weights in once per
    utterance, some 100 ms over PCIe; batches share that. It moves addresses, so it excludes captured CUDA graphs, and
    bitsandbytes' INT8 layers, which keep references of their own to the weights. Its 4-bit layers move, except for
    their scales, which are small.

    Campaign: "0.2 % VRAM reduction": it moved the 5.7 MB of the voice encoder and left the other 525.

    Evidence, from the tensors themselves: where each group was in each stage, bytes moved each way, seconds spent
    moving, with the device synchronized.
    """

    name = "cpu_offload"
    only_on_gpu = True

    @dataclass
    class Config:
        """`profile`: conditioning or sequential. `pinned`: keep the CPU's copies in page-locked memory."""

        profile: str = choice(*PROFILES)
        pinned: bool = True

    def unavailable(self, pipeline: Pipeline) -> str | None:
        if pipeline.device.type == "cpu":
            return "this pipeline is on the CPU already: use device=cuda"
        if self.config.profile != "sequential":
            return None
        if isinstance(decoder := pipeline.stages["generate_tokens"], Decoder) and decoder.captured_loop:
            return (
                "cuda_graphs has captured work on weights that would move: switch it off, or use "
                "optimizations.cpu_offload.profile=conditioning"
            )
        if parts := _int8(pipeline):
            return (
                f"{' and '.join(parts)} hold bitsandbytes' INT8 layers, which keep references of their own to their "
                "weights: use optimizations.quantization.strategy=aggressive, whose 4-bit layers do not, or "
                "optimizations.cpu_offload.profile=conditioning"
            )
        return None

    def apply(self, pipeline: Pipeline) -> None:
        model, s3gen, t3 = pipeline.model, pipeline.model.s3gen, pipeline.model.t3
        self._meter = Meter(pipeline.device)
        self._places: dict[str, dict[str, str]] = {}
        self._groups = {"conditioning": self._group(pipeline, *(parts(pipeline)[name] for name in CONDITIONING))}
        _pin_device(pipeline, s3gen)
        pipeline.swap_item(model.__dict__, "prepare_conditionals", self._fetching(model.prepare_conditionals))
        if self.config.profile == "sequential":
            _pin_device(pipeline, t3)
            for name, module in (("t3", t3), ("flow", s3gen.flow), ("vocoder", s3gen.mel2wav)):
                if next(module.parameters()).device.type == pipeline.device.type:  # or another plugin sent it away
                    self._groups[name] = self._group(pipeline, module)
                    self._fetch_on_call(pipeline, name, module)
        for group in self._groups.values():
            group.send()
        pipeline.call_between(self._note_places)

    def evidence(self, pipeline: Pipeline) -> Evidence:
        facts: dict[str, Any] = {
            "device_by_stage": self._places,
            "group_bytes": {name: group.n_bytes for name, group in self._groups.items()},
            "bytes_to_device": self._meter.bytes_to_device,
            "bytes_to_host": self._meter.bytes_to_host,
            "moves_count": self._meter.n_moves,
            "moving_s": round(self._meter.seconds, 6),
            "host_copies_pinned": all(group.is_pinned for group in self._groups.values() if group.n_bytes),
        }
        waiting = [name for name, group in self._groups.items() if group.place.type == "cpu"]
        if pipeline.device.type == "cpu" or "conditioning" not in waiting:
            return Evidence(False, facts, "the conditioning modules are on the device")
        return Evidence(True, facts)

    def _group(self, pipeline: Pipeline, *modules: nn.Module) -> Group:
        group = Group(modules, pipeline.device, self.config.pinned, self._meter)
        pipeline.on_undo(group.bring)
        return group

    def _fetching(self, prepare: Any) -> Any:
        """Upstream's `prepare_conditionals` with its modules on the device for as long as it takes."""

        def prepare_conditionals(*args: Any, **kwargs: Any) -> None:
            group = self._groups["conditioning"]
            group.bring()
            try:
                prepare(*args, **kwargs)
                self._note_places("condition_with_reference_clip")
            finally:
                group.send()

        return prepare_conditionals

    def _fetch_on_call(self, pipeline: Pipeline, name: str, module: nn.Module) -> None:
        """Have the group come in, and all others leave, when any part of its module is called, by whichever loop."""

        def fetch(*_: object) -> None:
            if self._groups[name].is_away:
                for other in self._groups.values():
                    other.send()
                self._groups[name].bring()

        for part in module.children():
            pipeline.on_undo(part.register_forward_pre_hook(fetch).remove)

    def _note_places(self, stage: str) -> None:
        """At a stage's end, where its weights are."""
        self._places[stage] = {name: str(group.place) for name, group in self._groups.items()}


@dataclass
class Meter:
    """What moving cost so far."""

    device: torch.device
    bytes_to_device: int = 0
    bytes_to_host: int = 0
    n_moves: int = 0
    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        synchronize(self.device)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.n_moves += 1
        self.seconds += time.perf_counter() - start


class Group:
    """Modules whose weights move together between `home`, where they compute, and the CPU."""

    def __init__(self, modules: tuple[nn.Module, ...], home: torch.device, pinned: bool, meter: Meter) -> None:
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        self._tensors = [t for t in {id(t): t for t in tensors}.values() if t.device.type == home.type]
        self._home, self._pinned, self._meter = home, pinned, meter
        self._copies: list[Tensor] = []
        self.is_away = False

    @property
    def n_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors)

    @property
    def place(self) -> torch.device:
        """Where the first of the weights is."""
        return self._tensors[0].device

    @property
    def is_pinned(self) -> bool:
        return bool(self._copies) and all(copy.is_pinned() for copy in self._copies)

    def send(self) -> None:
        """Let the weights be their copies on the CPU, which are made the first time."""
        if self.is_away:
            return
        with self._meter.running(), torch.inference_mode(False), torch.no_grad():
            if not self._copies:
                self._copies = [self._host_copy(tensor) for tensor in self._tensors]
                self._meter.bytes_to_host += self.n_bytes
            for tensor, copy in zip(self._tensors, self._copies, strict=True):
                tensor.data = copy
        self.is_away = True

    def bring(self) -> None:
        """Copy the weights to where they compute."""
        if not self.is_away:
            return
        # Parameters have to stay ordinary tensors, also when a stage runs in inference mode.
        with self._meter.running(), torch.inference_mode(False), torch.no_grad():
            for tensor, copy in zip(self._tensors, self._copies, strict=True):
                tensor.data = torch.empty_like(copy, device=self._home).copy_(copy, non_blocking=True)
            self._meter.bytes_to_device += self.n_bytes
        self.is_away = False

    def _host_copy(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="cpu", pin_memory=self._pinned).copy_(tensor)


def _pin_device(pipeline: Pipeline, module: nn.Module) -> None:
    """Have `module.device` name the pipeline's device, wherever its weights are.

    Upstream reads it off one parameter (S3Gen: of its speech tokenizer!) and sends its inputs there.
    """
    cls = type(module)
    pipeline.swap(module, "__class__", type(cls.__name__, (cls,), {"device": pipeline.device}))


def _int8(pipeline: Pipeline) -> list[str]:
    """Which of T3 and S3Gen hold layers whose weights also hang on bitsandbytes' own state."""
    model = pipeline.model
    wholes: dict[str, T3 | nn.Module] = {"T3": model.t3, "S3Gen": model.s3gen}
    return [
        name
        for name, whole in wholes.items()
        if any(type(module).__name__ == "Linear8bitLt" for module in whole.modules())
    ]
