"""What is undecided is measured again: fresh, twice as much, all of it together, and only while that can help."""

import argparse
import json
import subprocess
import sys
from dataclasses import replace

import pytest
from factories import Case, Effect, make_run
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import UserError
from harness.gate import command
from harness.gate.decide import read
from harness.gate.repeats import REPEATS, is_quality, next_job, pooled, read_all, repeats_of
from harness.results import RunFolder, find_runs

NOISY = Case(effect=Effect(time=1.0), noise=0.25, seed=1)
"""Undecided about 5 % of time, for one run."""


def a_job(processes=5, seeds=(1, 2, 3), **measure):
    return {"combo": "x", "measure": {"processes": processes, **measure}, "workload": {"seeds": list(seeds)}}


# -- the next job --------------------------------------------------------------------------------------------------


def test_data_double_from_look_to_look_and_no_seed_comes_twice():
    jobs = [a_job(min_rounds=4, max_rounds=4)]
    for _ in range(3):
        jobs.append(next_job(jobs, ["rtf", "wer"]))
    assert [job["measure"]["processes"] for job in jobs] == [5, 5, 10, 20]
    seeds = [seed for job in jobs for seed in job["workload"]["seeds"]]
    assert [len(job["workload"]["seeds"]) for job in jobs] == [3, 3, 6, 12]
    assert len(set(seeds)) == len(seeds)
    assert {job["measure"]["min_rounds"] for job in jobs} == {4}


def test_only_what_is_undecided_is_repeated_at_length():
    time_only = next_job([a_job()], ["rss"])
    assert time_only["measure"]["processes"] == 5
    assert time_only["workload"]["seeds"] == [4]
    quality_only = next_job([a_job(min_rounds=4, max_rounds=12)], ["wer", "sim_resemblyzer"])
    assert quality_only["measure"] == {"processes": 1, "min_rounds": 1, "max_rounds": 1, "requests_seed": None}
    assert quality_only["workload"]["seeds"] == [4, 5, 6]
    assert next_job([a_job()], ["wer_timed"])["measure"]["processes"] == 5  # of the clips that are timed


def test_a_run_of_one_process_gets_as_many_as_an_interval_takes():
    assert next_job([a_job(processes=1)], ["rss"])["measure"]["processes"] == 4
    assert next_job([a_job(processes=1), a_job(processes=4)], ["rss"])["measure"]["processes"] == 5


@given(
    st.lists(st.lists(st.integers(0, 2**40), min_size=1, max_size=5, unique=True), min_size=1, max_size=4),
    st.sets(st.sampled_from(["rtf", "rss", "vram", "wer", "wer_timed", "sim_a", "sim_a_timed"]), min_size=1),
)
def test_whatever_is_undecided_the_next_job_is_the_same_but_for_effort_and_fresh_seeds(seeds, undecided):
    jobs = [a_job(seeds=own) for own in seeds]
    job = next_job(jobs, undecided)
    used = {seed for own in seeds for seed in own}
    assert not used & set(job["workload"]["seeds"])
    assert job["combo"] == "x"
    assert jobs[0] == a_job(seeds=seeds[0])  # it is a copy
    assert job["measure"]["processes"] >= 1
    assert any(map(is_quality, undecided)) or len(job["workload"]["seeds"]) == 1


# -- together ------------------------------------------------------------------------------------------------------


def test_all_rows_of_all_runs_count_and_processes_are_told_apart(tmp_path):
    runs = [make_run(tmp_path, Case(seed=n, first_seed=1 + 10 * n), minute=n) for n in range(3)]
    folder = pooled(runs, tmp_path / "together")
    rows, scores = folder.measurements()[0], folder.scores()[0]
    assert len(rows) == sum(len(run.measurements()[0]) for run in runs)
    assert len(scores) == sum(len(run.scores()[0]) for run in runs)
    assert {row.process for row in rows} == {0, 1, 2}
    together = read_all(runs).summary
    assert together.status == "ok"
    assert together.run_id == runs[0].run_id
    assert together.processes == 3
    assert together.comparison["rtf"].n == sum(run.summary().comparison["rtf"].n for run in runs)


def test_clips_that_are_the_same_twice_do_not_count_twice(tmp_path):
    runs = [make_run(tmp_path, Case(seed=n), minute=n) for n in range(2)]  # of the same seeds
    assert read_all(runs).summary.status == "incomplete"


def test_an_optimization_that_was_not_active_in_one_of_them_was_not(tmp_path):
    lost = Case(statuses={"kv_cache": ("inactive", "no step of it ran")})
    runs = [make_run(tmp_path, case, minute=n) for n, case in enumerate((Case(), lost, Case()))]
    assert read_all(runs).summary.optimizations["kv_cache"]["status"] == "inactive"


def test_one_in_doubt_puts_all_in_doubt(tmp_path):
    runs = [make_run(tmp_path, Case()), make_run(tmp_path, Case(effect=Effect(audio=0.9)), minute=1)]
    assert read_all(runs).summary.status == "failed"


def test_runs_of_two_machines_or_commits_are_not_one(tmp_path):
    runs = [make_run(tmp_path, Case(device=device)) for device in ("one CPU", "another CPU")]
    with pytest.raises(UserError, match="another device"):
        read_all(runs)


# -- the loop ------------------------------------------------------------------------------------------------------


