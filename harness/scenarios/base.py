"""What a scenario decides: what one call speaks, how its answer becomes rows, and in which figures two are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from harness.results import Measurement
from harness.workload import Item

Turn = dict[str, list[Item]]
"""What each variant speaks in one call, the one right after the other."""


@dataclass(frozen=True)
class Request:
    """One utterance that is asked for. `n_tokens` pins its number of speech tokens; None lets the model stop itself."""

    item: Item
    seed: int
    n_tokens: int | None = None


@dataclass(frozen=True)
class Call:
    """What one variant is asked to speak at once, and where in the experiment that stands.

    `step` is one of results.PASSES; `position` tells whether the variant is the first (0) or the second (1) of its
    turn; `keep`, whether the clips are kept.
    """

    variant: str
    step: str
    requests: tuple[Request, ...]
    round: int = 0
    position: int = 0
    keep: bool = False


@dataclass(frozen=True)
class Figure:
    """A figure of the steady state: of each call an amount, per something where `per` says what."""

    name: str
    amount: Callable[[Sequence[Measurement]], float]
    per: Callable[[Sequence[Measurement]], float] | None = None


def generation_s(rows: Sequence[Measurement]) -> float:
    """Seconds that a call took, given its rows."""
    return sum(row.generation_time_s or 0.0 for row in rows)


def audio_s(rows: Sequence[Measurement]) -> float:
    """Seconds of audio that came out of a call, given its rows."""
    return sum(row.audio_s or 0.0 for row in rows)


class Scenario:
    """One way of handing utterances over. A subclass is all that a new way takes."""

    name: ClassVar[str]
    method: ClassVar[str] = "speak"
    """The worker's method that answers a call."""
    compared: ClassVar[tuple[Figure, ...]] = (
        Figure("rtf", generation_s, per=audio_s),
        Figure("generation_time_s", generation_s),
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

    def rows(self, call: Call, answers: Sequence[dict[str, Any]], started_s: float) -> list[Measurement]:
        """The rows of a call; `answers` holds each request's columns, as the worker's method gave them."""
        return [
            Measurement(
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
                started_s=started_s,
                text_sha=request.item.text_sha,
                **answer,
            )
            for request, answer in zip(call.requests, answers, strict=True)
        ]
