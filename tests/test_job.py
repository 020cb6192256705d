"""The paired job, on a pipeline that costs nothing: order, equal work, failures, and nobody left behind."""

from __future__ import annotations

import json
import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import fakes
import orphans
import psutil
import pytest
import yaml

from harness import devices, job, stats
from harness.config import JobSpec
from harness.errors import UserError
from harness.locations import ROOT
from harness.results import NO_EVIDENCE, Measurement, RunFolder, Summary
from harness.side import SPIN_S
from harness.summarize import build_summary
from harness.worker import ChildError, Setup, Worker, _context, start_server
from harness.workload import Item, fit_voices

TEXTS = ("one day", "two cats and a dog", "three of us")
LONG_TEXTS = tuple(f"{text}, and so it went on, day after day" for text in TEXTS)
"""Of what takes a tenth of a second, a busy machine does not hide that it got faster."""
SEEDS = [1, 2]
MEASURE = {
    "offline_baseline_items": 2,
    "min_rounds": 2,
    "max_rounds": 2,
    "budget_s": 60,
    "warmup_calls": 1,
    "pinned_tokens": None,
    "tokens_per_character": 1.7,
    "load_limit_s": 60,
    "call_limit_s": 2,
}


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory):
    start_server()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "LOCKS", tmp_path_factory.mktemp("locks"))
        yield


def spec(
    toggles: dict | None = None,
    texts: tuple[str, ...] = TEXTS,
    name: str = "untrained",
    scenario: str = "single_stream",
    against: tuple[str, dict] = ("baseline", {}),
    **measure,
) -> JobSpec:
    """A job on the fake pipeline; it is untrained unless said otherwise, so that nothing needs scoring."""
    reference, reference_toggles = against
    config = {
        "combo": "combo",
        "against": reference,
        "against_optimizations": reference_toggles,
        "device": "cpu",
        "results_dir": str(Path.home()),
        "measure": MEASURE | measure,
        "optimizations": {plugin: {"enabled": True} | params for plugin, params in (toggles or {}).items()},
        "pipeline": {"name": name, "loader": "fakes.load", "checkpoint_dir": None, "seed": 0, "threads": 1},
        "plugin_modules": ["fakes"],
        "quality": {},
        "workload": {
            "name": "fake",
            "file": None,
            "texts": [{"id": f"t{i}", "text": text} for i, text in enumerate(texts)],
            "voices": ["rms"],
            "seeds": SEEDS,
            "cross": "round_robin",
            "scenario": scenario,
        },
    }
    return JobSpec("combo", toggles or {}, config, reference, reference_toggles)


def quiet(phase: str, done: int, total: int) -> None:
    pass


def run(tmp_path: Path, *args, **kwargs) -> tuple[Summary, RunFolder]:
    summary = job.run(spec(*args, **kwargs), tmp_path, quiet)
    return summary, RunFolder.open(tmp_path / summary.run_id)


def rows(folder: RunFolder, step: str) -> list[Measurement]:
    return [row for row in folder.measurements()[0] if row.pass_name == step]


def no_children() -> bool:
    """Whether none of those is left that the forkserver, a child of this process, has forked."""
    us = psutil.Process()
    return set(us.children(recursive=True)) == set(us.children())


# -- a job that goes well --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> tuple[Summary, RunFolder]:
    toggles = {"fake_fast": {"factor": 4.0}, "fake_idle": {}, "fake_elsewhere": {}, "fake_broken": {}}
    return run(tmp_path_factory.mktemp("good"), toggles, LONG_TEXTS)


def test_the_faster_variant_is_found_faster(good):
    found = good[0].comparison["rtf"]
    assert found.verdict == "faster"
    assert found.value == pytest.approx(0.25, abs=0.1)


