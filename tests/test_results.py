"""Run folders: written so that a crash loses nothing, summarised so that nothing is hidden."""

import datetime
import json
from dataclasses import replace

import pytest
from factories import Case, Effect, make_run, make_summary, write_rows

from harness.errors import UserError
from harness.results import BASELINE, Measurement, RunFolder, Summary, find_runs, schema_problem
from harness.summarize import build_summary


def a_row(**changes) -> Measurement:
    row = Measurement(
        variant="baseline", pass_name="speed", text_id="a", text="Hello.", voice="rms", seed=1, audio_s=1.0
    )
    return replace(row, **changes)


# -- the folder ------------------------------------------------------------------------------------------


def test_run_ids_are_readable_and_never_reused(tmp_path):
    now = datetime.datetime(2026, 3, 14, 9, 26, 53)
    folders = [RunFolder.create(tmp_path, "kv cache/2", "mini", now=now) for _ in range(3)]
    assert [folder.run_id for folder in folders] == [
        "20260314-092653-kv-cache-2-mini",
        "20260314-092653-kv-cache-2-mini-2",
        "20260314-092653-kv-cache-2-mini-3",
    ]


def test_rows_survive_the_round_trip_with_the_columns_of_the_format(tmp_path):
    folder = RunFolder.create(tmp_path, "x", "mini")
    row = a_row(generation_time_s=float("nan"), stages_s={"condition": 0.5})
    folder.add_measurement(row)
    written = json.loads(folder.utterances_file.read_text())
    assert written["pass"] == "speed"
    assert written["generation_time_s"] is None  # JSON has no NaN
    assert folder.measurements() == ([replace(row, generation_time_s=None)], [])


def test_a_cut_last_line_costs_that_row_only(tmp_path):
    folder = RunFolder.create(tmp_path, "x", "mini")
    folder.add_measurement(a_row(text_id="a"))
    folder.add_measurement(a_row(text_id="b"))
    content = folder.utterances_file.read_bytes()
    folder.utterances_file.write_bytes(content[:-20])
    rows, warnings = folder.measurements()
    assert [row.text_id for row in rows] == ["a"]
    assert "cut off" in warnings[0]
    folder.add_measurement(a_row(text_id="c"))  # a resumed run
    rows, warnings = folder.measurements()
    assert [row.text_id for row in rows] == ["a", "c"]
    assert warnings == []


def test_a_broken_line_in_the_middle_is_refused_by_number(tmp_path):
    folder = RunFolder.create(tmp_path, "x", "mini")
    folder.add_measurement(a_row())
    folder.utterances_file.write_text("{oops\n" + folder.utterances_file.read_text())
    with pytest.raises(UserError, match="line 1"):
        folder.measurements()


def test_a_folder_that_no_run_wrote_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        with pytest.raises(UserError, match=name):
            RunFolder.open(tmp_path / name)


def test_an_unfinished_run_says_how_to_finish_it(tmp_path):
    folder = write_rows(tmp_path, Case())
    with pytest.raises(UserError, match="python -m harness score"):
        folder.summary()


def test_damaged_and_foreign_summaries_are_refused_in_one_line(tmp_path):
    folder = make_run(tmp_path, Case())
    record = json.loads(folder.summary_file.read_text())
    folder.write_json("summary.json", {**record, "schema_version": 99})
    with pytest.raises(UserError, match="schema version 99"):
        folder.summary()
    folder.write_json("summary.json", {**record, "status": "fine"})
    with pytest.raises(UserError, match=r"\$.status"):
        folder.summary()
    folder.summary_file.write_text('{"schema_version": 1, "run_id"')
    with pytest.raises(UserError, match="damaged"):
        folder.summary()


def test_a_summary_of_the_first_schema_is_still_read(tmp_path):
    folder = make_run(tmp_path, Case())
    record = json.loads(folder.summary_file.read_text())
    for name in ("against", "against_optimizations", "processes", "files", "digest", "replaces"):
        del record[name]
    for variant in record["variants"].values():
        for name in ("wer_timed", "watermark", "energy_j_per_audio_s", "repeated_request_ratio", "growth", "n_timed"):
            del variant[name]
    for name in ("load_s", "energy_j_per_audio_s", "wer_timed", "watermark"):
        del record["comparison"][name]
    for change in record["comparison"].values():
        del change["smallest_detectable"], change["rounds_for_threshold"]
    folder.write_json("summary.json", {**record, "schema_version": 1})
    summary = folder.summary()
    assert (summary.against, summary.candidate) == (BASELINE, "production")
    assert summary.comparison["rtf"].verdict == "faster"
    assert summary.comparison["wer_timed"].verdict == "not measured"


