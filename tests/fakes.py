"""A pipeline that costs nothing and misbehaves on demand, with optimizations for it.

A text's first word commands: "crash" kills the process, "hang" never returns, "raise" raises, "exhaust" is out
of memory, "short" returns half of the audio that was asked for, "missing" blames the user.
"""

import hashlib
import logging
import os
import signal
import threading
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from harness.changes import Changeable
from harness.errors import UserError
from harness.pipeline import Chunk, Desk, OneAtATime, Request, Told
from optimizations import Evidence, Optimization, register

SAMPLE_RATE = 24_000
TOKENS = 25
TOKEN_S = 0.002


@dataclass
class FakeUtterance:
    wave: np.ndarray
    n_tokens: int
    spent_s: float
    sample_rate: int = SAMPLE_RATE
    segments: tuple[str, ...] = ("all of it",)
    hit_token_cap: bool = False

    @property
    def audio_s(self) -> float:
        return len(self.wave) / self.sample_rate

    @property
    def stages_s(self) -> dict[str, float]:
        return {"generate_tokens": self.spent_s}


@dataclass
class FakePipeline(Changeable):
    """Speaks 25 tokens when it runs free; a token takes 2 ms, divided by `speed`.

    Several texts take as long as all their tokens, or, `together`, as long as the longest's.
    """

    trained: bool = True
    voices: dict[str, None] = field(default_factory=lambda: {"rms": None, "kal16": None})
    speed: float = 1.0
    together: bool = False
    chunk: int = 1000
    shared: bool = False
    calls: int = 0

    def synthesize(
        self, text: str, voice: str, seed: int, n_tokens: int | None = None, language: str | None = None
    ) -> FakeUtterance:
        self.calls += 1
        self._obey(text)
        tokens = n_tokens or TOKENS
        return self._speak(tokens, self._spend(tokens))

    def synthesize_stream(
        self, text: str, voice: str, seed: int, n_tokens: int | None = None, language: str | None = None
    ):
        """In chunks of `chunk` tokens."""
        self.calls += 1
        self._obey(text)
        tokens, spent_s = n_tokens or TOKENS, 0.0
        utterance = self._speak(tokens, spent_s)
        for first in range(0, tokens, self.chunk):
            n = min(self.chunk, tokens - first)
            spent_s += self._spend(n)
            start, end = (len(utterance.wave) * edge // tokens for edge in (first, first + n))
            yield Chunk(utterance.wave[start:end], SAMPLE_RATE, spent_s)
        utterance.spent_s = spent_s
        return utterance

    def desk(self) -> Desk:
        return FakeDesk(self) if self.shared else OneAtATime(self.synthesize_stream)

    def synthesize_batch(self, requests: list[Request]) -> list[FakeUtterance]:
        self.calls += 1
        for request in requests:
            self._obey(request.text)
        tokens = [request.n_tokens or TOKENS for request in requests]
        spent_s = self._spend(max(tokens) if self.together else sum(tokens))
        return [self._speak(n, spent_s) for n in tokens]

    def _obey(self, text: str) -> None:
        match text.split()[0]:
            case "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(1000)
            case "raise":
                raise RuntimeError("the fake raised")
            case "exhaust":
                raise MemoryError
            case "missing":
                raise UserError("something is missing")

    def _spend(self, tokens: int) -> float:
        seconds = tokens * TOKEN_S / self.speed
        time.sleep(seconds)
        return seconds

    def _speak(self, tokens: int, spent_s: float) -> FakeUtterance:
        samples = int(tokens * 0.04 * SAMPLE_RATE)
        return FakeUtterance(0.1 * np.sin(np.arange(samples, dtype=np.float32) / 20), tokens, spent_s)


def load(name: str, device: str, checkpoint_dir: str | None = None, seed: int = 0) -> FakePipeline:
    """A loader as `pipeline.loader` names one; the name says what is wrong with it."""
    if name == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "raise":
        raise RuntimeError("the fake cannot load")
    if name == "missing":
        raise UserError("the fake's checkpoint is missing: put it there")
    return FakePipeline(trained=name != "untrained")


class FakeOptimization(Optimization):
    """Acts on the fake only, so that the real catalogue can list it without harm."""

    extra = True


@register
class FakeFast(FakeOptimization):
    name = "fake_fast"

    @dataclass
    class Config:
        factor: float = 4.0

    def environment(self) -> dict[str, str]:
        return {"FAKE_VARIABLE": "set before loading"}

    def apply(self, pipeline: FakePipeline) -> None:
        pipeline.swap(pipeline, "speed", self.config.factor)

    def evidence(self, pipeline: FakePipeline) -> Evidence:
        return Evidence(True, {"calls": pipeline.calls, "variable": os.environ.get("FAKE_VARIABLE")})


@register
class FakeTogether(FakeOptimization):
    name = "fake_together"

    def apply(self, pipeline: FakePipeline) -> None:
        pipeline.swap(pipeline, "together", True)

    def evidence(self, pipeline: FakePipeline) -> Evidence:
        return Evidence(pipeline.together)


@register
class FakeStream(FakeOptimization):
    """Speaks five tokens at a time; `dishonest`, the last of them twice."""

    name = "fake_stream"

    @dataclass
    class Config:
        dishonest: bool = False

    def apply(self, pipeline: FakePipeline) -> None:
        pipeline.swap(pipeline, "chunk", 5)
        if self.config.dishonest:
            pipeline.wrap(pipeline, "synthesize_stream", self._twice)

    def _twice(self, speak):
        def stream(*args, **kwargs):
            chunks, last = speak(*args, **kwargs), None
            while True:
                try:
                    last = next(chunks)
                except StopIteration as end:
                    yield last
                    return end.value
                yield last

        return stream

    def evidence(self, pipeline: FakePipeline) -> Evidence:
        return Evidence(pipeline.chunk == 5)


class FakeDesk:
    """Speaks five tokens of everybody's in the time that one caller's take."""

    def __init__(self, pipeline: FakePipeline) -> None:
        self.pipeline = pipeline
        self.callers: dict[int, tuple[FakeUtterance, int]] = {}

    def take(self, caller: int, request: Request) -> None:
        self.callers[caller] = self.pipeline._speak(request.n_tokens or TOKENS, 0.0), 0

    def work(self) -> Told | None:
        if not self.callers:
            return None
        self.pipeline._spend(5)
        told: Told = []
        for caller, (utterance, said) in list(self.callers.items()):
            end = min(said + 5 * len(utterance.wave) // utterance.n_tokens, len(utterance.wave))
            told.append((caller, Chunk(utterance.wave[said:end], SAMPLE_RATE, 0.0)))
            self.callers[caller] = utterance, end
            if end == len(utterance.wave):
                told.append((caller, self.callers.pop(caller)[0]))
        return told


@register
class FakeShare(FakeOptimization):
    """Serves all callers at a time; `short`, without the last chunk of what it says."""

    name = "fake_share"

    @dataclass
    class Config:
        short: bool = False

    def apply(self, pipeline: FakePipeline) -> None:
        pipeline.swap(pipeline, "shared", True)
        if self.config.short:
            pipeline.swap(pipeline, "desk", lambda: ShortDesk(pipeline))

    def evidence(self, pipeline: FakePipeline) -> Evidence:
        return Evidence(pipeline.shared)


class ShortDesk(FakeDesk):
    def work(self) -> Told | None:
        told = super().work()
        over = {caller for caller, one in told or () if not isinstance(one, Chunk)}
        return told and [(caller, one) for caller, one in told if caller not in over or not isinstance(one, Chunk)]


@register
class FakeIdle(FakeOptimization):
    name = "fake_idle"

    def apply(self, pipeline: FakePipeline) -> None:
        pass

    def evidence(self, pipeline: FakePipeline) -> Evidence:
        return Evidence(False, reason="it never does anything")


class FakeBoast(FakeOptimization):
    """Says that it was active, whatever it did."""

    def evidence(self, pipeline: FakePipeline) -> Evidence:
        return Evidence(True, {"boast": "a hundred times as fast"})


@register
class FakeNothing(FakeBoast):
    name = "fake_nothing"

    def apply(self, pipeline: FakePipeline) -> None:
        pipeline.on_undo(lambda: None)


@register
class FakeShortLived(FakeBoast):
    name = "fake_short_lived"

    def apply(self, pipeline: FakePipeline) -> None:
        speed = pipeline.speed
        pipeline.swap(pipeline, "speed", 2 * speed)
        pipeline.swap(pipeline, "speed", speed)


@register
class FakeVariable(FakeBoast):
    """Lives by the environment alone; PATH is there already, as it is."""

    name = "fake_variable"

    @dataclass
    class Config:
        set_anew: bool = True

    def environment(self) -> dict[str, str]:
        return {"PATH": os.environ["PATH"]} | ({"FAKE_OTHER": "here"} if self.config.set_anew else {})

    def apply(self, pipeline: FakePipeline) -> None:
        pass


@register
class FakeElsewhere(FakeOptimization):
    name = "fake_elsewhere"

    def unavailable(self, pipeline: FakePipeline) -> str:
        return "it needs another machine"


@register
class FakeBroken(FakeOptimization):
    name = "fake_broken"

    def apply(self, pipeline: FakePipeline) -> None:
        pipeline.speed = 1000.0  # half-way through ...
        raise RuntimeError("the plugin broke")


@register
class FakeDeadly(FakeOptimization):
    """The process dies in its fifth call, which is in the middle of the speed pass."""

    name = "fake_deadly"

    def apply(self, pipeline: FakePipeline) -> None:
        speak = pipeline.synthesize

        def deadly(*args) -> FakeUtterance:
            if pipeline.calls == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return speak(*args)

        pipeline.synthesize = deadly


@register
class FakeHinders(FakeBoast):
    """Gives the processes beside its own a lower priority."""

    name = "fake_hinders"

    def apply(self, pipeline: FakePipeline) -> None:
        pipeline.swap(pipeline, "speed", 2.0)
        for other in psutil.Process(os.getppid()).children():
            if other.pid != os.getpid():
                other.nice(other.nice() + 1)


@register
class FakeLooksOut(FakeBoast):
    """Has two threads that look out for more work for 40 ms after each answer, as those of OpenMP's pools do for 3."""

    name = "fake_looks_out"

    def apply(self, pipeline: FakePipeline) -> None:
        answered, until = threading.Semaphore(0), [0.0]
        speak, block = pipeline.synthesize, bytes(100_000)

        def look_out() -> None:
            while answered.acquire():
                while time.perf_counter() < until[0]:
                    hashlib.sha256(block)  # without Python's lock

        def synthesize(*args: Any) -> FakeUtterance:
            said = speak(*args)
            until[0] = time.perf_counter() + 0.04
            answered.release(2)
            return said

        for _ in range(2):
            threading.Thread(target=look_out, daemon=True).start()
        pipeline.swap(pipeline, "synthesize", synthesize)


@register
class FakeLooksAround(FakeOptimization):
    """Notes at each of its calls on how many cores both processes compute, and whether on the same."""

    name = "fake_looks_around"

    def apply(self, pipeline: FakePipeline) -> None:
        speak, self.seen = pipeline.synthesize, []

        def looking(*args) -> FakeUtterance:
            ours, theirs = (one.cpu_affinity() for one in psutil.Process(os.getppid()).children())
            self.seen.append(len(ours) if ours == theirs else 0)
            return speak(*args)

        pipeline.swap(pipeline, "synthesize", looking)

    def evidence(self, pipeline: FakePipeline) -> Evidence:
        return Evidence(True, {"cores": self.seen})


@register
class FakeOtherRoute(FakeOptimization):
    name = "fake_other_route"
    replaces = ("mel_to_wave",)


@register
class FakeThirdRoute(FakeOptimization):
    name = "fake_third_route"
    replaces = ("mel_to_wave",)


def load_noisily(device: str) -> FakePipeline:
    print("noise from Python")
    os.system("echo noise from elsewhere")
    warnings.warn_explicit("noise of a package", FutureWarning, torch.__file__, 7)
    logging.getLogger("transformers").warning("noise about %s", Path(__file__).parent.parent / "configs/config.yaml")
    print(f"noise about {Path.home()}/clips/me.wav and {os.sep}nowhere{__file__}")
    return FakePipeline()
