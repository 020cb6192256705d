"""The report says what the results say: verdicts with figures, claims with verdicts, nothing without a source."""

import html
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from factories import TWELVE, Case, Effect, make_run, write_rows
from hydra import compose, initialize_config_dir

import run_sweep
from harness.__main__ import main
from harness.config import expand, register_catalogue
from harness.errors import UserError
from harness.locations import CONFIGS
from harness.report import (
    claims,
    conditions,
    data,
    plots,
    report_name,
    rules,
    sections,
    usage,
    verdict_line,
    words,
    write_report,
)
from harness.report.document import Bullets, Code, Document, Figure, Heading, Paragraph, Section, Table
from harness.report.html import render as render_html
from harness.report.markdown import render as render_markdown
from harness.report.together import as_one, pooled, together
from harness.results import BASELINE, Measurement, find_runs
from harness.summarize import build_summary

SECTIONS = [
    "Executive summary",
    "Baseline performance",
    "Each optimization",
    "Combined performance impact",
    "Quality",
    "Recommended configuration",
    "Deployment recommendations",
    "Claimed and measured",
    "Measuring conditions",
    "Warnings",
    "How to repeat this",
]


@pytest.fixture(autouse=True)
def blank_pictures(request, monkeypatch):
    """Most of a report's time goes into its pictures: drawn where a test is about them, elsewhere blank."""
    if "pictures" not in request.keywords:
        monkeypatch.setattr(plots, "saved", blank)


def blank(canvas, path: Path) -> Figure:
    path.touch()
    plots.plt.close(canvas)
    return Figure(path, canvas.axes[0].get_title(loc="left"), "<svg/>")


def report_of(tmp_path, *cases: Case) -> str:
    runs = [make_run(tmp_path / "runs", case, minute) for minute, case in enumerate(cases)]
    return write_report(runs, tmp_path / "report").read_text()


def loaded(tmp_path, *cases: Case) -> list[data.Run]:
    return data.load([make_run(tmp_path / "runs", case, minute) for minute, case in enumerate(cases)])


def alone(name: str, **changes) -> Case:
    return Case(combo=name, enabled=(name,), **changes)


def finding(claim_id: str, runs: list[data.Run]) -> claims.Finding:
    claim = next(claim for claim in claims.load_claims() if claim.id == claim_id)
    return claims.judge(claim, runs)


# -- the whole -------------------------------------------------------------------------------------------


@pytest.mark.pictures
def test_one_run_makes_a_whole_report(tmp_path):
    text = report_of(tmp_path, Case(effect=Effect(time=0.6, memory=0.8)))
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == SECTIONS
    assert "**faster**, 40 % less time" in text
    assert "quality **kept**" in text
    assert text.count("lower is faster") == 1  # RTF is defined once
    for picture in re.findall(r"\]\((.+\.png)\)", text):
        assert (tmp_path / "report" / picture).stat().st_size > 5000
    assert len(re.findall(r"\.png\)", text)) == 4


def test_why_there_is_no_verdict_stands_beside_it(tmp_path):
    idle = alone("kv_cache", effect=Effect(time=0.7), statuses={"kv_cache": ("inactive", "it had nothing to do")})
    assert "- `kv_cache` (inactive): time: no verdict, ratio 0.70" in report_of(tmp_path / "two", idle, alone("warmup"))
    text = report_of(tmp_path / "many", idle, alone("warmup"), alone("vocos"), alone("channels_last"))
    rows = re.findall(r"^\| `(\w+)` \| .*?, ([\w ]+) \|.*\| (\w+) \|$", text, flags=re.MULTILINE)
    assert ("kv_cache", "no verdict", "inactive") in rows
    assert ("warmup", "faster", "ok") in rows


def test_a_sweep_is_ranked_and_shared_out(tmp_path):
    text = report_of(
        tmp_path,
        alone("kv_cache", effect=Effect(time=0.7)),
        alone("quantization", effect=Effect(time=1.2, memory=0.6), processes=5),
        alone("vocos", effect=Effect(time=0.9, wer=0.3)),
        alone("warmup", effect=Effect()),
    )
    assert "4 combos with the mini pipeline on Test CPU, 2 cores: 2 faster (1 of these with quality kept)" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")][:4]
    assert [re.match(r"\| `(\w+)`", row)[1] for row in rows] == ["kv_cache", "vocos", "warmup", "quantization"]
    assert "Recommended for the mini pipeline on Test CPU, 2 cores: **kv_cache**, 30 % less time" in text
    assert "| Deploy | `kv_cache` |" in text
    assert "| Only where memory is short | `quantization` |" in text
    assert "| Do not deploy | `vocos` |" in text
    assert "| No reason to deploy | `warmup` |" in text


def test_leaving_one_out_tells_what_it_adds(tmp_path):
    text = report_of(
        tmp_path,
        Case(combo="production", enabled=("inference_mode", "kv_cache"), effect=Effect(time=0.5)),
        Case(combo="production-without-kv_cache", enabled=("inference_mode",), effect=Effect(time=0.8)),
    )
    row = next(line for line in text.splitlines() if line.startswith("| `kv_cache` | inference_mode |"))
    assert float(re.search(r"faster, (0\.\d+)", row)[1]) == pytest.approx(0.5 / 0.8, rel=0.05)


