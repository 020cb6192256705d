"""The best combo within limits that fail closed, and what in it earns its place."""

from dataclasses import replace

import pytest
import yaml
from factories import Case, Effect, make_run

from harness.__main__ import main
from harness.report.choice import EARNS, NEEDED, NOTHING, UNDECIDED, Limits, best, front, members, objection, objectives
from harness.report.data import load

WHOLE = ("mixed_precision", "warmup", "kv_cache")
FAST = Effect(time=0.4, memory=0.5)


def loaded(tmp_path, *cases):
    return load([make_run(tmp_path, case, minute) for minute, case in enumerate(cases)])


def whole(**changes) -> Case:
    return Case(combo="x", enabled=WHOLE, effect=FAST, memory_kind="vram", **changes)


def without(name: str, time: float, **changes) -> Case:
    """The combo without one member, against the combo."""
    return Case(
        combo=f"x-without-{name}",
        enabled=tuple(other for other in WHOLE if other != name),
        effect=Effect(time=0.4 * time, memory=0.5),
        against="x",
        reference=WHOLE,
        reference_effect=FAST,
        memory_kind="vram",
        sweep="leave_one_out",
        **changes,
    )


def test_the_fastest_within_the_limits(tmp_path):
    runs = loaded(
        tmp_path,
        Case(combo="fast", effect=Effect(time=0.3, memory=1.5, wer=0.0)),
        Case(combo="small", effect=Effect(time=0.7, memory=0.5), seed=1),
        Case(combo="deaf", effect=Effect(time=0.1, wer=0.2), seed=2),
    )
    assert best(runs, Limits()).name == "fast"
    assert best(runs, Limits(memory_mb=400)).name == "small"
    assert best(runs, Limits(memory_mb=100)) is None
    assert "worse" in objection(runs[2], Limits())


def test_what_was_not_measured_keeps_to_no_limit(tmp_path):
    (run,) = loaded(tmp_path, Case(trained=False, unmeasured="the weights come from a seed"))
    assert objection(run, Limits()) is None
    assert "not measured" in objection(run, Limits(wer_increase=0.5))
    blind = replace(
        run,
        summary=replace(
            run.summary,
            variants=run.summary.variants
            | {"production": replace(run.summary.variants["production"], peak_memory_mb=None)},
        ),
    )
    assert "not measured" in objection(blind, Limits(memory_mb=1e6))


def test_a_rise_is_ruled_out_by_the_whole_interval(tmp_path):
    (run,) = loaded(tmp_path, Case(effect=Effect(time=0.5, wer=0.005)))
    high = run.change("wer").high
    assert objection(run, Limits(wer_increase=high + 0.001)) is None
    assert "limit" in objection(run, Limits(wer_increase=run.change("wer").value))


@pytest.mark.parametrize("status", ["inactive", "failed"])
def test_nothing_without_evidence_is_recommended(tmp_path, status):
    (run,) = loaded(tmp_path, Case(statuses={"kv_cache": (status, "no evidence")}))
    assert objection(run, Limits())


def test_what_was_held_against_another_combo_is_not_recommended(tmp_path):
    """It is half as slow as a combo that may itself be slow."""
    (run,) = loaded(tmp_path, Case(against="y", reference=("warmup",), reference_effect=Effect(time=9.0)))
    assert run.verdict("rtf") == "faster"
    assert "`y`" in objection(run, Limits())
    assert best([run], Limits()) is None


def test_members_earn_their_place_or_do_not(tmp_path):
    runs = loaded(tmp_path, whole(), without("kv_cache", 2.0), without("warmup", 1.0, seed=1))
    grades = {member.optimization: member.grade for member in members(runs[0], runs)}
    assert grades == {"mixed_precision": UNDECIDED, "warmup": NOTHING, "kv_cache": EARNS}