def test_equal_work_in_pairs_whose_order_flips(good):
    speed = rows(good[1], "speed")
    assert len(speed) == 2 * 2 * len(TEXTS)
    for first, second in zip(speed[::2], speed[1::2], strict=True):
        assert first.pair == second.pair
        assert {first.variant, second.variant} == {"baseline", "combo"}
        assert (first.position, second.position) == (0, 1)
        assert first.n_tokens == second.n_tokens == first.pinned_tokens
    leaders = [row.variant for row in speed[::2]]
    assert all(one != other for one, other in pairwise(leaders[: len(TEXTS)]))
    assert leaders[: len(TEXTS)] != leaders[len(TEXTS) :]


def test_while_one_variant_speaks_the_other_is_idle(good):
    timed = [row for row in good[1].measurements()[0] if row.ok]
    for row, following in pairwise(timed):
        assert row.started_s + row.generation_time_s <= following.started_s


def test_first_and_warm_up_calls_are_kept_apart(good):
    assert [row.variant for row in rows(good[1], "first")] == ["baseline", "combo"]
    assert len(rows(good[1], "warmup")) == 2 * MEASURE["warmup_calls"]
    assert good[0].variants["baseline"].first_call_s > 0


def test_every_optimization_says_what_became_of_it(good):
    found = good[0].optimizations
    assert found["fake_fast"]["status"] == "active"
    assert found["fake_fast"]["evidence"]["variable"] == "set before loading"
    assert found["fake_idle"] == {
        "enabled": True,
        "status": "inactive",
        "reason": "it never does anything",
        "evidence": {"changes": []},
    }
    assert found["fake_elsewhere"]["status"] == "unavailable"
    assert found["fake_elsewhere"]["reason"] == "it needs another machine"
    assert found["fake_broken"]["status"] == "failed"
    assert "RuntimeError: the plugin broke" in found["fake_broken"]["reason"]
    assert found["kv_cache"]["status"] == "off"


def test_a_plugin_that_changed_nothing_is_inactive_whatever_it_says(tmp_path):
    found = run(tmp_path, {"fake_nothing": {}, "fake_short_lived": {}, "fake_fast": {}})[0].optimizations
    assert found["fake_nothing"]["status"] == found["fake_short_lived"]["status"] == "inactive"
    assert found["fake_nothing"]["reason"] == "it changed nothing in the pipeline"
    assert found["fake_short_lived"]["reason"] == "what it changed was put back or replaced: speed (2)"
    assert found["fake_nothing"]["evidence"] == {"boast": "a hundred times as fast", "changes": []}
    assert found["fake_fast"]["status"] == "active"
    assert found["fake_fast"]["evidence"]["changes"] == ["speed", "$FAKE_VARIABLE"]


@pytest.mark.slow
def test_a_variable_that_was_set_for_the_process_is_a_change(tmp_path):
    found = run(tmp_path / "set", {"fake_variable": {}})[0].optimizations["fake_variable"]
    assert (found["status"], found["evidence"]["changes"]) == ("active", ["$FAKE_OTHER"])
    found = run(tmp_path / "as_it_is", {"fake_variable": {"set_anew": False}})[0].optimizations["fake_variable"]
    assert (found["status"], found["evidence"]["changes"]) == ("inactive", [])


def test_a_plugin_that_broke_half_way_leaves_no_trace_in_the_pipeline(good):
    fast = [row.generation_time_s for row in rows(good[1], "speed") if row.variant == "combo"]
    assert min(fast) > 0.002, "the broken plugin's half-made change would make it faster still"


def test_the_job_accounts_for_all_of_its_time(good):
    timing = json.loads((good[1].path / "timing.json").read_text())
    parts = [timing[f"{part}_s"] for part in ("loading", "measured", "evidence", "scoring", "orchestration")]
    assert sum(parts) == pytest.approx(timing["job_s"])
    spoken = sum(row.parent_time_s for row in good[1].measurements()[0])
    assert timing["measured_s"] == pytest.approx(spoken)
    assert good[0].timing["orchestration_share"] == pytest.approx(timing["orchestration_share"])