def test_jobs_that_measured_the_same_say_more_together(tmp_path):
    slower = Effect(time=1.06)
    cases = [alone("warmup", effect=slower, noise=0.05, rounds=4, seed=seed) for seed in (1, 2, 3)]
    runs = loaded(tmp_path, *cases, alone("kv_cache", effect=slower))
    assert "no detectable change" in [run.verdict("rtf") for run in runs[:3]]
    whole = pooled(runs[:3], "rtf")
    assert whole.n == sum(run.change("rtf").n for run in runs[:3])
    assert whole.smallest_detectable < min(run.change("rtf").smallest_detectable for run in runs[:3])
    assert whole.verdict == "slower"
    _, table = together(runs)
    ((code, jobs, pairs, *_),) = table.rows
    assert (code, jobs, pairs) == ("`warmup`", "3", str(whole.n))
    assert together(runs[2:]) == []


def test_what_was_measured_twice_counts_once(tmp_path):
    lucky = [alone("warmup", effect=Effect(time=time), noise=0.05, rounds=8, seed=4) for time in (0.9, 1.1)]
    text = report_of(
        tmp_path, *lucky, alone("kv_cache"), *(alone(name, effect=Effect()) for name in ("vocos", "flow_steps"))
    )
    assert "4 combos with the mini pipeline on Test CPU, 2 cores: 1 faster" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| `warmup` |") and line.endswith("| ok |"))
    own = next(line for line in text.splitlines() if line.startswith("| `warmup` | active | alone |"))
    for told in (row, own):
        assert "no detectable change" in told
        assert float(re.search(r"(\d\.\d+) \(", told)[1]) == pytest.approx((0.9 * 1.1) ** 0.5, abs=0.03)


@pytest.mark.parametrize("losses", [(0.0, 0.3), (0.3, 0.0)])
def test_a_job_that_found_no_loss_does_not_outvote_one_that_did(tmp_path, losses):
    runs = loaded(tmp_path, *(alone("kv_cache", effect=Effect(time=0.7, wer=wer)) for wer in losses))
    (combo,) = as_one(runs)
    assert combo.summary.run_id == runs[losses.index(0.3)].summary.run_id
    assert {run.quality() for run in runs} == {"kept", "worse"}
    assert combo.quality() != "kept"


def test_jobs_of_which_one_failed_are_not_one(tmp_path):
    runs = loaded(tmp_path, alone("kv_cache"), alone("kv_cache", seed=1))
    runs[1] = replace(runs[1], summary=replace(runs[1].summary, status="failed"))
    assert len(as_one(runs)) == 2


def test_other_parameters_are_something_else(tmp_path):
    sizes = [alone("kv_cache", parameters={"kv_cache": {"bucket": size}}) for size in (64, 128)]
    assert together(loaded(tmp_path, *sizes)) == []


def test_a_verdict_that_was_withdrawn_does_not_come_back_with_others(tmp_path):
    runs = loaded(tmp_path, alone("kv_cache"), alone("kv_cache", seed=1))
    assert pooled(runs, "rtf").verdict == "faster"
    runs[0].change("rtf").verdict = "no detectable change"
    assert pooled(runs, "rtf").verdict == "no detectable change"
    runs[0].change("rtf").verdict = runs[1].change("rtf").verdict = "not measured"
    assert pooled(runs, "rtf") is None


def test_two_devices_are_kept_apart(tmp_path):
    text = report_of(tmp_path, Case(), Case(device="Test GPU", memory_kind="vram", pipeline="random"))
    assert "Recommended for the mini pipeline on Test CPU, 2 cores" in text
    assert "Recommended for the random pipeline on Test GPU" in text
    assert len(list((tmp_path / "report").glob("ratio-*.png"))) == 2


def test_speed_is_never_told_without_quality(tmp_path):
    cases = [
        Case(effect=Effect(time=0.5)),
        Case(effect=Effect(time=0.5, wer=0.2)),
        Case(effect=Effect(time=0.5), unmeasured="random weights speak noise"),
        Case(effect=Effect(time=0.5), trained=False),
    ]
    lines = [verdict_line(run.summary) for run in loaded(tmp_path, *cases)]
    assert all("faster" in line and "quality" in line for line in lines)
    assert "quality kept" in lines[0]
    assert "quality worse" in lines[1]
    assert "random weights speak noise" in lines[2]
    assert "untrained" in lines[3]


def test_a_failed_run_says_why_and_recommends_nothing(tmp_path):
    text = report_of(tmp_path, Case(effect=Effect(time=0.6, audio=0.9)))
    assert "`production` failed" in text
    assert "not a speed-up" in text
    assert "none cleared every gate" in text
    assert "**faster**" not in text