class Bench:
    """Stands in for the measuring: repetitions of a case, with other noise each time; `asked` is what for."""

    def __init__(self, case: Case):
        self.case, self.asked = case, []

    def __call__(self, runs, subjects) -> RunFolder:
        self.asked.append(list(subjects))
        case = replace(self.case, seed=self.case.seed + len(runs), first_seed=1 + 10 * len(runs))
        return make_run(runs[0].path / REPEATS, case, minute=len(runs))


@pytest.fixture
def gate():
    """`python -m harness gate RUN ...` with a bench in place of the measuring; gives the exit code."""

    def run(folder, *arguments, again):
        parser = argparse.ArgumentParser()
        command.add_gate(parser)
        return command.gate(parser.parse_args([str(folder.path), *arguments]), again)

    return run


@pytest.mark.slow
def test_noise_is_decided_by_measuring_again(tmp_path, gate, capsys):
    run, bench = make_run(tmp_path, NOISY), Bench(NOISY)
    limits = ["--limit", "rtf:5%"]
    assert gate(run, *limits, "--retries", "0", again=bench) == 3
    assert bench.asked == []
    assert gate(run, *limits, "--retries", "40", "--budget-s", "600", again=bench) == 0
    assert bench.asked
    assert all(asked == ["rtf"] for asked in bench.asked)
    assert f"with {len(bench.asked)} repetitions" in capsys.readouterr().out
    assert len(repeats_of(run)) == len(bench.asked)
    # What was repeated counts whenever the run is judged again, and is no run of its own.
    n = len(bench.asked)
    assert gate(run, *limits, "--retries", "0", again=bench) == 0
    assert len(bench.asked) == n
    assert [folder.path for folder in find_runs([tmp_path])] == [run.path]


def test_the_answer_stays_alone_whatever_the_measuring_prints(tmp_path, gate, capfd):
    run, bench = make_run(tmp_path, NOISY), Bench(NOISY)

    def talkative(runs, subjects):
        print("Job 1 of 1")
        subprocess.run([sys.executable, "-c", "print('a model was loaded')"], check=True)
        return bench(runs, subjects)

    gate(run, "--limit", "rtf:5%", "--retries", "1", "--json", again=talkative)
    said = capfd.readouterr()
    assert len(bench.asked) == 1
    assert json.loads(said.out)["runs"]
    assert "a model was loaded" in said.err


@pytest.mark.slow
def test_a_true_change_is_found_by_measuring_again(tmp_path, gate):
    slower = replace(NOISY, effect=Effect(time=1.12))
    run, bench = make_run(tmp_path, slower), Bench(slower)
    assert gate(run, "--limit", "rtf:5%", "--retries", "0", again=bench) == 3
    assert gate(run, "--limit", "rtf:5%", "--retries", "60", "--budget-s", "600", again=bench) == 1


def test_it_ends_with_the_retries_and_with_the_budget(tmp_path, gate):
    on_the_edge = replace(NOISY, effect=Effect(time=1.05))
    for effort, most in ((["--retries", "2", "--budget-s", "600"], 2), (["--retries", "9", "--budget-s", "0"], 0)):
        run, bench = make_run(tmp_path, on_the_edge), Bench(on_the_edge)
        assert gate(run, "--limit", "rtf:5%", *effort, again=bench) == 3
        assert len(bench.asked) == most
        assert gate(run, "--limit", "rtf:5%", *effort[:1], "0", "--undecided=pass", again=bench) == 0


@pytest.mark.parametrize("effort", ["--retries=-1", "--budget-s=nan", "--budget-s=-5", "--budget-s=inf"])
def test_effort_that_makes_no_sense_is_bad_input(tmp_path, gate, effort):
    with pytest.raises(UserError):
        gate(make_run(tmp_path, NOISY), effort, again=Bench(NOISY))


def test_nothing_is_measured_again_where_it_cannot_help(tmp_path, gate):
    hopeless = {
        "a regression beside it": replace(NOISY, effect=Effect(time=1.0, wer=0.2)),
        "no score beside it": replace(NOISY, scored=False),
        "a lost optimization beside it": replace(NOISY, statuses={"kv_cache": ("inactive", None)}),
    }
    for case in hopeless.values():
        bench = Bench(case)
        limits = ["--limit", "rtf:5%", "--limit", "wer:0.02", "--retries", "5", "--budget-s", "600"]
        assert gate(make_run(tmp_path, case), *limits, again=bench) != 0
        assert bench.asked == []


def test_a_repetition_that_fails_is_not_forgotten(tmp_path, gate):
    run, bench = make_run(tmp_path, NOISY), Bench(replace(NOISY, effect=Effect(time=1.0, audio=0.9)))
    limits = ["--limit", "rtf:5%", "--retries", "5", "--budget-s", "600"]
    assert gate(run, *limits, again=bench) == 1
    assert len(bench.asked) == 1
    assert gate(run, *limits, again=Bench(NOISY)) == 1  # also next time


def test_where_it_cannot_be_measured_again_it_stays_undecided(tmp_path, gate, capsys):
    def refuses(_runs, _subjects):
        raise UserError("this code is another commit")

    run = make_run(tmp_path, NOISY)
    assert gate(run, "--limit", "rtf:5%", "--retries", "5", "--budget-s", "600", again=refuses) == 3
    assert "this code is another commit" in capsys.readouterr().out
    assert read(run).summary.status == "ok"


def test_a_repetition_draws_requests_of_its_own_even_where_the_run_was_told_which():
    assert next_job([a_job(requests_seed=7)], ["rtf"])["measure"]["requests_seed"] is None
