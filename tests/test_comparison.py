"""What takes a verdict back: timed clips that are worse, and a watermark that is lost."""

from __future__ import annotations

import pytest

from harness.comparison import objection, watermark_loss, withdrawn
from harness.results import Comparison, Score


def change(verdict: str, value: float = 0.5) -> Comparison:
    return Comparison(kind="ratio", value=value, low=value, high=value, verdict=verdict, n=12)


def test_only_a_gain_is_withdrawn_and_only_for_a_reason():
    assert withdrawn(change("faster"), "it said nothing").verdict == "withdrawn: it said nothing"
    assert withdrawn(change("less"), "it said nothing").verdict == "withdrawn: it said nothing"
    assert withdrawn(change("faster"), None).verdict == "faster"
    for verdict in ("slower", "no detectable change", "not measured"):
        assert withdrawn(change(verdict), "it said nothing").verdict == verdict


def test_timed_clips_that_are_worse_are_an_objection_with_each_figure():
    worse, kept = change("worse", 0.25), change("no detectable change", 0.01)
    assert objection({"rtf": change("faster"), "wer": worse, "wer_timed": kept, "sim_x_timed": kept}) is None
    words, voice = objection({"wer_timed": worse, "sim_x_timed": change("worse", -0.3)}).split("; ")
    assert words.endswith("their word error rate by +0.250")
    assert voice.endswith("their similarity by -0.300")


def scores(variant: str, *confidences: float | None) -> list[Score]:
    return [
        Score(variant=variant, text_id="a", text="One day.", voice="v", seed=seed, watermark=confidence)
        for seed, confidence in enumerate(confidences)
    ]


@pytest.mark.parametrize(
    ("reference", "candidate", "lost"),
    [
        ([0.9] * 4, [0.9] * 4, None),
        ([0.9] * 4, [0.9] * 3 + [0.1], None),  # one clip may be missed
        ([0.9] * 4, [0.9] * 2 + [0.1] * 2, "in 2 of 4 judged clips, and in 4 of 4 of baseline's"),
        ([0.9] * 4, [0.9] * 2 + [0.1] * 2 + [None] * 9, "in 2 of 4 judged clips"),  # nobody asked about those
        ([0.1] * 4, [0.1] * 4, None),  # there was none to lose
        ([0.9] * 60, [0.9] * 58 + [0.1] * 2, None),  # three in a hundred
        ([0.9] * 40, [0.9] * 37 + [0.1] * 3, "in 37 of 40 judged clips"),
        ([], [0.1] * 4, None),
        ([0.9] * 4, [None] * 4, None),
    ],
)
def test_a_watermark_is_lost_where_more_than_a_clip_lacks_it(reference, candidate, lost):
    found = watermark_loss([*scores("baseline", *reference), *scores("combo", *candidate)], "baseline", "combo")
    assert found is None if lost is None else lost in found