def test_inactive_and_unavailable_optimizations_get_no_credit(tmp_path):
    statuses = {"vocos": ("unavailable", "no checkpoint for this mel")}
    text = report_of(
        tmp_path,
        alone("channels_last", effect=Effect(time=0.8), statuses={"channels_last": ("inactive", "none pays")}),
        alone("vocos", effect=Effect(), statuses=statuses),
    )
    assert "<code>channels_last</code>: inactive" in text
    assert "no checkpoint for this mel." in text
    assert "| Could not be judged here | `channels_last` | inactive: none pays |" in text


def test_both_variants_say_how_long_their_first_words_took(tmp_path):
    text = report_of(tmp_path, Case())
    assert "| process start to first utterance | 6.00 s | 6.00 s |" in text


def test_evidence_is_shown(tmp_path):
    facts = {"cat_calls": 0, "bytes": {"before": 83_000_000, "after": 14_000_000}}
    text = report_of(tmp_path, alone("kv_cache", evidence={"kv_cache": facts}))
    assert "| `cat_calls` | 0 |" in text
    assert "| `bytes.before` | 83,000,000 |" in text


def test_no_path_of_this_machine_gets_into_a_report(tmp_path):
    assert str(tmp_path) not in report_of(tmp_path, Case())


def test_lost_jobs_are_listed(tmp_path):
    run = make_run(tmp_path / "runs", Case())
    (tmp_path / "runs" / "failures.txt").write_text("vocos: Traceback ...\nValueError: out of sorts\n\n")
    text = write_report([run], tmp_path / "report").read_text()
    assert "A job left no results: ValueError: out of sorts." in text


def test_a_report_of_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="did not finish"):
        write_report([write_rows(tmp_path, Case())], tmp_path / "report")


def test_the_report_is_named_after_its_runs(tmp_path):
    one = make_run(tmp_path / "results", Case())
    assert report_name([one]) == one.run_id
    sweep = [make_run(tmp_path / "20260314-sweep", alone(name), minute) for minute, name in enumerate(TWELVE[:2])]
    assert report_name(sweep) == "20260314-sweep"
    assert report_name([one, *sweep]) == f"{sweep[-1].run_id}-and-2-more"


# -- wording ---------------------------------------------------------------------------------------------


def test_a_combo_against_another_combo_is_told_so(tmp_path):
    case = Case(
        combo="production-without-kv_cache",
        enabled=("inference_mode",),
        against="production",
        reference=("kv_cache", "inference_mode"),
        reference_effect=Effect(time=0.5),
        effect=Effect(time=0.7),
    )
    text = report_of(tmp_path, case)
    assert "`production-without-kv_cache` is **slower** than `production`" in text
    assert "It is `production` without `kv_cache`." in text
    assert "fast as the baseline" not in text
    assert f"0 confirmed, 0 not confirmed, 0 contradicted, {len(claims.load_claims())} cannot be measured" in text


def test_numbers_and_verbs_agree(tmp_path):
    cases = [
        alone(name, effect=Effect(time=time)) for name, time in (("kv_cache", 0.7), ("vocos", 1.3), ("warmup", 1.0))
    ]
    text = report_of(tmp_path, *cases)
    assert "Of 3 combos, 1 is faster and 1 is slower" in text
    assert not re.search(r"\b1 (are|have|need)\b|\b1 combos\b|\b0 (faster|slower|with)\b", text)


def test_no_detectable_change_says_what_would_have_been_found(tmp_path):
    (run,) = loaded(tmp_path, Case(effect=Effect(), noise=0.05))
    found = run.change("rtf").smallest_detectable
    assert f"(a change of {words.percent(found)} or more would have been found)" in verdict_line(run.summary)
    assert "| smallest findable |" in report_of(tmp_path, Case(effect=Effect(), noise=0.05))


def test_a_figure_that_a_process_has_once_gets_no_interval_from_one_process(tmp_path):
    resident, counted = (
        report_of(tmp_path / kind, Case(effect=Effect(memory=0.8), memory_kind=kind)) for kind in ("rss", "vram")
    )
    assert re.search(r"\| peak memory \| .+ \| 0\.80\d \|", resident)
    assert re.search(r"\| peak memory \| .+ \| 0\.80\d \(0\.80\d to 0\.80\d\) \|", counted)
    assert "they are shown without one" in resident


def test_nothing_is_said_twelve_times(tmp_path):
    text = report_of(
        tmp_path,
        *(
            alone(name, effect=Effect(time=0.5 + 0.1 * place), unmeasured="random weights")
            for place, name in enumerate(TWELVE[:4])
        ),
    )
    lines = [line for line in text.splitlines() if len(line) > 60 and not line.startswith("|")]
    assert max(map(lines.count, lines)) <= 2  # the recommendation stands in the summary as well
    reasons = [row.split("|")[1] for row in text.split("| because | claimed |")[1].split("\n\n")[0].splitlines()[2:]]
    assert len(set(reasons)) == len(reasons)


