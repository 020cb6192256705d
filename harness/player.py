"""What a listener has of a stream: when the first sound comes, how long the gaps are, whether the player ran dry.

A player starts when the first chunk is there, and plays each chunk behind the one before it. Where the next one is not
there in time, it falls silent until it comes: an underrun. Had it waited a little at the start, a pre-roll, it might
not have had to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

AUDIBLE_S = 0.001
"""A silence that is shorter is no underrun: nobody hears it, and no clock here is as good."""


@dataclass(frozen=True)
class Arrival:
    """A chunk: when it was there, in seconds since it was asked for, and how many seconds of audio it holds."""

    ready_s: float
    audio_s: float


@dataclass(frozen=True)
class Heard:
    """One stream as a listener has it, in seconds. `gaps_s` are between chunks, `underruns_s` the player's silences.

    `preroll_s` is how much longer the player would have had to wait at the start for no underrun at all.
    """

    first_s: float
    last_s: float
    audio_s: float
    n_chunks: int
    gaps_s: tuple[float, ...]
    underruns_s: tuple[float, ...]
    preroll_s: float

    @property
    def is_continuous(self) -> bool:
        return not self.underruns_s


def listen(arrivals: Sequence[Arrival]) -> Heard | None:
    """What the player makes of a stream's chunks, in their order; None where nothing came, which is never good."""
    if not arrivals or not any(arrival.audio_s for arrival in arrivals):
        return None
    start = arrivals[0].ready_s
    ends, silences = start, []
    for arrival in arrivals:
        silences.append(max(0.0, arrival.ready_s - ends))
        ends = max(ends, arrival.ready_s) + arrival.audio_s
    played = [0.0, *accumulate(arrival.audio_s for arrival in arrivals)]
    return Heard(
        first_s=start,
        last_s=arrivals[-1].ready_s,
        audio_s=played[-1],
        n_chunks=len(arrivals),
        gaps_s=tuple(other.ready_s - one.ready_s for one, other in pairwise(arrivals)),
        underruns_s=tuple(silence for silence in silences if silence > AUDIBLE_S),
        preroll_s=max(0.0, *(a.ready_s - start - before for a, before in zip(arrivals, played, strict=False))),
    )


def heard_of(row: Any) -> Heard | None:
    """Of a `harness.results.Measurement`; None where it failed."""
    return listen([Arrival(*chunk) for chunk in row.chunks]) if row.ok else None


def arrivals_of(chunks: Sequence[Any]) -> list[Arrival]:
    """Of `harness.pipeline.Chunk`s."""
    return [Arrival(chunk.ready_s, chunk.audio_s) for chunk in chunks]
