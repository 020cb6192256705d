"""Intervals must cover, verdicts must not alarm on noise, and warnings must speak up when they should."""

import numpy as np
import pytest

from harness import stats

TIME = stats.METRICS["rtf"]
WER = stats.METRICS["wer"]


def texts(n: int) -> list[str]:
    return [f"t{i}" for i in range(n)]


def run_twice(rng: np.random.Generator, n: int, noise: float, effect: float = 1.0, process: float = 0.01):
    """Two variants' times for n texts: each run noisy, each process a little slow or fast as a whole."""
    work = rng.lognormal(0, 0.4, n)
    slow = rng.normal(0, process, 2)
    baseline = work * np.exp(rng.normal(slow[0], noise, n))
    variant = effect * work * np.exp(rng.normal(slow[1], noise, n))
    return baseline, variant


def run_in_processes(
    rng: np.random.Generator,
    processes: int,
    texts: int = 6,
    rounds: int = 4,
    noise: float = 0.05,
    process: float = 0.01,
    text: float = 0.0,
    effect: float = 1.0,
) -> stats.Interval:
    """Fresh work: each round of a text has a length of its own, the same for both; each process is slow as a whole."""
    p, t = np.repeat(np.arange(processes), texts * rounds), np.tile(np.repeat(np.arange(texts), rounds), processes)
    audio = rng.lognormal(0, 0.4, texts)[t] * rng.uniform(0.9, 1.1, len(t))
    slow = rng.normal(0, process, (2, processes))[:, p] + rng.normal(0, noise, (2, len(t)))
    own = rng.normal(0, text, texts)[t]
    baseline, variant = audio * np.exp(slow[0]), effect * audio * np.exp(slow[1] + own)
    return stats.ratio_of_sums(
        baseline, variant, [f"t{i}" for i in t], audio, audio, processes=p.tolist(), resamples=499
    )


def test_ratio_of_sums_is_the_ratio_of_the_two_rtfs():
    interval = stats.ratio_of_sums(
        [2.0, 4.0, 6.0] * 2, [1.0, 2.0, 3.0] * 2, texts(6), [4, 4, 4] * 2, [4, 4, 4] * 2, resamples=200
    )
    assert interval.estimate == pytest.approx(0.5)
    assert interval.low == pytest.approx(0.5)
    assert interval.high == pytest.approx(0.5)
    assert interval.n == 6


def test_the_same_rows_give_the_same_interval():
    baseline, variant = run_twice(np.random.default_rng(0), 8, 0.1)
    assert stats.ratio_of_sums(baseline, variant, texts(8)) == stats.ratio_of_sums(baseline, variant, texts(8))


def test_too_few_pairs_give_no_interval_and_no_verdict():
    n = stats.MIN_PAIRS - 1
    interval = stats.ratio_of_sums([1.0] * n, [0.1] * n, texts(n))
    assert (interval.low, interval.high) == (None, None)
    assert interval.estimate == pytest.approx(0.1)
    assert stats.verdict(interval.low, interval.high, 0.03, TIME) == stats.NOT_MEASURED


@pytest.mark.parametrize("noise", [0.01, 0.03, 0.05, 0.1])
@pytest.mark.parametrize("n", [6, 12, 40])
def test_identical_code_seldom_alarms(n, noise):
    rng = np.random.default_rng(n)
    experiments = 400
    alarms = 0
    for _ in range(experiments):
        baseline, variant = run_twice(rng, n, noise)
        interval = stats.ratio_of_sums(baseline, variant, texts(n), resamples=999)
        alarms += stats.verdict(interval.low, interval.high, 0.03, TIME) != stats.NO_CHANGE
    # 2 % and what 400 experiments may exceed it by chance (two standard deviations of a binomial)
    assert alarms / experiments <= 0.02 + 2 * (0.02 * 0.98 / experiments) ** 0.5


