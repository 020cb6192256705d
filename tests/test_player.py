"""The player: gaps, underruns and the pre-roll that avoids them, from when chunks came and how long they play."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.player import AUDIBLE_S, Arrival, listen

SECONDS = st.floats(0.01, 3.0)
STREAMS = st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=12)


def stream(pairs: list[tuple[float, float]]) -> list[Arrival]:
    """Chunks from pairs of how long after the one before each was ready, and how long it plays."""
    now, arrivals = 0.0, []
    for waited, audio_s in pairs:
        now += waited
        arrivals.append(Arrival(now, audio_s))
    return arrivals


def test_chunks_that_come_in_time_are_heard_without_a_gap() -> None:
    heard = listen(stream([(0.2, 0.5), (0.4, 1.0), (1.0, 0.3)]))
    assert heard is not None
    assert heard.is_continuous
    assert heard.preroll_s == 0
    assert (heard.first_s, heard.audio_s, heard.n_chunks) == (0.2, pytest.approx(1.8), 3)
    assert heard.gaps_s == pytest.approx((0.4, 1.0))


def test_a_chunk_that_comes_late_is_a_silence_as_long_as_it_was_late() -> None:
    heard = listen(stream([(0.2, 0.5), (0.8, 1.0), (1.25, 0.3)]))
    assert heard is not None
    assert heard.underruns_s == pytest.approx((0.3, 0.25))
    assert heard.preroll_s == pytest.approx(0.55)


def test_one_chunk_cannot_run_dry() -> None:
    heard = listen([Arrival(3.0, 2.0)])
    assert heard is not None
    assert heard.is_continuous
    assert heard.gaps_s == ()


@pytest.mark.parametrize("nothing", [[], [Arrival(0.1, 0.0)]])
def test_nothing_is_not_good(nothing: list[Arrival]) -> None:
    assert listen(nothing) is None


@given(STREAMS)
def test_the_preroll_is_the_least_that_avoids_every_underrun(pairs: list[tuple[float, float]]) -> None:
    arrivals = stream(pairs)
    heard = listen(arrivals)
    assert heard is not None

    def with_preroll(seconds: float) -> bool:
        ends = arrivals[0].ready_s + seconds
        for arrival in arrivals:
            if arrival.ready_s > ends + AUDIBLE_S:
                return False
            ends += arrival.audio_s
        return True

    assert with_preroll(heard.preroll_s)
    assert heard.preroll_s <= 2 * AUDIBLE_S or not with_preroll(heard.preroll_s - 2 * AUDIBLE_S)
    assert sum(heard.underruns_s) == pytest.approx(heard.preroll_s, abs=len(pairs) * AUDIBLE_S)


@given(STREAMS, SECONDS)
def test_a_slower_stream_is_never_heard_better(pairs: list[tuple[float, float]], later: float) -> None:
    heard, slower = listen(stream(pairs)), listen(stream([*pairs[:-1], (pairs[-1][0] + later, pairs[-1][1])]))
    assert heard is not None
    assert slower is not None
    assert slower.preroll_s >= heard.preroll_s
    assert slower.first_s >= heard.first_s
