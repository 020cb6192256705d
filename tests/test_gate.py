"""The gate: stops what got worse, passes what did not, and never passes what nobody knows."""

import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from factories import Case, Effect, make_run
from hypothesis import given
from hypothesis import strategies as st

from harness import gate
from harness.__main__ import main
from harness.errors import UserError
from harness.gate import decide, outputs
from harness.gate.limits import Rules, parse_limit, parse_limits, read_rules, rules_from
from harness.results import BASELINE, RunFolder
from harness.summarize import build_summary

PASSED, REGRESSION, BAD_INPUT, UNKNOWN = 0, 1, 2, 3
CPU_ONLY = {"device": {"type": "cpu"}, "cpu": {"model": "Test CPU", "cores": 2, "features": ["avx2"]}}


def rules(*limits, **others) -> Rules:
    return Rules(parse_limits(limits or ("rtf:5%",)), **others)


def judge(run: RunFolder, *limits, reference: RunFolder | None = None, **others):
    """Outcome by subject, and the exit code."""
    measured = decide.read(run)
    held_against = decide.read(reference) if reference else None
    findings = decide.check(measured, rules(*limits, **others), held_against)
    code = outputs.exit_code([outputs.Judgement(measured, held_against, findings, "")])
    return {finding.subject: finding.outcome for finding in findings}, code


def rewritten(run: RunFolder, **files) -> RunFolder:
    """The run with other side files, sealed again."""
    for name, content in files.items():
        run.write_json(f"{name}.json", content)
    run.write_summary(build_summary(run))
    return run


# -- the grammar ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "metric", "amount"),
    [
        ("rtf:5%", "rtf", 0.05),
        ("rtf:+2.5%", "rtf", 0.025),
        ("wer:+0.02", "wer", 0.02),
        ("wer:0.02", "wer", 0.02),
        ("sim_resemblyzer:-0.1", "sim_resemblyzer", 0.1),
        ("sim_*:0.02", "sim_*", 0.02),
        ("vram:5%", "peak_memory_mb", 0.05),
        ("rss:10%", "peak_memory_mb", 0.1),
        ("peak_memory_mb:5%", "peak_memory_mb", 0.05),
    ],
)
def test_the_grammar(text, metric, amount):
    limit = parse_limit(text)
    assert limit.metric == metric
    assert limit.amount == pytest.approx(amount)


@pytest.mark.parametrize(
    "text",
    ["rtf", "rtf:5", "rtf:-5%", "wer:5%", "wer:-0.02", "speed:5%", "rtf:five%", "sim_resemblyzer:+0.1", "", "*:5%",
     "rtf:nan%", "rtf:inf%", "rtf:-inf%", "wer:nan", "wer:1e999", f"rtf:{'9' * 400}%", "watermark:1", "rtf:5%\nwer:1"],
)  # fmt: skip
def test_anything_else_is_bad_input_and_shows_the_way_out(text):
    with pytest.raises(UserError, match="gate limit"):
        parse_limit(text)


@given(st.text(max_size=12).map(lambda text: f"rtf:{text}"))
def test_whatever_is_written_behind_a_metric_a_limit_is_a_finite_amount_or_bad_input(text):
    try:
        limit = parse_limit(text)
    except UserError:
        return
    assert 0 <= limit.amount < float("inf")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"limits": []}, "no limits"),
        ({}, "no limits"),
        ({"limits": "rtf:5%"}, "list"),
        ({"limits": [5]}, "list"),
        ({"limits": ["rtf:5%", "rtf:50%"]}, "two gate limits"),
        ({"limits": ["rtf:5%"], "elsewhere": ["wer:0.5"]}, "elsewhere"),
        ({"limits": ["rtf:5%"], "budget_s": float("nan")}, "budget_s"),
        ({"limits": ["rtf:5%"], "budget_s": float("inf")}, "budget_s"),
        ({"limits": ["rtf:5%"], "retries": -1}, "retries"),
        ({"limits": ["rtf:5%"], "limit": ["wer:1"]}, "limits"),
    ],
)
def test_rules_that_make_no_sense_are_bad_input(settings, word):
    with pytest.raises(UserError, match=word):
        rules_from(settings)


def test_a_file_that_holds_no_rules_is_bad_input(tmp_path):
    for content in ("", "- rtf:5%", "{", "limits: .nan"):
        (tmp_path / "rules.yaml").write_text(content)
        with pytest.raises(UserError):
            read_rules(tmp_path / "rules.yaml")
    with pytest.raises(UserError, match=r"missing\.yaml"):
        read_rules(tmp_path / "missing.yaml")


