"""Requests that nobody has seen before, and what is heard in the answers."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from harness import checks
from harness.draws import APART, SPREAD, Draws, fresh_length
from harness.figures import growth, outpaces_itself, repeated_request_ratio
from harness.hearing import Listener, Memory
from harness.results import Measurement
from harness.workload import Item

ITEM, OTHER = Item("a", "one day", "rms"), Item("b", "two cats", "rms")
RATE = 24_000


# -- fresh work ----------------------------------------------------------------------------------------------------


def test_no_request_comes_twice_and_lengths_stay_near_and_apart():
    draws = Draws(7, taken=[1, 2, 3])
    asked = [draws.request(item, 100) for _ in range(6) for item in (ITEM, OTHER)]
    assert len({request.seed for request in asked} | {1, 2, 3}) == len(asked) + 3
    for item in (ITEM, OTHER):
        lengths = [request.n_tokens for request in asked if request.item == item]
        assert all(abs(n - 100) <= 100 * SPREAD for n in lengths)
        assert all(abs(one - other) >= 100 * APART for one, other in combinations(lengths[:3], 2))


def test_the_same_secret_asks_the_same_and_another_does_not():
    first, again, other = (
        [draws.request(ITEM, 100) for _ in range(5)] for draws in (Draws(7, []), Draws(7, []), Draws(None, []))
    )
    assert first == again != other


def test_where_all_lengths_are_taken_the_latest_are_avoided_first():
    lengths: list[int] = []
    for _ in range(40):
        lengths.append(fresh_length(100, lengths, random.Random(len(lengths))))
        assert abs(lengths[-1] - 100) <= 10
        assert len(lengths) < 2 or abs(lengths[-1] - lengths[-2]) >= 3
    assert fresh_length(1, [1, 1], random.Random(0)) == 1


def test_without_a_count_the_model_stops_itself():
    assert Draws(0, []).request(ITEM, None).n_tokens is None


# -- what is heard -------------------------------------------------------------------------------------------------


def speech(seed: int, seconds: float = 2.0) -> np.ndarray:
    """Tones that change every 80 ms, as loud as speech."""
    source = np.random.default_rng(seed)
    n = int(seconds / 0.08)
    moments = np.arange(int(0.08 * RATE)) / RATE
    tones = [sum(np.sin(2 * np.pi * pitch * moments) for pitch in source.uniform(100, 4000, 3)) for _ in range(n)]
    return (0.05 * np.concatenate(tones)).astype(np.float32)


def spoken(seed: int) -> np.ndarray:
    """The same sounds in another pace and with a noise of its own."""
    source, sounds = np.random.default_rng(seed), np.split(speech(0), 25)
    paced = np.concatenate([np.resize(sound, int(len(sound) * source.uniform(0.8, 1.4))) for sound in sounds])
    return (paced + 0.001 * source.standard_normal(len(paced))).astype(np.float32)


def stretched(wave: np.ndarray, n: int) -> np.ndarray:
    return np.interp(np.linspace(0, len(wave) - 1, n), np.arange(len(wave)), wave)


def row(variant: str = "x", **columns) -> Measurement:
    known = {"generation_time_s": 1.0, "parent_time_s": 1.001, "audio_s": 2.0, "pinned_tokens": 50, "seed": 1} | columns
    return Measurement(variant=variant, pass_name="speed", text_id="a", text="one day", voice="rms", **known)


def heard_pairs(spoil) -> list[tuple[Measurement, Measurement]]:
    """What the checks get to see of four requests, which the candidate's `spoil` answers from the honest wave."""
    known, pairs = Memory(), []
    listeners = Listener(known, is_reference=True), Listener(known, is_reference=False)
    for number in range(4):
        honest = spoken(number)
        waves = honest, spoil(honest, number)
        pairs.append(
            tuple(
                row(name, seed=number, round=number, **listener.columns(ITEM, number, wave, RATE))
                for name, listener, wave in zip(("baseline", "x"), listeners, waves, strict=True)
            )
        )
    return pairs


def said(pairs) -> str:
    return " ".join(checks.pair_failures(pairs, [], "baseline"))


def test_only_the_references_first_clips_say_what_a_text_sounds_like():
    """A candidate that says other words, always the same, does not become what others are held against."""
    known = Memory()
    reference, candidate = Listener(known, is_reference=True), Listener(known, is_reference=False)
    for number in range(4):
        reference.columns(ITEM, number, spoken(number), RATE)
        unlike = candidate.columns(ITEM, number, speech(99), RATE)["unlikeness"]
        assert unlike > 0.05
    assert len(known.first[ITEM]) == 2