def test_a_rare_slow_run_does_not_alarm_either():
    """One run in twenty takes three times as long, in either variant: a background process, say."""
    rng = np.random.default_rng(5)
    alarms = 0
    for _ in range(400):
        baseline, variant = run_twice(rng, 12, 0.03)
        for times in (baseline, variant):
            times *= np.where(rng.random(12) < 0.05, 3.0, 1.0)
        interval = stats.ratio_of_sums(baseline, variant, texts(12), resamples=999)
        alarms += stats.verdict(interval.low, interval.high, 0.03, TIME) != stats.NO_CHANGE
    assert alarms / 400 <= 0.034


def test_identical_quality_seldom_alarms():
    """Word error rates of two seeds of the same model: mostly zero, sometimes bad."""
    rng = np.random.default_rng(2)
    alarms = 0
    for _ in range(300):
        wer = rng.choice([0.0, 0.1, 0.2, 0.5], p=[0.7, 0.15, 0.1, 0.05], size=(2, 36))
        interval = stats.mean_delta(wer[0], wer[1], [f"t{i // 3}" for i in range(36)], resamples=999)
        alarms += stats.verdict(interval.low, interval.high, 0.02, WER) != stats.NO_CHANGE
    assert alarms / 300 <= 0.036


@pytest.mark.parametrize("n", [6, 20])
def test_a_real_speed_up_is_found(n):
    rng = np.random.default_rng(7)
    found = 0
    for _ in range(100):
        baseline, variant = run_twice(rng, n, 0.05, effect=0.7)
        interval = stats.ratio_of_sums(baseline, variant, texts(n), resamples=999)
        found += stats.verdict(interval.low, interval.high, 0.03, TIME) == "faster"
    assert found >= 95


@pytest.mark.parametrize("n", [6, 30])
def test_the_interval_covers_the_truth(n):
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(400):
        baseline, variant = run_twice(rng, n, 0.1, effect=0.8, process=0.0)
        interval = stats.ratio_of_sums(baseline, variant, texts(n), resamples=999)
        covered += interval.low <= 0.8 <= interval.high
    assert covered / 400 >= 0.92


def test_repeats_of_a_text_are_not_independent_evidence():
    """Eight texts that differ in effect, each measured ten times: the texts decide the interval."""
    rng = np.random.default_rng(3)
    effect = np.repeat(rng.uniform(0.6, 1.0, 8), 10)
    names = [f"t{i // 10}" for i in range(80)]
    clustered = stats.ratio_of_sums(np.ones(80), effect, names)
    naive = stats.ratio_of_sums(np.ones(80), effect, texts(80))
    assert clustered.high - clustered.low > 2 * (naive.high - naive.low)


@pytest.mark.parametrize("processes", [1, 2, 5])
@pytest.mark.parametrize("noise", [0.02, 0.05])
def test_identical_code_on_fresh_work_seldom_alarms(processes, noise):
    rng = np.random.default_rng(21)
    alarms = 0
    for _ in range(300):
        interval = run_in_processes(rng, processes, noise=noise)
        alarms += stats.verdict(interval.low, interval.high, 0.03, TIME) != stats.NO_CHANGE
    assert alarms / 300 <= 0.02 + 2 * (0.02 * 0.98 / 300) ** 0.5


@pytest.mark.parametrize(
    ("process", "text"), [(0.0, 0.0), (0.03, 0.0), (0.0, 0.05), (0.03, 0.05)], ids=["calm", "process", "text", "both"]
)
@pytest.mark.slow
def test_five_processes_cover_the_truth_whatever_it_is_that_differs(process, text):
    rng = np.random.default_rng(22)
    covered = 0
    for _ in range(300):
        interval = run_in_processes(rng, 5, rounds=2, process=process, text=text, effect=0.8)
        covered += interval.low <= 0.8 <= interval.high
    assert covered / 300 >= 0.92


def test_one_process_is_not_resampled():
    baseline, variant = run_twice(np.random.default_rng(0), 8, 0.1)
    alone = stats.ratio_of_sums(baseline, variant, texts(8))
    assert stats.ratio_of_sums(baseline, variant, texts(8), processes=[0] * 8) == alone