def test_the_recommendation_ends_with_the_lines_that_use_it(tmp_path):
    """tests/test_application.py runs such lines on the miniature."""
    text = report_of(tmp_path, Case(memory_kind="vram"))
    (code,) = re.findall(r"```python\n(.+?)\n```", text, flags=re.DOTALL)
    assert 'optimize(ChatterboxTTS.from_pretrained("cuda"), {' in code  # as that is not the production of today
    assert code in html.unescape((tmp_path / "report/report.html").read_text())


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({"pipeline": {"name": "multilingual"}}, ["ChatterboxMultilingualTTS.from_pretrained", 'language_id="en"']),
        ({"pipeline": {"checkpoint_dir": "my/model"}}, ["ChatterboxTTS.from_local('my/model', \"cpu\")"]),
        ({"plugin_modules": ["my_plugin"]}, ["import my_plugin"]),
    ],
)
def test_those_lines_are_for_the_model_that_was_measured(tmp_path, change, lines):
    pipeline = change.get("pipeline", {}).get("name", "mini")
    (run,) = loaded(tmp_path, Case(pipeline=pipeline))
    code = usage.lines(replace(run, job={**run.job, **change}))
    assert all(line in code for line in lines)


# -- rules -----------------------------------------------------------------------------------------------


def test_the_command_names_what_differs_from_the_groups_files(tmp_path):
    folder = make_run(tmp_path, Case(against="campaign"))
    job = folder.job() | {
        "optimizations": {},
        "measure": {"name": "fast", "min_rounds": 2, "pinned_tokens": 250, "thresholds": {"rtf": 0.05, "wer": 0.02}},
        "workload": {"name": "passage", "seeds": [1, 2], "voices": ["/home/me/my voice.wav"]},
        "plugin_modules": ["mine"],
    }
    (run,) = data.load([folder])
    run = replace(run, job=job, summary=replace(run.summary, workload="passage"))
    assert conditions.command(run) == (
        "python run_sweep.py +combo=production against=campaign pipeline=mini workload=passage measure=fast "
        "'workload.seeds=[1,2]' 'workload.voices=[\"my voice.wav\"]' measure.pinned_tokens=250 "
        "measure.thresholds.rtf=0.05 'plugin_modules=[mine]'"
    )


ON_A_CPU = ("pipeline=tiny_turbo", "workload=smoke", "device=cpu")
ASKED = {
    "a combo": ["+combo=production", *ON_A_CPU],
    "another pipeline": ["+combo=production", *ON_A_CPU, "pipeline.seed=3", "pipeline.threads=2"],
    "and parameters": [
        *("+combo=production", *ON_A_CPU, "measure=fast", "optimizations.cuda_graphs.poll=8"),
        *("optimizations.warmup.shapes=[8,16]", "optimizations.compile.decode=none"),
    ],
    "and switches": [
        *("+combo=throughput", *ON_A_CPU, "optimizations.int8_weights.enabled=true"),
        *("optimizations.flat_estimator.enabled=false", "optimizations.batching.size=4", "pipeline.sampling.top_k=40"),
    ],
    "no combo": ["optimizations.kv_cache.enabled=true", "optimizations.kv_cache.bucket=64", *ON_A_CPU],
}


SWEEPS = {
    "leave_one_out": ["+combo=production", "+sweep=leave_one_out"],
    "screening": ["+combo=production", "+sweep=screening", "runs=20"],
    "screening beside the combo": ["+combo=production", "+sweep=screening", "paired_with=combo"],
    "of fewer and others": [
        *("+combo=production", "+sweep=screening"),
        *(f"optimizations.{o}" for o in ("warmup.enabled=false", "upstream_head.enabled=true")),
    ],
    "factorial": ["+combo=production", "+sweep=factorial", "over=[kv_cache,compile]"],
    "the whole catalogue": ["+sweep=one_at_a_time"],
    "some of it": ["+sweep=one_at_a_time", "optimizations.warmup.enabled=true", "optimizations.vocos.enabled=true"],
}


def specified(words):
    """The jobs that a command's words ask for."""
    words = [run_sweep.PLUS.sub("", word) for word in words]
    register_catalogue(words)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return expand(compose("config", words))


@pytest.mark.parametrize("words", ASKED.values(), ids=ASKED)
def test_the_command_measures_again_what_was_measured(words, tmp_path):
    (spec,) = specified(words)
    assert asked_again(spec, tmp_path) == [spec]


def test_a_job_of_a_sweep_has_the_configuration_that_it_has_alone():
    (alone,) = specified(["+combo=production", *ON_A_CPU])
    first, other, *_ = specified(["+combo=production", *ON_A_CPU, "+sweep=leave_one_out", "results_dir=elsewhere"])
    assert alone.config_hash == first.config_hash != other.config_hash


@pytest.mark.parametrize("words", SWEEPS.values(), ids=SWEEPS)
def test_the_command_of_a_sweep_asks_for_all_its_jobs(words, tmp_path):
    specs = specified([*words, *ON_A_CPU])
    assert asked_again(specs[-1], tmp_path) == specs


def asked_again(spec, tmp_path):
    """What the command that a report tells of this job asks for."""
    (run,) = data.load([make_run(tmp_path, Case(combo=spec.combo))])
    summary = replace(run.summary, workload="smoke", pipeline="tiny_turbo")
    environment = run.environment | {"device": {"type": "cpu"}}
    command = conditions.command(replace(run, job=spec.config, summary=summary, environment=environment))
    _, script, *again = shlex.split(command)
    assert script == "run_sweep.py"
    return specified(again)