def test_a_wave_of_nothing_is_silent():
    found = Listener(Memory(), is_reference=True).columns(ITEM, 0, np.zeros(0, dtype=np.float32), RATE)
    assert (found["silent"], found["level_dbfs"], found["silent_share"]) == (True, None, 1.0)


def test_honest_clips_pass_even_where_they_are_not_the_reference_s():
    assert said(heard_pairs(lambda wave, number: wave)) == ""
    assert said(heard_pairs(lambda wave, number: np.resize(spoken(100 + number), len(wave)))) == ""


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda wave, number: 0 * wave, "are silent"),
        (lambda wave, number: np.full_like(wave, np.nan), "are not finite"),
        (lambda wave, number: np.resize(wave[: len(wave) // 960 * 480], len(wave)), "say something twice"),
        (lambda wave, number: np.resize(speech(99), len(wave)), "are those of an earlier request again"),
        (lambda wave, number: stretched(spoken(99), len(wave)), "are stretched from an earlier one"),
        (lambda wave, number: np.where(np.arange(len(wave)) < len(wave) // 2, wave, 0), "are silent for long"),
        (lambda wave, number: 0.03 * wave, "dB too quiet"),
        (lambda wave, number: speech(100 + number, len(wave) / RATE), "say something else"),
    ],
)
def test_a_clip_that_was_not_spoken_is_heard(spoil, words):
    assert words in said(heard_pairs(lambda wave, number: spoil(wave, number).astype(np.float32)))


@pytest.mark.parametrize("spoil", [lambda wave, number: wave, lambda wave, number: spoken(100 + number)])
def test_who_speaks_alike_whether_it_is_timed_or_not_is_honest(spoil):
    timed, free = heard_pairs(spoil), heard_pairs(spoil)
    assert "in another way" not in " ".join(checks.pair_failures(timed, free, "baseline"))


def test_who_speaks_in_another_way_while_it_is_timed_is_heard():
    def rough(wave: np.ndarray, number: int) -> np.ndarray:
        return wave + (0.02 * np.random.default_rng(number).standard_normal(len(wave))).astype(np.float32)

    timed, free = heard_pairs(rough), heard_pairs(lambda wave, number: wave)
    found = " ".join(checks.pair_failures(timed, free, "baseline"))
    assert "in another way than those of the quality pass" in found
    assert "and 0.00 where nothing is timed" in found


# -- what comes again, and what grows ------------------------------------------------------------------------------


def test_what_repeating_gives():
    first, again = row(), replace(row(generation_time_s=0.1, parent_time_s=0.1), pass_name="repeat")
    assert repeated_request_ratio([first, again]) == pytest.approx(0.1, rel=0.01)
    assert repeated_request_ratio([first]) is None


@pytest.mark.parametrize(
    ("again_s", "remembered"), [((0.1, 0.1), True), ((0.45,), False), ((0.1, 0.6), False), ((), False)]
)
def test_a_second_time_faster_than_any_call_is_more_than_luck(again_s, remembered):
    def timed(time_s: float, **fields):
        return row(generation_time_s=time_s, parent_time_s=time_s, **fields)

    spoken = [timed(time_s, seed=number) for number, time_s in enumerate((0.77, 0.39, 0.55))]
    again = [replace(timed(time_s, seed=0), pass_name="repeat") for time_s in again_s]
    assert outpaces_itself([*spoken, *again]) is remembered


def test_what_grows_call_by_call_is_told_with_its_slope():
    rows = [
        row(round=number // 3, seed=number, counts={"hooks": 7.0 + 3 * number, "threads": 4}) for number in range(12)
    ]
    assert growth(rows) == {"hooks": pytest.approx(3.0)}


def test_what_warms_up_and_stops_is_no_growth():
    held = [800, 900, 950, 955, 955, 955, 954, 955, 956, 955, 955, 955]
    rows = [row(round=number // 3, seed=number, counts={"memory_mb": mb}) for number, mb in enumerate(held)]
    assert growth(rows) == {}


def test_time_that_drifts_from_round_to_round_is_growth():
    seconds = [1 + 0.1 * number for number in range(12)]
    rows = [row(round=n, seed=n, parent_time_s=took, generation_time_s=took) for n, took in enumerate(seconds)]
    assert growth(rows) == {"time": pytest.approx(0.1 / np.median(seconds))}