def test_processes_that_lie_apart_widen_every_kind_of_interval():
    """Twelve texts in each of five processes that agree, and in five that do not; nothing else differs."""
    names, processes = texts(12) * 5, np.repeat(np.arange(5), 12)
    ones = np.ones(60)
    for shift, apart in ((0.0, False), (0.05, True)):
        value = 1 + shift * (processes - 2)
        for interval in (
            stats.ratio_of_sums(ones, value, names, processes=processes.tolist()),
            stats.ratio_of_peaks(ones, value, names, processes=processes.tolist()),
            stats.mean_delta(ones, value, names, processes=processes.tolist()),
            stats.per_unit(value, ones, names, processes=processes.tolist()),
        ):
            assert (interval.high - interval.low > 0.1) == apart


def test_what_a_process_has_once_takes_five_processes():
    few = stats.ratio_over_processes([4.0] * 4, [2.0] * 4)
    assert few == stats.Interval(pytest.approx(0.5), None, None, 4)
    rng = np.random.default_rng(23)
    covered = alarms = 0
    for _ in range(1000):
        baseline, variant = np.exp(rng.normal(0, 0.05, (2, 5)))
        interval = stats.ratio_over_processes(baseline, variant)
        covered += interval.low <= 1 <= interval.high
        alarms += stats.verdict(interval.low, interval.high, 0.02, stats.METRICS["peak_memory_mb"]) != stats.NO_CHANGE
    assert covered / 1000 >= 0.935
    assert alarms / 1000 <= 0.02 + 2 * (0.02 * 0.98 / 1000) ** 0.5


@pytest.mark.parametrize("processes", [1, 5])
def test_the_smallest_detectable_change_is_detected_four_times_in_five(processes):
    rng = np.random.default_rng(24)
    calm = [run_in_processes(rng, processes, process=0.0) for _ in range(100)]
    change = float(np.median([stats.smallest_detectable(interval, 0.03, TIME) for interval in calm]))
    found = 0
    for _ in range(300):
        interval = run_in_processes(rng, processes, process=0.0, effect=1 + change)
        found += stats.verdict(interval.low, interval.high, 0.03, TIME) == "slower"
    assert 0.75 <= found / 300 <= 0.96


def test_the_word_error_rate_that_few_clips_could_have_heard():
    """A delta: forty clips, the change that `smallest_detectable` names after hearing none."""
    rng = np.random.default_rng(25)

    def heard(change: float) -> stats.Interval:
        before, after = rng.choice([0.0, 0.1, 0.2, 0.5], p=[0.7, 0.15, 0.1, 0.05], size=(2, 40))
        return stats.mean_delta(before, after + change, texts(40), resamples=499)

    change = float(np.median([stats.smallest_detectable(heard(0.0), 0.02, WER) for _ in range(50)]))
    assert change > 0.05
    found = sum(stats.verdict(i.low, i.high, 0.02, WER) == "worse" for i in (heard(change) for _ in range(200)))
    assert 0.7 <= found / 200 <= 0.9


def test_the_rounds_for_a_change_tell_it_from_none():
    rng = np.random.default_rng(26)
    first = [run_in_processes(rng, 1, rounds=2, process=0.0) for _ in range(100)]
    rounds = int(np.median([stats.rounds_for(0.03, interval, 2, "ratio") for interval in first]))
    assert 4 <= rounds <= 20
    told = 0
    for _ in range(200):
        interval = run_in_processes(rng, 1, rounds=rounds, process=0.0, effect=1.03)
        told += interval.low > 1
    assert 0.7 <= told / 200 <= 0.96


