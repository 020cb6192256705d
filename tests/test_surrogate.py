"""The model behind a waterfall: on pipelines whose truth is known, its intervals hold it and are narrow."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from harness import attribution, orders, stats
from harness.attribution import Foretold, Observation
from harness.designs import DESIGNS, Subject

Stages = Callable[[frozenset[str]], Mapping[str, float]]
"""Milliseconds of each stage with a set of optimizations on."""

NAMES = (
    *("fused_vocoder", "int8_weights", "mixed_precision", "flat_estimator", "kv_cache", "compile"),
    *("gpu_watermark", "cuda_graphs", "cpu_offload", "warmup"),
)
REQUIRES = {"compile": ("kv_cache",), "flat_estimator": ("mixed_precision",)}
NEEDS = {name: frozenset(REQUIRES.get(name, ())) for name in NAMES}
SCREENING = ("screening",)
ENDS = ("one_at_a_time", "leave_one_out")
BESIDE = "beside the combo"
"""Among designs: what the sets of the screening are paired with."""


def gpu(rng: np.random.Generator) -> Stages:
    """The tokens depend on five that need each other, the other stages on one or two; two do nothing."""
    pace = {name: math.exp(rng.normal(0, 0.25)) for name in ("eager", "cached", "captured", "flow", "vocoder", "mark")}
    each = np.exp(rng.normal(0, 0.1, 20))

    def tokens(on: frozenset[str]) -> float:
        int8, half, graphs = (name in on for name in ("int8_weights", "mixed_precision", "cuda_graphs"))
        if "compile" in on and not graphs:
            return 390 * pace["captured"]
        if "compile" in on:
            return (45 * each[0], 30 * each[1], 19 * each[2])[int8 + half] * pace["captured"]
        slower = 1.5 * each[3] if int8 else 1.0
        if "kv_cache" in on:
            return (160 * each[4] if graphs else 840 * each[5]) * slower * pace["cached"]
        return 1100 * slower * pace["eager"] * (1.1 if half and not graphs else 1)

    def flow(on: frozenset[str]) -> float:
        graphs, half, flat = (name in on for name in ("cuda_graphs", "mixed_precision", "flat_estimator"))
        plain = 130 * each[6] if graphs else 390 * each[7]
        return pace["flow"] * plain * (each[8] * (0.48 if graphs else 1.08) if half else 1) * (0.5 if flat else 1)

    def stages(on: frozenset[str]) -> dict[str, float]:
        graphs = "cuda_graphs" in on
        fused = (2.3 if graphs else 12) if "fused_vocoder" in on else (3.5 if graphs else 40)
        mark = (1.3 if graphs else 25) * each[9] if "gpu_watermark" in on else 100
        return {
            "tokens": tokens(on),
            "flow": flow(on),
            "vocoder": fused * pace["vocoder"],
            "mark": mark * pace["mark"],
            "rest": 2.0,
        }

    return stages


def multiplied(rng: np.random.Generator) -> Stages:
    """Nothing interacts within a stage; half of the effects are none."""
    effects = rng.normal(-0.15, 0.35, (len(NAMES), 4)) * (rng.random((len(NAMES), 4)) < 0.5)
    base = np.array([1100.0, 390.0, 40.0, 100.0])

    def stages(on: frozenset[str]) -> dict[str, float]:
        logs = effects[[NAMES.index(name) for name in on]].sum(axis=0)
        return dict(zip(("tokens", "flow", "vocoder", "mark"), base * np.exp(logs), strict=True)) | {"rest": 2.0}

    return stages


def in_twos(rng: np.random.Generator) -> Stages:
    """One stage only, with a few interactions of two: a memory, or a time whose stages are not told."""
    effects = dict(zip(NAMES, rng.normal(-0.1, 0.2, len(NAMES)), strict=True))
    crossed = {pair: rng.normal(0, 0.2) for pair in combinations(NAMES, 2) if rng.random() < 0.1}

    def stages(on: frozenset[str]) -> dict[str, float]:
        return {"": math.exp(sum(effects[name] for name in on) + sum(w for p, w in crossed.items() if on >= {*p}))}

    return stages


def observed(
    stages: Stages, designs: tuple[str, ...], noise: float, rng: np.random.Generator, told: bool = True
) -> list[Observation]:
    """The designs' jobs: in each, what slows one side down slows all of its stages, and each a little by itself."""
    subject = Subject("combo", NAMES, NAMES, REQUIRES, beside_combo=BESIDE in designs)
    found = []
    named = [design for design in designs if design != BESIDE]
    for job in dict.fromkeys(job for design in named for job in DESIGNS[design](subject)):
        on, off = frozenset(job.enabled), frozenset(job.reference)
        before, together = stages(off), rng.normal(0, noise)
        after = {name: value * math.exp(together + rng.normal(0, noise / 3)) for name, value in stages(on).items()}
        change = math.log(sum(after.values()) / sum(before.values()))
        by_stage = {name: (after[name], before[name]) for name in after} if told else {}
        found.append(Observation(on, off, change, noise, "", by_stage))
    return found


