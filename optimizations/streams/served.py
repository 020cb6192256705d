"""Many utterances at once, each in pieces, as they come and go: who is next, and with whom.

A GPU does one of two things at a time: a round of T3, some tokens further in all places that are taken
(`t3/slots.py`), or the next pieces of a few utterances together (`pieces.py`). Whoever has a listener who will soon
hear nothing is more urgent than who has not, and who has no sound yet is as urgent as somebody whose sound ends after
what a first piece may take. So pieces go by deadline, the earliest first, and rounds of T3 come between them wherever
no deadline is near.

T3 runs ahead of the listeners. A piece has at least `growth` times as many tokens as the one before it, and takes all
that are there when its turn comes: the more there is to do, the larger the pieces are, and the less often the flow goes
over the voice's prompt again.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.pipeline import Chunk, Pipeline, Request, Segment, SynthesisError, Told, Utterance
from optimizations.flow.prefix import LOOKAHEAD
from optimizations.streams.pieces import (
    Next,
    Piece,
    SpokenPieces,
    launch_together,
    own_random_numbers,
    take_together,
)
from optimizations.t3.slots import Slots

FIRST_S = 0.15
"""Seconds in which a first piece is wanted: the deadline of who has no sound yet."""
NEAR_S = 0.4
"""Before a deadline that is nearer than this, no round of T3 for others begins."""


@dataclass(frozen=True)
class Pace:
    """How pieces are cut. `round`: tokens of T3 between two looks; `together`: utterances whose pieces are made in one
    pass, fewer while others have no sound yet; `prompt`: tokens of the voice's own that the flow sees; the others as in
    `optimizations.streaming`."""

    first: int
    first_steps: int
    growth: float
    longest: int
    context: int
    prompt: int
    round: int
    together: int


@dataclass
class Caller:
    """One request on its way. Times are by `time.perf_counter`."""

    number: int
    request: Request
    came_s: float
    segments: deque[Segment] = field(default_factory=deque)
    texts: list[str] = field(default_factory=list)
    waves: list[Piece] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    heard_from_s: float | None = None
    """When its first piece was there."""
    audio_s: float = 0.0

    @property
    def is_silent(self) -> bool:
        """Whether its listener has heard nothing yet."""
        return self.heard_from_s is None

    @property
    def deadline_s(self) -> float:
        """When its listener hears nothing any more, or has waited for long enough."""
        return self.came_s + FIRST_S if self.heard_from_s is None else self.heard_from_s + self.audio_s


@dataclass
class Speech:
    """A segment that is being said, in a place of T3's until all its tokens are there."""

    caller: Caller
    segment: Segment
    slot: int
    pieces: SpokenPieces
    resume: Callable[[], Any]
    pace: Pace
    ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """Its tokens so far [n], on the CPU."""
    ended: bool = False
    last: int = 0
    """Tokens of its last piece."""

    @property
    def lacks(self) -> int:
        """Tokens that are missing for its next piece, if it goes on for so long."""
        said, pace = self.pieces.said, self.pace
        least = min(math.ceil(pace.growth * self.last), pace.longest) if said else pace.first
        return 0 if self.ended else max(0, said + least + LOOKAHEAD - len(self.ids))

    @property
    def end(self) -> int | None:
        """Where its next piece would end; None while there are too few tokens for one."""
        said, n = self.pieces.said, len(self.ids)
        most = self.pace.longest if said else self.pace.first
        if self.ended and n - said <= most + LOOKAHEAD:
            return n
        return None if self.lacks else min(n - LOOKAHEAD, said + most)

    @property
    def is_full(self) -> bool:
        """Whether its next piece would be no larger if it waited."""
        most = self.pace.longest if self.pieces.said else self.pace.first
        return self.ended or len(self.ids) >= self.pieces.said + most + LOOKAHEAD

    @property
    def is_pressing(self) -> bool:
        """Whether its listener will soon wait."""
        return self.caller.deadline_s < time.perf_counter() + NEAR_S


@dataclass
class Tally:
    """How many utterances came while so many others were decoded, and passes by how many utterances had them."""

    joined: Counter[int] = field(default_factory=Counter)
    passes: Counter[int] = field(default_factory=Counter)