def test_without_an_interval_nothing_is_said_about_power():
    unknown = stats.Interval(1.0, None, None, 2)
    assert stats.resolution(unknown, "ratio") is None
    assert stats.smallest_detectable(unknown, 0.03, TIME) is None
    assert stats.rounds_for(0.03, unknown, 4, "ratio") is None
    certain = stats.Interval(1.0, 1.0, 1.0, 6)
    assert stats.smallest_detectable(certain, 0.03, TIME) == pytest.approx(0.03)
    assert stats.rounds_for(0.03, certain, 4, "ratio") == 1


def test_a_planted_slowdown_is_found_with_the_rounds_of_a_gate():
    """10 % slower, six texts, single runs spread by 5 %, processes by 1 %: five processes of four rounds see it."""
    rng = np.random.default_rng(27)
    found = 0
    for _ in range(200):
        interval = run_in_processes(rng, 5, effect=1.1)
        found += stats.verdict(interval.low, interval.high, 0.03, TIME) == "slower"
    assert found / 200 >= 0.95


def test_a_verdict_needs_the_whole_interval_beyond_the_threshold():
    assert stats.verdict(0.90, 0.96, 0.03, TIME) == "faster"
    assert stats.verdict(0.90, 0.98, 0.03, TIME) == "no detectable change"
    assert stats.verdict(1.04, 1.20, 0.03, TIME) == "slower"
    assert stats.verdict(0.98, 0.99, 0.03, TIME) == "no detectable change"  # certain, yet too small to matter
    assert stats.verdict(0.5, 0.6, 0.02, stats.METRICS["peak_memory_mb"]) == "less"
    assert stats.verdict(0.03, 0.06, 0.02, WER) == "worse"
    assert stats.verdict(-0.06, -0.03, 0.02, WER) == "better"
    assert stats.verdict(-0.06, -0.03, 0.02, stats.metric("sim_resemblyzer")) == "worse"
    assert stats.verdict(None, None, 0.02, WER) == "not measured"


def test_finding_no_loss_is_not_ruling_one_out():
    assert stats.verdict(-0.05, 0.08, 0.02, WER) == "no detectable change"
    assert not stats.proves_no_worse(-0.05, 0.08, 0.02, WER)
    assert stats.proves_no_worse(-0.05, 0.015, 0.02, WER)
    assert stats.proves_no_worse(-0.015, 0.3, 0.02, stats.metric("sim_resemblyzer"))
    assert not stats.proves_no_worse(-0.05, 0.3, 0.02, stats.metric("sim_resemblyzer"))
    assert not stats.proves_no_worse(None, None, 0.02, WER)


def test_two_independent_comparisons_are_contrasted():
    first, second = stats.Interval(0.8, 0.76, 0.84, 12), stats.Interval(0.4, 0.38, 0.42, 10)
    change = stats.contrast(first, second, "ratio")
    assert change.estimate == pytest.approx(0.5)
    assert change.n == 10
    assert 0.46 < change.low < 0.475  # wider than either alone: 5 % and 5 % in quadrature are 7 %
    assert 0.53 < change.high < 0.54
    unknown = stats.contrast(first, stats.Interval(0.4, None, None, 2), "ratio")
    assert (unknown.estimate, unknown.low, unknown.high) == (pytest.approx(0.5), None, None)


def test_the_other_side_of_a_change_is_the_same_change():
    assert stats.inverse(stats.Interval(0.5, 0.4, 0.8, 9), "ratio") == stats.Interval(2.0, 1.25, 2.5, 9)
    assert stats.inverse(stats.Interval(0.5, -0.1, 0.8, 9), "delta") == stats.Interval(-0.5, -0.8, 0.1, 9)
    assert stats.inverse(stats.Interval(0.5, None, None, 1), "ratio") == stats.Interval(2.0, None, None, 1)


