"""What each check says of rows and records, and where it keeps silent: on both sides of every bound.

That whoever is planted is found out is `test_planted`'s, in jobs of minutes; this takes none.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import count

import pytest

from harness import checks
from harness.records import Child
from harness.results import Measurement
from harness.shapes import without_impossible

numbers = count()
PAIRS = 12


def row(**columns) -> Measurement:
    """An utterance of a second in half a second, by both clocks."""
    seed = next(numbers)
    columns = {"generation_time_s": 0.5, "parent_time_s": 0.501, "audio_s": 1.0, "pinned_tokens": 25} | columns
    columns = {"pass_name": "speed", "round": seed} | columns
    return Measurement(variant="combo", text_id="a", text="One day.", voice="v", seed=seed, **columns)


def said(rows, *children) -> str:
    return " ".join(checks.failures(rows, children or [Child()]))


def pairs(of, n: int = PAIRS, **base) -> list[checks.Pair]:
    """`of` is the candidate's columns of each pair, given its number; `base` is the reference's of all."""
    return [(row(**base), row(**of(number))) for number in range(n)]


def said_beside(some: list[checks.Pair], free: list[checks.Pair] = ()) -> str:
    return " ".join(checks.pair_failures(some, free, "baseline"))


def some_of(n: int, **columns):
    """Columns of the first n, none of the others."""
    return lambda number: columns if number < n else {}


# -- one variant by itself ---------------------------------------------------------------------------------------------


def test_honest_rows_are_not_accused():
    assert said([row() for _ in range(6)]) == ""
    assert said([], Child(cpu_between_calls_s=1.0)) == ""


def test_a_flaw_is_told_with_its_number_and_only_of_timed_clips_that_came():
    rows = [row(), row(flaw="cut"), row(flaw="cut")]
    assert said(rows) == "2 of 3 timed clips: cut."
    assert said([row(), row(flaw="cut", pass_name="warmup"), row(flaw="cut", status="failed")]) == ""


@pytest.mark.parametrize(
    ("own_s", "trips_s", "accused"),
    [
        (0.482, [], False),  # 2 % of the call and 10 ms are allowed
        (0.479, [], True),
        (0.521, [], True),
        (0.470, [0.005, 0.007, 0.009], False),  # three times what an empty call takes
        (0.465, [0.005, 0.007, 0.009], True),
        (0.442, [1.0], False),  # but never more than 50 ms
        (0.435, [1.0], True),
    ],
)
def test_two_clocks_have_to_agree(own_s, trips_s, accused):
    rows = [row(generation_time_s=own_s, parent_time_s=0.5) for _ in range(4)]
    assert ("and by the parent's 2.00 s" in said(rows, Child(round_trips_s=trips_s))) == accused


def test_figures_go_by_the_longer_time():
    assert row(generation_time_s=0.1, parent_time_s=1.001).time_s == 1.001
    assert row(generation_time_s=1.0, parent_time_s=None).time_s == 1.0


def test_a_busy_host_may_delay_every_second_call():
    late = [row(generation_time_s=0.3) for _ in range(2)]
    assert said([*late, row(), row()]) == ""
    assert "by its own clock 2 calls took 0.60 s" in said([*late, row()])


@pytest.mark.parametrize(("off_s", "accused"), [(0.07, False), (0.09, True)])
def test_sealing_every_further_wave_of_a_call_takes_its_time(off_s, accused):
    """64 of one call: 63 ms more, besides 10 ms and 2 % of a half second that the call takes."""
    call = [
        row(round=-1, batch_size=64, generation_time_s=(0.5 - off_s) / 64, parent_time_s=0.5 / 64) for _ in range(64)
    ]
    assert bool(said(call)) == accused


@pytest.mark.parametrize(("between_s", "accused"), [(0.069, False), (0.071, True)])
def test_nobody_works_on_after_the_answer(between_s, accused):
    """5 ms for each of four calls, and a twentieth of what the calls took."""
    child = Child(cpu_in_calls_s=1.0, cpu_between_calls_s=between_s)
    assert ("worked on after it had answered" in said([row() for _ in range(4)], child)) == accused


def test_a_figure_that_cannot_be_accuses_nobody():
    """A reader leaves it out and says so; the sums of CPU time once ran backwards."""
    possible, wrong = without_impossible(asdict(Child(cpu_in_calls_s=1.0, cpu_between_calls_s=-6.57)))
    assert wrong == ["cpu_between_calls_s -6.57"]
    assert said([row()], Child.from_dict(possible)) == ""


def test_each_process_answers_for_its_own_calls():
    rows = [row(process=0), row(process=1)]
    assert said(rows, Child(), Child()) == ""
    assert "worked on" in said(rows, Child(), Child(cpu_between_calls_s=1.0))


# -- beside the reference ----------------------------------------------------------------------------------------------


def test_equal_clips_are_not_accused():
    assert said_beside(pairs(lambda _: {}, level_dbfs=-20.0)) == ""


def test_one_silent_or_broken_clip_is_enough_where_the_references_is_not():
    assert "1 of 12 timed clips are silent, and baseline's do not." in said_beside(pairs(some_of(1, silent=True)))
    assert "are not finite" in said_beside(pairs(some_of(1, non_finite=True)))
    assert said_beside(pairs(some_of(1, silent=True, non_finite=True), silent=True, non_finite=True)) == ""


@pytest.mark.parametrize(("n", "of", "accused"), [(4, 12, True), (3, 12, False), (3, 6, True), (2, 4, False)], ids=str)
@pytest.mark.parametrize(
    ("columns", "base", "what"),
    [
        ({"silent_share": 0.45}, {"silent_share": 0.1}, "are silent for long"),
        ({"level_dbfs": -33.0}, {"level_dbfs": -20.0}, "too quiet or too loud"),
        ({"level_dbfs": -7.0}, {"level_dbfs": -20.0}, "too quiet or too loud"),
        ({"repetition": 0.98}, {"repetition": 0.5}, "say something twice"),
        ({"likeness": 0.98}, {"likeness": 0.5}, "are those of an earlier request again"),
        ({"stretched_likeness": 0.88}, {"stretched_likeness": 0.5}, "are stretched from an earlier one"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_happens_now_and_then_has_to_happen_often(columns, base, what, n, of, accused):
    """In more than a quarter of the clips, and in three at least."""
    some = pairs(lambda number: columns if number < n else base, of, **base)
    assert (what in said_beside(some)) == accused


@pytest.mark.parametrize(
    ("columns", "base"),
    [
        ({"silent_share": 0.39}, {"silent_share": 0.1}),
        ({"level_dbfs": -31.0}, {"level_dbfs": -20.0}),
        ({"level_dbfs": None}, {"level_dbfs": -20.0}),
        ({"repetition": 0.96}, {"repetition": 0.5}),
        ({"repetition": 0.98}, {"repetition": 0.95}),  # so is the reference's
        ({"likeness": 0.98}, {"likeness": None}),  # of which nothing is known
        ({"stretched_likeness": 0.88}, {"stretched_likeness": 0.87}),
    ],
    ids=str,
)
def test_what_is_within_bounds_is_not_told(columns, base):
    assert said_beside(pairs(lambda _: columns, **base)) == ""


def test_levels_that_vary_by_themselves_allow_more():
    levels = [-50.0, -10.0] * (PAIRS // 2)
    loud = [(row(level_dbfs=level), row(level_dbfs=level + 30.0)) for level in levels]
    assert said_beside(loud) == "", "a babble of random weights, four deviations of 20 dB"


@pytest.mark.parametrize(("unlikeness", "n", "accused"), [(0.06, 5, True), (0.06, 4, False), (0.044, 12, False)])
def test_other_words_are_told_where_a_third_says_them(unlikeness, n, accused):
    some = pairs(lambda number: {"unlikeness": unlikeness if number < n else 0.02}, unlikeness=0.02)
    assert ("5 of 12 timed clips say something else" in said_beside(some)) == accused


def test_as_many_other_words_as_the_reference_says_are_taken_off():
    some = pairs(lambda number: {"unlikeness": 0.1 if number < 5 else 0.02}, unlikeness=0.02)
    odd = [(replace(base, unlikeness=0.1), own) if index < 2 else (base, own) for index, (base, own) in enumerate(some)]
    assert said_beside(odd) == ""


@pytest.mark.parametrize(("apart", "accused"), [(0.29, False), (0.31, True)])
def test_timed_clips_are_made_as_those_that_nobody_times(apart, accused):
    """Three times nine tenths of the free ones' distance, and 0.15."""
    free = pairs(lambda number: {"apart": 0.05 if number else 5.0})
    timed = pairs(lambda number: {"apart": apart if number % 12 else 9.0})
    assert ("in another way than those of the quality pass" in said_beside(timed, free)) == accused
    assert said_beside(timed, free[:2]) == "", "too few to know"


@pytest.mark.parametrize(
    ("audio_s", "pinned", "accused"), [(0.97, 25, False), (0.95, 25, True), (1.05, 25, True), (0.95, 24, False)]
)
def test_the_same_tokens_are_as_long(audio_s, pinned, accused):
    """One speech token more or less, which joining may cost, and work that was not the same is not compared."""
    some = pairs(some_of(1, audio_s=audio_s, pinned_tokens=pinned))
    assert (f"it returned {audio_s:.2f} s of audio and baseline 1.00 s (1 of 12 pairs" in said_beside(some)) == accused


def test_long_clips_may_differ_by_a_hundredth():
    for audio_s, accused in ((10.09, False), (10.11, True)):
        some = pairs(lambda _, audio_s=audio_s: {"audio_s": audio_s}, audio_s=10.0)
        assert bool(said_beside(some)) == accused