def test_find_runs_takes_a_run_or_a_folder_of_runs(tmp_path):
    runs = [make_run(tmp_path / "sweep", Case(combo=name), minute) for minute, name in enumerate("ab")]
    assert [run.path for run in find_runs([tmp_path / "sweep"])] == [run.path for run in runs]
    assert [run.path for run in find_runs([runs[1].path, tmp_path / "sweep"])] == [runs[1].path, runs[0].path]
    with pytest.raises(UserError, match="nowhere"):
        find_runs([tmp_path / "nowhere"])


# -- the schema ------------------------------------------------------------------------------------------


def test_the_schema_knows_null_but_no_missing_and_no_unknown_figure(tmp_path):
    record = make_summary(tmp_path, Case()).to_dict()
    assert schema_problem(record) is None
    assert Summary.from_dict(record).to_dict() == record
    variant = record["variants"]["production"]
    assert schema_problem({**record, "variants": {"production": {**variant, "wer": None}}}) is None
    assert "wer" in schema_problem(
        {**record, "variants": {"production": {k: v for k, v in variant.items() if k != "wer"}}}
    )
    assert "speed" in schema_problem({**record, "speed": 3})
    bad = {**record["comparison"], "rtf": {**record["comparison"]["rtf"], "verdict": "much faster"}}
    assert "much faster" in schema_problem({**record, "comparison": bad})


def test_the_writer_refuses_a_summary_that_violates_its_schema(tmp_path):
    folder = make_run(tmp_path, Case())
    before = folder.summary_file.read_text()
    with pytest.raises(ValueError, match="status"):
        folder.write_summary(replace(folder.summary(), status="splendid"))
    assert folder.summary_file.read_text() == before


# -- the summary -----------------------------------------------------------------------------------------


def test_a_clean_run_has_every_figure(tmp_path):
    summary = make_summary(tmp_path, Case(effect=Effect(time=0.6, memory=0.8)))
    base, combo = summary.variants["baseline"], summary.variants["production"]
    assert summary.status == "ok"
    assert base.rtf == pytest.approx(0.5, rel=0.02)
    assert base.first_call_s == pytest.approx(4 * 0.5 * 60 / 25, rel=0.1)
    assert base.warmup_time_s < base.first_call_s / 2
    assert base.stages_s["generate_tokens"] == pytest.approx(0.7 * base.generation_time_s)
    assert base.tokens_per_s == pytest.approx(25 / (0.5 * 0.7), rel=0.02)
    assert base.intervals["rtf"][0] < base.rtf < base.intervals["rtf"][1]
    assert (combo.n_speed, combo.n_expected, combo.n_scored, combo.n_missing) == (16, 24, 24, 0)
    rtf = summary.comparison["rtf"]
    assert (rtf.verdict, rtf.n) == ("faster", 16)
    assert rtf.low < 0.6 < rtf.high
    assert rtf.value == pytest.approx(combo.rtf / base.rtf)
    # a process has its peak of resident memory, loading and its first call once: a ratio, and no certainty about it
    assert summary.comparison["peak_memory_mb"].value == pytest.approx(0.8, rel=0.01)
    assert summary.comparison["wer"].verdict == "no detectable change"
    assert summary.comparison["sim_resemblyzer"].verdict == "no detectable change"
    assert summary.comparison["first_call_s"].value == pytest.approx(0.6, rel=0.1)
    for name in ("peak_memory_mb", "first_call_s", "load_s", "model_memory_mb"):
        assert summary.comparison[name].verdict == "not measured"


def test_the_same_code_twice_is_no_change_in_anything(tmp_path):
    summary = make_summary(tmp_path, Case(combo="baseline", effect=Effect(), noise=0.05, enabled=()))
    assert summary.status == "ok"
    verdicts = {record.verdict for record in summary.comparison.values()}
    assert verdicts == {"no detectable change", "not measured"}


def test_shorter_audio_for_the_same_tokens_is_an_error_not_a_speed_up(tmp_path):
    summary = make_summary(tmp_path, Case(effect=Effect(time=0.6, audio=0.95)))
    assert summary.status == "failed"
    assert summary.variants["production"].status == "failed"
    assert "not a speed-up" in summary.variants["production"].error
    assert summary.comparison["rtf"].verdict == "not measured"
    assert any("not a speed-up" in warning for warning in summary.warnings)


def test_counted_gpu_memory_of_the_model_has_a_verdict_and_resident_memory_has_none(tmp_path):
    effect = Effect(memory=0.7)
    vram = make_summary(tmp_path, Case(effect=effect, memory_kind="vram"))
    assert vram.comparison["model_memory_mb"].verdict == "less"
    rss = make_summary(tmp_path, Case(effect=effect, memory_kind="rss"))
    assert rss.comparison["model_memory_mb"].verdict == "not measured"