@pytest.mark.parametrize("measure", [TIME, WER])
def test_a_p_value_says_what_the_interval_says(measure):
    rng = np.random.default_rng(31)
    for _ in range(200):
        estimate = measure.neutral + rng.normal(0, 0.1)
        interval = stats.Interval(estimate, estimate - rng.uniform(0, 0.1), estimate + rng.uniform(0, 0.1), 9)
        named = stats.verdict(interval.low, interval.high, measure.threshold, measure) != stats.NO_CHANGE
        assert (stats.p_value(interval, measure.threshold, measure) < 0.05) == named
    assert stats.p_value(stats.Interval(0.5, None, None, 1), 0.03, measure) is None
    sure = stats.Interval(measure.neutral + 0.5, measure.neutral + 0.5, measure.neutral + 0.5, 9)
    assert stats.p_value(sure, 0.03, measure) == 0


def test_holm_corrects_by_rank_and_leaves_out_what_has_no_p_value():
    assert stats.holm([0.01, None, 0.04, 0.03]) == [pytest.approx(0.03), None, pytest.approx(0.06), pytest.approx(0.06)]
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_a_family_of_changes_that_are_none_seldom_alarms_at_all():
    """Twenty at a time, exactly at the edge of the threshold, where single ones alarm in 2.5 % of the cases."""
    rng = np.random.default_rng(32)
    alarms = 0
    for _ in range(400):
        found = [stats.Interval(x, x - 0.0196, x + 0.0196, 9) for x in rng.normal(0.02, 0.01, 20)]
        alarms += min(stats.holm([stats.p_value(interval, 0.02, WER) for interval in found])) <= 0.05
    assert alarms / 400 <= 0.05


def test_peaks_compare_the_highest_values():
    interval = stats.ratio_of_peaks([100, 110, 120, 100, 100, 120], [50, 55, 60, 50, 50, 60], texts(6))
    assert interval.estimate == pytest.approx(0.5)
    assert 0.4 < interval.low <= 0.5 <= interval.high < 0.6


def test_spread_and_outliers_are_reported_and_kept():
    work = [f"t{i % 4}" for i in range(40)]
    calm = 1 + 0.01 * np.sin(np.arange(40))
    assert stats.noise_warnings("baseline", stats.noise(calm, work)) == []
    disturbed = calm.copy()
    disturbed[[7, 22]] = 4.0
    found = stats.noise(disturbed, work)
    assert (found.severe, found.n) == (2, 40)
    messages = stats.noise_warnings("baseline", found)
    assert any("close other programs" in message for message in messages)
    assert any("2 of 40 runs lie far out" in message for message in messages)


def test_runs_that_never_repeat_say_nothing_about_spread():
    assert stats.noise([1.0, 9.0, 3.0], ["a", "b", "c"]).spread is None


def test_jobs_that_measured_the_same_are_pooled_with_what_they_differ_by():
    """Equal jobs narrow the interval; those that contradict each other widen it to hold both."""
    one, same = stats.Interval(0.8, 0.76, 0.84, 10), stats.Interval(0.8, 0.76, 0.84, 12)
    assert stats.pooled([one], "ratio") == one
    both = stats.pooled([one, same], "ratio")
    assert (both.estimate, both.n) == (pytest.approx(0.8), 22)
    assert 0.76 < both.low < both.high < 0.84
    apart = stats.pooled([one, stats.Interval(0.6, 0.59, 0.61, 10)], "ratio")
    assert apart.low < 0.6
    assert apart.high > 0.8
    assert stats.pooled([stats.Interval(1.0, None, None, 1), one], "delta") == one
    still = stats.Interval(0.5, 0.5, 0.5, 4)
    assert stats.pooled([still, still], "ratio").estimate == pytest.approx(0.5)


# -- drift -------------------------------------------------------------------------------------------------------


def drifting(rng: np.random.Generator, n: int, correlation: float, order: float = 0.0) -> np.ndarray:
    """Ratios around 1 of n pairs in the order of time, by 5 %; who is first in its turn is slower by `order`."""
    noise = rng.normal(0, 1, n)
    for i in range(1, n):
        noise[i] = correlation * noise[i - 1] + (1 - correlation**2) ** 0.5 * noise[i]
    return np.exp(0.05 * noise + order * (-1) ** np.arange(n))


