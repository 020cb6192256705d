"""A sweep survives: what it keeps when it is killed, what it measures again, what it refuses, what it says."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import quick_jobs
from conftest import ROOT
from test_cli import composed

import run_sweep
from harness import plan, sweep
from harness.config import expand
from harness.report import write_report
from harness.results import RunFolder, find_runs

MEMBERS = ("inference_mode", "cuda_cache")
SWEEP = ["+sweep=leave_one_out", "device=cpu", *(f"optimizations.{name}.enabled=true" for name in MEMBERS)]
FIRST, SECOND = "custom", "custom-without-cuda_cache"


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Jobs that take no time, and a report that nobody reads."""
    monkeypatch.setenv("QUICK_JOBS", str(tmp_path))
    monkeypatch.setattr(sweep, "run_job", quick_jobs.run_job)
    monkeypatch.setattr("harness.report.write_report", lambda runs, out: out / "report.md")


@pytest.fixture
def command(tmp_path, monkeypatch, capsys, quick):
    """Runs run_sweep.py with arguments: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["run_sweep.py", *arguments, *folders(tmp_path)])
        code = run_sweep.main()
        written = capsys.readouterr()
        return code, written.out, written.err

    return run


@pytest.fixture(scope="module")
def a_finished_sweep(tmp_path_factory):
    """The folder of a sweep whose jobs are all done."""
    tmp_path = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUICK_JOBS", str(tmp_path))
        patch.setattr(sweep, "run_job", quick_jobs.run_job)
        patch.setattr("harness.report.write_report", lambda runs, out: out / "report.md")
        patch.setattr(sys, "argv", ["run_sweep.py", *SWEEP, *folders(tmp_path)])
        assert run_sweep.main() == 0
    (folder,) = (tmp_path / "results").iterdir()
    return folder


@pytest.fixture
def finished(tmp_path, a_finished_sweep):
    return shutil.copytree(a_finished_sweep, tmp_path / "results" / "mine")


def folders(tmp_path: Path) -> list[str]:
    return [f"results_dir={tmp_path / 'results'}", f"reports_dir={tmp_path / 'reports'}"]


def begun(tmp_path: Path) -> list[str]:
    """The jobs that began, in their order."""
    file = tmp_path / "begun"
    return file.read_text().split() if file.exists() else []


def killed(tmp_path: Path, where: str, *arguments: str) -> Path:
    """The folder of a sweep whose process was killed."""
    environment = os.environ | {"QUICK_JOBS": str(tmp_path), "QUICK_JOBS_DIE": where}
    script = [sys.executable, str(ROOT / "tests" / "quick_jobs.py"), *SWEEP, *arguments, *folders(tmp_path)]
    ended = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    (folder,) = (tmp_path / "results").iterdir()
    return folder


# -- killed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "again"),
    [("within", True), pytest.param("after", False, marks=pytest.mark.slow)],
    ids=["within a job", "between two jobs"],
)
def test_the_same_command_goes_on_where_it_was_killed(command, tmp_path, where, again):
    folder = killed(tmp_path, f"{where} {SECOND}")
    before = begun(tmp_path)
    assert before == [FIRST, SECOND]
    kept = {run: run.stat().st_mtime_ns for run in plan.done(folder).values()}
    assert len(kept) == len(before) - again

    code, out, _ = command(*SWEEP)
    assert code == 0
    assert list((tmp_path / "results").iterdir()) == [folder], "it goes on in the folder where it was"
    after = begun(tmp_path)[len(before) :]
    assert (SECOND in after) == again
    assert not set(after) & set(before[: len(kept)]), "nothing is measured twice"
    assert {run: run.stat().st_mtime_ns for run in kept} == kept
    assert len(find_runs([folder])) == len(plan.keys_of(folder)) == len(before) + len(after) - again
    skipped = next(line for line in out.splitlines() if line.startswith("Sweep of"))
    assert all(name in skipped for name in before[: len(kept)])
    assert not plan.missing(folder)


def test_a_sweep_that_is_done_is_not_measured_again_in_its_folder_and_is_in_a_new_one(command, tmp_path, finished):
    code, out, _ = command(*SWEEP, f"hydra.sweep.dir={finished}")
    assert (code, begun(tmp_path)) == (0, [])
    assert "Report: " in out
    assert command(*SWEEP)[0] == 0
    assert len(begun(tmp_path)) == 1 + len(MEMBERS)
    assert len(list((tmp_path / "results").iterdir())) == 2


def test_jobs_whose_files_are_damaged_are_measured_again(command, tmp_path, finished):
    first, second, third = plan.done(finished).values()
    (first / "summary.json").write_text('{"status": "o')
    (second / "summary.json").unlink()
    quick_jobs.cut_last_line(third / "utterances.jsonl")
    assert len(plan.missing(finished)) == 3
    assert command(*SWEEP)[0] == 0
    assert len(begun(tmp_path)) == 3
    assert not plan.missing(finished)


def test_a_run_that_cannot_be_read_is_named_in_one_line(command, finished, monkeypatch):
    monkeypatch.setattr("harness.report.write_report", write_report)
    strange = RunFolder.create(finished, "custom", "mini")
    (strange.path / "job.yaml").write_text("key: [\n")
    code, _, err = command(*SWEEP, f"hydra.sweep.dir={finished}")
    assert (code, len(err.splitlines())) == (1, 1)
    assert str(strange.path / "job.yaml") in err


@pytest.mark.slow
def test_a_full_disk_loses_the_job_that_met_it_and_no_other(command, tmp_path, monkeypatch):
    write = RunFolder.write_summary
    room = {"left": 2}

    def write_while_there_is_room(folder, summary):
        if not room["left"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        room["left"] -= 1
        write(folder, summary)

    monkeypatch.setattr(RunFolder, "write_summary", write_while_there_is_room)
    code, out, err = command(*SWEEP)
    assert code == 1
    assert "No space left on device" in err
    assert "Traceback" not in err
    assert "The same command goes on with them." in out
    (folder,) = (tmp_path / "results").iterdir()
    assert len(plan.done(folder)) == 2
    room["left"] = 1000
    first = len(begun(tmp_path))
    code, out, _ = command(*SWEEP)
    assert code == 0
    assert len(begun(tmp_path)) == first + len(plan.keys_of(folder)) - 2
    assert list((tmp_path / "results").iterdir()) == [folder]


def test_a_folder_that_cannot_be_written_is_one_line(command, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(plan, "write_atomically", full)
    code, _, err = command(*SWEEP)
    assert code == 2
    assert "No space left on device" in err
    assert len(err.splitlines()) == 1
    assert not begun(tmp_path)


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
def test_a_second_sweep_in_one_folder_is_refused_in_one_line(command, tmp_path, finished, named):
    where = [f"hydra.sweep.dir={finished}"] if named else []
    (run, *_) = plan.done(finished).values()
    (run / "summary.json").unlink()  # unfinished: the same command would go on with it
    with plan.held(finished):
        code, _, err = command(*SWEEP, *where)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "another sweep" in err
    assert str(finished) in err
    assert not begun(tmp_path)


@pytest.mark.parametrize("other", ["measure.min_rounds=5", "workload=standard", "optimizations.kv_cache.enabled=true"])
def test_a_folder_of_another_sweep_is_refused(command, tmp_path, finished, other):
    code, _, err = command(*SWEEP, other, f"hydra.sweep.dir={finished}")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "holds another sweep" in err
    assert not begun(tmp_path)


def test_a_design_without_its_sweeper_is_refused(command):
    code, _, err = command("-m", *SWEEP, "hydra/sweeper=basic")
    assert code == 1
    assert "leave it as it is" in err


# -- keys --------------------------------------------------------------------------------------------------------------


def keys(*arguments: str) -> set[str]:
    plan._sha256.cache_clear()
    return {plan.key(spec) for spec in expand(composed(*SWEEP, *arguments))}


def test_a_key_holds_configuration_code_and_contents(tmp_path, monkeypatch):
    texts = tmp_path / "texts.txt"
    texts.write_text("It was late.\n")
    given = f"workload.file={texts}"
    before = keys(given)
    assert len(before) == 1 + len(MEMBERS)
    assert keys(given, "reports_dir=elsewhere", "results_dir=elsewhere", "dry_run=true") == before
    assert not keys(given, "measure.budget_s=7") & before
    texts.write_text("It was early.\n")
    assert not (changed := keys(given)) & before
    monkeypatch.setattr(plan, "code", lambda: "other code")
    assert not keys(given) & changed


def test_a_key_holds_what_a_reference_clip_and_a_checkpoint_sound_like(tmp_path):
    clip, weights = tmp_path / "me.wav", tmp_path / "mini"
    weights.mkdir()
    given = [f"workload.voices=[{clip}]", f"pipeline.checkpoint_dir={weights}"]
    clip.write_bytes(b"one voice")
    (weights / "t3.safetensors").write_bytes(b"weights")
    before = keys(*given)
    clip.write_bytes(b"another voice")
    assert not (other := keys(*given)) & before
    (weights / "t3.safetensors").write_bytes(b"heavier")
    plan._folder.cache_clear()
    assert not keys(*given) & other


# -- a dry run ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_lists_jobs_times_and_what_is_done(command, tmp_path):
    code, out, _ = command(*SWEEP, "dry_run=true")
    assert code == 0
    assert not begun(tmp_path)
    assert not list(tmp_path.glob("results/*")), "it leaves nothing behind"
    *jobs, total = out.splitlines()
    assert len(jobs) == 1 + len(MEMBERS)
    assert all("to do" in line and "about" in line for line in jobs)
    assert total.startswith(f"{len(jobs)} jobs, 0 of them done; about ")


def test_a_dry_run_tells_what_is_done(command, tmp_path, finished):
    *_, last = plan.done(finished).values()
    (last / "summary.json").unlink()
    _, out, _ = command(*SWEEP, "dry_run=true")
    *jobs, total = out.splitlines()
    assert sum(" done " in line for line in jobs) == len(jobs) - 1
    assert [line for line in jobs if "to do" in line and "about 60 s" in line], "as long as those that are done took"
    assert str(finished) in total
    assert not begun(tmp_path)


@pytest.mark.parametrize("arguments", [["+combo=production"], ["-m", "+combo=production,baseline"]])
def test_a_dry_run_of_no_design_measures_nothing_either(command, tmp_path, arguments):
    code, out, _ = command(*arguments, "device=cpu", "dry_run=true")
    assert code == 0
    assert "production against" in out
    assert not begun(tmp_path)
    assert not list(tmp_path.glob("results/*"))


# -- what is kept of it ------------------------------------------------------------------------------------------------


def test_the_plan_says_what_each_job_is(finished):
    jobs = json.loads((finished / plan.FILE).read_text())["jobs"]
    assert len({job["key"] for job in jobs}) == len(jobs) == 1 + len(MEMBERS)
    assert all(set(job) >= {"key", "label", "against", "enabled", "reference", "expected_s"} for job in jobs)
    assert {plan.key_of(run.path) for run in find_runs([finished])} == {job["key"] for job in jobs}