def test_only_a_complete_gain_with_kept_quality_is_recommended(tmp_path):
    runs = loaded(
        tmp_path,
        Case(combo="fast_but_wrong", effect=Effect(time=0.3, wer=0.1)),
        Case(combo="fast_unscored", effect=Effect(time=0.4), scored=False),
        Case(combo="good", effect=Effect(time=0.6)),
        Case(combo="small_but_slow", effect=Effect(time=1.3, memory=0.5)),
    )
    assert rules.recommended(runs).name == "good"
    objections = {run.name: rules.objection(run) for run in runs}
    assert "quality is worse" in objections["fast_but_wrong"]
    assert objections["fast_unscored"] == "the run is incomplete"
    assert objections["good"] is None
    assert objections["small_but_slow"] == "it is slower"


def test_a_combo_that_is_cut_off_at_the_limit_has_worse_quality_whatever_was_heard(tmp_path):
    folder = write_rows(tmp_path, Case())
    scores = folder.scores()[0]
    folder.scores_file.unlink()
    for score in scores:
        folder.add_score(replace(score, hit_token_cap=(score.variant, score.text_id) == ("production", "t1")))
    folder.write_summary(build_summary(folder))
    (run,) = data.load([folder])
    assert run.quality() == "worse"
    text = write_report([folder], tmp_path / "report").read_text()
    assert re.search(r"\| production .*\| 3 \|$", text, flags=re.MULTILINE)


def test_fidelity_stands_in_the_report_stage_by_stage_and_where_nothing_was_heard_in_the_verdict(tmp_path):
    folder = write_rows(tmp_path, Case(unmeasured="random weights speak noise"))
    figures = {"mel_error": {"mean": 0.25, "low": 0.2, "high": None}}
    stages = {
        "generate_tokens": {"verdict": "faithful", "figures": {"kl_mean": {"mean": 0.0, "low": 0.0, "high": 0.0}}},
        "tokens_to_mel": {"verdict": "differs", "figures": figures},
        "watermark": {"verdict": "not measured", "figures": {}},
    }
    folder.write_json("fidelity.json", {"cases": [], "stages": stages})
    folder.write_summary(build_summary(folder))
    summary = folder.summary()
    assert summary.fidelity == stages
    assert "fidelity differs from the reference's: tokens_to_mel." in summary.warnings
    text = write_report([folder], tmp_path / "report").read_text()
    assert re.search(r"tokens_to_mel.*25 %.*20 % to not finite.*differs", text)
    assert "computed: tokens_to_mel differs and watermark not measured" in verdict_line(summary)


def figure(mean: float | None, limit: float | None = 0.05) -> dict:
    return {"mean": mean, "low": mean, "high": mean, "limit": limit}


def compared(folder, **figures: dict) -> None:
    """A comparison of stages, judged as it is in a job."""
    stages = {}
    for stage, found in figures.items():
        limited = [one for one in found.values() if one["limit"]]
        within = all(one["mean"] is not None and one["mean"] <= one["limit"] for one in limited)
        stages[stage] = {"verdict": "faithful" if within else "differs", "figures": found}
    folder.write_json("fidelity.json", {"cases": [], "stages": stages})
    folder.write_summary(build_summary(folder))


def test_the_report_says_what_was_heard_what_was_computed_and_what_nobody_judged(tmp_path):
    heard = make_run(tmp_path, Case())
    mute = write_rows(tmp_path, Case(combo="throughput", unmeasured="its weights come from a seed"), 1)
    compared(mute, generate_tokens={"kl_mean": figure(0.001)}, tokens_to_mel={"mel_error": figure(0.25)})
    text = write_report([heard, mute], tmp_path / "report").read_text()
    assert re.search(r"\*\*Heard\*\*, words by \S+, voice by \S+: `production` \(\d+ clips\)\.", text)
    assert "**Computed**, without an ear: `throughput`: `tokens_to_mel` differs." in text
    assert re.search(r"\*\*Not judged\*\*: `throughput`: .*its weights come from a seed\.", text)
    assert re.search(r"\*\*Not judged\*\*: `production`: stages were not compared", text)


@pytest.mark.pictures
def test_the_picture_of_stages_shows_each_figure_over_its_limit(tmp_path):
    folder = write_rows(tmp_path, Case(unmeasured="its weights come from a seed"))
    compared(
        folder,
        generate_tokens={"kl_mean": figure(0.001), "top1_changed": figure(0.0)},
        tokens_to_mel={"mel_error": figure(0.25), "mel_distance_db": figure(None)},
        mel_to_wave={"wave_error": figure(0.5, limit=None)},
    )
    write_report([folder], tmp_path / "report")
    assert (tmp_path / "report/fidelity.png").stat().st_size > 5_000
    page = (tmp_path / "report/report.html").read_text()
    assert "production: 1 of 3 stages faithful to the baseline's" in html.unescape(page)
    assert "production, flow: 25 %" in page
    assert "production, flow: not finite" in page
    assert "vocoder: " not in page, "what has no limit is in the table only"