def coverage(
    correlation: float, n: int, in_time: bool, order: float = 0.0, effect: float = 1.0, experiments: int = 300
) -> float:
    """How often the interval of one process holds the truth."""
    rng = np.random.default_rng(13)
    covered = 0
    for _ in range(experiments):
        ratios = effect * drifting(rng, n, correlation, order)
        positions = [i % 2 for i in range(n)] if in_time else None
        one = stats.ratio_of_sums(np.ones(n), ratios, ["a"] * n, positions=positions, resamples=299)
        covered += one.low <= effect * np.exp(0.00125) <= one.high
    return covered / experiments


def test_pairs_that_drift_together_are_fewer_than_they_seem():
    assert coverage(0.6, 60, in_time=False) < 0.75
    assert coverage(0.6, 60, in_time=True) > 0.88
    assert coverage(0.0, 60, in_time=True) > 0.93


@pytest.mark.parametrize("effect", [0.05, 20.0])
def test_a_large_change_drifts_by_its_own_measure(effect):
    assert 0.88 < coverage(0.6, 60, in_time=True, effect=effect) < 0.96


def test_whose_turn_was_first_does_not_hide_the_drift():
    """It alternates, and looks like the opposite of drift where it is not told apart."""
    assert coverage(0.6, 60, in_time=True, order=0.05) > 0.88


def test_independent_pairs_cost_little():
    rng = np.random.default_rng(17)
    for n, most in ((12, 1.2), (60, 1.08)):
        widths = []
        for _ in range(60):
            ratios = drifting(rng, n, 0.0)
            both = [
                stats.ratio_of_sums(np.ones(n), ratios, ["a"] * n, positions=positions, resamples=299)
                for positions in (None, [i % 2 for i in range(n)])
            ]
            assert both[1].low <= both[0].low
            assert both[1].high >= both[0].high
            widths.append((both[1].high - both[1].low) / (both[0].high - both[0].low))
        assert np.mean(widths) < most


@pytest.mark.parametrize("ratios", [np.ones(8), np.array([1.0] * 7 + [1e9]), np.array([0.0] * 8)])
def test_drift_of_what_hardly_varies_is_none(ratios):
    one = stats.ratio_of_sums(np.ones(8), ratios, ["a"] * 8, positions=[0, 1] * 4, resamples=99)
    assert np.isfinite([one.estimate, one.low, one.high]).all()


def test_texts_that_differ_are_no_drift():
    """Six texts, one after the other in every round, whose effects differ by far more than the noise."""
    rng = np.random.default_rng(19)
    effects = np.tile([0.5, 0.6, 0.7, 0.8, 0.9, 1.0], 8) * rng.normal(1, 0.01, 48)
    names, positions = [f"t{i % 6}" for i in range(48)], [(i // 6 + i) % 2 for i in range(48)]
    alone, in_time = (
        stats.ratio_of_sums(np.ones(48), effects, names, positions=given, resamples=299) for given in (None, positions)
    )
    assert in_time.high - in_time.low < 1.02 * (alone.high - alone.low)


def test_two_rounds_of_three_texts_do_not_tell():
    """What their texts and turns leave of six pairs is two numbers, which resemble each other soon enough."""
    names, positions = ["a", "b", "c"] * 2, [0, 1] * 3
    for seed in range(40):
        ratios = drifting(np.random.default_rng(seed), 6, 0.0)
        both = [stats.ratio_of_sums(np.ones(6), ratios, names, positions=p, resamples=99) for p in (None, positions)]
        assert both[0] == both[1]


def test_several_processes_drift_each_by_itself():
    ratios = drifting(np.random.default_rng(23), 30, 0.8)
    ones, names, processes = np.ones(30), ["a"] * 30, [i // 6 for i in range(30)]
    alone = stats.ratio_of_sums(ones, ratios, names, processes=processes)
    assert stats.ratio_of_sums(ones, ratios, names, processes=processes, positions=[0, 1] * 15) == alone