# -- intervals decide ----------------------------------------------------------------------------------------------


@given(
    low=st.floats(0.5, 1.5),
    width=st.floats(0, 0.5),
    bound=st.floats(1.0, 1.4),
)
def test_only_a_whole_interval_decides(low, width, bound):
    metric = decide.stats.METRICS["rtf"]
    found = decide.outcome((low, low + width), bound, metric)
    assert (found == "passed") == (low + width <= bound)
    assert (found == "regression") == (low > bound)
    mirrored = decide.outcome((-low - width, -low), -bound, decide.stats.SIMILARITY)
    assert mirrored == found


def test_a_faster_combo_passes_and_a_slower_one_does_not(tmp_path):
    fast = make_run(tmp_path, Case(effect=Effect(time=0.6)))
    slow = make_run(tmp_path, Case(effect=Effect(time=1.2)))
    assert judge(fast, "rtf:5%", "wer:+0.02")[1] == PASSED
    assert judge(slow, "rtf:5%")[1] == REGRESSION
    assert judge(slow, "rtf:30%")[1] == PASSED


def test_worse_quality_is_a_regression(tmp_path):
    worse = make_run(tmp_path, Case(effect=Effect(time=0.5, wer=0.1, similarity=-0.1)))
    found, code = judge(worse, "wer:+0.02", "sim_*:-0.02")
    assert (found["wer"], found["sim_resemblyzer"], code) == ("regression", "regression", REGRESSION)


@pytest.mark.parametrize("limit", ["rtf:1%", "rtf:9%"])
def test_an_interval_across_the_limit_is_undecided_and_does_not_pass(tmp_path, limit):
    noisy = make_run(tmp_path, Case(effect=Effect(time=1.06), noise=0.3, seed=4))
    change = noisy.summary().comparison["rtf"]
    bound = parse_limit(limit).amount + 1
    assert change.low < bound < change.high  # what the test is about: the estimate is beyond it, or within
    assert judge(noisy, limit) == ({"evidence": "passed", "rtf": "undecided"}, UNKNOWN)


def test_undecided_passes_for_whoever_wants_it(tmp_path):
    noisy = make_run(tmp_path, Case(effect=Effect(time=1.06), noise=0.3, seed=4))
    command = ["gate", str(noisy.path), "--limit", "rtf:9%"]
    assert main(command) == UNKNOWN
    assert main([*command, "--undecided", "pass"]) == PASSED
    assert main([*command[:-1], "rtf:1%", "--undecided=pass"]) == PASSED
    slow = make_run(tmp_path, Case(effect=Effect(time=1.3)))
    assert main(["gate", str(slow.path), "--limit", "rtf:5%", "--undecided=pass"]) == REGRESSION


# -- it fails closed -----------------------------------------------------------------------------------------------


def test_missing_figures_do_not_pass(tmp_path):
    unscored = make_run(tmp_path, Case(scored=False))
    assert judge(unscored, "wer:+0.02")[0]["wer"] == "not measured"
    assert judge(unscored, "sim_*:0.02")[0]["sim_*"] == "not measured"
    assert judge(unscored, "sim_resemblyzer:0.02")[0]["sim_resemblyzer"] == "not measured"
    assert judge(unscored, "rtf:5%")[1] == UNKNOWN  # the run is incomplete


def test_what_a_combo_did_while_it_was_timed_is_a_regression_and_an_error_of_its_process_is_none(tmp_path):
    short = make_run(tmp_path, Case(effect=Effect(audio=0.9)))
    assert judge(short, "rtf:5%") == ({"run": "regression", "evidence": "passed", "rtf": "not measured"}, REGRESSION)
    summary = short.summary()
    summary.variants[summary.candidate].exposed = False  # as that of a process that broke down
    (finding, *_) = decide.check(decide.Measured(summary), Rules(tuple(parse_limits(["rtf:5%"]))))
    assert finding.outcome == "not measured"


def test_a_similarity_that_was_not_measured_does_not_pass_beside_one_that_was(tmp_path):
    run = make_run(tmp_path, Case())
    assert judge(run, "sim_*:0.02", "sim_wavlm:0.02")[0]["sim_wavlm"] == "not measured"


