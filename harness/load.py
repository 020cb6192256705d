"""Requests that come while others are spoken: in closed loop, in open loop, and what came of them.

In closed loop `n` requests are always on their way: as soon as one is answered, the next one comes, and the load
follows the server. In open loop requests come when they come, as strangers' do, at random and at a rate: the queue
tells whether the server keeps up.

`drive` goes through a load at a `Counter`, which is given each request when it comes, and asked for news in between.
The clock and the sleep are parameters, so that the same code runs in a test without time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

from harness.player import Arrival, Heard, listen

FIRST_AUDIO_LIMIT_S = 0.3
"""Within which 99 % of a load's callers have to have sound, unless a run's settings say otherwise."""


@dataclass(frozen=True)
class News:
    """What a caller has now: `audio_s` more seconds of audio, or, when it `ends`, all there is; `failed` if that is
    not the whole answer."""

    caller: int
    audio_s: float = 0.0
    ends: bool = False
    failed: bool = False


class Counter(Protocol):
    """Where requests are handed in, and whoever speaks for several callers answers."""

    def take(self, caller: int, request: Any) -> None:
        """A caller's request has come."""
        ...

    def news(self, patience_s: float) -> list[News] | None:
        """What there is, after waiting for at most that long; None where nothing is asked for."""
        ...


@dataclass
class Served:
    """One request: when it came, on the load's clock [s], and what was there when, since then."""

    came_s: float
    arrivals: list[Arrival] = field(default_factory=list)
    is_whole: bool = False

    def heard(self) -> Heard | None:
        """What its caller has of it; None where the answer did not come to its end."""
        return listen(self.arrivals) if self.is_whole else None


class Closed:
    """`users` requests on their way at a time, `total` in all."""

    def __init__(self, users: int, total: int) -> None:
        self.users, self.total = users, total

    def due(self, now_s: float, came: int, done: int) -> int:
        """Requests that come now."""
        return max(0, min(self.total, done + self.users) - came)

    def next_s(self, came: int) -> float | None:
        """When the next one comes by itself."""
        return None


class Open:
    """Requests at given times, in seconds from the start."""

    def __init__(self, times_s: Sequence[float]) -> None:
        self.times_s, self.total = sorted(times_s), len(times_s)

    def due(self, now_s: float, came: int, done: int) -> int:
        return sum(at <= now_s for at in self.times_s[came:])

    def next_s(self, came: int) -> float | None:
        return self.times_s[came] if came < self.total else None


def poisson(rate: float, n: int, seed: int) -> list[float]:
    """`n` times [s] at which requests come, independently of one another, `rate` a second on average."""
    numbers = random.Random(seed)
    return list(accumulate(numbers.expovariate(rate) for _ in range(n)))


def drive(
    counter: Counter,
    load: Closed | Open,
    requests: Sequence[Any],
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    limit_s: float = float("inf"),
) -> list[Served]:
    """Go through a load; what was not answered when `limit_s` were over stays unanswered.

    In open loop a request's clock runs from when it was to come, however late there was time to take it.
    """
    start, done = clock(), set[int]()
    served: list[Served] = []
    open_s = load.times_s if isinstance(load, Open) else None
    while len(done) < load.total and (now := clock() - start) < limit_s:
        for _ in range(load.due(now, len(served), len(done))):
            caller = len(served)
            served.append(Served(open_s[caller] if open_s else now))
            counter.take(caller, requests[caller % len(requests)])
        following = load.next_s(len(served))
        until = min(limit_s, float("inf") if following is None else following)
        news = counter.news(max(0.0, until - (clock() - start)))
        if news is None:
            if following is None:
                break  # nothing to do, and nobody comes
            sleep(max(0.0, until - (clock() - start)))
            continue
        now = clock() - start
        for one in news:
            if one.audio_s:
                served[one.caller].arrivals.append(Arrival(now - served[one.caller].came_s, one.audio_s))
            if one.ends:
                served[one.caller].is_whole = not one.failed
                done.add(one.caller)
    return served


# -- the figure ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """What a load of one size gave. `size` is users, or simultaneous streams of audio in open loop.

    Quantiles are over all requests; one without an answer counts as infinitely late, and as one that breaks off.
    `underruns` are of those that were answered.
    """

    size: float
    first_p50_s: float
    first_p90_s: float
    first_p99_s: float
    continuous_share: float
    underruns: int
    n: int

    def keeps(self, limit_s: float) -> bool:
        """First audio within the limit for 99 %, and no underrun at all."""
        return self.n > 0 and self.first_p99_s <= limit_s and self.continuous_share == 1.0


def level(size: float, heard: Sequence[Heard | None]) -> Level:
    """A load's level, from what all callers have of their requests; None of one that was not answered."""
    first = sorted(one.first_s if one else float("inf") for one in heard)
    p50, p90, p99 = (quantile(first, share) for share in (0.5, 0.9, 0.99))
    continuous = sum(one is not None and one.is_continuous for one in heard)
    return Level(
        size=size,
        first_p50_s=p50,
        first_p90_s=p90,
        first_p99_s=p99,
        continuous_share=continuous / len(heard) if heard else 0.0,
        underruns=sum(len(one.underruns_s) for one in heard if one),
        n=len(heard),
    )


def most_kept(levels: Sequence[Level], limit_s: float) -> float | None:
    """The largest size up to which every level keeps the limit; None where already the smallest does not."""
    best = None
    for one in sorted(levels, key=lambda one: one.size):
        if not one.keeps(limit_s):
            break
        best = one.size
    return best


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest of the ordered values that `share` of them do not exceed; infinite where there is none.

    Nothing is interpolated: the 99th percentile of fewer than a hundred is their largest.
    """
    if not ordered:
        return float("inf")
    rank = -(-share * len(ordered) // 1)
    return ordered[max(0, int(rank) - 1)]
