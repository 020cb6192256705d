"""Many callers: for how many does the first sound come soon, and goes on?

The speed pass is that of `streaming`: one utterance after the other, paired. Behind it comes the load pass. For each
size in `measure.users` requests come in two ways (`harness.load`):

    closed    so many users, each with a request on its way at any time: when one is answered, the next one comes
    open      at random, as many as make so many seconds of audio a second: so many listeners at a time

A variant that does not keep `measure.first_audio_limit_s` at a size, or whose players run dry, is asked for no larger
one. Both variants have the same requests at the same times, one variant after the other.

**Whose clock.** The parent's alone. A request has come when the parent sends it or, in open loop, when it was to be
sent; the child may be busy then, and hears of it when it looks. A chunk is there when the parent has its last sample,
through the same pipe as everybody's. What the child knows is what it was sent; of the load it is told nothing. A
request whose audio is not what was asked for, in its length or by its seal, had no answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.load import Closed, Open, poisson
from harness.results import Measurement
from harness.scenarios.base import Call, Request, Visit
from harness.scenarios.streaming import Streaming
from harness.workload import LOADED, Item

CLOSED, OPEN = "closed", "open"
LENGTH_TOLERANCE = 0.01
UNANSWERED = "it was not answered to its end in time"
OF_ANOTHER_LENGTH = "its audio is not as long as what was asked for"


@dataclass(frozen=True)
class Size:
    """One load: `how` is CLOSED or OPEN."""

    how: str
    users: int

    def load(self, requests: Sequence[Request], token_s: float, seed: int) -> Closed | Open:
        """When the requests come, of which a token plays for `token_s`."""
        if self.how == CLOSED:
            return Closed(self.users, len(requests))
        mean_s = token_s * sum(request.n_tokens or 0 for request in requests) / len(requests)
        return Open(poisson(self.users / mean_s, len(requests), seed))


class Loaded(Streaming):
    """A turn is one utterance by each variant; the load pass (`harness.load_pass`) is behind all of them."""

    name = LOADED

    def sizes(self, how: str, settings: Mapping[str, Any]) -> list[Size]:
        """The loads of one kind, in the order in which they are tried."""
        return [Size(how, users) for users in sorted(set(settings["users"]))]

    def visit_rows(self, call: Call, size: Size, visits: Sequence[Visit | None], token_s: float) -> list[Measurement]:
        """The rows of a load, one a request; None is one that never came to be asked."""
        rows = []
        for request, visit in zip(call.requests, visits, strict=True):
            columns: dict[str, Any] = {"load": size.how, "load_size": float(size.users)}
            error = UNANSWERED
            if visit is not None:
                asked_s = token_s * (request.n_tokens or 0)
                fits = abs(visit.audio_s - asked_s) <= LENGTH_TOLERANCE * asked_s + token_s
                columns |= {"came_s": visit.came_s, "chunks": visit.chunks, "audio_s": visit.audio_s}
                columns |= {"n_tokens": visit.n_tokens, "parent_time_s": visit.chunks[-1][0] if visit.chunks else None}
                error = UNANSWERED if not visit.is_whole else visit.flaw or ("" if fits else OF_ANOTHER_LENGTH)
            columns |= {"status": "failed", "error": error} if error else {}
            rows.append(self._row(call, request, columns))
        return rows

    def remark(self, shares: Mapping[str, Sequence[Item]]) -> str:
        return (
            f"{super().remark(shares)} Under load, behind that, each variant is given more callers at a time until it "
            "fails them; a request without a whole answer counts as infinitely late."
        )