def test_a_regression_outranks_a_gap(tmp_path):
    slow = make_run(tmp_path, Case(effect=Effect(time=1.5), scored=False))
    assert judge(slow, "rtf:5%", "wer:+0.02")[1] == REGRESSION


def test_an_edited_run_is_not_judged(tmp_path):
    run = make_run(tmp_path, Case(effect=Effect(time=1.5)))
    rows = run.utterances_file.read_text()
    run.utterances_file.write_text(rows.replace('"generation_time_s": 1.', '"generation_time_s": 0.'))
    found, code = judge(run, "rtf:5%")
    assert (found["rtf"], code) == ("not measured", UNKNOWN)


@pytest.mark.parametrize("status", ["inactive", "failed", "not built", "unavailable"])
def test_an_optimization_that_should_be_active_and_is_not(tmp_path, status):
    run = make_run(tmp_path, Case(statuses={"inference_mode": (status, "it could not")}))
    found, code = judge(run, "rtf:5%")
    assert (found["evidence"], code) == ("regression", REGRESSION)


def test_what_this_kind_of_device_cannot_have_may_be_unavailable_but_not_inactive(tmp_path):
    allowed = {"cpu": frozenset(["inference_mode"]), "cuda": frozenset()}
    for status, memory_kind, code in (("unavailable", "rss", 0), ("unavailable", "vram", 1), ("inactive", "rss", 1)):
        case = Case(statuses={"inference_mode": (status, "no")}, memory_kind=memory_kind)
        assert judge(make_run(tmp_path, case), "rtf:5%", unavailable=allowed)[1] == code


def test_what_the_reference_had_has_to_be_active(tmp_path):
    reference = make_run(tmp_path, Case())
    without = make_run(tmp_path, Case(enabled=("kv_cache",)))
    assert judge(without, "rtf:50%")[1] == PASSED
    assert judge(without, "rtf:50%", reference=reference)[0]["evidence"] == "regression"
    unavailable = Case(statuses={"inference_mode": ("unavailable", "no")})
    neither = make_run(tmp_path, unavailable), make_run(tmp_path, unavailable)
    assert judge(neither[0], "rtf:50%", reference=neither[1])[1] == PASSED


def test_the_rules_do_not_excuse_what_this_very_device_had(tmp_path):
    environment = {**CPU_ONLY, "git": {"commit": "0123456789ab", "dirty": False}}
    allowed = {"cpu": frozenset(["inference_mode"])}
    reference = rewritten(make_run(tmp_path, Case()), environment=environment)
    lost = make_run(tmp_path, Case(statuses={"inference_mode": ("unavailable", "no")}))
    assert judge(lost, "rtf:50%", reference=reference, unavailable=allowed)[1] == PASSED  # another device
    lost = rewritten(lost, environment=environment)
    assert judge(lost, "rtf:50%", reference=reference, unavailable=allowed)[0]["evidence"] == "regression"


def with_scores(run: RunFolder, change) -> RunFolder:
    """The run with other scores, sealed again."""
    scores = [change(score) for score in run.scores()[0]]
    run.scores_file.write_text("".join(json.dumps(score.to_row()) + "\n" for score in scores))
    run.write_summary(build_summary(run))
    return run


def marked(lost: str = "", confidence: float = 0.0):
    """Every clip marked, but for the first text's of the variant `lost`."""

    def change(score):
        gone = score.variant == lost and score.text_id == "t0"
        return replace(score, watermark=confidence if gone else 0.99)

    return change


def test_a_lost_watermark_is_a_regression_whatever_the_limits_say(tmp_path):
    run = make_run(tmp_path, Case())
    assert judge(with_scores(run, marked()), "watermark")[1] == PASSED
    assert judge(with_scores(run, marked(lost=BASELINE)), "watermark")[1] == PASSED
    for limits in (["watermark"], ["rtf:5%"]):
        found, code = judge(with_scores(run, marked(lost="production")), *limits)
        assert (found["watermark"], code) == ("regression", REGRESSION)
    assert judge(with_scores(run, marked("production", 0.51)), "watermark")[1] == PASSED


def test_a_watermark_that_nobody_asked_for_does_not_pass(tmp_path):
    run = make_run(tmp_path, Case())
    assert judge(run, "rtf:5%")[1] == PASSED
    assert judge(run, "watermark") == ({"evidence": "passed", "watermark": "not measured"}, UNKNOWN)
    nobody = with_scores(run, lambda score: replace(score, watermark=0.1))
    assert judge(nobody, "watermark")[1] == UNKNOWN  # the baseline has none either: nothing to lose, nothing kept
    some = with_scores(run, lambda score: replace(score, watermark=None if score.text_id == "t0" else 0.99))
    assert judge(some, "watermark")[1] == UNKNOWN  # of both sides alike, so nothing was lost
    assert judge(make_run(tmp_path, Case(scored=False)), "watermark")[0]["watermark"] == "not measured"


