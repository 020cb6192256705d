"""A combo's change is shared out: parts that are the truth's, that add up, and that say how sure they are."""

import math
from dataclasses import replace

import numpy as np
import pytest
from factories import TWELVE, Case, Effect, make_summary

from harness.ablation import reference
from harness.attribution import EXACT, FITTED, Measured, waterfalls
from harness.designs import DESIGNS, Subject

NAMES = TWELVE[:6]
LOGS = dict(zip(NAMES, (-0.4, -0.2, -0.1, 0.0, 0.1, -0.3), strict=True))
TOGETHER = {frozenset(NAMES[:2]): -0.3, frozenset((NAMES[2], NAMES[5])): 0.2}


def log_time(on) -> float:
    """What the planted effects and interactions make of a set of optimizations."""
    return sum(LOGS.get(name, 0.0) for name in on) + sum(amount for pair, amount in TOGETHER.items() if pair <= set(on))


def part(name: str) -> float:
    """Shapley's value: the effect, and half of each interaction."""
    return LOGS[name] + sum(amount / 2 for pair, amount in TOGETHER.items() if name in pair)


def measured(
    tmp_path, *designs: str, names=NAMES, over=(), requires=None, beside_combo=False, **changes
) -> list[Measured]:
    """Runs of the designs, as the planted effects would have them."""
    subject = Subject("production", tuple(names), TWELVE, requires or {}, over=over, beside_combo=beside_combo)
    jobs = dict.fromkeys(job for design in designs for job in DESIGNS[design](subject))
    cases = [
        Case(
            combo=job.label,
            enabled=job.enabled,
            effect=Effect(time=math.exp(log_time(job.enabled))),
            against=job.against,
            reference=job.reference,
            reference_effect=Effect(time=math.exp(log_time(job.reference))),
            seed=number,
            seeds=1,
            **changes,
        )
        for number, job in enumerate(jobs)
    ]
    return [Measured(make_summary(tmp_path, case, minute % 60)) for minute, case in enumerate(cases)]


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory) -> dict[str, list[Measured]]:
    """The runs of three designs, which most tests only read."""
    names = ("one_at_a_time", "leave_one_out", "screening")
    return {name: measured(tmp_path_factory.mktemp(name), name, texts=6) for name in names}


@pytest.mark.parametrize("designs", [("one_at_a_time", "leave_one_out"), ("screening",)])
def test_the_parts_are_the_truths_and_add_up_to_the_measured_whole(sweeps, designs):
    (waterfall,) = waterfalls([run for design in designs for run in sweeps[design]], "rtf")
    assert (waterfall.combo, waterfall.model.method) == ("production", FITTED)
    for found in waterfall.parts:
        assert math.log(found.interval.estimate) == pytest.approx(part(found.optimization), abs=0.02)
        assert found.interval.low < found.interval.estimate < found.interval.high
    product = math.prod(found.interval.estimate for found in waterfall.parts)
    assert product == pytest.approx(waterfall.sum.estimate)
    assert product * waterfall.remainder == pytest.approx(waterfall.total.estimate)
    assert waterfall.remainder == pytest.approx(1, abs=0.02)
    verdicts = {found.optimization: found.verdict for found in waterfall.parts}
    assert verdicts[NAMES[0]] == "faster"
    assert verdicts[NAMES[4]] == "slower"


def test_a_screening_beside_its_combo_tells_the_same_parts(tmp_path):
    (waterfall,) = waterfalls(measured(tmp_path, "screening", names=TWELVE[:8], beside_combo=True, texts=6), "rtf")
    assert (waterfall.model.method, waterfall.model.jobs) == (FITTED, 16)
    for found in waterfall.parts:
        planted = part(found.optimization) if found.optimization in NAMES else 0.0
        assert math.log(found.interval.estimate) == pytest.approx(planted, abs=0.04)
    assert waterfall.remainder == pytest.approx(1, abs=0.02)


def test_jobs_of_too_few_pairs_for_an_interval_count_by_how_they_scatter(sweeps):
    known = waterfalls(sweeps["screening"], "rtf")[0]
    (waterfall,) = waterfalls([without_interval(run) for run in sweeps["screening"]], "rtf")
    assert (waterfall.total.bounds, waterfall.adds_up) == (None, True)
    for found, other in zip(waterfall.parts, known.parts, strict=True):
        assert found.interval.low < other.interval.estimate < found.interval.high
        assert found.interval.high / found.interval.low < 1.1
    assert waterfall.parts[0].verdict == "faster"


def without_interval(run: Measured) -> Measured:
    record = replace(run.summary.comparison["rtf"], low=None, high=None, verdict="not measured")
    return replace(run, summary=replace(run.summary, comparison=run.summary.comparison | {"rtf": record}))


