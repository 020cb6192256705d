"""A combo's change is shared out: parts that are the truth's, that add up, and that say how sure they are."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from factories import TWELVE, Case, Effect, make_summary

from harness import attribution
from harness.attribution import EXACT, FITTED, Measured, Observation, waterfalls
from harness.designs import DESIGNS, Subject

NAMES = TWELVE[:6]
LOGS = dict(zip(NAMES, (-0.4, -0.2, -0.1, 0.0, 0.1, -0.3), strict=True))
TOGETHER = {frozenset(NAMES[:2]): -0.3, frozenset((NAMES[2], NAMES[5])): 0.2}


def log_time(on) -> float:
    """What the planted effects and interactions make of a set of optimizations."""
    return sum(LOGS[name] for name in on) + sum(amount for pair, amount in TOGETHER.items() if pair <= set(on))


def part(name: str) -> float:
    """Shapley's value: the effect, and half of each interaction."""
    return LOGS[name] + sum(amount / 2 for pair, amount in TOGETHER.items() if name in pair)


def measured(tmp_path, *designs: str, names=NAMES, over=(), requires=None, **changes) -> list[Measured]:
    """Runs of the designs, as the planted effects would have them."""
    subject = Subject("production", tuple(names), TWELVE, requires or {}, over=over)
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
    assert (waterfall.combo, waterfall.method) == ("production", FITTED)
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
    assert (waterfall.method, waterfall.jobs) == (EXACT, 7)
    assert waterfall.remainder == pytest.approx(1)
    for found in waterfall.parts:
        own = LOGS[found.optimization] + (-0.15 if found.optimization in NAMES[:2] else 0)
        assert math.log(found.interval.estimate) == pytest.approx(own, abs=0.02)


def test_prerequisites_are_kept_in_every_order(tmp_path):
    """The second needs the first: it never comes first, so the first carries none of what they do together."""
    requires = {NAMES[1]: (NAMES[0],)}
    runs = measured(tmp_path, "factorial", names=NAMES[:3], over=NAMES[:3], requires=requires)
    (waterfall,) = waterfalls(runs, "rtf", requires)
    assert waterfall.method == EXACT
    parts = {found.optimization: math.log(found.interval.estimate) for found in waterfall.parts}
    assert parts[NAMES[0]] == pytest.approx(LOGS[NAMES[0]], abs=0.02)
    assert parts[NAMES[1]] == pytest.approx(LOGS[NAMES[1]] - 0.3, abs=0.02)


def test_too_few_jobs_make_no_waterfall(sweeps):
    assert waterfalls(sweeps["leave_one_out"], "rtf") == []
    assert waterfalls(sweeps["one_at_a_time"], "rtf") == []


def test_other_parameters_are_another_optimization(sweeps):
    runs = [*sweeps["one_at_a_time"], *sweeps["leave_one_out"]]
    assert waterfalls(runs, "rtf")
    changed = [
        Measured(run.summary, {name: {"enabled": True, "size": len(run.summary.active)} for name in NAMES})
        for run in runs
    ]
    assert waterfalls(changed, "rtf") == []


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


@pytest.mark.parametrize("designs", [("one_at_a_time", "leave_one_out"), ("screening",)])
@pytest.mark.parametrize(
    "requires", [{}, {NAMES[2]: (NAMES[1],), NAMES[5]: (NAMES[1], NAMES[4])}], ids=["free", "chained"]
)
def test_the_parts_intervals_cover_the_truth(designs, requires):
    """Forty models of random effects and a few random interactions, each measured with errors of one per cent."""
    rng = np.random.default_rng(1)
    needs = {name: frozenset(requires.get(name, ())) for name in NAMES}
    covered = []
    for _ in range(40):
        effects = dict(zip(NAMES, rng.normal(-0.1, 0.2, len(NAMES)), strict=True))
        crossed = {frozenset(pair): rng.normal(0, 0.2) * (rng.random() < 0.2) for pair in combinations(NAMES, 2)}

        def true(on, effects=effects, crossed=crossed) -> float:
            return sum(effects[name] for name in on) + sum(w for pair, w in crossed.items() if pair <= set(on))

        subject = Subject("x", NAMES, NAMES, requires)
        jobs = [job for design in designs for job in DESIGNS[design](subject)]
        observed = [
            Observation(
                frozenset(job.enabled),
                frozenset(job.reference),
                true(job.enabled) - true(job.reference) + rng.normal(0, 0.01),
                0.01,
                "",
            )
            for job in jobs
        ]
        model = attribution.two_way_model(NAMES, observed)
        shares = attribution.order_average(NAMES, needs, model.features)
        truth = attribution.order_average(NAMES, needs, lambda on, true=true: np.array([true(on)]))[:, 0]
        found = [model.tell(row, "delta") for row in shares]
        covered += [one.low <= value <= one.high for one, value in zip(found, truth, strict=True)]
    assert 0.9 <= np.mean(covered) <= 1


def test_many_optimizations_are_put_in_sampled_orders():
    names = tuple(f"n{i}" for i in range(14))
    needs = {name: frozenset() for name in names} | {"n3": frozenset({"n7"})}

    def features(on) -> np.ndarray:
        assert "n3" not in on or "n7" in on
        return np.array([len(on), float({"n0", "n1"} <= on)])

    steps = attribution.order_average(names, needs, features)
    assert steps[:, 0] == pytest.approx(np.ones(14))
    assert steps[:2, 1] == pytest.approx([0.5, 0.5], abs=0.05)
