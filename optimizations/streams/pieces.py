"""From the tokens of an utterance that is not over to pieces of its wave: flow, vocoder, watermark, join.

Several utterances may take a pass together: each row is what it is alone (`flow/batched.py`, `vocoder/batched.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.pipeline import Pipeline, Segment, seed_draws
from optimizations.common.padding import filled
from optimizations.flow.batched import encode_few, solve
from optimizations.flow.prefix import PrefixFlow
from optimizations.flow.static_shape import FRAMES_PER_TOKEN
from optimizations.vocoder.batched import decode
from optimizations.vocoder.continued import ContinuedVocoder

BEHIND = 26
"""Mel frames spoken already that a window begins with: 16 that HiFT reaches back, and 200 ms for the watermark's
network and its spectrum."""
OVERLAP = 2
"""Mel frames over which a window fades into the next one."""
Piece = NDArray[np.float32]


class SpokenPieces:
    """One segment's pieces. `said` tokens are in those that were launched.

    `longest` is the number of tokens that it can have. The first pass of the flow takes `first_steps` Euler steps, and
    each sees `context` tokens again, and `prompt` of the voice's (`PrefixFlow`).
    """

    def __init__(
        self,
        pipeline: Pipeline,
        segment: Segment,
        longest: int,
        first_steps: int,
        context: int,
        prompt: int | None = None,
    ) -> None:
        self.flow = PrefixFlow(pipeline, segment.conditionals, longest, context, prompt)
        self.said = 0
        self._pipeline, self._first_steps = pipeline, first_steps
        self._vocoder = ContinuedVocoder(pipeline.model.s3gen.mel2wav, BEHIND)
        self._held: Piece | None = None
        self._window = torch.zeros(0)
        self._bounds = 0, 0, 0

    @property
    def steps(self) -> int:
        """Euler steps of the next pass."""
        return self.flow.steps(None if self.said else self._first_steps)

    def launch(self, ids: Tensor, end: int, last: bool) -> None:
        """Begin with what comes next, up to the token `end` of those [n] that are there; those behind come again."""
        mel = self.flow(ids, self.said, self.steps)
        window, source, start = self.window(mel, end)
        self.hold(self._pipeline.model.s3gen.mel2wav.decode(x=window, s=source)[0], start, end, last)

    def window(self, mel: Tensor, end: int) -> tuple[Tensor, Tensor, int]:
        """What the vocoder makes the next piece of, from the mel [1, 80, n] behind what is said, up to `end`."""
        return self._vocoder.window(mel, FRAMES_PER_TOKEN * (end - self.said))

    def hold(self, wave: Tensor, start: int, end: int, last: bool) -> None:
        """Keep the next piece's window [samples], in which it begins at `start` and ends with the token `end`."""
        per_token = FRAMES_PER_TOKEN * self._vocoder.per_frame
        said, self.said = self.said, end
        fade = self._pipeline.model.s3gen.trim_fade
        if start == per_token * said:  # the window begins where the utterance does
            n = min(len(fade), len(wave))
            wave[:n] *= fade[:n]
        stop = start + per_token * (end - said)
        self._window = wave
        self._bounds = start, stop, stop if last else stop + OVERLAP * self._vocoder.per_frame

    def take(self) -> Piece:
        """The piece that was launched, watermarked."""
        return take_together(self._pipeline, [self])[0]

    def joined(self, marked: Piece) -> Piece:
        """The piece in its watermarked window, faded into from what was held of the one before."""
        start, stop, beyond = self._bounds
        piece, held = marked[start:stop].copy(), self._held
        if held is not None:
            n = min(len(held), len(piece))
            rise = (0.5 - 0.5 * np.cos(np.linspace(0, math.pi, n))).astype(np.float32)
            piece[:n] = held[:n] * (1 - rise) + piece[:n] * rise
        self._held = marked[stop:beyond].copy()
        return piece


@dataclass
class Next:
    """What is asked of a segment: `ids` [n] are there, and the piece ends with the token `end`.

    `resume` has its own random numbers go on.
    """

    pieces: SpokenPieces
    ids: Tensor
    end: int
    last: bool
    resume: Callable[[], Any]


def launch_together(pipeline: Pipeline, wanted: Sequence[Next], encode_rows: Any = encode_few) -> None:
    """`SpokenPieces.launch` for several segments, whose next passes take equally many steps.

    Rows are filled up to a power of two, so that few shapes occur.
    """
    flow, hift = pipeline.model.s3gen.flow, pipeline.model.s3gen.mel2wav
    ratio, rows = flow.token_mel_ratio, filled([_row(one) for one in wanted])
    prompts = [one.pieces.flow.prompt for one, _, _ in rows]
    ids = [torch.cat((one.pieces.flow.prompt.tokens, one.ids[start:])) for one, start, _ in rows]
    mels = solve(flow, ids, prompts, [noise for _, _, noise in rows], wanted[0].pieces.steps, encode_rows)
    windows: list[tuple[Tensor, Tensor, int]] = []
    for (one, start, _), mel in zip(rows, mels.to(pipeline.model.s3gen.dtype), strict=True):
        begin = ratio * (len(one.pieces.flow.prompt.tokens) + one.pieces.said - start)
        end = begin + ratio * (len(one.ids) - one.pieces.said)
        if len(windows) < len(wanted):
            with one.resume():
                windows.append(one.pieces.window(mel[None, :, begin:end], one.end))
    padded = filled(windows)
    waves = decode(hift.decode, [window for window, _, _ in padded], [source for _, source, _ in padded])
    for one, wave, (_, _, start) in zip(wanted, waves, windows, strict=False):
        one.pieces.hold(wave.clone(), start, one.end, one.last)


def take_together(pipeline: Pipeline, launched: Sequence[SpokenPieces]) -> list[Piece]:
    """The pieces that were launched, watermarked."""
    marked = pipeline.stages["watermark"]([pieces._window for pieces in launched])
    return [pieces.joined(wave) for pieces, wave in zip(launched, marked, strict=True)]


def _row(one: Next) -> tuple[Next, int, Tensor]:
    start, noise = one.pieces.flow.window(one.ids, one.pieces.said)
    return one, start, noise[0]


@contextmanager
def own_random_numbers(device: torch.device, seed: int | None = None) -> Iterator[Any]:
    """Random numbers beside those that are drawn outside, which go on as if nothing were drawn here.

    Yields a context manager that goes on with them where they were left. `seed` None draws one from those outside.
    """
    devices = [device] if device.type == "cuda" else []
    state: list[Any] = []

    def leave() -> None:
        state[:] = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]

    @contextmanager
    def resume() -> Iterator[None]:
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(state[0])
            for device, its in zip(devices, state[1:], strict=True):
                torch.cuda.set_rng_state(its, device)
            yield
            leave()

    with torch.random.fork_rng(devices=devices):
        seed_draws(int(torch.randint(2**31, (1,), device=device)) if seed is None else seed, device)
        yield resume
        leave()