def test_several_processes_give_what_a_process_has_once_its_verdict(tmp_path):
    summary = make_summary(tmp_path, Case(effect=Effect(time=0.6, memory=0.9), processes=5))
    verdicts = {
        name: summary.comparison[name].verdict for name in ("peak_memory_mb", "model_memory_mb", "first_call_s")
    }
    assert verdicts == {"peak_memory_mb": "less", "model_memory_mb": "less", "first_call_s": "faster"}
    assert summary.processes == summary.comparison["peak_memory_mb"].n == 5
    few = make_summary(tmp_path, Case(effect=Effect(memory=0.9), processes=4), minute=1)
    assert few.comparison["peak_memory_mb"].verdict == "not measured"
    assert any("4 pairs of processes cannot tell" in warning for warning in few.warnings)


def test_thresholds_come_from_the_configuration(tmp_path):
    folder = write_rows(tmp_path, Case(effect=Effect(time=0.9)))
    assert build_summary(folder).comparison["rtf"].verdict == "faster"
    folder.write_job({**folder.job(), "measure": {"thresholds": {"rtf": 0.2}}})
    summary = build_summary(folder)
    assert summary.thresholds["rtf"] == 0.2
    assert summary.comparison["rtf"].verdict == "no detectable change"


def test_missing_rows_make_a_run_incomplete_and_say_which(tmp_path):
    folder = write_rows(tmp_path, Case())
    lines = folder.utterances_file.read_text().splitlines(keepends=True)
    folder.utterances_file.write_text("".join(lines[:-30]))
    summary = build_summary(folder)
    assert summary.status == "incomplete"
    assert any("rows of the quality pass" in warning for warning in summary.warnings)
    assert any("rows of the speed pass" in warning for warning in summary.warnings)


def test_a_child_that_died_leaves_the_baseline_figures(tmp_path):
    folder = write_rows(tmp_path, Case())
    rows = [row for row in folder.measurements()[0] if row.variant == "baseline"]
    folder.utterances_file.unlink()
    folder.scores_file.unlink()
    for row in rows:
        folder.add_measurement(row)
    children = folder.read_json("children.json")
    children["production"][0] |= {"status": "failed", "error": "Traceback ...\nMemoryError: no more"}
    folder.write_json("children.json", children)
    summary = build_summary(folder)
    assert summary.status == "failed"
    assert summary.variants["baseline"].rtf == pytest.approx(0.5, rel=0.02)
    assert summary.variants["production"].rtf is None
    assert "production failed: MemoryError: no more" in summary.warnings
    assert summary.comparison["rtf"].verdict == "not measured"
    folder.write_summary(summary)


def test_failed_and_silent_clips_count_as_wer_one(tmp_path):
    folder = write_rows(tmp_path, Case(texts=6, seeds=1, wer=0.0))
    rows, scores = folder.measurements()[0], folder.scores()[0]
    folder.utterances_file.unlink()
    folder.scores_file.unlink()
    for row in rows:
        fails = (row.variant, row.pass_name, row.text_id) == ("production", "quality", "t0")
        folder.add_measurement(replace(row, status="failed", error="boom") if fails else row)
    for score in scores:
        if (score.variant, score.text_id) == ("production", "t0"):
            continue  # the scorer found no clip
        silent = (score.variant, score.text_id) == ("production", "t1")
        folder.add_score(replace(score, wer=None, missing=True, reason="silent") if silent else score)
    summary = build_summary(folder)
    combo = summary.variants["production"]
    assert (combo.n_scored, combo.n_missing) == (6, 2)
    assert combo.wer == pytest.approx(2 / 6, abs=0.02)
    assert summary.status == "incomplete"
    assert any("boom" in warning for warning in summary.warnings)


def with_scores(folder, change):
    """The folder with every score of the combo put through `change`."""
    scores = folder.scores()[0]
    folder.scores_file.unlink()
    for score in scores:
        folder.add_score(change(score) if score.variant == "production" else score)
    return build_summary(folder)


def test_what_a_mean_hides_stands_beside_it(tmp_path):
    def change(score):
        bad = (score.text_id, score.seed) == ("t1", 2)
        return replace(score, wer=1.4 if bad else 0.2, cer=0.1, tail_insertions=3, seconds_per_character=0.07)

    heard = with_scores(write_rows(tmp_path, Case(texts=4, seeds=2)), change).variants["production"].heard
    assert heard == {
        "cer": pytest.approx(0.1),
        "n_mostly_wrong": 1,
        "worst": {"text_id": "t1", "voice": "rms", "seed": 2, "wer": 1.4},
        "tail_insertions": 24,
        "tail_deletions": 0,
        "seconds_per_character": pytest.approx(0.07),
        "n_hit_token_cap": 0,
    }


