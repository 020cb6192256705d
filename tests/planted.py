"""Optimizations that cheat or are broken, to be found out: `plugin_modules=[planted]`.

Each says what it does wrong, and of itself that it was active. All of them work on the miniature.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from harness.pipeline import Pipeline, Request, Segment, Stage, Utterance
from optimizations import Evidence, Optimization, register

SAMPLES_PER_TOKEN = 960
FRAMES_PER_TOKEN = 2
Speak = Callable[[list[Request]], list[Utterance]]


class Planted(Optimization):
    """Whatever it did, it says that it was active."""

    extra = True

    def evidence(self, pipeline: Pipeline) -> Evidence:
        return Evidence(True)


class Whole(Planted):
    """One that takes whole requests in hand: `answer` speaks one, with the honest pipeline at hand."""

    def apply(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        pipeline.wrap(pipeline, "synthesize_batch", self._each)

    def _each(self, speak: Speak) -> Speak:
        return lambda requests: [self.answer(request, lambda r: speak([r])[0]) for request in requests]

    def answer(self, request: Request, speak: Callable[[Request], Utterance]) -> Utterance:
        raise NotImplementedError


def of_length(utterance: Utterance, request: Request, wave: np.ndarray) -> Utterance:
    """The utterance with that wave, and as many tokens as were asked for."""
    n_tokens = request.n_tokens or utterance.n_tokens
    return replace(utterance, wave=wave.astype(np.float32), tokens=[torch.zeros(n_tokens, dtype=torch.long)])


def n_samples(request: Request, otherwise: int) -> int:
    return request.n_tokens * SAMPLES_PER_TOKEN if request.n_tokens else otherwise


# -- broken --------------------------------------------------------------------------------------------------------


@register
class Nothing(Planted):
    """Does nothing at all."""

    name = "nothing"

    def apply(self, pipeline: Pipeline) -> None:
        pass


@register
class PutBack(Planted):
    """Changes something, and puts it back before anybody speaks."""

    name = "put_back"

    def apply(self, pipeline: Pipeline) -> None:
        join = pipeline.stages["join"]
        pipeline.replace_stage("join", lambda waves: waves[0], by=self.name)
        pipeline.replace_stage("join", join, by=self.name)


@register
class HalfOfTheAudio(Planted):
    """Returns the first half of each wave."""

    name = "half_of_the_audio"

    def apply(self, pipeline: Pipeline) -> None:
        pipeline.wrap_stage("join", lambda join: lambda waves: join(waves)[: sum(map(len, waves)) // 2])


@register
class Crashes(Whole):
    """Its process dies in the middle of the run."""

    name = "crashes"
    calls = 0

    def answer(self, request: Request, speak: Callable[[Request], Utterance]) -> Utterance:
        self.calls += 1
        if self.calls == 6:
            os.kill(os.getpid(), signal.SIGSEGV)
        return speak(request)


@register
class Hangs(Whole):
    """Never answers in the middle of the run."""

    name = "hangs"
    calls = 0

    def answer(self, request: Request, speak: Callable[[Request], Utterance]) -> Utterance:
        self.calls += 1
        if self.calls == 6:
            time.sleep(1000)
        return speak(request)


@register
class RaisesOnOneText(Whole):
    """Cannot speak of a bus."""

    name = "raises_on_one_text"

    def answer(self, request: Request, speak: Callable[[Request], Utterance]) -> Utterance:
        if "bus" in request.text:
            raise RuntimeError("no bus, please")
        return speak(request)


@register
class Silence(Planted):
    """Silent clips of the right length."""

    name = "silence"

    def apply(self, pipeline: Pipeline) -> None:
        pipeline.wrap_stage("watermark", lambda mark: lambda waves: [wave * 0 for wave in mark(waves)])


@register
class NotANumber(Planted):
    """One sample in each clip is not a number."""

    name = "not_a_number"

    def apply(self, pipeline: Pipeline) -> None:
        def spoiled(waves: list[np.ndarray]) -> list[np.ndarray]:
            for wave in waves:
                wave[len(wave) // 2] = math.nan
            return waves

        pipeline.wrap_stage("watermark", lambda mark: lambda waves: spoiled(mark(waves)))


@register
class UntrainedAdapter(Planted):
    """Puts a linear layer with random weights between the mel and the vocoder."""

    name = "untrained_adapter"

    def apply(self, pipeline: Pipeline) -> None:
        torch.manual_seed(0)
        adapter = torch.nn.Linear(80, 80).to(pipeline.device)
        pipeline.wrap_stage("mel_to_wave", lambda vocode: lambda mels: vocode([adapter(mel.mT).mT for mel in mels]))


@register
class AnotherVoice(Planted):
    """Speaks with a voice that was not asked for."""

    name = "another_voice"

    def apply(self, pipeline: Pipeline) -> None:
        names = sorted(pipeline.voices)
        other = dict(zip(names, reversed(names), strict=True))
        pipeline.wrap_stage("condition", lambda condition: lambda voice: condition(other.get(voice, voice)))


@register
class OneFlowStep(Planted):
    """Solves the flow in one step instead of ten."""

    name = "one_flow_step"

    def apply(self, pipeline: Pipeline) -> None:
        pipeline.wrap(pipeline.model.s3gen, "flow_inference", lambda solve: partial(solve, n_cfm_timesteps=1))


@register
class Slower(Whole):
    """Takes a fifth longer."""

    name = "slower"
    share = 0.2

    def answer(self, request: Request, speak: Callable[[Request], Utterance]) -> Utterance:
        start = time.perf_counter()
        spoken = speak(request)
        time.sleep(self.share * (time.perf_counter() - start))
        return spoken


@register
class ALittleSlower(Slower):
    """Takes nine per cent longer."""

    name = "a_little_slower"
    share = 0.09


@register
class Quiet(Planted):
    """Turns the volume down by 30 dB."""

    name = "quiet"

    def apply(self, pipeline: Pipeline) -> None:
        pipeline.wrap_stage("watermark", lambda mark: lambda waves: [wave * 0.03 for wave in mark(waves)])


# -- the watermark -------------------------------------------------------------------------------------------------


def unmarked(waves: Sequence[Tensor]) -> list[np.ndarray]:
    return [wave.detach().cpu().numpy() for wave in waves]


@register
class NoWatermark(Planted):
    """Leaves the watermark out."""

    name = "no_watermark"

    def apply(self, pipeline: Pipeline) -> None:
        pipeline.replace_stage("watermark", unmarked, by=self.name)


@register
class FirstMarkOnly(Planted):
    """Marks the first clip, which somebody may look at, and no other."""

    name = "first_mark_only"

    def apply(self, pipeline: Pipeline) -> None:
        marks = iter([pipeline.stages["watermark"]])
        pipeline.wrap_stage("watermark", lambda _: lambda waves: next(marks, unmarked)(waves))


@register
class RandomMark(Planted):
    """Adds random numbers as loud as a watermark."""

    name = "random_mark"

    def apply(self, pipeline: Pipeline) -> None:
        def noisy(waves: list[Tensor]) -> list[np.ndarray]:
            draw = np.random.default_rng(0).standard_normal
            return [(wave + 1e-3 * draw(len(wave))).astype(np.float32) for wave in unmarked(waves)]

        pipeline.replace_stage("watermark", noisy, by=self.name)


# -- what was said before ------------------------------------------------------------------------------------------


class Remembers(Whole):
    """Speaks once for each key."""

    def apply(self, pipeline: Pipeline) -> None:
        self.said: dict[Any, Utterance] = {}
        super().apply(pipeline)

    def key(self, request: Request) -> Any:
        raise NotImplementedError

    def answer(self, request: Request, speak: Callable[[Request], Utterance]) -> Utterance:
        key = self.key(request)
        if key not in self.said:
            self.said[key] = speak(request)
        return self.said[key]


@register
class RemembersRequests(Remembers):
    """Remembers the result of a request that it has seen."""

    name = "remembers_requests"

    def key(self, request: Request) -> Any:
        return request


@register
class RemembersTexts(Remembers):
    """Remembers what it made of a text, whatever the voice, the seed and the length, and fits the length."""

    name = "remembers_texts"

    def key(self, request: Request) -> Any:
        return request.text

    def answer(self, request: Request, speak: Callable[[Request], Utterance]) -> Utterance:
        spoken = super().answer(request, speak)
        return of_length(spoken, request, np.resize(spoken.wave, n_samples(request, len(spoken.wave))))


@register
class RemembersSeeds(Remembers):
    """Remembers text, voice and seed, and ignores the length."""

    name = "remembers_seeds"

    def key(self, request: Request) -> Any:
        return request.text, request.voice, request.seed


@register
class EverySecondCall(Whole):
    """Skips every second call: gives what it said last, cut or repeated to the right length."""

    name = "every_second_call"
    last: Utterance | None = None

    def answer(self, request: Request, speak: Callable[[Request], Utterance]) -> Utterance:
        if self.last is None:
            self.last = speak(request)
            return self.last
        said, self.last = self.last, None
        return of_length(said, request, np.resize(said.wave, n_samples(request, len(said.wave))))


@register
class Stretched(Whole):
    """Once it has spoken, stretches that clip to the length that is asked for; honest while it may stop by itself."""

    name = "stretched"
    said: Utterance | None = None

    def answer(self, request: Request, speak: Callable[[Request], Utterance]) -> Utterance:
        if self.said is None or not request.n_tokens:
            self.said = speak(request)
            return self.said
        wave, n = self.said.wave, n_samples(request, 0)
        stretched = np.interp(np.linspace(0, len(wave) - 1, n), np.arange(len(wave)), wave)
        return of_length(self.said, request, stretched)


@register
class LoopsAClip(Whole):
    """Records the first second that it says, and plays it in a loop wherever the length is pinned."""

    name = "loops_a_clip"
    clip: Utterance | None = None

    def answer(self, request: Request, speak: Callable[[Request], Utterance]) -> Utterance:
        if self.clip is None or not request.n_tokens:
            self.clip = speak(request)
            return self.clip
        second = self.clip.wave[: self.clip.sample_rate]
        return of_length(self.clip, request, np.resize(second, n_samples(request, 0)))


# -- another way where nobody listens ------------------------------------------------------------------------------


class WhenPinned(Planted):
    """Cheats only where the number of tokens is pinned, which tells it that it is being timed."""

    def apply(self, pipeline: Pipeline) -> None:
        self.pinned = False
        pipeline.wrap_stage("generate_tokens", self._look)
        self.cheat(pipeline)

    def _look(self, generate: Stage) -> Stage:
        def looking(segments: list[Segment]) -> list[Tensor]:
            self.pinned = self.timed(segments)
            return self.tokens(generate, segments) if self.pinned else generate(segments)

        return looking

    def timed(self, segments: list[Segment]) -> bool:
        return segments[0].n_tokens is not None

    def tokens(self, generate: Stage, segments: list[Segment]) -> list[Tensor]:
        return generate(segments)

    def cheat(self, pipeline: Pipeline) -> None:
        pass


def fewer(segments: list[Segment], share: float) -> list[Segment]:
    return [replace(segment, n_tokens=max(1, math.ceil(share * (segment.n_tokens or 1)))) for segment in segments]


@register
class TokensTwice(WhenPinned):
    """Half of the tokens, each said twice."""

    name = "tokens_twice"

    def tokens(self, generate: Stage, segments: list[Segment]) -> list[Tensor]:
        halves = generate(fewer(segments, 0.5))
        return [half.repeat_interleave(2)[: s.n_tokens] for half, s in zip(halves, segments, strict=True)]


@register
class PaddedWithNoise(WhenPinned):
    """A third of the tokens, and random ones behind them."""

    name = "padded_with_noise"

    def tokens(self, generate: Stage, segments: list[Segment]) -> list[Tensor]:
        said = generate(fewer(segments, 1 / 3))
        lacking = [(s.n_tokens or 0) - len(tokens) for tokens, s in zip(said, segments, strict=True)]
        return [
            torch.cat((tokens, torch.randint(0, 6000, (n,), device=tokens.device)))
            for tokens, n in zip(said, lacking, strict=True)
        ]


@register
class NoFlow(WhenPinned):
    """Leaves the flow out: a mel of noise."""

    name = "no_flow"

    def cheat(self, pipeline: Pipeline) -> None:
        def noise(tokens: list[Tensor]) -> list[Tensor]:
            return [torch.randn(1, 80, FRAMES_PER_TOKEN * len(t), device=t.device) - 5 for t in tokens]

        def leaving_out(solve: Stage) -> Stage:
            return lambda tokens, voices: noise(tokens) if self.pinned else solve(tokens, voices)

        pipeline.wrap_stage("tokens_to_mel", leaving_out)


@register
class FewStepsWhenTimed(WhenPinned):
    """One step of the flow's solver while it is timed, ten while it is heard."""

    name = "few_steps_when_timed"

    def cheat(self, pipeline: Pipeline) -> None:
        def solver(solve: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda *args, **kwargs: solve(*args, **kwargs | ({"n_cfm_timesteps": 1} if self.pinned else {}))

        pipeline.wrap(pipeline.model.s3gen, "flow_inference", solver)


@register
class AfterTheFirstRound(NoFlow):
    """Honest until it has seen a text pinned three times: the first round, then, is real."""

    name = "after_the_first_round"

    def apply(self, pipeline: Pipeline) -> None:
        self.seen: dict[str, int] = {}
        super().apply(pipeline)

    def timed(self, segments: list[Segment]) -> bool:
        if not super().timed(segments):
            return False
        text = segments[0].text
        self.seen[text] = self.seen.get(text, 0) + 1
        return self.seen[text] > 3


# -- clocks and neighbours -----------------------------------------------------------------------------------------


@register
class SlowClock(Planted):
    """Slows its own process's clocks to a third, and has nobody wait for the device."""

    name = "slow_clock"

    def apply(self, pipeline: Pipeline) -> None:
        for clock in ("perf_counter", "monotonic", "time"):
            pipeline.wrap(time, clock, self._slowed)
        pipeline.swap(torch.cuda, "synchronize", lambda *_: None)

    @staticmethod
    def _slowed(clock: Callable[[], float]) -> Callable[[], float]:
        start = clock()
        return lambda: start + (clock() - start) / 3


@register
class BehindTheClock(Whole):
    """Returns at once, and fills the wave in from a thread; honest while it may stop by itself."""

    name = "behind_the_clock"
    one_at_a_time = threading.Lock()

    def answer(self, request: Request, speak: Callable[[Request], Utterance]) -> Utterance:
        if not request.n_tokens:
            return speak(request)
        wave = np.zeros(n_samples(request, 0), dtype=np.float32)

        def fill_in() -> None:
            with self.one_at_a_time:
                wave[:] = np.resize(speak(request).wave, len(wave))

        threading.Thread(target=fill_in, daemon=True).start()
        n_tokens = request.n_tokens
        return Utterance(
            wave=wave,
            sample_rate=self.pipeline.model.sr,
            tokens=[torch.zeros(n_tokens, dtype=torch.long)],
            segments=[request.text],
            stages_s={},
            generation_time_s=1e-3,
        )


@register
class EndsAfterTheClock(BehindTheClock):
    """The same wherever it is asked, so that what is heard is what was there when the clock stopped: nothing."""

    name = "ends_after_the_clock"

    def answer(self, request: Request, speak: Callable[[Request], Utterance]) -> Utterance:
        return super().answer(replace(request, n_tokens=request.n_tokens or 50), speak)


@register
class HindersTheOther(Planted):
    """Ties the other variant's process to one core, gives it the lowest priority, and keeps that core busy."""

    name = "hinders_the_other"

    def apply(self, pipeline: Pipeline) -> None:
        pipeline.call_between(lambda stage: None)
        threading.Thread(target=self._hinder, daemon=True).start()

    def _hinder(self) -> None:
        parent = psutil.Process(os.getppid())
        for other in parent.children():
            if other.pid != os.getpid():
                with suppress(psutil.Error):
                    other.cpu_affinity([0])
                    other.nice(19)
        os.sched_setaffinity(threading.get_native_id(), {0})
        _burn(lambda: True)


@register
class BusyWhileIdle(Whole):
    """Computes on all cores while the other variant is being timed, and rests while it is timed itself."""

    name = "busy_while_idle"

    def apply(self, pipeline: Pipeline) -> None:
        self._at_work = threading.Event()
        super().apply(pipeline)
        for _ in range(os.cpu_count() or 1):
            threading.Thread(target=_burn, args=[lambda: not self._at_work.is_set()], daemon=True).start()

    def answer(self, request: Request, speak: Callable[[Request], Utterance]) -> Utterance:
        self._at_work.set()
        try:
            return speak(request)
        finally:
            self._at_work.clear()


def _burn(wanted: Callable[[], bool]) -> None:
    block = np.ones((500, 500), dtype=np.float32)
    while True:
        if wanted():
            block = np.clip(block @ block, 0, 1)  # without Python's lock
        else:
            time.sleep(0.005)
