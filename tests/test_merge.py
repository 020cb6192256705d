"""What several hosts measured, joined; and what one measured, judged on another."""

from __future__ import annotations

import json
import shutil
import zipfile

import factories
import numpy as np
import pytest
import soundfile
import yaml

from harness import __main__ as later_steps
from harness import plan
from harness.callback import finish
from harness.integrity import ARCHIVE
from harness.later import awaits_scores, pack, unpacked
from harness.report import data
from harness.results import FAILURES, RunFolder, find_runs
from harness.summarize import build_summary


def host(tmp_path, name: str, *combos: str, unfinished: str = "", **case):
    """A sweep's folder with runs of some combos, each of the job of its name."""
    folder = tmp_path / name / "sweep"
    for combo in combos:
        of = {"texts": 1, "seeds": 1} | case
        run = factories.make_run(folder, factories.Case(combo, **of))
        job = yaml.safe_load((run.path / "job.yaml").read_text())
        run.write_job(job | {"key": combo})
        if combo != unfinished:
            run.write_summary(build_summary(run))
        else:
            run.summary_file.unlink()
    jobs = [{"key": combo, "label": combo} for combo in combos]
    (folder / plan.FILE).write_text(json.dumps({"jobs": jobs}))
    return folder


@pytest.mark.slow
def test_the_folders_of_two_hosts_become_one_for_one_report(tmp_path, capsys):
    one, other = host(tmp_path, "one", "a", "b"), host(tmp_path, "other", "c")
    into = tmp_path / "joined"
    assert later_steps.main(["merge", str(one), str(other), "-o", str(into)]) == 0
    assert "2 runs of" in capsys.readouterr().out
    runs = find_runs([into])
    assert sorted(run.summary().combo for run in runs) == ["a", "b", "c"]
    assert {run.summary().status for run in runs} == {"ok"}, "their files are as their hosts sealed them"
    assert later_steps.main(["report", str(into), "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "report.md").is_file()


def test_absolute_figures_stand_host_by_host_and_ratios_together(tmp_path):
    one, other = host(tmp_path, "one", "a", "b"), host(tmp_path, "other", "c")
    into = tmp_path / "joined"
    later_steps.main(["merge", str(one), str(other), "-o", str(into)])
    runs = data.load(find_runs([into]))
    assert sorted(len(here) for here in data.by_setting(runs).values()) == [1, 2]
    assert len(data.by_place(runs)) == 1, "which optimization does what is found out over all of them"
    assert len(data.by_setting(data.load(find_runs([one])))) == 1


def test_what_another_host_finished_is_taken_from_there(tmp_path):
    one = host(tmp_path, "one", "a", "b", unfinished="b")
    other = host(tmp_path, "other", "b")
    third = host(tmp_path, "third", "d", unfinished="d")
    (one / FAILURES).write_text("b: killed\n\n")
    into = tmp_path / "joined"
    later_steps.main(["merge", str(one), str(other), str(third), "-o", str(into)])
    keys = sorted(yaml.safe_load((run.path / "job.yaml").read_text())["key"] for run in find_runs([into]))
    assert keys == ["a", "b", "d"], "b once; what nobody finished is not hidden"
    assert len(list(into.glob(f"*/{FAILURES}"))) == 1


def test_the_same_job_from_two_hosts_is_two_measurements(tmp_path):
    one, other = host(tmp_path, "one", "a"), host(tmp_path, "other", "a")
    into = tmp_path / "joined"
    later_steps.main(["merge", str(one), str(other), "-o", str(into)])
    assert len(find_runs([into])) == 2


@pytest.mark.parametrize("wrong", ["empty", "twice", "there", "inside"])
def test_what_cannot_be_joined_is_one_line(tmp_path, capsys, wrong):
    one, other = host(tmp_path, "one", "a"), host(tmp_path, "other", "c")
    into = tmp_path / "joined"
    if wrong == "empty":
        shutil.rmtree(other)
        other.mkdir()
    elif wrong == "twice":
        other = one
    elif wrong == "there":
        into.mkdir()
    else:
        into = one / "joined"
    assert later_steps.main(["merge", str(one), str(other), "-o", str(into)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.glob("**/.*partial*"))


# -- judged later ------------------------------------------------------------------------------------------------------


def measured_for_later(tmp_path) -> RunFolder:
    """A run whose clips are packed, and which nobody has judged."""
    run = factories.write_rows(tmp_path / "results", factories.Case(scored=False, texts=2, seeds=2))
    job = yaml.safe_load((run.path / "job.yaml").read_text())
    run.write_job(job | {"quality": {"score": "later"}, "key": "k"})
    noise = np.random.default_rng(0).normal(0, 0.1, 24_000).astype(np.float32)
    for row in run.measurements()[0]:
        if row.pass_name == "quality":
            (run.path / row.audio).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(run.path / row.audio, noise, 24_000)
    pack(run)
    run.write_summary(build_summary(run))
    return run


def test_a_run_for_later_has_one_archive_and_claims_nothing_of_its_quality(tmp_path, capsys, monkeypatch):
    run = measured_for_later(tmp_path)
    assert not (run.path / "audio").exists()
    clips = [row.audio for row in run.measurements()[0] if row.pass_name == "quality"]
    assert sorted(zipfile.ZipFile(run.path / ARCHIVE).namelist()) == sorted(clips)
    assert run.summary().status == "incomplete", "so a gate does not pass it, and nothing recommends it"
    assert awaits_scores(run)
    assert list(plan.done(tmp_path / "results")) == ["k"], "it is not measured again"
    monkeypatch.setattr("harness.report.write_report", lambda runs, out: out / "report.md")
    assert finish(tmp_path / "results", tmp_path / "reports") == 0
    assert "Not judged yet: 1 of 1 runs. `python -m harness score" in capsys.readouterr().out


def test_a_run_for_later_that_lacks_more_than_scores_is_measured_again(tmp_path):
    run = measured_for_later(tmp_path)
    lines = run.utterances_file.read_text().splitlines(keepends=True)
    run.utterances_file.write_text("".join(lines[:-1]))
    run.write_summary(build_summary(run))
    assert not awaits_scores(run)
    assert not plan.done(tmp_path / "results")


def test_clips_come_out_of_the_archive_as_they_went_in(tmp_path):
    run = measured_for_later(tmp_path)
    row = next(row for row in run.measurements()[0] if row.pass_name == "quality")
    with unpacked(run) as where:
        assert len(soundfile.read(where / row.audio)[0]) == 24_000
    assert not (run.path / "audio").exists()
    assert not where.exists()


@pytest.mark.slow
def test_scoring_on_another_machine_completes_the_run(tmp_path, monkeypatch):
    run = measured_for_later(tmp_path)
    moved = RunFolder.open(shutil.copytree(run.path, tmp_path / "elsewhere" / run.run_id))
    heard = []

    def judge(rows, results_dir, config, language):
        heard.extend((results_dir / row.audio).is_file() for row in rows)
        template = {"wer": 0.1, "audio": None}
        return [factories_score(row, **template) for row in rows]

    def factories_score(row, wer, audio):
        from harness.results import Score

        return Score(
            variant=row.variant, text_id=row.text_id, voice=row.voice, seed=row.seed, pass_name="quality", wer=wer
        )

    monkeypatch.setattr("harness.quality.scoring._judge", judge)
    monkeypatch.setattr("harness.quality.scoring._processes", lambda *_: 1)
    assert later_steps.main(["score", str(moved.path)]) == 0
    assert heard
    assert all(heard)
    assert moved.summary().status == "ok"
    assert not awaits_scores(moved)


def test_a_damaged_archive_is_one_line(tmp_path, capsys):
    run = measured_for_later(tmp_path)
    archive = run.path / ARCHIVE
    archive.write_bytes(archive.read_bytes()[:200])
    assert later_steps.main(["score", str(run.path)]) == 2
    err = capsys.readouterr().err
    assert str(archive) in err
    assert len(err.splitlines()) == 1
