"""What a scenario decides: what one call speaks, how its answer becomes rows, and in which figures two are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from harness.answers import Order, Said
from harness.results import Measurement
from harness.workload import Item

UNSEALED = "its audio was not yet there when the clock stopped"
Turn = dict[str, list[Item]]
"""What each variant speaks in one call, the one right after the other."""


@dataclass(frozen=True)
class Request:
    """One utterance that is asked for. `n_tokens` pins its number of speech tokens; None lets the model stop itself."""

    item: Item
    seed: int
    n_tokens: int | None = None

    @property
    def order(self) -> Order:
        """As a child is told of it."""
        return Order(self.item.text, self.item.voice, self.seed, self.n_tokens, self.item.language)


@dataclass(frozen=True)
class Call:
    """What one variant is asked to speak at once, and where in the experiment that stands.

    `step` is one of results.PASSES; `position` tells whether the variant is the first (0) or the second (1) of its
    turn; `kept` are the items whose clips are kept, of which the variant knows nothing.
    """

    variant: str
    step: str
    requests: tuple[Request, ...]
    round: int = 0
    position: int = 0
    kept: frozenset[Item] = frozenset()


@dataclass
class Heard:
    """What came of a call: `parent_s` by the experiment's clock, the rest by the child's word or from outside.

    `waves` are mono float32 [samples]; `unsealed` marks those that are not what they were when the clock stopped.
    `chunks` are samples as bytes that came before the answer, each with the seconds until it was there.
    """

    parent_s: float
    seconds: float = 0.0
    said: tuple[Said, ...] = ()
    error: str | None = None
    waves: list[np.ndarray] = field(default_factory=list)
    chunks: list[tuple[float, bytes]] = field(default_factory=list)
    unsealed: list[bool] = field(default_factory=list)
    memory_kind: str = "rss"
    peak_memory_mb: float | None = None
    memory: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    energy_j: float | None = None


@dataclass
class Visit:
    """What came of a request among others: when it came [s], and of each chunk when it was there since then, and how
    many seconds it plays. `is_whole` says whether the answer came to its end; `wave` is mono float32 [samples]."""

    came_s: float
    chunks: list[list[float]]
    wave: np.ndarray
    audio_s: float
    is_whole: bool = False
    n_tokens: int | None = None
    flaw: str | None = None


@dataclass(frozen=True)
class Figure:
    """A figure of the steady state: of each call an amount, per something where `per` says what.

    Where the amount of a call is None, that is not known, the figure is not measured.
    """

    name: str
    amount: Callable[[Sequence[Measurement]], float | None]
    per: Callable[[Sequence[Measurement]], float] | None = None


def generation_s(rows: Sequence[Measurement]) -> float:
    """Seconds that a call took, given its rows."""
    return sum(row.time_s or 0.0 for row in rows)


def audio_s(rows: Sequence[Measurement]) -> float:
    """Seconds of audio that came out of a call, given its rows."""
    return sum(row.audio_s or 0.0 for row in rows)


def energy_j(rows: Sequence[Measurement]) -> float | None:
    """Joules that a GPU used during a call, given its rows."""
    known = [row.energy_j for row in rows if row.energy_j is not None]
    return sum(known) if known and len(known) == len(rows) else None


class Scenario:
    """One way of handing utterances over. A subclass is all that a new way takes."""

    name: ClassVar[str]
    method: ClassVar[str] = "speak"
    """The worker's method that answers a call."""
    compared: ClassVar[tuple[Figure, ...]] = (
        Figure("rtf", generation_s, per=audio_s),
        Figure("generation_time_s", generation_s),
        Figure("energy_j_per_audio_s", energy_j, per=audio_s),
    )

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises UserError for measure settings that this scenario cannot work with."""

    def share(self, items: Sequence[Item], modified: bool, settings: Mapping[str, Any]) -> list[Item]:
        """What a variant speaks in each round; `modified` tells whether it has optimizations."""
        return list(items)

    def turns(self, shares: Mapping[str, Sequence[Item]]) -> list[Turn]:
        """The calls of one round, given each variant's share."""
        raise NotImplementedError

    def own_warmup(self, shares: Mapping[str, Sequence[Item]]) -> list[Turn]:
        """What has to be warmed up besides single utterances, before the speed pass."""
        return []

    def least_rounds(self, settings: Mapping[str, Any]) -> int:
        """Rounds of the speed pass, whatever they take."""
        return settings["min_rounds"]

    def remark(self, shares: Mapping[str, Sequence[Item]]) -> str | None:
        """What a reader of the figures has to know of this scenario, as a warning."""
        return None

    def rows(self, call: Call, heard: Heard) -> list[Measurement]:
        """The rows of a call, one a request.

        A request's share of the call is that of its audio, so that shares add up to the call, in every figure of time.
        """
        n = len(call.requests)
        if heard.error:
            failed = {"status": "failed", "error": heard.error, "batch_size": n, "parent_time_s": heard.parent_s / n}
            return [self._row(call, request, failed) for request in call.requests]
        lengths = [len(wave) / said.sample_rate for wave, said in zip(heard.waves, heard.said, strict=True)]
        whole = sum(lengths)
        return [
            self._row(
                call,
                request,
                {
                    "audio_s": length,
                    "n_tokens": said.n_tokens,
                    "n_segments": said.n_segments,
                    "hit_token_cap": said.hit_token_cap,
                    "eos": None if request.n_tokens else not said.hit_token_cap,
                    "generation_time_s": heard.seconds * share,
                    "parent_time_s": heard.parent_s * share,
                    "stages_s": {stage: spent * share for stage, spent in said.stages_s.items()},
                    "batch_size": n,
                    "peak_memory_mb": heard.peak_memory_mb,
                    "memory_kind": heard.memory_kind,
                    "memory": heard.memory,
                    "counts": heard.counts,
                    "energy_j": None if heard.energy_j is None else heard.energy_j * share,
                    "flaw": UNSEALED if unsealed else None,
                },
            )
            for request, said, length, unsealed in zip(call.requests, heard.said, lengths, heard.unsealed, strict=True)
            for share in [length / whole if whole else 1 / n]
        ]

    def _row(self, call: Call, request: Request, columns: dict[str, Any]) -> Measurement:
        return Measurement(
            variant=call.variant,
            pass_name=call.step,
            text_id=request.item.text_id,
            text=request.item.text,
            voice=request.item.voice,
            seed=request.seed,
            round=call.round,
            position=call.position,
            repeat=call.round,
            pinned_tokens=request.n_tokens,
            text_sha=request.item.text_sha,
            language=request.item.language,
            **columns,
        )