def test_the_folder_tells_what_ran_where(good):
    folder = good[1].path
    job = yaml.safe_load((folder / "job.yaml").read_text())
    assert job["pipeline"]["loader"] == "fakes.load"
    assert "results_dir" not in job  # a folder of this machine
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["chatterbox-tts"] == "0.1.7"
    assert environment["device"]["name"].startswith("CPU")
    assert os.uname().nodename not in (folder / "environment.json").read_text()
    assert str(Path.home()) not in (folder / "environment.json").read_text()


def test_a_checkpoint_that_cannot_speak_has_no_quality_figures(good):
    summary, folder = good
    assert rows(folder, "quality") == []
    assert summary.variants["combo"].wer is None
    assert summary.comparison["wer"].verdict == "not measured"
    assert any("cannot speak" in warning for warning in summary.warnings)


def test_its_token_counts_follow_from_the_length_of_the_text(good):
    for row in rows(good[1], "speed"):
        assert row.pinned_tokens == pytest.approx(round(1.7 * len(row.text)), rel=0.1)


def test_whoever_hinders_the_other_process_has_failed(tmp_path):
    summary, _ = run(tmp_path, {"fake_hinders": {}}, TEXTS[:1])
    assert summary.variants["baseline"].status == "ok"
    assert "the process of baseline was hindered while the job went on" in summary.variants["combo"].error
    assert summary.comparison["rtf"].verdict == "not measured"


@pytest.mark.parametrize(("spin_s", "accused"), [(0.06, False), (SPIN_S, True)])
def test_threads_may_look_out_for_more_work_after_the_answer_but_not_for_long(tmp_path, monkeypatch, spin_s, accused):
    """For 40 ms, longer than any pool's do, so that they still do when a slow machine's answer has arrived."""
    monkeypatch.setattr("harness.side.SPIN_S", spin_s)
    summary, _ = run(tmp_path, {"fake_looks_out": {}}, TEXTS[:1], min_rounds=8, max_rounds=8)
    assert ("worked on after it had answered" in (summary.variants["combo"].error or "")) == accused


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system gives no process its cores")
@pytest.mark.parametrize("waits", [True, False])
def test_two_that_launch_a_gpus_work_do_so_from_one_core(tmp_path, monkeypatch, waits):
    monkeypatch.setattr("harness.pair.waits_for_its_host", lambda _device: waits)
    summary, _ = run(tmp_path, {"fake_looks_around": {}}, TEXTS[:1], min_rounds=3, max_rounds=3)
    assert summary.variants["combo"].error is None
    seen, everywhere = summary.optimizations["fake_looks_around"]["evidence"]["cores"], len(os.sched_getaffinity(0))
    first_and_warmup, timed = [everywhere] * 2, [1 if waits else everywhere] * 4  # the last one is repeated
    assert seen == first_and_warmup + timed


def test_nobody_is_left_behind(good):
    assert no_children()


@pytest.mark.slow
def test_a_checkpoint_that_speaks_gives_the_token_counts_itself(tmp_path, monkeypatch):
    scored: list[RunFolder] = []
    monkeypatch.setattr(job, "score_run", lambda folder, quality: scored.append(folder))
    _, folder = run(tmp_path, name="trained")
    quality = rows(folder, "quality")
    assert len(quality) == 2 * len(TEXTS) * len(SEEDS)
    assert all(row.pinned_tokens is None and row.eos for row in quality)
    assert all((folder.path / row.audio).is_file() for row in quality)
    assert {row.pinned_tokens for row in rows(folder, "speed")} <= set(range(23, 28))
    assert [one.path for one in scored] == [folder.path]


@pytest.mark.slow
def test_rounds_are_added_while_the_budget_lasts(tmp_path):
    for budget, expected in ((0.0, 2), (1e6, 4)):
        _, folder = run(tmp_path, max_rounds=4, budget_s=budget)
        assert len({row.round for row in rows(folder, "speed")}) == expected


