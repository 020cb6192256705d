"""`python -m harness history`: steps are marked where a level really changed, and any folder is told or refused."""

from __future__ import annotations

import re

import pytest
from factories import Case, Effect, make_run, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from test_any_folder import cases, drawn, edits, leave, place, shows_something, summarized

from harness.__main__ import main


def measured(tmp_path, *times: float, **changes) -> None:
    """A run each, one a minute, all of one experiment on one device."""
    for minute, time in enumerate(times):
        make_run(tmp_path / "runs", Case(effect=Effect(time=time), seed=minute, texts=6, seeds=1, **changes), minute)


def told(tmp_path, capsys, *arguments: str) -> tuple[str, list[str]]:
    assert main(["history", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), *arguments]) == 0
    *lines, path = capsys.readouterr().out.splitlines()
    assert path == str(tmp_path / "out/history.md")
    return (tmp_path / "out/history.md").read_text(), lines


def test_a_step_is_marked_once_with_its_size_and_what_changed_with_it(tmp_path, capsys):
    measured(tmp_path, 0.6, 0.6, 0.6)
    for minute in (10, 11, 12):
        folder = write_rows(tmp_path / "runs", Case(effect=Effect(time=0.66), seed=minute), minute)
        environment = folder.read_json("environment.json")
        folder.write_json("environment.json", {**environment, "packages": {"torch": "2.12.0"}})
        summarized(folder)
    text, lines = told(tmp_path, capsys)
    (line,) = lines
    assert re.fullmatch(
        r"production: slower from 2026-03-14 on, (9\.\d|10|11) % more time than before\. "
        r"Changed with it: .*torch 2\.11\.0 → 2\.12\.0, .*",
        line,
    )
    marked = [row for row in text.splitlines() if row.endswith("| **slower** |")]
    assert len(marked) == 1
    assert "09:10" in marked[0]
    (picture,) = re.findall(r"\]\((.+\.png)\)", text)
    assert shows_something(tmp_path / "out" / picture)


def test_there_and_back_are_two_steps(tmp_path, capsys):
    measured(tmp_path, 0.6, 0.6, 0.8, 0.6)
    _, lines = told(tmp_path, capsys)
    assert [line.split(" from")[0] for line in lines] == ["production: slower", "production: faster"]


def test_what_does_not_count_is_no_step(tmp_path, capsys):
    measured(tmp_path, 0.600, 0.606, 0.598, 0.603, 0.609)
    text, lines = told(tmp_path, capsys)
    assert lines == ["production: no step in 5 runs."]
    assert "**slower**" not in text


def test_a_slow_drift_is_found_once_it_counts(tmp_path, capsys):
    measured(tmp_path, *(0.6 * 1.012**n for n in range(9)), noise=0.002)
    _, lines = told(tmp_path, capsys)
    assert lines
    assert all("slower" in line for line in lines)


def test_a_figure_that_a_process_has_once_makes_no_step(tmp_path, capsys):
    for minute, memory in enumerate((1.0, 1.0, 1.5)):
        make_run(tmp_path / "runs", Case(effect=Effect(memory=memory), memory_kind="rss"), minute)
    assert told(tmp_path, capsys, "--metric", "peak_memory_mb")[1] == ["production: no step in 3 runs."]


def test_other_devices_and_experiments_have_histories_of_their_own(tmp_path, capsys):
    measured(tmp_path, 0.6, 0.6)
    make_run(tmp_path / "runs", Case(effect=Effect(time=0.9), device="Another CPU"), 20)
    make_run(tmp_path / "runs", Case(effect=Effect(time=0.9), pipeline="random", unmeasured="no words"), 21)
    text, lines = told(tmp_path, capsys)
    assert lines == ["production: no step in 2 runs."]
    assert "there is one run" in text
    assert "`production` on Another CPU" in text


def test_what_a_reference_keeps_of_the_time_before_it_belongs_to_its_history(tmp_path, capsys):
    now = make_run(tmp_path / "runs", Case(effect=Effect(time=0.9)), 30).path
    make_run(now / "earlier", Case(effect=Effect(time=0.6)), 1)
    assert "slower" in told(tmp_path, capsys)[1][0]


def test_a_run_that_cannot_be_read_is_named_beside_the_others(tmp_path, capsys):
    measured(tmp_path, 0.6, 0.6, 0.6)
    (first, *_) = sorted((tmp_path / "runs").iterdir())
    (first / "summary.json").write_text("{")
    text, lines = told(tmp_path, capsys)
    assert lines == ["production: no step in 2 runs."]
    assert "1 run could not be read" in text
    assert first.name in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--metric", "rft"], "--metric rft: unknown (did you mean rtf?); known: rtf"),
        (["--metric", "energy_j_per_audio_s"], "no finished run there has measured energy_j_per_audio_s"),
        (["--metric", "sim_nobody"], "no finished run there has measured sim_nobody"),
        (["--out", "a_file"], "--out a_file: cannot be made a folder"),
    ],
)
def test_what_cannot_be_followed_is_said_in_a_line(tmp_path, capsys, monkeypatch, arguments, says):
    measured(tmp_path, 0.6)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    assert main(["history", "runs", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_folder_without_runs_is_named(tmp_path, capsys):
    assert main(["history", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


@settings(drawn, max_examples=5)
@given(case=cases(), changes=st.lists(edits(), max_size=4), more=st.lists(edits(), max_size=4))
def test_any_folder_is_told_or_refused(case, changes, more):
    with place() as here:
        for minute, edited in enumerate((changes, more)):
            summarized(leave(here / "runs", case, edited, minute))
        for metric in ("rtf", "wer"):
            assert main(["history", str(here / "runs"), "--metric", metric, "--out", str(here / "out")]) in (0, 2)
