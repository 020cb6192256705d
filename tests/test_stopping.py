"""When a job has its answer: after as many pairs as its noise asks for, and not because it was looked at often."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from harness import stats
from harness.checks import Pair
from harness.comparison import speed
from harness.results import Measurement
from harness.scenarios.base import Scenario
from harness.stopping import is_answered

RTF = Scenario.compared[0]
THRESHOLD = 0.03


def pairs(ratio: float, noise: float, n: int, seed: int = 0) -> list[Pair]:
    """Calls of some 1 s on each side, the candidate's by `ratio`; `noise` is the deviation of a time's logarithm."""
    rng = np.random.default_rng(seed)

    def row(variant: str, number: int, seconds: float) -> Measurement:
        said = {"text_id": "a", "text": "One day.", "voice": "v", "seed": number, "round": number}
        return Measurement(variant=variant, pass_name="speed", generation_time_s=seconds, audio_s=1.0, **said)

    times = np.exp(rng.normal(0, noise, (n, 2))) * [1.0, ratio]
    return [(row("baseline", i, base), row("combo", i, other)) for i, (base, other) in enumerate(times)]


def answered_after(known: list[Pair], detectable: float, least: int = stats.MIN_PAIRS) -> int | None:
    """The pairs after which a job would have stopped; None if it would have gone on."""
    looks = range(least, len(known) + 1)
    return next((n for n in looks if is_answered(known[:n], RTF, THRESHOLD, detectable)), None)


def test_too_few_pairs_answer_nothing():
    assert not is_answered([], RTF, THRESHOLD, 10.0)
    assert not is_answered(pairs(0.1, 0.0, stats.MIN_PAIRS - 1), RTF, THRESHOLD, 10.0)


def test_what_could_have_been_found_is_an_answer():
    known = pairs(1.0, 0.04, 60)
    assert not is_answered(known[:10], RTF, THRESHOLD, 0.06)
    assert is_answered(known, RTF, THRESHOLD, 0.06)
    assert not is_answered(known, RTF, THRESHOLD, 0.031), "which the threshold alone nearly takes up"


@pytest.mark.parametrize("seed", range(5))
def test_what_is_reported_is_what_was_asked_for(seed):
    """Looking again and again at a rough figure would end at the first that happens to be low."""
    known = pairs(1.0, 0.06, 120, seed)
    change = speed(known[: answered_after(known, 0.06)], [RTF])["rtf"][0]
    assert stats.smallest_detectable(change, THRESHOLD, stats.metric("rtf")) <= 0.06


def test_more_noise_takes_more_pairs():
    calm, rough = (answered_after(pairs(1.0, noise, 200), 0.06) for noise in (0.03, 0.09))
    assert calm is not None
    assert rough is not None
    assert rough > 3 * calm


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_a_change_beyond_doubt_is_an_answer_before_it_is_known_precisely(ratio):
    known = pairs(ratio, 0.2, 60)
    stopped = answered_after(known, 0.01)
    assert stopped is not None
    assert stopped < 40
    change = speed(known[:stopped], [RTF])["rtf"][0]
    assert stats.smallest_detectable(change, THRESHOLD, stats.metric("rtf")) > 0.1


def test_a_first_verdict_is_no_answer():
    """It comes along in identical code, if one waits for it."""
    for n in range(stats.MIN_PAIRS, 60):
        known = pairs(0.9, 0.1, n)
        low, high = speed(known, [RTF])["rtf"][0].bounds
        if stats.verdict(low, high, THRESHOLD, stats.metric("rtf")) == "faster":
            assert not is_answered(known, RTF, THRESHOLD, 0.031)
            return
    pytest.fail("none of these had a verdict")


@pytest.mark.slow
@pytest.mark.parametrize(("truth", "most"), [(1.0, 0.02), (1 + THRESHOLD, 0.05)])
def test_looking_after_every_round_alarms_no_more_often_than_looking_once(truth, most):
    """Identical code, and a change that just does not count: how often it is called slower, or faster."""
    alarms, covered, jobs = 0, 0, 300
    for known in _many(truth, jobs):
        stopped = answered_after(known, 0.08, least=10) or len(known)
        low, high = speed(known[:stopped], [RTF])["rtf"][0].bounds
        alarms += stats.verdict(low, high, THRESHOLD, stats.metric("rtf")) != stats.NO_CHANGE
        covered += low <= truth <= high
    assert alarms / jobs <= most
    assert covered / jobs >= 0.92


def _many(truth: float, jobs: int) -> Iterator[list[Pair]]:
    return (pairs(truth, 0.1, 70, seed) for seed in range(jobs))