def test_no_rounds_are_added_to_an_answer(tmp_path):
    """Four times as fast takes no 60 rounds to be seen."""
    asked = {"min_rounds": 6, "max_rounds": 60, "thresholds": {"rtf": 0.03}}
    _, folder = run(tmp_path, {"fake_fast": {}}, TEXTS[:1], **asked, detectable=0.05)
    assert 6 <= len({row.round for row in rows(folder, "speed")}) < 60


def test_a_number_pins_every_text(tmp_path):
    _, folder = run(tmp_path, pinned_tokens=7)
    assert {row.n_tokens for row in rows(folder, "speed")} == {7}


# -- all texts at once -------------------------------------------------------------------------------------------

SEVERAL = tuple(f"text {'very ' * i}long" for i in range(5))


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> tuple[Summary, RunFolder]:
    return run(tmp_path_factory.mktemp("offline"), {"fake_together": {}}, texts=SEVERAL, scenario="offline")


@pytest.mark.slow
def test_a_batch_is_one_call_and_the_baseline_speaks_a_part_of_it(offline):
    summary, folder = offline
    assert (summary.scenario, summary.status) == ("offline", "ok")
    speed = rows(folder, "speed")
    for name, size in (("baseline", 2), ("combo", 5)):
        own = [row for row in speed if row.variant == name]
        assert {row.batch_size for row in own} == {size}
        assert len(own) == size * 6, "as many rounds as an interval takes"
        assert all(row.n_tokens == row.pinned_tokens for row in own)
    assert any("combo speaks 5" in warning and "baseline speaks 2" in warning for warning in summary.warnings)


def test_the_time_of_a_batch_is_counted_once(offline):
    summary, folder = offline
    batch = [row for row in rows(folder, "speed") if row.variant == "combo" and row.round == 0]
    longest = max(row.n_tokens for row in batch) * 0.002
    assert sum(row.generation_time_s for row in batch) == pytest.approx(longest, abs=0.02)
    assert sum(row.parent_time_s for row in batch) == pytest.approx(longest, abs=0.03)
    assert sum(row.stages_s["generate_tokens"] for row in batch) == pytest.approx(longest)
    audio_s = sum(row.audio_s for row in batch)
    assert {round(row.generation_time_s / row.audio_s, 9) for row in batch} == {
        round(sum(row.generation_time_s for row in batch) / audio_s, 9)
    }
    combo, spoken = summary.variants["combo"], [row for row in rows(folder, "speed") if row.variant == "combo"]
    assert combo.rtf == pytest.approx(longest / audio_s, rel=0.2)
    decoding_s = sum(row.stages_s["generate_tokens"] for row in spoken)
    assert combo.tokens_per_s == pytest.approx(sum(row.n_tokens for row in spoken) / decoding_s)
    assert combo.generation_time_s == pytest.approx(longest / 5, rel=0.2)


def test_batches_are_compared_per_second_of_audio_call_by_call(offline):
    found = offline[0].comparison["rtf"]
    assert (found.verdict, found.n) == ("faster", 6)
    tokens = [round(1.7 * len(text)) for text in SEVERAL]
    assert found.value == pytest.approx(max(tokens) / sum(tokens), rel=0.2)


def test_first_and_warm_up_calls_are_one_utterance_also_offline(offline):
    assert [row.batch_size for row in rows(offline[1], "first")] == [1, 1]
    warmup = rows(offline[1], "warmup")
    assert [row.batch_size for row in warmup] == [1, 1, *[2] * 2, *[5] * 5]
    combo = [row.time_s for row in warmup if row.variant == "combo" and row.batch_size == 1]
    assert offline[0].variants["combo"].warmup_time_s == pytest.approx(sum(combo))


@pytest.mark.slow
def test_identical_code_offline_speaks_equal_parts(tmp_path):
    summary, folder = run(tmp_path, texts=SEVERAL, scenario="offline")
    assert {row.batch_size for row in rows(folder, "speed")} == {2}
    assert summary.comparison["rtf"].verdict == "no detectable change"


