"""The gate: stops what certainly got worse, passes noise, and says when it does not know."""

import pytest
from factories import Case, Effect, make_summary

from harness import gate
from harness.errors import UserError


def judge(summary, *limits, reference=None):
    findings = gate.check(summary, [gate.parse_limit(text) for text in limits], reference)
    return [finding.outcome for finding in findings], gate.exit_code([summary], findings)


@pytest.mark.parametrize(
    ("text", "amount"),
    [("rtf:5%", 0.05), ("rtf:+2.5%", 0.025), ("wer:+0.02", 0.02), ("wer:0.02", 0.02), ("sim_resemblyzer:-0.1", 0.1)],
)
def test_the_grammar(text, amount):
    assert gate.parse_limit(text).amount == pytest.approx(amount)


@pytest.mark.parametrize(
    "text", ["rtf", "rtf:5", "rtf:-5%", "wer:5%", "wer:-0.02", "speed:5%", "rtf:five%", "sim_resemblyzer:+0.1", ""]
)
def test_anything_else_is_bad_input_and_shows_the_way_out(text):
    with pytest.raises(UserError, match="gate limit"):
        gate.parse_limit(text)


def test_a_faster_combo_passes_and_a_slower_one_does_not(tmp_path):
    fast = make_summary(tmp_path, Case(effect=Effect(time=0.6)))
    slow = make_summary(tmp_path, Case(effect=Effect(time=1.2)))
    assert judge(fast, "rtf:5%", "wer:+0.02") == (["passed", "passed"], gate.PASSED)
    assert judge(slow, "rtf:5%") == (["regression"], gate.REGRESSION)
    assert judge(slow, "rtf:30%") == (["passed"], gate.PASSED)


def test_worse_quality_is_a_regression(tmp_path):
    worse = make_summary(tmp_path, Case(effect=Effect(time=0.5, wer=0.1, similarity=-0.1)))
    assert judge(worse, "wer:+0.02", "sim_resemblyzer:-0.02")[0] == ["regression", "regression"]


def test_noise_beyond_the_limit_is_undecided_and_passes(tmp_path):
    noisy = make_summary(tmp_path, Case(effect=Effect(time=1.06), noise=0.3, seed=4))
    change = noisy.comparison["rtf"]
    assert change.value > 1.01 > change.low  # what the test is about
    assert judge(noisy, "rtf:1%") == (["undecided"], gate.PASSED)


def test_against_a_reference_the_ratios_are_compared(tmp_path):
    reference = make_summary(tmp_path, Case(effect=Effect(time=0.5), device="another machine"))
    lost = make_summary(tmp_path, Case(effect=Effect(time=0.6)))
    assert judge(lost, "rtf:5%")[1] == gate.PASSED  # still faster than its baseline
    assert judge(lost, "rtf:5%", reference=reference)[1] == gate.REGRESSION
    assert judge(lost, "rtf:30%", reference=reference)[1] == gate.PASSED


def test_a_reference_of_another_experiment_is_refused(tmp_path):
    summary = make_summary(tmp_path, Case())
    for changes in ({"combo": "campaign"}, {"pipeline": "random"}):
        other = make_summary(tmp_path, Case(**changes))
        with pytest.raises(UserError, match="reference"):
            judge(summary, "rtf:5%", reference=other)


def test_missing_figures_are_neither_a_pass_nor_a_regression(tmp_path):
    unscored = make_summary(tmp_path, Case(scored=False))
    assert judge(unscored, "wer:+0.02") == (["not measured"], gate.NO_DATA)
    assert judge(unscored, "rtf:5%")[1] == gate.NO_DATA  # the run is incomplete
    failed = make_summary(tmp_path, Case(effect=Effect(audio=0.9)))
    assert judge(failed, "rtf:5%") == (["not measured"], gate.NO_DATA)


def test_a_regression_outranks_a_gap(tmp_path):
    slow = make_summary(tmp_path, Case(effect=Effect(time=1.5), scored=False))
    assert judge(slow, "rtf:5%", "wer:+0.02")[1] == gate.REGRESSION
