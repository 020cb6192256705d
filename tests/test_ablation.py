"""Effects are shared out by what was active, whatever the runs were called."""

import pytest
from factories import TWELVE, Case, Effect, make_summary

from harness.ablation import attribute, group_effects


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


def left_out(tmp_path, minute, time, whole, gone, **changes):
    """The combo without a part, against the combo."""
    rest = tuple(name for name in whole if name not in gone)
    case = Case(
        combo=f"x-without-{'+'.join(gone)}",
        enabled=rest,
        effect=Effect(time=time),
        against="x",
        reference=whole,
        **changes,
    )
    return make_summary(tmp_path, case, minute)


def test_what_is_left_out_reads_as_what_it_does(tmp_path):
    """Without it the combo takes 1.25 times as long: with it, 0.8 times."""
    whole = ("mixed_precision", "warmup", "kv_cache")
    (effect,) = attribute([left_out(tmp_path, 0, 1.25, whole, ("kv_cache",))], ["rtf"])
    assert (effect.optimization, effect.beside, effect.verdict) == ("kv_cache", ("mixed_precision", "warmup"), "faster")
    assert effect.interval.estimate == pytest.approx(0.8, rel=0.02)
    assert effect.interval.low < 0.8 < effect.interval.high


def test_what_had_to_leave_together_is_a_group(tmp_path):
    whole = ("mixed_precision", "warmup", "kv_cache")
    run_ = left_out(tmp_path, 0, 5.0, whole, ("mixed_precision", "kv_cache"))
    assert attribute([run_], ["rtf"]) == []
    (group,) = group_effects([run_], ["rtf"], {"kv_cache": ["mixed_precision"]})
    assert (group.optimization, group.along, group.beside) == ("mixed_precision", ("kv_cache",), ("warmup",))
    assert group.interval.estimate == pytest.approx(0.2, rel=0.02)


def test_what_a_screening_left_out_together_is_no_group(tmp_path):
    """Of three, the second does not need the first: nothing says that the first took it along."""
    whole = ("mixed_precision", "warmup", "kv_cache")
    run_ = left_out(tmp_path, 0, 5.0, (*whole, "compile"), whole)
    assert group_effects([run_], ["rtf"], {"kv_cache": ["mixed_precision"]}) == []
    (group,) = group_effects([run_], ["rtf"], {"kv_cache": ["warmup"], "warmup": ["mixed_precision"]})
    assert group.along == ("warmup", "kv_cache")


def test_what_became_unavailable_with_it_left_with_it(tmp_path):
    """Nobody declared that kv_cache needs warmup, and without warmup it could not run: the two are a group."""
    whole = ("mixed_precision", "warmup", "kv_cache")
    statuses = {"kv_cache": ("unavailable", "it needs warmup")}
    case = Case(
        combo="x-without-warmup",
        enabled=("mixed_precision", "kv_cache"),
        statuses=statuses,
        effect=Effect(time=2.0),
        against="x",
        reference=whole,
    )
    run_ = make_summary(tmp_path, case)
    assert attribute([run_], ["rtf"]) == []
    (group,) = group_effects([run_], ["rtf"], {})
    assert (group.optimization, group.along) == ("warmup", ("kv_cache",))


def test_one_among_many_has_to_be_clearer_than_one_alone(tmp_path):
    """Holm: what is barely faster by itself is no verdict among twelve that do nothing."""
    barely = run(tmp_path, 0, 0.935, "kv_cache", noise=0.035, seed=3)
    (alone,) = attribute([barely], ["rtf"])
    assert (alone.verdict, alone.withdrawn) == ("faster", False)
    others = [run(tmp_path, 1 + i, 1.0, name, noise=0.035, seed=i) for i, name in enumerate(TWELVE[:10])]
    among = {effect.optimization: effect for effect in attribute([barely, *others], ["rtf"])}
    assert (among["kv_cache"].verdict, among["kv_cache"].withdrawn) == ("no detectable change", True)
    assert among["kv_cache"].p_value > alone.p_value
    clear = run(tmp_path, 30, 0.5, "kv_cache")
    assert {effect.verdict for effect in attribute([clear, *others], ["rtf"])} == {"faster", "no detectable change"}


def test_what_one_job_tells_goes_before_what_two_jobs_tell(tmp_path):
    whole = ("mixed_precision", "kv_cache")
    runs = [
        run(tmp_path, 0, 0.8, "mixed_precision"),
        run(tmp_path, 1, 0.4, *whole),
        left_out(tmp_path, 2, 2.2, whole, ("kv_cache",)),
    ]
    (added,) = [effect for effect in attribute(runs, ["rtf"]) if effect.optimization == "kv_cache"]
    assert added.run_ids == (runs[2].run_id,)