def test_clips_that_only_the_combo_leaves_broken(tmp_path):
    run = make_run(tmp_path, Case())

    def silent(variants):
        return lambda score: replace(score, missing=score.variant in variants and score.text_id == "t0")

    assert judge(with_scores(run, silent(["production"])), "rtf:5%")[0]["clips"] == "regression"
    assert judge(with_scores(run, silent(["production", BASELINE])), "rtf:5%")[1] == PASSED


# -- memory by its kind --------------------------------------------------------------------------------------------


def test_memory_is_held_to_the_limit_of_its_kind(tmp_path):
    grown = make_run(tmp_path, Case(effect=Effect(time=1, memory=1.07), memory_kind="vram"))
    assert judge(grown, "vram:5%", "rss:20%")[0]["vram"] == "regression"
    assert judge(grown, "vram:10%", "rss:1%") == ({"evidence": "passed", "vram": "passed"}, PASSED)
    assert judge(grown, "rss:20%") == ({"evidence": "passed", "rss": "not measured"}, UNKNOWN)


# -- against a reference -------------------------------------------------------------------------------------------


def test_against_a_reference_the_ratios_are_compared(tmp_path):
    reference = make_run(tmp_path, Case(effect=Effect(time=0.5), device="another machine"))
    lost = make_run(tmp_path, Case(effect=Effect(time=0.6)))
    assert judge(lost, "rtf:5%")[1] == PASSED  # still faster than its baseline
    assert judge(lost, "rtf:5%", reference=reference)[1] == REGRESSION
    assert judge(lost, "rtf:30%", reference=reference)[1] == PASSED


def test_a_reference_of_another_device_has_limits_of_its_own(tmp_path):
    reference = make_run(tmp_path, Case(effect=Effect(time=0.5)))
    run = make_run(tmp_path, Case(effect=Effect(time=0.6)))
    wider = {"elsewhere": parse_limits(["rtf:30%"])}
    for environment, code in (({}, PASSED), (CPU_ONLY, REGRESSION)):  # two that say nothing are not the same
        for folder in (reference, run):
            rewritten(folder, environment=environment)
        assert judge(run, "rtf:5%", reference=reference, **wider)[1] == code
    newer = {**CPU_ONLY, "cpu": {**CPU_ONLY["cpu"], "features": ["avx2", "avx512f"]}}
    assert judge(run, "rtf:5%", reference=rewritten(reference, environment=newer), **wider)[1] == PASSED


def test_a_reference_without_the_figure_does_not_let_it_pass(tmp_path):
    run = make_run(tmp_path, Case())
    reference = make_run(tmp_path, Case(scored=False, unmeasured="the judges were out"))
    assert reference.summary().status == "ok"
    assert judge(run, "wer:0.02", reference=reference)[0]["wer"] == "not measured"
    assert judge(reference, "sim_*:0.02", reference=run)[0]["sim_resemblyzer"] == "not measured"


@pytest.mark.parametrize("changes", [{"combo": "campaign"}, {"pipeline": "random"}, {"scored": False}])
def test_a_reference_of_another_experiment_or_in_doubt_is_refused(tmp_path, changes):
    run, other = make_run(tmp_path, Case()), make_run(tmp_path, Case(**changes))
    with pytest.raises(UserError, match="reference"):
        judge(run, "rtf:5%", reference=other)


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_rules_come_from_the_file_else_the_run_else_the_default(tmp_path):
    run = make_run(tmp_path, Case(effect=Effect(time=1.3)))
    strict, loose = tmp_path / "strict.yaml", tmp_path / "loose.yaml"
    strict.write_text("limits: [rtf:5%]")
    loose.write_text("limits: [rtf:50%]")
    assert main(["gate", str(run.path)]) == REGRESSION  # configs/gate/default.yaml
    run.write_job({**run.job(), "gate": {"name": "own", "limits": ["rtf:60%"]}})
    rewritten(run)
    assert main(["gate", str(run.path)]) == PASSED
    assert main(["gate", str(run.path), "--config", str(strict)]) == REGRESSION
    assert main(["gate", str(run.path), "--config", str(loose)]) == PASSED
    assert main(["gate", str(run.path), "--config", str(loose), "--limit", "rtf:5%"]) == REGRESSION
    assert main(["gate", str(run.path), "--config", str(tmp_path / "none.yaml")]) == BAD_INPUT
    assert main(["gate", str(run.path), "--limit", "rtf:five"]) == BAD_INPUT
    assert main(["gate", str(tmp_path / "nothing")]) == BAD_INPUT