def test_stages_that_could_not_be_compared_say_why(tmp_path):
    folder = write_rows(tmp_path, Case())
    folder.write_json("fidelity.json", {"reason": "production: RuntimeError: no room"})
    summary = build_summary(folder)
    assert summary.fidelity == {}
    assert "stages were not compared: production: RuntimeError: no room." in summary.warnings


@pytest.mark.parametrize("record", [{"stages": {"watermark": {"verdict": 1, "figures": {}}}}, {"stages": [1]}, [1]])
def test_a_damaged_comparison_of_stages_is_named(tmp_path, record):
    folder = write_rows(tmp_path, Case())
    folder.write_json("fidelity.json", record)
    with pytest.raises(UserError, match=r"fidelity\.json: damaged"):
        build_summary(folder)


def test_too_few_clips_to_rule_a_loss_out_do_not_prove_quality(tmp_path):
    (run,) = loaded(tmp_path, Case(effect=Effect(time=0.5, wer=0.015)))
    assert run.verdict("wer") == "no detectable change"
    assert run.quality() == "no detectable change"
    assert rules.recommended([run]) is None
    assert rules.candidate([run]) is run
    text = report_of(tmp_path, Case(effect=Effect(time=0.5, wer=0.015)))
    assert "measure more texts or seeds before deploying" in text


def test_unmeasured_quality_makes_a_candidate_not_a_recommendation(tmp_path):
    runs = loaded(tmp_path, Case(effect=Effect(time=0.5), unmeasured="random weights"))
    assert rules.recommended(runs) is None
    assert rules.candidate(runs).name == "production"


# -- claims ----------------------------------------------------------------------------------------------


def test_every_claim_is_about_something_that_exists_and_has_a_unique_id():
    loaded_claims = claims.load_claims()
    assert len({claim.id for claim in loaded_claims}) == len(loaded_claims) >= 30
    assert {claim.optimization for claim in loaded_claims} - {None} == set(TWELVE)


@pytest.mark.parametrize(
    ("time", "verdict"),
    [(0.60, claims.CONFIRMED), (0.677, claims.CONFIRMED), (0.85, claims.NOT_CONFIRMED), (1.0, claims.NOT_CONFIRMED),
     (1.2, claims.CONTRADICTED)],
)  # fmt: skip
def test_a_claimed_change_is_held_against_the_interval(tmp_path, time, verdict):
    runs = loaded(tmp_path, alone("alignment_analyzer", effect=Effect(time=time)))
    found = finding("analyzer-time", runs)
    assert found.verdict == verdict
    assert "generation time ratio" in found.measured


def test_a_claimed_increase_counts_in_its_own_direction(tmp_path):
    def runs(time):
        case = alone("cuda_cache", effect=Effect(time=time), memory_kind="vram")
        loaded_runs = loaded(tmp_path, case)
        loaded_runs[0].job["optimizations"]["cuda_cache"]["profile"] = "balanced"
        return loaded_runs

    assert finding("cuda-cache-time", runs(1.28)).verdict == claims.CONFIRMED
    assert finding("cuda-cache-time", runs(1.0)).verdict == claims.NOT_CONFIRMED
    assert finding("cuda-cache-time", runs(0.8)).verdict == claims.CONTRADICTED


def test_no_change_needs_the_whole_interval_within_the_threshold(tmp_path):
    quiet = loaded(tmp_path, alone("kv_cache", effect=Effect(), noise=0.005))
    noisy = loaded(tmp_path, alone("kv_cache", effect=Effect(), noise=0.3))
    faster = loaded(tmp_path, alone("kv_cache", effect=Effect(time=0.5)))
    verdicts = [finding("kv-cache-time", runs).verdict for runs in (quiet, noisy, faster)]
    assert verdicts == [claims.CONFIRMED, claims.NOT_CONFIRMED, claims.CONTRADICTED]


def test_quality_maintained_is_contradicted_by_a_worse_wer(tmp_path):
    assert finding("combined-quality", loaded(tmp_path, Case())).verdict == claims.CONFIRMED
    worse = loaded(tmp_path, Case(effect=Effect(wer=0.2)))
    assert finding("combined-quality", worse).verdict == claims.CONTRADICTED
    unmeasured = loaded(tmp_path, Case(unmeasured="random weights"))
    assert finding("combined-quality", unmeasured).verdict == claims.CANNOT


def test_what_cannot_be_measured_says_why(tmp_path):
    cpu = loaded(tmp_path, alone("mixed_precision"))
    assert "GPU" in finding("mixed-precision-memory", cpu).reason
    together = loaded(tmp_path, Case(enabled=("vocos", "warmup")))
    assert "together with others" in finding("vocos-rtf", together).reason
    assert "no run of this report" in finding("kv-cache-time", together).reason
    missing = loaded(tmp_path, alone("vocos", statuses={"vocos": ("unavailable", "no checkpoint")}))
    assert finding("vocos-rtf", missing).reason == "unavailable: no checkpoint"
    absolute = loaded(tmp_path, Case(memory_kind="vram", device="NVIDIA H200"))
    assert "RTX 4090" in finding("baseline-rtf", absolute).reason