@pytest.mark.slow
def test_offline_clips_are_judged_where_both_spoke(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "score_run", lambda folder, quality: None)
    _, folder = run(tmp_path, {"fake_together": {}}, texts=SEVERAL, scenario="offline", name="trained")
    quality = rows(folder, "quality")
    assert len([row for row in quality if row.variant == "baseline"]) == 2 * len(SEEDS)
    assert len([row for row in quality if row.variant == "combo"]) == 5 * len(SEEDS)
    assert len({row.audio for row in quality}) == 7 * len(SEEDS)
    assert {row.pinned_tokens for row in rows(folder, "speed")} <= set(range(23, 28))


def test_a_batch_that_raises_fails_as_a_whole(tmp_path):
    texts = ("one day", "two cats", "raise it")
    summary, folder = run(tmp_path, {"fake_together": {}}, texts=texts, scenario="offline")
    failed = [row for row in rows(folder, "speed") if not row.ok]
    assert {(row.variant, row.batch_size) for row in failed} == {("combo", 3)}
    assert len(failed) == 3 * 6
    assert summary.variants["combo"].status == "failed"


# -- against another combo ---------------------------------------------------------------------------------------


def test_any_combo_can_be_the_reference(tmp_path):
    fast = {"fake_fast": {"factor": 4.0}}
    summary, folder = run(tmp_path, {}, against=("quick one", fast))
    assert (summary.against, summary.candidate) == ("quick one", "combo")
    assert summary.comparison["rtf"].verdict == "slower"
    assert summary.comparison["rtf"].value == pytest.approx(4.0, rel=0.3)
    assert summary.against_optimizations["fake_fast"]["status"] == "active"
    assert summary.optimizations["fake_fast"]["status"] == "off"
    assert {row.variant for row in folder.measurements()[0]} == {"quick one", "combo"}


@pytest.mark.slow
def test_a_reference_that_has_optimizations_speaks_all_of_a_batch(tmp_path):
    _, folder = run(
        tmp_path, {}, texts=SEVERAL, scenario="offline", against=("batched", {"fake_together": {}}), min_rounds=1
    )
    sizes = {row.variant: row.batch_size for row in rows(folder, "speed")}
    assert sizes == {"batched": 5, "combo": 2}


def test_what_the_reference_could_not_switch_on_is_said(tmp_path):
    summary, _ = run(tmp_path, {}, against=("odd", {"fake_elsewhere": {}}))
    assert any(w.startswith("odd: fake_elsewhere is enabled but unavailable") for w in summary.warnings)


# -- a job that goes wrong -------------------------------------------------------------------------------------


def test_a_child_that_dies_is_recorded_and_the_other_goes_on(tmp_path):
    summary, folder = run(tmp_path, {"fake_deadly": {}})
    assert summary.status == "failed"
    assert "SIGKILL" in summary.variants["combo"].error
    assert summary.variants["baseline"].status == "ok"
    speed = rows(folder, "speed")
    assert len([row for row in speed if row.variant == "baseline" and row.ok]) == 2 * len(TEXTS)
    assert [row.error for row in speed if not row.ok] == [summary.variants["combo"].error]
    assert no_children()