def test_several_runs_end_as_the_worst_of_them(tmp_path):
    fast = make_run(tmp_path / "runs", Case(effect=Effect(time=0.5)))
    noisy = make_run(tmp_path / "runs", Case(effect=Effect(time=1.06), noise=0.3, seed=4), minute=1)
    limits = ["--limit", "rtf:9%"]
    assert main(["gate", str(fast.path), *limits]) == PASSED
    assert main(["gate", str(tmp_path / "runs"), *limits]) == UNKNOWN
    slow = make_run(tmp_path / "runs", Case(effect=Effect(time=1.5)), minute=2)
    assert main(["gate", str(fast.path), str(noisy.path), str(slow.path), *limits]) == REGRESSION


def test_the_same_is_told_to_everyone(tmp_path, capsys, monkeypatch):
    reference = make_run(tmp_path, Case(effect=Effect(time=0.5)))
    slow = make_run(tmp_path, Case(effect=Effect(time=0.6)), minute=1)
    step_summary, junit = tmp_path / "summary.md", tmp_path / "out" / "gate.xml"
    step_summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(step_summary))
    command = ["gate", str(slow.path), "--reference", str(reference.path), "--limit", "rtf:5%", "--junit", str(junit)]
    assert main(command) == REGRESSION
    terminal = capsys.readouterr().out
    assert main([*command, "--json"]) == REGRESSION
    record = json.loads(capsys.readouterr().out)  # one line, and nothing else

    (run,) = record["runs"]
    (finding,) = [finding for finding in run["findings"] if finding["subject"] == "rtf"]
    assert record["exit_code"] == REGRESSION
    assert finding["outcome"] == "regression"
    assert finding["change"]["low"] > finding["bound"] == pytest.approx(1.05)
    suite = ET.parse(junit).getroot().find("testsuite")
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", "1", "0")
    failure = suite.find("testcase/failure")
    markdown = step_summary.read_text()
    assert markdown.startswith("before\n")
    for told in (terminal, markdown, failure.get("message") + failure.text):
        assert "rtf" in told
        assert f"{finding['change']['low']:.3f} to {finding['change']['high']:.3f}" in told
        assert "rtf:5%" in told
        assert "commit 0123456789ab" in told
        assert "run_sweep.py +combo=production" in told
        assert f"--reference {reference.path}" in told


def test_what_nobody_knows_is_an_error_to_junit(tmp_path):
    noisy = make_run(tmp_path, Case(effect=Effect(time=1.06), noise=0.3, seed=4))
    junit = tmp_path / "gate.xml"
    command = ["gate", str(noisy.path), "--limit", "rtf:9%", "--junit", str(junit)]
    main(command)
    assert ET.parse(junit).find("testsuite").get("errors") == "1"
    main([*command, "--undecided=pass"])
    assert ET.parse(junit).find("testsuite").get("skipped") == "1"


def test_a_reason_with_anything_in_it_still_makes_valid_files(tmp_path, capsys):
    ugly = "Traceback:\x1b[31m <b> & | \x00 \n next line"
    run = make_run(tmp_path, Case(statuses={"inference_mode": ("failed", ugly)}))
    junit = tmp_path / "gate.xml"
    assert main(["gate", str(run.path), "--limit", "rtf:5%", "--junit", str(junit), "--json"]) == REGRESSION
    assert len(capsys.readouterr().out.splitlines()) == 1
    ET.parse(junit)


# -- accepting a reference -----------------------------------------------------------------------------------------


@pytest.fixture
def accept(tmp_path):
    """`python -m harness accept` into a folder of its own; gives the exit code."""
    return lambda run, reason="because": main(
        ["accept", str(run.path), "--reason", reason, "--references", str(tmp_path / "reference")]
    )