def test_interactions_are_found_by_a_screening(sweeps):
    (waterfall,) = waterfalls(sweeps["screening"], "rtf")
    verdicts = {frozenset(found.pair): found.verdict for found in waterfall.interactions}
    assert len(verdicts) == 15
    assert {pair: verdict for pair, verdict in verdicts.items() if verdict != "no detectable change"} == {
        frozenset(NAMES[:2]): "faster",
        frozenset((NAMES[2], NAMES[5])): "slower",
    }


def test_where_all_sets_were_measured_the_parts_are_exact(tmp_path):
    runs = measured(tmp_path, "factorial", names=NAMES[:3], over=NAMES[:3])
    (waterfall,) = waterfalls(runs, "rtf")
    assert (waterfall.model.method, waterfall.model.jobs) == (EXACT, 7)
    assert waterfall.remainder == pytest.approx(1)
    for found in waterfall.parts:
        own = LOGS[found.optimization] + (-0.15 if found.optimization in NAMES[:2] else 0)
        assert math.log(found.interval.estimate) == pytest.approx(own, abs=0.02)


def test_prerequisites_are_kept_in_every_order(tmp_path):
    """The second needs the first: it never comes first, so the first carries none of what they do together."""
    requires = {NAMES[1]: (NAMES[0],)}
    runs = measured(tmp_path, "factorial", names=NAMES[:3], over=NAMES[:3], requires=requires)
    (waterfall,) = waterfalls(runs, "rtf", requires)
    assert waterfall.model.method == EXACT
    parts = {found.optimization: math.log(found.interval.estimate) for found in waterfall.parts}
    assert parts[NAMES[0]] == pytest.approx(LOGS[NAMES[0]], abs=0.02)
    assert parts[NAMES[1]] == pytest.approx(LOGS[NAMES[1]] - 0.3, abs=0.02)


def test_too_few_jobs_make_no_waterfall(sweeps):
    assert waterfalls(sweeps["leave_one_out"], "rtf") == []
    assert waterfalls(sweeps["one_at_a_time"], "rtf") == []


def test_other_parameters_are_another_optimization(sweeps):
    runs = [*sweeps["one_at_a_time"], *sweeps["leave_one_out"]]
    assert waterfalls(runs, "rtf")
    changed = [Measured(run.summary, {name: {"size": len(run.summary.active)} for name in NAMES}) for run in runs]
    assert waterfalls(changed, "rtf") == []


def test_a_combo_measured_with_two_sets_of_parameters_has_a_waterfall_of_each(sweeps):
    small = [Measured(run.summary, {NAMES[0]: {"size": 32, "kind": "flat"}}) for run in sweeps["screening"]]
    large = [
        Measured(replace(run.summary, git="another"), {NAMES[0]: {"size": 64, "kind": "flat"}})
        for run in [*sweeps["one_at_a_time"], *sweeps["leave_one_out"]]
    ]
    told = waterfalls([*small, *large], "rtf")
    parameter = f"{NAMES[0]}.size"
    assert [waterfall.apart for waterfall in told] == [{parameter: 32}, {parameter: 64}]
    for waterfall, others in zip(told, (large, small), strict=True):
        with_it = [run for run in others if NAMES[0] in {*run.summary.active, *reference(run.summary)}]
        assert waterfall.left_out == len(with_it) > 0
    assert [len(waterfall.commits) for waterfall in told] == [2, 2]  # jobs without that one count in both


def test_a_parameter_that_only_one_of_two_runs_knows_tells_them_apart(sweeps):
    known = [Measured(run.summary, {NAMES[0]: {"size": 32}}) for run in sweeps["leave_one_out"]]
    new = [Measured(run.summary, {NAMES[0]: {"size": 32, "tile": 8}}) for run in sweeps["screening"]]
    told = waterfalls([*known, *new], "rtf")
    assert [waterfall.apart for waterfall in told] == [{f"{NAMES[0]}.tile": None}, {f"{NAMES[0]}.tile": 8}]


def test_runs_of_another_place_do_not_count(sweeps):
    there = [Measured(replace(run.summary, device="another CPU")) for run in sweeps["leave_one_out"]]
    assert waterfalls([*sweeps["one_at_a_time"], *there], "rtf") == []


def test_what_was_not_active_is_credited_with_nothing(tmp_path):
    idle = {NAMES[2]: ("unavailable", "no CUDA")}
    (waterfall,) = waterfalls(measured(tmp_path, "screening", names=NAMES[:4], statuses=idle, texts=6), "rtf")
    assert NAMES[2] not in [found.optimization for found in waterfall.parts]