def test_a_child_that_hangs_is_ended_and_shows_where(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.worker.TRACE_MARGIN_S", 0.8)
    summary, folder = run(tmp_path, texts=("one day", "hang now"), call_limit_s=0.5)
    assert summary.status == "failed"
    hung = next(row for row in folder.measurements()[0] if not row.ok)
    assert hung.error.endswith("speak did not answer within 0.5 s and was ended")
    assert 'File "fakes.py"' in hung.error, "the stack says where it hung"
    assert str(ROOT) not in next((folder.path / "logs").glob("combo*")).read_text()
    assert no_children()


@pytest.mark.parametrize(
    ("text", "error"), [("raise it", "RuntimeError: the fake raised"), ("exhaust it", "MemoryError")]
)
def test_an_utterance_that_raises_fails_alone(tmp_path, text, error):
    summary, folder = run(tmp_path, texts=("one day", text))
    assert summary.status == "incomplete"
    failed = [row for row in rows(folder, "speed") if not row.ok]
    assert len(failed) == 4
    assert all(row.error.rstrip().endswith(error) and "Traceback" in row.error for row in failed)
    assert not any(str(ROOT) in row.error for row in failed)
    assert len([row for row in rows(folder, "speed") if row.ok]) == 4


@pytest.mark.parametrize(("name", "error"), [("crash", "SIGSEGV"), ("raise", "the fake cannot load")])
def test_a_pipeline_that_does_not_load_is_a_failed_job(tmp_path, name, error):
    summary, folder = run(tmp_path, name=name)
    assert summary.status == "failed"
    assert error in summary.variants["baseline"].error
    assert folder.measurements()[0] == []


def test_what_a_user_can_put_right_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="put it there"):
        run(tmp_path, name="missing")
    assert list(tmp_path.iterdir()) == []
    assert no_children()


def test_a_mistake_in_scoring_does_not_lose_the_measurements(tmp_path, monkeypatch):
    def no_recognizer(folder: RunFolder, quality: dict) -> None:
        raise UserError("quality.asr=whisper: it cannot be fetched")

    monkeypatch.setattr(job, "score_run", no_recognizer)
    with pytest.raises(UserError, match="whisper"):
        run(tmp_path, name="trained")
    (folder,) = tmp_path.iterdir()
    assert RunFolder.open(folder).summary().comparison["rtf"].verdict == "no detectable change"


def test_a_baseline_without_a_part_in_the_batch_is_refused(tmp_path):
    with pytest.raises(UserError, match="offline_baseline_items=0"):
        run(tmp_path, scenario="offline", offline_baseline_items=0)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_voice_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.wav.*kal16, rms"):
        fit_voices([Item("t0", "one day", "nowhere.wav")], ["kal16", "rms"])


def test_a_checkpoint_with_one_voice_speaks_them_all_and_says_so():
    items = [Item("t0", "one day", "rms"), Item("t1", "two cats", "kal16")]
    fitted, warnings = fit_voices(items, ["default"])
    assert [item.voice for item in fitted] == ["default", "default"]
    assert len(warnings) == 2


def test_ctrl_c_keeps_what_was_measured_and_ends_the_children(tmp_path):
    def interrupt(phase: str, done: int, total: int) -> None:
        if phase.startswith("speed") and done > 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.run(spec(), tmp_path, interrupt)
    (folder,) = tmp_path.iterdir()
    summary = RunFolder.open(folder).summary()
    assert summary.status == "incomplete", [one.error for one in summary.variants.values()]
    assert len(RunFolder.open(folder).measurements()[0]) == 7
    assert no_children()


def test_a_run_that_was_killed_before_its_evidence_is_credited_with_nothing(tmp_path):
    _, folder = run(tmp_path, {"fake_fast": {"factor": 3.0}})
    for name in ("summary.json", "optimizations.json", "children.json", "timing.json"):
        (folder.path / name).unlink()
    summary = build_summary(folder)
    assert summary.status == "incomplete"
    assert summary.optimizations["fake_fast"]["reason"] == NO_EVIDENCE
    assert summary.comparison["rtf"].value < 1
    assert summary.comparison["rtf"].verdict == stats.NOT_MEASURED