def test_an_accepted_run_is_found_as_the_reference_of_its_experiment(tmp_path, accept):
    references = tmp_path / "reference"
    for combo, time in (("production", 0.5), ("campaign", 0.9)):
        run = make_run(tmp_path / "results", Case(combo=combo, effect=Effect(time=time)))
        assert accept(rewritten(run, environment=CPU_ONLY)) == PASSED
    names = sorted(path.name for path in (references / "cpu-test-avx2").iterdir())
    assert names == ["campaign-mini", "production-mini"]
    new = make_run(tmp_path / "results", Case(effect=Effect(time=0.6)), minute=3)
    command = ["gate", str(new.path), "--limit", "rtf:5%", "--reference", str(references)]
    assert main(command) == REGRESSION
    other = make_run(tmp_path / "results", Case(combo="min_vram"), minute=4)
    assert main(["gate", str(other.path), "--reference", str(references)]) == BAD_INPUT


def test_the_reference_of_the_same_device_is_preferred(tmp_path, accept):
    gpu = {"device": {"name": "NVIDIA H200", "type": "cuda", "memory_mb": 150000}}
    for environment, time in ((CPU_ONLY, 0.5), (gpu, 0.9)):
        run = make_run(tmp_path / "results", Case(effect=Effect(time=time)))
        accept(rewritten(run, environment=environment))
    assert (tmp_path / "reference" / "h200" / "production-mini").is_dir()
    run = rewritten(make_run(tmp_path / "results", Case(effect=Effect(time=0.6)), minute=3), environment=CPU_ONLY)
    command = ["gate", str(run.path), "--limit", "rtf:5%", "--reference", str(tmp_path / "reference")]
    assert main(command) == REGRESSION
    assert main(["gate", str(rewritten(run, environment=gpu).path), *command[2:]]) == PASSED


def test_the_old_reference_is_kept_and_the_history_says_why(tmp_path, accept):
    cases = [Case(effect=Effect(time=time)) for time in (0.6, 0.5)]
    runs = [make_run(tmp_path / "results", case, minute=minute) for minute, case in enumerate(cases)]
    clip = runs[1].path / "audio" / "clip.wav"
    clip.parent.mkdir()
    clip.write_bytes(b"RIFF")
    rewritten(runs[1])
    assert accept(runs[0], "the first") == accept(runs[1], "faster kernels") == PASSED
    (place,) = [path.parent for path in (tmp_path / "reference").rglob("history.jsonl")]
    history = [json.loads(line) for line in (place / "history.jsonl").read_text().splitlines()]
    assert [entry["reason"] for entry in history] == ["the first", "faster kernels"]
    assert [entry["run_id"] for entry in history] == [run.run_id for run in runs]
    assert all(entry["commit"] == "0123456789ab" and entry["accepted"] for entry in history)
    assert RunFolder.open(place).summary().run_id == runs[1].run_id
    assert RunFolder.open(place).summary().status == "ok"  # its hashes hold, though its clips were left behind
    assert not (place / "audio").exists()
    assert RunFolder.open(place / "earlier" / runs[0].run_id).summary().status == "ok"
    assert [folder.path for folder in gate.references.find_runs([tmp_path / "reference"])] == [place]


def test_experiments_of_one_combo_do_not_replace_each_other(tmp_path, accept):
    run = make_run(tmp_path / "results", Case())
    accept(run)
    run.write_job({**run.job(), "workload": {"name": "standard", "seeds": [1, 2, 3]}})
    assert accept(rewritten(run)) == PASSED
    names = sorted(path.parent.name for path in (tmp_path / "reference").rglob("history.jsonl"))
    assert names == ["production-mini", "production-mini-standard"]


def test_a_run_in_doubt_and_an_empty_reason_are_refused(tmp_path, accept):
    edited = make_run(tmp_path, Case())
    edited.scores_file.write_text(edited.scores_file.read_text().replace('"wer": 0.1', '"wer": 0.0'))
    incomplete, failed = make_run(tmp_path, Case(scored=False)), make_run(tmp_path, Case(effect=Effect(audio=0.9)))
    for run in (edited, incomplete, failed):
        assert accept(run) == BAD_INPUT
    assert accept(make_run(tmp_path, Case()), " ") == BAD_INPUT
    assert not (tmp_path / "reference").exists()


def test_a_reference_cannot_be_accepted_once_more(tmp_path, accept):
    accept(make_run(tmp_path, Case()))
    (place,) = [path.parent for path in (tmp_path / "reference").rglob("history.jsonl")]
    assert accept(RunFolder.open(place)) == BAD_INPUT
    assert RunFolder.open(place).summary().status == "ok"