@pytest.mark.slow
def test_memory_and_quality_are_shared_out_too(tmp_path):
    runs = measured(tmp_path, "screening", texts=6, memory_kind="vram")
    assert [waterfall.kind for metric in ("peak_memory_mb", "wer") for waterfall in waterfalls(runs, metric)] == [
        "ratio",
        "delta",
    ]
    (wer,) = waterfalls(runs, "wer")
    assert wer.total.estimate == pytest.approx(wer.sum.estimate + wer.remainder)
    assert {found.verdict for found in wer.parts} == {"no detectable change"}


@pytest.mark.parametrize("missing", ["nowhere", "everywhere", "in one run"])
def test_runs_that_do_not_tell_their_stages_are_shared_out_as_wholes(sweeps, missing):
    runs = list(sweeps["screening"])
    for index in {"nowhere": [], "everywhere": range(len(runs)), "in one run": [3]}[missing]:
        runs[index] = without_stages(runs[index])
    (waterfall,) = waterfalls(runs, "rtf")
    assert (waterfall.model.stages > 1) == (missing == "nowhere")
    assert waterfall.adds_up
    for found in waterfall.parts:
        assert math.log(found.interval.estimate) == pytest.approx(part(found.optimization), abs=0.02)


def without_stages(run: Measured) -> Measured:
    variants = {name: replace(variant, stages_s={}) for name, variant in run.summary.variants.items()}
    return replace(run, summary=replace(run.summary, variants=variants))


def test_a_job_with_a_member_from_elsewhere_or_one_that_did_not_work_is_left_out(sweeps):
    clean = waterfalls(sweeps["screening"], "rtf")[0]
    other = sweeps["screening"][3]
    strange = replace(other, summary=with_status(other.summary, TWELVE[10], "active"))
    failed = replace(other, summary=with_status(other.summary, TWELVE[10], "failed"))
    for odd in (strange, failed):
        (waterfall,) = waterfalls([*sweeps["screening"], odd], "rtf")
        assert (waterfall.model.jobs, waterfall.parts) == (clean.model.jobs, clean.parts)


def with_status(summary, name: str, status: str):
    record = {"enabled": True, "status": status, "reason": None, "evidence": {}}
    return replace(summary, optimizations=summary.optimizations | {name: record})


def test_more_sweeps_narrow_the_intervals(sweeps):
    """Not each of them: a first sweep may happen to fit too well."""
    alone = waterfalls(sweeps["screening"], "rtf")[0]
    (together,) = waterfalls([run for sweep in sweeps.values() for run in sweep], "rtf")
    assert together.model.jobs > alone.model.jobs
    assert np.mean([width(part) for part in together.parts]) < np.mean([width(part) for part in alone.parts])


def width(found) -> float:
    return math.log(found.interval.high / found.interval.low)


def test_a_part_without_a_verdict_says_what_would_have_been_found(sweeps):
    (waterfall,) = waterfalls(sweeps["screening"], "rtf")
    found = {part.optimization: part for part in waterfall.parts}
    nothing = found[NAMES[3]]
    assert nothing.verdict == "no detectable change"
    assert 0.03 < nothing.smallest_detectable < 0.06
    assert found[NAMES[0]].smallest_detectable is None
    undecided = [one for one in waterfall.interactions if one.verdict == "no detectable change"]
    assert all(one.smallest_detectable > 0.02 for one in undecided)
    assert all(one.smallest_detectable is None for one in waterfall.interactions if one not in undecided)


def test_a_part_whose_verdict_holms_correction_takes_back_says_so_as_well(sweeps):
    """At a threshold that its own interval only just excludes, and that four others do not pass."""
    (waterfall,) = waterfalls(sweeps["screening"], "rtf")
    threshold = 1 - waterfall.parts[1].interval.high - 1e-4
    (strict,) = waterfalls([with_threshold(run, threshold) for run in sweeps["screening"]], "rtf")
    judged = strict.parts[1]
    assert judged.interval.high < 1 - threshold
    assert judged.verdict == "no detectable change"
    assert judged.smallest_detectable > threshold


def with_threshold(run: Measured, threshold: float) -> Measured:
    return replace(run, summary=replace(run.summary, thresholds=run.summary.thresholds | {"rtf": threshold}))


def test_a_figure_that_does_not_vary_adds_up_by_the_sums_interval(sweeps):
    (waterfall,) = waterfalls(sweeps["screening"], "rtf")
    exact = replace(waterfall.total, low=waterfall.total.estimate, high=waterfall.total.estimate)
    assert replace(waterfall, total=exact).adds_up
    far = replace(exact, estimate=2.0, low=2.0, high=2.0)
    assert not replace(waterfall, total=far).adds_up