def test_an_interruption_before_the_speed_pass_is_no_failure(tmp_path):
    def interrupt(phase: str, done: int, total: int) -> None:
        if phase.startswith("warmup"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.run(spec(), tmp_path, interrupt)
    (folder,) = tmp_path.iterdir()
    summary = RunFolder.open(folder).summary()
    assert summary.status == "incomplete", [one.error for one in summary.variants.values()]


def test_a_child_does_not_outlive_its_parent(tmp_path):
    context = _context()
    ours, theirs = context.Pipe()
    parent = context.Process(target=orphans.start_a_hanging_child_and_die, args=(tmp_path, theirs))
    parent.start()
    theirs.close()
    orphan = psutil.Process(ours.recv())
    parent.join()
    assert parent.exitcode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while _runs(orphan) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(orphan)


def _runs(process: psutil.Process) -> bool:
    """A zombie has ended; whether somebody reaps it is the system's affair."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


# -- the two ends of the pipe ----------------------------------------------------------------------------------


def test_a_dead_worker_is_not_asked_again(tmp_path):
    worker = Worker(Setup("once", tmp_path, "fakes.load", {"name": "crash"}, "cpu"))
    with pytest.raises(ChildError, match="the process died in load: SIGSEGV"):
        worker.ask("load", limit_s=60)
    with pytest.raises(ChildError, match="not attempted"):
        worker.ask("load", limit_s=60)
    worker.stop()


def test_a_loader_that_cannot_be_imported_is_named(tmp_path):
    worker = Worker(Setup("lost", tmp_path, "nowhere.load", {}, "cpu"))
    with pytest.raises(UserError, match=r"nowhere\.load"):
        worker.ask("load", limit_s=60)
    worker.stop()


def test_what_a_child_prints_stays_off_the_terminal(tmp_path, capfd):
    worker = Worker(Setup("noisy", tmp_path, "fakes.load_noisily", {}, "cpu"))
    worker.ask("load", limit_s=60)
    worker.stop()
    assert "noise" in (tmp_path / "logs" / "noisy.log").read_text()
    assert "noise" not in "".join(capfd.readouterr())


def test_a_log_names_no_folder_of_the_machine(tmp_path):
    worker = Worker(Setup("noisy", tmp_path, "fakes.load_noisily", {}, "cpu"))
    worker.ask("load", limit_s=60)
    worker.stop()
    log = (tmp_path / "logs" / "noisy.log").read_text()
    assert "\ntorch/__init__.py:7: FutureWarning: noise of a package\n" in log
    assert "noise about configs/config.yaml\n" in log  # by a logger that has kept its stream since it was imported
    assert f"noise about ~/clips/me.wav and /nowhere{fakes.__file__}\n" in log  # the latter below no folder of those


# -- streams -------------------------------------------------------------------------------------------------------


def test_first_audio_is_paired_and_by_the_parents_clock(tmp_path):
    summary, folder = run(tmp_path, {"fake_stream": {}}, scenario="streaming")
    assert summary.status == "ok", [variant.error for variant in summary.variants.values()]
    found = summary.comparison["first_audio_s"]
    assert found.verdict == "faster"
    assert 0.1 < found.value < 0.7  # a fifth, and what every answer takes
    assert summary.comparison["generation_time_s"].value == pytest.approx(1, abs=0.5)
    baseline, combo = (summary.variants[name].streaming for name in ("baseline", "combo"))
    assert (baseline["chunks_mean"], baseline["gap_p50_s"]) == (1, None)
    assert combo["continuous_share"] == baseline["continuous_share"] == 1
    assert combo["first_audio_p50_s"] <= combo["first_audio_p99_s"] < baseline["first_audio_p50_s"]
    for row in rows(folder, "speed"):
        ready = [ready_s for ready_s, _ in row.chunks]
        assert ready == sorted(ready)
        assert ready[-1] <= row.time_s
        assert sum(audio_s for _, audio_s in row.chunks) == pytest.approx(row.audio_s)


def test_chunks_that_are_not_the_utterance_fail_the_variant(tmp_path):
    summary, _ = run(tmp_path, {"fake_stream": {"dishonest": True}}, scenario="streaming", min_rounds=1, max_rounds=1)
    assert summary.variants["combo"].status == "failed"
    assert "what came in chunks is not the utterance" in summary.variants["combo"].error


def test_a_stream_that_failed_counts_against(tmp_path):
    texts = ("one day", "raise it")
    summary, _ = run(tmp_path, {"fake_stream": {}}, texts=texts, scenario="streaming", min_rounds=1, max_rounds=1)
    found = summary.variants["combo"].streaming
    assert found["streams"] == 2
    assert found["continuous_share"] == 0.5
    assert found["first_audio_p99_s"] is None
    assert found["preroll_s"] is None


# -- under load ----------------------------------------------------------------------------------------------------

FEW_USERS = {
    "users": [1, 4],
    "requests_per_user": 2,
    "users_limit_s": 20,
    "first_audio_limit_s": 0.06,
    "min_rounds": 1,
    "max_rounds": 1,
}


def levels_of(summary, variant, how):
    return {one["size"]: one for one in summary.variants[variant].loaded["levels"] if one["load"] == how}


@pytest.mark.slow
def test_who_serves_all_at_a_time_keeps_more_callers(tmp_path):
    """A text takes 50 ms here; of four callers the last waits for four of them, or, together, for a chunk."""
    summary, folder = run(tmp_path, {"fake_share": {}}, scenario="loaded", **FEW_USERS)
    assert summary.status == "ok", [variant.error for variant in summary.variants.values()]
    baseline, combo = (summary.variants[name].loaded for name in ("baseline", "combo"))
    assert baseline["streams_closed"] <= 1
    assert combo["streams_closed"] == combo["streams_open"] == combo["streams"] == 4
    kept = levels_of(summary, "combo", "closed")
    assert kept[4]["first_p50_s"] <= kept[4]["first_p99_s"] < 0.06
    assert kept[4]["n"] == 8
    assert kept[4]["continuous_share"] == 1
    visits = [row for row in rows(folder, "load") if row.variant == "combo"]
    assert {(row.load, row.load_size) for row in visits} == {("closed", 1), ("closed", 4), ("open", 1), ("open", 4)}
    for row in visits:
        assert row.n_tokens == row.pinned_tokens
        assert sum(audio_s for _, audio_s in row.chunks) == pytest.approx(row.audio_s)
        assert [ready_s for ready_s, _ in row.chunks] == sorted(ready_s for ready_s, _ in row.chunks)
    both = {name: [r.work for r in rows(folder, "load") if r.variant == name] for name in ("baseline", "combo")}
    assert set(both["baseline"]) <= set(both["combo"]), "both are asked the same"


@pytest.mark.slow
def test_who_says_less_under_load_has_not_answered(tmp_path):
    summary, folder = run(tmp_path, {"fake_share": {"short": True}}, scenario="loaded", **FEW_USERS)
    assert summary.variants["combo"].loaded["streams"] == 0
    assert levels_of(summary, "combo", "closed")[1]["first_p50_s"] is None
    visits = [row for row in rows(folder, "load") if row.variant == "combo"]
    assert visits
    assert not any(row.ok for row in visits)
    assert any("had no whole answer" in warning for warning in summary.warnings)


def test_what_is_not_answered_in_time_counts_against(tmp_path):
    few = FEW_USERS | {"users_limit_s": 0.12, "users": [8], "first_audio_limit_s": 100}
    summary, folder = run(tmp_path, {"fake_share": {}}, scenario="loaded", **few)
    level = levels_of(summary, "baseline", "closed")[8]
    assert level["n"] == 16
    assert level["first_p99_s"] is None
    assert not level["kept"]
    lost = [row for row in rows(folder, "load") if row.variant == "baseline" and not row.ok]
    assert "not answered to its end in time" in lost[0].error


def test_a_process_that_dies_under_load_has_answered_nothing(tmp_path):
    texts = ("one day", "crash it")
    summary, _ = run(tmp_path, {"fake_share": {}}, texts=texts, scenario="loaded", **FEW_USERS)
    assert summary.variants["combo"].status == "failed"
    assert summary.variants["combo"].loaded.get("streams", 0) == 0
