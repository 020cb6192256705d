"""Effects are shared out by what was active, whatever the runs were called."""

import pytest
from factories import Case, Effect, make_summary

from harness.ablation import attribute


def run(tmp_path, minute, time, *active, **changes):
    case = Case(combo="+".join(active), enabled=active, effect=Effect(time=time), **changes)
    return make_summary(tmp_path, case, minute)


def test_an_effect_alone_and_one_beside_another(tmp_path):
    runs = [
        run(tmp_path, 0, 0.8, "kv_cache"),
        run(tmp_path, 1, 0.4, "kv_cache", "mixed_precision"),
        run(tmp_path, 2, 0.7, "warmup"),
    ]
    effects = {(effect.optimization, effect.beside): effect for effect in attribute(runs, ["rtf"])}
    assert set(effects) == {("kv_cache", ()), ("mixed_precision", ("kv_cache",)), ("warmup", ())}
    added = effects["mixed_precision", ("kv_cache",)]
    assert added.interval.estimate == pytest.approx(0.5, rel=0.02)
    assert added.interval.low < 0.5 < added.interval.high
    assert added.verdict == "faster"
    assert added.run_ids == (runs[0].run_id, runs[1].run_id)


def test_an_optimization_that_was_not_active_is_credited_with_nothing(tmp_path):
    idle = run(tmp_path, 0, 0.5, "kv_cache", statuses={"kv_cache": ("inactive", "no evidence")})
    assert attribute([idle], ["rtf"]) == []


def test_an_unavailable_one_does_not_blur_the_others(tmp_path):
    statuses = {"cuda_cache": ("unavailable", "no CUDA")}
    both = run(tmp_path, 0, 0.5, "kv_cache", "cuda_cache", statuses=statuses)
    (effect,) = attribute([both], ["rtf"])
    assert (effect.optimization, effect.beside) == ("kv_cache", ())


def test_runs_of_different_pipelines_are_not_subtracted(tmp_path):
    runs = [
        run(tmp_path, 0, 0.8, "kv_cache", pipeline="random"),
        run(tmp_path, 1, 0.4, "kv_cache", "warmup", pipeline="mini"),
    ]
    assert {effect.beside for effect in attribute(runs, ["rtf"])} == {()}
