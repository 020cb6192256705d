"""Results are evidence: a file that was changed after the run is found, and said by whatever reads the run."""

import json
import shutil
from pathlib import Path

import pytest
from factories import Case, Effect, make_run, write_rows

from harness import __main__ as command
from harness.integrity import UNVERIFIED
from harness.report import verdict_line
from harness.results import RunFolder
from harness.summarize import build_summary


@pytest.fixture
def run(tmp_path):
    """A clean run, with a clip and a file of its own in a folder below."""
    folder = write_rows(tmp_path, Case(effect=Effect(time=0.6)))
    clip = folder.path / "audio" / "production" / "t0-rms-s1.wav"
    clip.parent.mkdir(parents=True)
    clip.write_bytes(b"RIFF")
    folder.write_summary(build_summary(folder))
    return folder


def change(path, old="0.", new="1."):
    path.write_text(path.read_text().replace(old, new, 1))


def test_a_run_as_it_was_left_is_trusted(run):
    summary = run.summary()
    assert summary.status == "ok"
    assert {"job.yaml", "utterances.jsonl", "scores.jsonl", "audio/production/t0-rms-s1.wav"} <= set(summary.files)
    assert "summary.json" not in summary.files
    assert not [warning for warning in summary.warnings if "changed" in warning or "unverified" in warning]


@pytest.mark.parametrize("name", ["utterances.jsonl", "scores.jsonl", "job.yaml", "children.json", "plan.json"])
def test_an_edited_file_is_named_and_nothing_is_concluded_from_it(run, name):
    path = run.path / name
    path.write_text(path.read_text() + "\n")
    summary = run.summary()
    assert summary.status == "failed"
    assert name in summary.warnings[0]
    assert "changed after the run" in verdict_line(summary)
    assert "faster" not in verdict_line(summary)


def test_an_edited_summary_does_not_match_its_own_digest(run):
    record = json.loads(run.summary_file.read_text())
    record["comparison"]["rtf"]["ratio"] /= 2
    run.summary_file.write_text(json.dumps(record))
    assert "summary.json was edited" in verdict_line(run.summary())


def test_how_a_summary_is_laid_out_does_not_matter(run):
    run.summary_file.write_text(json.dumps(json.loads(run.summary_file.read_text()), indent=7))
    assert run.summary().status == "ok"


def test_what_is_gone_or_was_added_is_told(run):
    (run.path / "environment.json").unlink()
    assert "environment.json is missing" in verdict_line(run.summary())


def test_scores_that_were_added_to_a_run_without_them_are_told(tmp_path):
    folder = make_run(tmp_path, Case(scored=False))
    assert folder.summary().status == "incomplete"
    folder.scores_file.write_text("")
    assert "scores.jsonl was added" in verdict_line(folder.summary())


def test_clips_may_be_left_behind_but_not_changed(run):
    clip = run.path / "audio" / "production" / "t0-rms-s1.wav"
    clip.write_bytes(b"RIFX")
    assert "t0-rms-s1.wav was changed" in verdict_line(run.summary())
    clip.unlink()
    assert run.summary().status == "ok"


@pytest.fixture
def score_again(monkeypatch):
    """`python -m harness score`, with a judge that finds the scores in need of another line."""

    def judge(folder, _config):
        folder.scores_file.write_text(folder.scores_file.read_text().replace('"hits": 9', '"hits": 8'))

    monkeypatch.setattr("harness.quality.scoring.score_run", judge)
    return lambda folder: command.main(["score", str(folder.path)])


def test_scoring_again_is_no_edit_and_says_what_it_replaced(run, score_again):
    before = run.summary()
    assert score_again(run) == 0
    after = run.summary()
    assert after.status == "ok"
    assert after.replaces == before.digest
    assert after.files["scores.jsonl"] != before.files["scores.jsonl"]
    assert after.files["utterances.jsonl"] == before.files["utterances.jsonl"]


def test_a_run_that_was_copied_and_scored_again_keeps_its_name(run, score_again, tmp_path):
    copied = RunFolder(Path(shutil.copytree(run.path, tmp_path / "reference")))
    assert score_again(copied) == 0
    assert copied.summary().run_id == run.summary().run_id


def test_scoring_again_does_not_launder_an_edited_row(run, score_again):
    change(run.utterances_file, '"generation_time_s": 0.', '"generation_time_s": 0.0')
    score_again(run)
    assert "utterances.jsonl was changed" in verdict_line(run.summary())


def test_a_run_without_hashes_is_said_to_be_unverified_and_is_read(run, score_again):
    record = json.loads(run.summary_file.read_text())
    for name in ("files", "digest", "replaces"):
        del record[name]
    run.summary_file.write_text(json.dumps(record))
    assert run.summary().status == "ok"
    assert UNVERIFIED in run.summary().warnings
    score_again(run)  # does not make it a verified one
    assert UNVERIFIED in run.summary().warnings


def test_the_report_says_it(run, tmp_path):
    change(run.utterances_file, '"generation_time_s": 0.', '"generation_time_s": 0.0')
    assert command.main(["report", str(run.path), "--out", str(tmp_path / "out")]) == 0
    assert "utterances.jsonl was changed after the run" in (tmp_path / "out" / "report.md").read_text()