def test_an_absolute_claim_is_compared_on_its_own_device(tmp_path):
    case = Case(pipeline="random", memory_kind="vram", device="NVIDIA GeForce RTX 4090")
    found = finding("baseline-rtf", loaded(tmp_path, case))
    assert found.verdict == claims.NOT_CONFIRMED  # the synthetic baseline has an RTF of 0.5
    assert re.match(r"RTF 0\.(49|50)\d*, the random pipeline on NVIDIA GeForce RTX 4090", found.measured)
    miniature = replace(case, pipeline="mini")
    assert finding("baseline-rtf", loaded(tmp_path, miniature)).verdict == claims.CANNOT


def test_a_watermark_that_was_read_back_answers_its_claim(tmp_path):
    (run,) = loaded(tmp_path, Case())
    assert finding("combined-watermark", [run]).verdict == claims.CANNOT
    run.combo.watermark = 1.0
    assert finding("combined-watermark", [run]).verdict == claims.CONFIRMED
    run.combo.watermark = 0.9
    assert finding("combined-watermark", [run]).verdict == claims.CONTRADICTED


def test_evidence_counts_answer_claims(tmp_path):
    facts = {"token_sequence": {"attention_scores_saved_percent": 81.5}}
    runs = loaded(tmp_path, alone("token_sequence", evidence=facts))
    assert finding("token-sequence-attention", runs).verdict == claims.CONFIRMED
    facts = {"vocos": {"hift_bytes": 83_000_000, "vocos_bytes": 60_000_000}}
    runs = loaded(tmp_path, alone("vocos", evidence=facts))
    assert finding("vocos-size", runs).verdict == claims.NOT_CONFIRMED


def test_what_an_optimization_shows_about_itself_counts_in_any_company(tmp_path):
    together = loaded(tmp_path, Case(enabled=("inference_mode", "warmup")))
    assert finding("inference-mode-incompatible", together).verdict == claims.CONTRADICTED


def test_what_the_campaign_could_not_run_is_contradicted_by_evidence(tmp_path):
    assert (
        finding("inference-mode-incompatible", loaded(tmp_path, alone("inference_mode"))).verdict == claims.CONTRADICTED
    )


def test_a_cold_start_is_the_first_call_against_warm_ones(tmp_path):
    found = finding("warmup-cold-start", loaded(tmp_path, alone("warmup")))
    assert found.verdict == claims.NOT_CONFIRMED  # the synthetic first call takes four times as long
    assert re.search(r"first call 3\.\d+ times", found.measured)


def test_a_damaged_claims_file_is_bad_input(tmp_path):
    path = tmp_path / "claims.yaml"
    path.write_text("claims: [{id: a, unknown: 1}]")
    with pytest.raises(UserError, match=r"claims\.yaml"):
        claims.load_claims(path)


# -- words and print -------------------------------------------------------------------------------------


def test_numbers_in_words():
    assert words.number(1234.5) == "1,234"
    assert words.number(0.012345) == "0.0123"
    assert words.seconds(0.0421) == "42.1 ms"
    assert words.signed(-0.0301) == "−0.030"
    assert words.signed(-0.0001) == "0.000"
    assert words.amount_of_change("rtf", 0.612) == "39 % less time"
    assert words.amount_of_change("peak_memory_mb", 1.034) == "3.4 % more memory"
    assert words.listing(["a", "b", "c"]) == "a, b and c"


def test_markdown_and_html_print_every_kind_of_block():
    document = Document("Title & more")
    table = Table(["a", "b"], [["x|y", "1 < 2"]], numeric=frozenset({1}))
    document.add(Heading(2, "Head"), Paragraph("**strong** `code`"), Bullets(["one"]), table, None, Code("x", "sh"))
    markdown = render_markdown(document)
    assert "| x\\|y | 1 < 2 |" in markdown
    assert "| --- | ---: |" in markdown
    html = render_html(document)
    assert "<strong>strong</strong> <code>code</code>" in html
    assert '<td class="number">1 &lt; 2</td>' in html
    assert "Title &amp; more" in html


# -- the command -----------------------------------------------------------------------------------------


def test_pipelines_on_one_device_stand_side_by_side(tmp_path):
    cases = [
        Case(pipeline="random"),
        Case(pipeline="random", combo="kv_cache", effect=Effect(time=0.9)),
        Case(pipeline="random_turbo", effect=Effect(time=0.05)),
        Case(pipeline="random_turbo", device="another GPU"),
        Case(pipeline="random_multilingual", effect=Effect(time=0.4)),
    ]
    runs = loaded(tmp_path, *cases)

    def beside(runs):
        parts = [block for block in sections.build(runs, {}, []).blocks if isinstance(block, Section)]
        return [block for part in parts if "side by side" in part.title for block in part.blocks]

    _, table = beside(runs)
    told = [tuple(row[:2]) for row in table.rows]
    turbo, english, other = (words.said(name) for name in ("random_turbo", "random", "random_multilingual"))
    fast, slow = "`production`", "`baseline`"
    assert told[:4] == [(turbo, slow), (turbo, fast), (other, slow), (other, fast)]
    assert told[4:] == [(english, slow), (english, fast), (english, "`kv_cache`")]
    (summary,) = [r.summary for r in runs if r.summary.pipeline == "random_turbo" and "another" not in r.summary.device]
    assert table.rows[1][4] == words.number(summary.variants["production"].rtf)
    assert not beside(runs[:2])


