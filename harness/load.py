"""Requests that come while others are spoken: in closed loop, in open loop, and who serves them.

In closed loop `n` requests are always on their way: as soon as one is answered, the next one comes, and the load
follows the server. In open loop requests come when they come, as strangers' do, at random and at a rate: the queue
tells whether the server keeps up.

`drive` goes through a load with a `Desk`, which is given each request when it comes, and asked to work in between. The
clock and the sleep are parameters, so that the same code runs in a test without time.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

from harness.player import Arrival, Heard, listen


class Desk(Protocol):
    """Whoever speaks for several callers."""

    def take(self, caller: int, request: Any) -> None:
        """A caller's request has come."""
        ...

    def work(self) -> list[tuple[int, float]] | None:
        """Go on a little: the callers that are further now, each with the seconds of audio that came of it, which may
        be none; None where nothing is to do."""
        ...

    def is_done(self, caller: int) -> bool:
        """Whether a caller has all of the answer."""
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
    desk: Desk,
    load: Closed | Open,
    requests: Sequence[Any],
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    limit_s: float = float("inf"),
) -> list[Served]:
    """Go through a load; what was not answered when `limit_s` were over stays unanswered.

    In open loop a request's clock runs from when it was to come, however late the desk had time to take it.
    """
    start, done = clock(), set[int]()
    served: list[Served] = []
    open_s = load.times_s if isinstance(load, Open) else None
    while len(done) < load.total and (now := clock() - start) < limit_s:
        for _ in range(load.due(now, len(served), len(done))):
            caller = len(served)
            served.append(Served(open_s[caller] if open_s else now))
            desk.take(caller, requests[caller % len(requests)])
        chunks = desk.work()
        if chunks is None:
            following = load.next_s(len(served))
            if following is None:
                break  # nothing to do, and nobody comes
            sleep(max(0.0, following - (clock() - start)))
            continue
        now = clock() - start
        for caller, audio_s in (chunk for chunk in chunks if chunk[1]):
            served[caller].arrivals.append(Arrival(now - served[caller].came_s, audio_s))
        for caller in {caller for caller, _ in chunks} - done:
            if desk.is_done(caller):
                served[caller].is_whole = True
                done.add(caller)
    return served


class OneAtATime:
    """A pipeline that speaks one utterance after the other, in the order in which they were asked for."""

    def __init__(self, stream: Callable[[Any], Iterator[Any]]) -> None:
        self._stream = stream
        self._waiting: deque[tuple[int, Any]] = deque()
        self._now: tuple[int, Iterator[Any]] | None = None
        self._done: set[int] = set()

    def take(self, caller: int, request: Any) -> None:
        self._waiting.append((caller, request))

    def work(self) -> list[tuple[int, float]] | None:
        """One more chunk, or the end of the utterance, which has no audio of its own."""
        if self._now is None:
            if not self._waiting:
                return None
            caller, request = self._waiting.popleft()
            self._now = caller, self._stream(request)
        caller, chunks = self._now
        chunk = next(chunks, None)
        if chunk is None:
            self._now = None
            self._done.add(caller)
            return [(caller, 0.0)]
        return [(caller, chunk.audio_s)]

    def is_done(self, caller: int) -> bool:
        return caller in self._done


# -- the figure ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """What a load of one size gave. `size` is users, or simultaneous streams of audio in open loop.

    Quantiles are over all requests; one without an answer counts as infinitely late.
    """

    size: float
    first_p50_s: float
    first_p99_s: float
    continuous_share: float
    n: int

    def keeps(self, limit_s: float) -> bool:
        """First audio within the limit for 99 %, and no underrun at all."""
        return self.n > 0 and self.first_p99_s <= limit_s and self.continuous_share == 1.0


def level(size: float, served: Sequence[Served]) -> Level:
    """A load's level, from all requests that came."""
    heard = [one.heard() for one in served]
    first = sorted(one.first_s if one else float("inf") for one in heard)
    return Level(
        size=size,
        first_p50_s=quantile(first, 0.5),
        first_p99_s=quantile(first, 0.99),
        continuous_share=sum(one is not None and one.is_continuous for one in heard) / len(heard) if heard else 0.0,
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