class ServedStreams:
    """A desk: speaks for as many callers as there are places, and has the others wait."""

    def __init__(self, pipeline: Pipeline, slots: Slots, pace: Pace, encode_rows: Any, tally: Tally) -> None:
        self._pipeline, self._slots, self._pace, self._tally = pipeline, slots, pace, tally
        self._encode_rows = encode_rows
        self._waiting: deque[Caller] = deque()
        self._speeches: list[Speech] = []
        self._piece_is_next = True

    def take(self, caller: int, request: Request) -> None:
        self._waiting.append(Caller(caller, request, time.perf_counter()))

    def work(self) -> Told | None:
        with self._pipeline.as_in_a_synthesis(), torch.inference_mode():
            return self._work()

    def leave(self) -> None:
        """Give all places back, whatever was not said."""
        with torch.inference_mode():
            for speech in self._speeches:
                self._release(speech)
        self._speeches, self._waiting = [], deque()

    def _work(self) -> Told | None:
        if self._waiting and self._slots.free:
            return self._admit()
        ready = [one for one in self._speeches if one.end is not None and (one.is_full or one.is_pressing)]
        due = sorted(ready, key=lambda one: one.caller.deadline_s)
        if due and (not self._slots.n_running or due[0].is_pressing or self._can_wait_for_pieces()):
            self._piece_is_next = False
            return self._speak(due)
        self._piece_is_next = True
        if self._slots.n_running:
            return self._decode()
        return None

    def _can_wait_for_pieces(self) -> bool:
        """Whether pieces for those who have time may come before T3: every other time, and if nobody has no sound."""
        return self._piece_is_next and not self._somebody_is_silent()

    def _somebody_is_silent(self) -> bool:
        return any(one.caller.is_silent for one in self._speeches)

    # -- the three things to do --------------------------------------------------------------------------------------

    def _admit(self) -> Told:
        """Read the prompts of those who wait, as many as there are places for, at most `together` at a time."""
        told: Told = []
        chosen: list[tuple[Caller, Segment]] = []
        while self._waiting and len(chosen) < min(len(self._slots.free), self._pace.together):
            caller = self._waiting.popleft()
            if not caller.texts:
                segments = self._pipeline.segments(caller.request)
                caller.segments, caller.texts = deque(segments), [segment.text for segment in segments]
            if self._slots.fits(caller.segments[0]):
                chosen.append((caller, caller.segments.popleft()))
            else:
                told.append((caller.number, SynthesisError("the text is longer than a place of T3's has room for")))
        if not chosen:
            return told
        self._tally.joined[self._slots.n_running] += len(chosen)
        seeds = [self._seed(caller) for caller, _ in chosen]
        slots = self._slots.admit([segment for _, segment in chosen], seeds)
        for (caller, segment), seed, slot in zip(chosen, seeds, slots, strict=True):
            self._speeches.append(self._begun(caller, segment, seed, slot))
        return told

    def _decode(self) -> Told:
        """A round of T3, a shorter one if that is enough for somebody's first piece."""
        told: Told = []
        lacking = [one.lacks for one in self._speeches if one.lacks and one.caller.is_silent]
        found = self._slots.go_on(min([self._pace.round, *lacking]))
        for speech in list(self._speeches):
            if speech.slot not in found or speech.ended:
                continue
            tokens, ended = found[speech.slot]
            ids, _ = self._slots.decoder.spoken(tokens, speech.segment.n_tokens is not None)
            speech.ids, speech.ended = ids, ended
            if ended:
                self._release(speech)
            if ended and not len(ids):
                self._speeches.remove(speech)
                told.append((speech.caller.number, SynthesisError("T3 emitted its stop token first")))
        return told

    def _speak(self, due: list[Speech]) -> Told:
        """The next pieces of those that are due first, all with as many Euler steps as the first of them.

        While somebody waits for a first piece, a pass that takes more steps than that one is for fewer.
        """
        steps, together = due[0].pieces.steps, self._pace.together
        if self._somebody_is_silent():
            together = max(1, together * min(steps, self._pace.first_steps) // steps)
        chosen = [one for one in due if one.pieces.steps == steps][:together]
        self._tally.passes[len(chosen)] += 1
        wanted = []
        for one in chosen:
            end = one.end
            assert end is not None
            one.last, last = end - one.pieces.said, one.ended and end == len(one.ids)
            ids = one.ids[: end + LOOKAHEAD].to(self._pipeline.device, non_blocking=True)
            wanted.append(Next(one.pieces, ids, end, last, one.resume))
        launch_together(self._pipeline, wanted, self._encode_rows)
        told: Told = []
        pieces = take_together(self._pipeline, [one.pieces for one in chosen])
        for speech, asked, piece in zip(chosen, wanted, pieces, strict=True):
            told += self._told(speech, piece, asked.last)
        return told

    def _told(self, speech: Speech, piece: Piece, is_last: bool) -> Told:
        caller, rate, now = speech.caller, self._pipeline.model.sr, time.perf_counter()
        caller.heard_from_s = caller.heard_from_s or now
        caller.audio_s += len(piece) / rate
        caller.waves.append(piece)
        told: Told = [(caller.number, Chunk(piece, rate, now - caller.came_s))]
        if is_last:
            self._speeches.remove(speech)
            caller.tokens.append(speech.ids)
            if caller.segments:
                self._waiting.appendleft(caller)
            else:
                told.append((caller.number, self._utterance(caller, now)))
        return told

    def _utterance(self, caller: Caller, now: float) -> Utterance:
        return Utterance(
            wave=np.concatenate(caller.waves),
            sample_rate=self._pipeline.model.sr,
            tokens=caller.tokens,
            segments=caller.texts,
            stages_s={},
            generation_time_s=now - caller.came_s,
            token_cap=self._pipeline.sampling.max_new_tokens,
        )

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _seed(self, caller: Caller) -> int:
        """The request's, another one for each of its segments; one drawn outside where it has none."""
        if caller.request.seed is None:
            return int(torch.randint(2**62, (1,)))
        return caller.request.seed + len(caller.tokens)

    def _begun(self, caller: Caller, segment: Segment, seed: int, slot: int) -> Speech:
        pace, most = self._pace, segment.n_tokens or self._pipeline.sampling.max_new_tokens
        with own_random_numbers(self._pipeline.device, seed) as resume:
            pieces = SpokenPieces(self._pipeline, segment, most, pace.first_steps, pace.context, pace.prompt)
        return Speech(caller, segment, slot, pieces, resume, pace)

    def _release(self, speech: Speech) -> None:
        if speech.slot >= 0:
            self._slots.release(speech.slot)
            speech.slot = -1