def shared_out(jobs: list[Observation], stages: Stages) -> tuple[np.ndarray, np.ndarray]:
    """Errors of the parts and the half-widths of their intervals, [names], on the log scale."""
    steps = orders.average_steps(NAMES, NEEDS)
    estimates, variances = attribution.fitted_model(NAMES, NEEDS, jobs).tell(steps)
    sets = [frozenset(name for name, on in zip(NAMES, row, strict=True) if on) for row in steps.sets]
    truth = steps.weights @ np.log([sum(stages(on).values()) for on in sets])
    return estimates - truth, stats.Z * np.sqrt(variances)


def simulated(
    world: Callable[[np.random.Generator], Stages],
    designs: tuple[str, ...],
    noise: float,
    times: int,
    told: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """How often each part's interval held the truth, and its median half-width."""
    found = []
    for seed in range(times):
        rng = np.random.default_rng(seed)
        stages = world(rng)
        found.append(shared_out(observed(stages, designs, noise, rng, told), stages))
    errors, half_widths = (np.array(rows) for rows in zip(*found, strict=True))
    return (np.abs(errors) <= half_widths).mean(axis=0), np.median(half_widths, axis=0)


SMALL = [NAMES.index(name) for name in ("fused_vocoder", "gpu_watermark", "cpu_offload", "warmup")]


def test_intervals_hold_the_truth_and_what_does_little_is_known_well():
    held, half_widths = simulated(gpu, (*SCREENING, *ENDS), 0.01, times=3)
    assert held.mean() >= 0.9
    assert half_widths[SMALL].max() < 0.02
    assert half_widths.max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.01, 0.03])
@pytest.mark.parametrize(
    "designs",
    [SCREENING, (*SCREENING, BESIDE), (*SCREENING, *ENDS)],
    ids=["screening", "screening beside the combo", "three sweeps"],
)
@pytest.mark.parametrize("world", [gpu, multiplied])
def test_intervals_hold_the_truth_in_every_part(world, designs, noise):
    held, half_widths = simulated(world, designs, noise, times=20)
    assert held.mean() >= 0.93
    assert held.min() >= 0.8  # of 20, where 95 % are expected
    assert half_widths[SMALL].max() < 1.5 * noise + 0.015
    assert half_widths.max() < 1.5 * noise + 0.01  # also of those that meet


@pytest.mark.slow
@pytest.mark.parametrize("designs", [ENDS, SCREENING, (*SCREENING, *ENDS)])
def test_a_whole_is_shared_out_as_surely(designs):
    held, _ = simulated(in_twos, designs, 0.01, times=20, told=False)
    assert held.mean() >= 0.9


def test_jobs_told_from_the_others_lie_within_their_intervals():
    for seed in range(2):
        rng = np.random.default_rng(seed)
        jobs = observed(gpu(rng), SCREENING, 0.02, rng)
        foretold = attribution.fitted_model(NAMES, NEEDS, jobs).foretold("ratio")
        assert foretold.held >= 0.9 * foretold.jobs == 0.9 * len(jobs)
        assert 0.01 < foretold.typical < 0.03


def test_what_is_told_of_a_job_does_not_depend_on_what_it_measured():
    rng = np.random.default_rng(0)
    jobs = observed(gpu(rng), SCREENING, 0.01, rng)
    learnt = attribution.fitted_model(NAMES, NEEDS, jobs).surrogate

    def told(job: int, change: float) -> tuple[float, float]:
        spoilt = [
            [replace(process, changes=process.changes + change * (np.arange(len(jobs)) == 3)) for process in draw]
            for draw in learnt.draws
        ]
        return replace(learnt, draws=tuple(map(tuple, spoilt))).held_out(job)

    assert told(3, 0.5) == pytest.approx(told(3, 0.0))
    assert told(4, 0.5) != pytest.approx(told(4, 0.0))