def test_clips_cut_at_the_limit_are_listed(tmp_path):
    folder = write_rows(tmp_path, Case())
    rows = folder.measurements()[0]
    folder.utterances_file.unlink()
    for row in rows:
        cut = (row.variant, row.pass_name, row.text_id, row.seed) == ("production", "quality", "t3", 2)
        folder.add_measurement(replace(row, hit_token_cap=cut))
    (warning,) = [text for text in build_summary(folder).warnings if "limit of speech tokens" in text]
    assert "1 of 24 clips" in warning
    assert "t3 (voice rms, seed 2)" in warning


def test_a_similarity_stays_where_words_cannot_be_judged(tmp_path):
    folder = write_rows(tmp_path, Case())
    scores = folder.scores()[0]
    folder.scores_file.unlink()
    for score in scores:
        folder.add_score(replace(score, wer=None))
    summary = build_summary(folder)
    assert summary.comparison["wer"].verdict == "not measured"
    assert summary.comparison["sim_resemblyzer"].verdict == "no detectable change"
    assert summary.variants["production"].n_scored == 24


def test_a_run_without_scores_is_incomplete_and_its_quality_null(tmp_path):
    summary = make_summary(tmp_path, Case(scored=False))
    assert summary.status == "incomplete"
    assert summary.variants["production"].wer is None
    assert summary.comparison["wer"].verdict == "not measured"
    assert any("not scored" in warning for warning in summary.warnings)


def test_quality_that_cannot_be_measured_is_null_with_its_reason_and_the_run_is_complete(tmp_path):
    summary = make_summary(tmp_path, Case(unmeasured="random weights speak noise"))
    assert summary.status == "ok"
    assert summary.variants["production"].wer is None
    assert "random weights speak noise" in summary.variants["production"].quality_note
    assert any("random weights speak noise" in warning for warning in summary.warnings)


def test_untrained_weights_are_called_that(tmp_path):
    summary = make_summary(tmp_path, Case(trained=False))
    assert "untrained" in summary.variants["production"].quality_note


def test_an_enabled_optimization_that_was_not_active_is_named(tmp_path):
    case = Case(statuses={"kv_cache": ("inactive", "no cache was used")})
    summary = make_summary(tmp_path, case)
    assert summary.active == ["inference_mode"]
    assert any("kv_cache is enabled but inactive" in warning for warning in summary.warnings)


def test_a_combo_with_nothing_active_gets_no_verdict_on_time_or_memory(tmp_path):
    idle = ("inactive", "none pays")
    summary = make_summary(tmp_path, Case(statuses={"kv_cache": idle, "inference_mode": idle}))
    rtf = summary.comparison["rtf"]
    assert rtf.value == pytest.approx(0.6, rel=0.05)
    assert rtf.verdict == summary.comparison["peak_memory_mb"].verdict == "not measured"
    assert summary.comparison["wer"].verdict == "no detectable change"
    assert any("no optimization was active" in warning for warning in summary.warnings)


def test_a_batchs_rows_are_one_measurement(tmp_path):
    """Eight texts in each of two calls are two pairs, not sixteen, and their time is counted once."""
    folder = write_rows(tmp_path, Case())
    rows = folder.measurements()[0]
    folder.utterances_file.unlink()
    for row in rows:
        folder.add_measurement(replace(row, batch_size=8) if row.pass_name == "speed" else row)
    summary = build_summary(folder)
    assert summary.comparison["rtf"].n == 2
    assert summary.comparison["rtf"].value == pytest.approx(0.6, rel=0.05)
    assert summary.comparison["rtf"].verdict == "not measured"
    assert summary.variants["baseline"].rtf == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("planned", [True, False])
def test_a_run_that_ended_before_its_speed_pass_is_incomplete(tmp_path, planned):
    folder = write_rows(tmp_path, Case())
    rows = [row for row in folder.measurements()[0] if row.pass_name in ("first", "quality")]
    folder.utterances_file.unlink()
    for row in rows:
        folder.add_measurement(row)
    if not planned:
        (folder.path / "plan.json").unlink()
    summary = build_summary(folder)
    assert summary.status == "incomplete"
    assert summary.variants["baseline"].status == "ok"
    assert summary.comparison["rtf"].verdict == "not measured"
    assert any("rows of the speed pass are there" in warning for warning in summary.warnings)
    folder.write_summary(summary)


def test_too_few_pairs_give_a_ratio_and_no_verdict(tmp_path):
    summary = make_summary(tmp_path, Case(texts=2, rounds=1, seeds=1))
    assert summary.comparison["rtf"].value == pytest.approx(0.6, rel=0.05)
    assert summary.comparison["rtf"].verdict == "not measured"
    assert any("too few" in warning for warning in summary.warnings)
