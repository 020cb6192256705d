"""Load: who comes when, who waits for whom, and the largest load that is kept; on a clock that stands still."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from harness.load import Closed, Level, News, Open, Served, drive, level, most_kept, poisson, quantile


@dataclass
class Time:
    now: float = 100.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Speaker:
    """Says one request after the other; each takes `each_s` for each of `n` chunks of a second of audio."""

    time: Time
    each_s: float
    n: int = 3
    asked: list[object] = field(default_factory=list)
    waiting: list[tuple[int, int]] = field(default_factory=list)

    def take(self, caller: int, request: object) -> None:
        self.asked.append(request)
        self.waiting.append((caller, self.n))

    def news(self, patience_s: float) -> list[News] | None:
        if not self.waiting:
            return None
        (caller, left), *others = self.waiting
        if not left:
            self.waiting = others
            return [News(caller, ends=True)]
        self.time.now += self.each_s
        self.waiting = [(caller, left - 1), *others]
        return [News(caller, 1.0)]


def served_by(
    each_s: float, load: Closed | Open, n: int = 3, limit_s: float = math.inf
) -> tuple[list[Served], Speaker]:
    time = Time()
    speaker = Speaker(time, each_s, n)
    return drive(speaker, load, ["a", "b"], time.clock, time.sleep, limit_s), speaker


def test_one_user_never_waits() -> None:
    served, speaker = served_by(0.1, Closed(1, 4))
    assert [one.came_s for one in served] == pytest.approx([0, 0.3, 0.6, 0.9])
    for one in served:
        assert [arrival.ready_s for arrival in one.arrivals] == pytest.approx([0.1, 0.2, 0.3])
    assert speaker.asked == ["a", "b", "a", "b"]


def test_many_users_wait_for_one_another() -> None:
    served, _ = served_by(0.1, Closed(3, 6))
    first = [one.heard().first_s for one in served]  # type: ignore[union-attr]
    assert first == pytest.approx([0.1, 0.4, 0.7, 0.7, 0.7, 0.7])
    assert all(one.is_whole for one in served)


def test_strangers_wait_from_when_they_came() -> None:
    """The second comes while the first is spoken; the third long after both."""
    served, _ = served_by(0.1, Open([0.0, 0.05, 5.0]))
    assert [one.heard().first_s for one in served] == pytest.approx([0.1, 0.35, 0.1])  # type: ignore[union-attr]
    assert [one.came_s for one in served] == [0.0, 0.05, 5.0]


def test_a_server_that_falls_behind_is_seen_to() -> None:
    """A service of 0.3 s, a request every 0.2 s: each waits 0.1 s longer than the one before."""
    served, _ = served_by(0.1, Open([0.2 * i for i in range(10)]))
    first = [one.heard().first_s for one in served]  # type: ignore[union-attr]
    assert first == pytest.approx([0.1 + 0.1 * i for i in range(10)])


def test_what_was_not_answered_in_time_counts_against() -> None:
    served, _ = served_by(1.0, Closed(2, 4), limit_s=4.5)
    assert [one.is_whole for one in served] == [True, False, False]
    assert served[1].heard() is None
    found = level(2, [one.heard() for one in served])
    assert found.first_p99_s == math.inf
    assert found.continuous_share == pytest.approx(1 / 3)
    assert not found.keeps(10.0)


def test_no_request_keeps_nothing() -> None:
    assert not level(1, []).keeps(math.inf)


def test_poisson_comes_at_its_rate_and_the_same_again() -> None:
    times = poisson(4.0, 4000, seed=1)
    assert times == poisson(4.0, 4000, seed=1) != poisson(4.0, 4000, seed=2)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(1000, rel=0.06)
    gaps = [other - one for one, other in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.15)


def kept(size: float, p99: float, share: float = 1.0) -> Level:
    return Level(size, p99 / 2, p99 / 2, p99, share, 0, 100)


def test_the_largest_load_is_the_last_before_the_first_that_fails() -> None:
    levels = [kept(8, 0.2), kept(1, 0.1), kept(2, 0.1), kept(4, 0.4)]
    assert most_kept(levels, 0.3) == 2
    assert most_kept([kept(1, 0.5)], 0.3) is None
    assert most_kept([kept(1, 0.1), kept(2, 0.1, share=0.99)], 0.3) == 1
    assert most_kept([], 0.3) is None


def test_quantiles_are_values_that_were_seen() -> None:
    values = [float(n) for n in range(1, 101)]
    assert quantile(values, 0.99) == 99
    assert quantile(values[:50], 0.99) == 50
    assert quantile(values, 0.5) == 50
    assert quantile([], 0.5) == math.inf
