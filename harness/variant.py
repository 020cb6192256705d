"""One pipeline with its optimizations, inside its own process: the methods that `harness.worker` answers with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from harness.answers import Account, Answer, Order, Part, Said, seal
from harness.errors import UserError
from harness.fitting import fit
from harness.locations import trace
from harness.plugins import import_catalogue, import_path
from harness.results import slug
from harness.sampling import ask

IMPORTS_S = time.time() - psutil.Process().create_time()
"""From this process's start to here. `preload` imports this module last, and its children inherit the figure: what
a process of their own would have spent on importing the packages."""


@dataclass(frozen=True)
class Setup:
    """All that a child needs to become one variant. `plugins` maps names to parameters, enabled ones only."""

    variant: str
    folder: Path
    loader: str
    loader_arguments: dict[str, Any]
    device: str
    sampling: dict[str, Any] = field(default_factory=dict)
    language: str | None = None
    plugins: dict[str, dict[str, Any]] = field(default_factory=dict)
    plugin_modules: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    threads: int | None = None

    @property
    def log(self) -> Path:
        """Where everything goes that the child prints."""
        return self.folder / "logs" / f"{slug(self.variant)}.log"


class Variant:
    """One variant, from its loading on."""

    def __init__(
        self,
        setup: Setup,
        inherited: Mapping[str, str] | None = None,
        tell: Callable[[bytes], None] = lambda _samples: None,
        hear: Callable[[bool], Any] = lambda _wait_for_it: None,
    ) -> None:
        """`inherited` are the environment's variables as they would have been without the optimizations.

        `tell` sends samples before the answer to which they belong. `hear` is what the other end says meanwhile, an
        empty tuple if that is nothing; it may wait for it.
        """
        self.setup = setup
        self.tell, self.hear = tell, hear
        self.inherited = inherited or {}
        self.waves: list[np.ndarray] = []

    def load(self) -> dict[str, Any]:
        """Load the pipeline and apply the optimizations; what that cost, and what became of each."""
        import torch

        from harness import environment, measure

        start = time.perf_counter()
        if self.setup.threads:
            torch.set_num_threads(self.setup.threads)
        self.device = torch.device(self.setup.device)
        held = measure.held_mb(self.device)
        load = import_path(self.setup.loader)
        create: Any = import_catalogue(self.setup.plugin_modules).create if self.setup.plugins else None
        self.fitted = fit(
            lambda: ask(
                load(device=self.setup.device, **self.setup.loader_arguments), self.setup.sampling, self.setup.language
            ),
            self.setup.plugins,
            create,
            self.inherited,
        )
        self.pipeline = self.fitted.pipeline
        measure.synchronize(self.device)
        load_s = time.perf_counter() - start
        return {
            "imports_s": IMPORTS_S,
            "load_s": load_s,
            "model_memory_mb": measure.held_mb(self.device) - held,
            "memory_kind": measure.memory_kind(self.device),
            "trained": self.pipeline.trained,
            "voices": sorted(self.pipeline.voices),
            "device": environment.describe_device(self.device),
            "gpu": measure.gpu_uuid(self.device),
            "optimizations": self.fitted.statuses,
        }

    def prepare(self) -> None:
        """Before a call and outside its time: a new peak of memory begins."""
        from harness import measure

        if self.device.type == "cuda":
            measure.reset_peak(self.device)

    def speak(self, orders: Sequence[Order], offset: int) -> Answer:
        """Speak the orders in one call. Of none at all the answer takes as long as the way there and back."""
        return self._answer(lambda: self._synthesize(orders), offset)

    def stream(self, orders: Sequence[Order], offset: int) -> Answer:
        """The same, one order after the other in chunks, each of which is sent as soon as it is there."""
        return self._answer(lambda: [self._in_chunks(order) for order in orders], offset)

    def serve(self, offset: int) -> Answer:
        """Speak for callers who come while others are spoken for, until the other end says None.

        What comes of each is sent as soon as it is there. The answer's utterances are those that were said to their
        end, in the order of their callers.
        """
        from harness.pipeline import Chunk, Request

        start, said, idle = time.perf_counter(), dict[int, Said](), True
        desk = self.pipeline.desk()
        while True:
            while (heard := self.hear(idle)) != ():
                if heard is None:
                    return Answer(time.perf_counter() - start, tuple(said[caller] for caller in sorted(said)))
                caller, order = heard
                desk.take(caller, Request(**vars(order)))
                idle = False
            told = desk.work()
            idle = told is None
            for caller, one in told or ():
                if isinstance(one, Chunk):
                    self.tell(Part(caller, np.asarray(one.wave, dtype=np.float32).tobytes()).to_bytes())
                    continue
                if isinstance(one, Exception):
                    print(f"caller {caller}: {one}")
                else:
                    said[caller] = self._said(one, np.asarray(one.wave, dtype=np.float32), offset)
                self.tell(Part(caller, failed=isinstance(one, Exception)).to_bytes())

    def _answer(self, speak: Callable[[], list[Any]], offset: int) -> Answer:
        from harness import measure

        start = time.perf_counter()
        try:
            utterances, seconds = measure.timed(self.device, speak)
            self.waves = [np.array(utterance.wave, dtype=np.float32, copy=True) for utterance in utterances]
            said = [self._said(utterance, wave, offset) for utterance, wave in zip(utterances, self.waves, strict=True)]
        except UserError:
            raise
        except Exception:
            self.waves = []
            return Answer(time.perf_counter() - start, error=trace())
        return Answer(seconds, tuple(said))

    def _synthesize(self, orders: Sequence[Order]) -> list[Any]:
        if not orders:
            return []
        if len(orders) == 1:
            (order,) = orders
            return [self.pipeline.synthesize(*astuple(order))]
        from harness.pipeline import Request

        requests = [Request(**vars(order)) for order in orders]
        return self.pipeline.synthesize_batch(requests)

    def _in_chunks(self, order: Order) -> Any:
        chunks = self.pipeline.synthesize_stream(*astuple(order))
        while True:
            try:
                chunk = next(chunks)
            except StopIteration as end:
                return end.value
            self.tell(np.asarray(chunk.wave, dtype=np.float32).tobytes())

    def _said(self, utterance: Any, wave: np.ndarray, offset: int) -> Said:
        return Said(
            n_tokens=utterance.n_tokens,
            n_segments=len(utterance.segments),
            hit_token_cap=utterance.hit_token_cap,
            sample_rate=utterance.sample_rate,
            stages_s=utterance.stages_s,
            seal=seal(wave, offset),
        )

    def account(self) -> Account:
        """After a call and outside its time: what it left behind. The waves follow, by `take_waves`."""
        from harness import measure

        memory = None
        counts: dict[str, float] = {"hooks": measure.hooks(getattr(self.pipeline, "model", None))}
        if self.device.type == "cuda":
            peak = measure.peak(self.device)
            memory = {"kind": peak.kind, "peak_mb": peak.peak_mb, "detail": peak.detail}
            counts["memory_mb"] = measure.allocated_mb(self.device)
        return Account(len(self.waves), memory, counts)

    def take_waves(self) -> list[bytes]:
        """The samples of the last call's waves, float32, once."""
        waves, self.waves = self.waves, []
        return [wave.tobytes() for wave in waves]

    def state(self) -> dict[str, Any]:
        """The device's clocks, temperature and processes, as this process sees them."""
        from harness import measure

        return measure.device_state(self.device)

    def record_stages(self, cases: Sequence[Any], seed: int, path: Path) -> bool:
        """Speak `harness.quality.replay.Case`s and keep in `path` what went from stage to stage."""
        from harness.quality import replay

        replay.save(path, replay.record(self.pipeline, cases, seed))
        return True

    def replay_stages(self, cases: Sequence[Any], seed: int, inputs: Path, path: Path) -> bool:
        """Keep in `path` what each stage makes of the recorded inputs."""
        from harness.quality import replay

        replay.save(path, replay.replay(self.pipeline, cases, replay.load(inputs, replay.Inputs), seed))
        return True

    def evidence(self) -> dict[str, dict[str, Any]]:
        """After the runs: what each optimization shows for having been active."""
        return self.fitted.evidence()