def test_the_report_command_writes_where_it_is_told(tmp_path, capsys):
    make_run(tmp_path / "runs", Case())
    out = tmp_path / "there"
    assert main(["report", str(tmp_path / "runs"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert str(out / "report.md") in printed
    assert "production: faster" in printed


def test_bad_folders_are_one_line_and_exit_code_two(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "nowhere" in error


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    run = make_run(tmp_path, Case())
    command = [sys.executable, "-m", "harness", "report", run.path, "--out", tmp_path / "report"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert (tmp_path / "report" / "report.md").exists()


def test_reading_results_needs_no_torch():
    code = (
        "import sys, harness.report, harness.gate, harness.summarize, harness.ablation, harness.__main__\n"
        "print('torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def test_find_runs_skips_what_is_no_run(tmp_path):
    run = make_run(tmp_path, Case())
    (tmp_path / "failures.txt").write_text("x")
    (tmp_path / "notes").mkdir()
    deeper = make_run(tmp_path / "zz-sweep", Case())
    assert [found.path for found in find_runs([tmp_path])] == [run.path, deeper.path]


# -- under load ------------------------------------------------------------------------------------------


def visits(variant: str, how: str, size: int, first_s: float, gap_s: float = 0.0) -> list[Measurement]:
    """So many requests at a time, each with two chunks of a second."""
    columns = {"pass_name": "load", "voice": "rms", "load": how, "load_size": float(size), "audio_s": 2.0}
    return [
        Measurement(
            variant=variant,
            text_id=f"t{i}",
            text="Yes.",
            seed=i,
            chunks=[[first_s, 1.0], [first_s + gap_s, 1.0]],
            **columns,
        )
        for i in range(size)
    ]


@pytest.mark.pictures
def test_what_callers_have_under_load(tmp_path):
    folder = write_rows(tmp_path / "runs", Case(combo="serving"))
    for how in ("closed", "open"):
        for size in (1, 2, 4, 8, 16, 32):
            for row in visits("serving", how, size, 0.05 * (1 + size / 16) ** 2, gap_s=1.5 if size == 32 else 0.5):
                folder.add_measurement(row)
        for row in visits(BASELINE, how, 1, 2.5):
            folder.add_measurement(row)
    folder.write_summary(build_summary(folder))
    found = folder.summary().variants["serving"].loaded
    assert (found["streams"], found["streams_closed"], found["streams_open"]) == (16, 16, 16)
    assert folder.summary().variants[BASELINE].loaded["streams"] == 0
    text = write_report([folder], tmp_path / "report").read_text()
    assert "`serving` keeps 16 streams" in text
    assert "`baseline` keeps none of the loads" in text
    assert re.search(r"^\| `serving` \| users \| 32 .* \| 32 \| none \| 32 \| no \|$", text, flags=re.MULTILINE)
    assert "![serving keeps 16" in text
    assert (tmp_path / "report" / "load.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("loads", "opens", "told"),
    [
        (
            [("closed", 1, 0.1), ("closed", 32, 0.32), ("open", 1, 0.1), ("open", 32, 0.2)],
            "`serving` keeps **1 stream** on one NVIDIA H200, the baseline 0: first audio within 0.300 s for 99 % and "
            "no underrun, in closed loop (1 and 0) as in open loop (32 and 0). `serving` is ",
            "closed loop 1 (first audio after 0.320 s at 32), the baseline 0 (first audio after 2.50 s at 1); "
            "open loop 32 (no more were tried), the baseline 0 (first audio after 2.50 s at 1); faster",
        ),
        (
            [("closed", 4, 0.5), ("open", 4, 0.1)],
            "`serving` keeps **none of the loads that were tried** on one NVIDIA H200, the baseline 0: ",
            "closed loop 0 (first audio after 0.500 s at 4), the baseline 0 ",
        ),
    ],
)
def test_a_run_under_load_opens_with_its_streams(tmp_path, loads, opens, told):
    folder = write_rows(tmp_path, Case(combo="serving", device="NVIDIA H200"))
    for how in ("closed", "open"):
        own = [("serving", size, first_s) for way, size, first_s in loads if way == how]
        for variant, size, first_s in [(BASELINE, 1, 2.5), *own]:
            for row in visits(variant, how, size, first_s, gap_s=0.5):
                folder.add_measurement(row)
    folder.write_summary(build_summary(folder))
    report = write_report([folder], tmp_path / "report")
    assert report.read_text().split("## Executive summary\n\n")[1].startswith(opens)
    assert words.markup(opens) in report.with_suffix(".html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert told in verdict_line(folder.summary())