def test_what_earns_nothing_by_itself_stays_for_what_needs_it(tmp_path):
    requires = {"kv_cache": ["warmup"]}
    runs = loaded(tmp_path, whole(requires=requires), without("kv_cache", 2.0), without("warmup", 1.0, seed=1))
    found = {member.optimization: member for member in members(runs[0], runs)}
    assert found["warmup"].grade == NEEDED
    assert "kv_cache" in found["warmup"].reason


def test_what_cannot_run_here_earns_nothing_here(tmp_path):
    (run,) = loaded(tmp_path, whole(statuses={"kv_cache": ("unavailable", "no CUDA")}))
    found = {member.optimization: member for member in members(run, [run])}
    assert found["kv_cache"].grade == NOTHING
    assert "no CUDA" in found["kv_cache"].reason


def test_the_front_holds_what_nothing_is_better_than(tmp_path):
    runs = loaded(
        tmp_path,
        Case(combo="fast", effect=Effect(time=0.3, memory=1.5)),
        Case(combo="small", effect=Effect(time=0.7, memory=0.5)),
        Case(combo="neither", effect=Effect(time=0.8, memory=1.6)),
        without("warmup", 0.1),
    )
    assert {run.name for run in front(runs)} == {"fast", "small"}


def test_what_nobody_would_run_costs_a_search_more_than_anything(tmp_path):
    good, deaf, idle = loaded(
        tmp_path,
        Case(effect=Effect(time=0.5)),
        Case(effect=Effect(time=0.1, wer=0.3), seed=1),
        Case(effect=Effect(time=0.1), statuses={"kv_cache": ("inactive", "no evidence")}, seed=2),
    )
    assert objectives(good.summary)[0] == pytest.approx(0.5, abs=0.05)
    assert {*objectives(deaf.summary), *objectives(idle.summary), *objectives(None)} == {float("inf")}


def test_the_command_writes_the_combo_without_what_earns_nothing(tmp_path, capsys):
    results, out = tmp_path / "results", tmp_path / "mine.yaml"
    sizes = {"kv_cache": {"bucket": 64}}
    loaded(
        results,
        whole(parameters=sizes),
        *(
            without(n, t, seed=i, parameters=sizes)
            for i, (n, t) in enumerate({"kv_cache": 2.0, "warmup": 1.0, "mixed_precision": 1.5}.items())
        ),
    )
    arguments = ["recommend", str(results), "--max-wer-increase", "0.02", "--max-memory-mb", "2000", "-o", str(out)]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "x: time ratio 0.4" in told
    assert "warmup earns nothing here" in told
    written = yaml.safe_load(out.read_text())
    assert written == {
        "combo": "mine",
        "optimizations": {"mixed_precision": {"enabled": True}, "kv_cache": {"enabled": True, "bucket": 64}},
    }
    assert out.read_text().splitlines()[:2] == ["# @package _global_", "# python run_sweep.py +combo=mine"]
    assert main(arguments) == 2  # it is there now


def test_no_combo_within_the_limits_is_its_own_exit_code(tmp_path, capsys):
    loaded(tmp_path, whole())
    assert main(["recommend", str(tmp_path), "--max-memory-mb", "1"]) == 3
    assert "the limit is 1 MB" in capsys.readouterr().out


@pytest.mark.parametrize("limit", ["nan", "-1", "inf"])
def test_a_limit_that_is_none_is_refused(tmp_path, limit, capsys):
    loaded(tmp_path, whole())
    assert main(["recommend", str(tmp_path), "--max-wer-increase", limit]) == 2
    assert "--max-wer-increase" in capsys.readouterr().err


def test_two_places_have_no_one_best(tmp_path, capsys):
    loaded(tmp_path, whole(), replace(whole(), device="another GPU"))
    assert main(["recommend", str(tmp_path)]) == 0
    assert main(["recommend", str(tmp_path), "-o", str(tmp_path / "mine.yaml")]) == 2
    assert "2 places" in capsys.readouterr().err