@pytest.mark.parametrize(("held", "plausible"), [(43, True), (39, True), (36, False)])
def test_too_few_jobs_within_their_intervals_are_no_accident(held, plausible):
    assert Foretold(held, 43, 0.02).is_plausible is plausible


def test_what_acts_in_one_stage_by_itself_gets_what_it_saves_there():
    """Of two equal stages each is halved by one: first 150 of 200 ms are left, then 100 of 150, in either order."""

    def stages(on: frozenset[str]) -> dict[str, float]:
        return {"tokens": 50.0 if "kv_cache" in on else 100.0, "vocoder": 50.0 if "fused_vocoder" in on else 100.0}

    steps = orders.average_steps(NAMES, NEEDS)
    jobs = observed(stages, (*SCREENING, *ENDS), 0.01, np.random.default_rng(0))
    estimates, variances = attribution.fitted_model(NAMES, NEEDS, jobs).tell(steps)
    known = {"kv_cache": math.log(1 / 2) / 2, "fused_vocoder": math.log(1 / 2) / 2}
    for name, estimate, half_width in zip(NAMES, estimates, stats.Z * np.sqrt(variances), strict=True):
        assert abs(estimate - known.get(name, 0.0)) <= half_width < 0.015


def test_jobs_that_say_nothing_of_it_leave_a_part_wide():
    rng = np.random.default_rng(0)
    stages = gpu(rng)
    jobs = observed(stages, SCREENING, 0.01, rng)
    _, before = shared_out(jobs, stages)
    _, after = shared_out(jobs[:12], stages)
    assert after.mean() > 1.5 * before.mean()


def test_many_optimizations_are_put_in_sampled_orders():
    names = tuple(f"n{i}" for i in range(14))
    needs = dict.fromkeys(names, frozenset[str]()) | {"n3": frozenset({"n7"})}
    steps = orders.average_steps(names, needs)
    assert not steps.sets[0].any()
    assert (steps.sets[:, 3] <= steps.sets[:, 7]).all()
    assert steps.weights @ steps.sets.sum(axis=1) == pytest.approx(np.ones(14))
    both = steps.weights @ (steps.sets[:, 0] * steps.sets[:, 1])
    assert both[:2] == pytest.approx([0.5, 0.5], abs=0.05)


def test_many_optimizations_have_parts_with_intervals():
    """Fourteen, of which three do something; all sets are too many for a list of their covariances."""
    names = tuple(f"n{i}" for i in range(14))
    effects = {"n0": -0.5, "n1": -0.2, "n2": 0.3}
    subject = Subject("combo", names, names)
    rng = np.random.default_rng(0)
    jobs = [
        Observation(
            frozenset(job.enabled),
            frozenset(job.reference),
            sum(effects.get(name, 0) for name in job.enabled)
            - sum(effects.get(name, 0) for name in job.reference)
            + rng.normal(0, 0.01),
            0.01,
            "",
        )
        for design in ENDS
        for job in DESIGNS[design](subject)
    ]
    needs: dict[str, frozenset[str]] = dict.fromkeys(names, frozenset())
    sums, pairs = attribution.asked(names, needs)
    assert pairs == []
    estimates, variances = attribution.fitted_model(names, needs, jobs).tell(sums)
    truth = np.array([effects.get(name, 0.0) for name in names] + [sum(effects.values())])
    assert np.abs(estimates - truth).max() < 0.03
    assert (np.abs(estimates - truth) <= 2.5 * np.sqrt(variances)).all()


def test_second_differences_are_told_where_each_can_be_on_without_the_other():
    names, needs = ("a", "b", "c"), {"a": frozenset(), "b": frozenset({"a"}), "c": frozenset()}
    steps = orders.average_steps(names, needs)
    pairs, weights = orders.second_differences(names, steps.sets)
    assert pairs == [("a", "c"), ("b", "c")]
    values = steps.sets @ [1.0, 2.0, 3.0] + 5 * steps.sets[:, 1] * steps.sets[:, 2]
    assert weights @ values == pytest.approx([0.0, 5.0])
