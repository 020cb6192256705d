"""The command line: what composes, what is refused in one line, what a sweep leaves behind."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from hydra import compose, initialize_config_dir

import run_sweep
from harness.config import expand, register_catalogue
from harness.errors import UserError
from harness.results import find_runs

CONFIGS = ROOT / "configs"
FAKE = [
    "plugin_modules=[fakes]",
    "pipeline.loader=fakes.load",
    "pipeline.name=untrained",
    "workload=smoke",
    "measure=fast",
    "device=cpu",
]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys, own_locks):
    """Runs run_sweep.py with arguments: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        folders = [f"results_dir={tmp_path / 'results'}", f"reports_dir={tmp_path / 'reports'}"]
        monkeypatch.setattr(sys, "argv", ["run_sweep.py", *arguments, *folders])
        code = run_sweep.main()
        written = capsys.readouterr()
        return code, written.out, written.err

    return run


# -- what runs ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_combo_ends_with_its_verdict_and_its_report(command, tmp_path):
    code, out, err = command(*FAKE, "optimizations.fake_fast.enabled=true", "optimizations.fake_fast.factor=3")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("Measuring custom (fake_fast) against the baseline: ")
    assert [line for line in lines if line.startswith("speed pass, ")], "no terminal, so phases are plain lines"
    times, start = lines[-4:-2]
    assert "orchestration" in times
    assert re.search(r"to the first utterance.*: baseline .* s, custom .* s\.$", start)
    assert "faster" in lines[-2]
    report = Path(lines[-1].removeprefix("Report: "))
    assert report.is_file()
    assert report.is_relative_to(tmp_path / "reports")
    (run,) = find_runs([tmp_path / "results"])
    assert run.summary().comparison["rtf"].value == pytest.approx(1 / 3, abs=0.1)


@pytest.mark.slow
def test_identical_code_against_itself_makes_no_claim(command, tmp_path):
    code, _, _ = command(*FAKE, "+combo=baseline")
    assert code == 0
    (run,) = find_runs([tmp_path / "results"])
    assert set(run.summary().variants) == {"baseline", "baseline_again"}
    assert run.summary().comparison["rtf"].verdict == "no detectable change"


@pytest.mark.slow
def test_leave_one_out_is_a_job_for_each_and_one_report(command, tmp_path):
    code, _, _ = command(*FAKE, "+sweep=leave_one_out", "optimizations.fake_fast.enabled=true")
    assert code == 0
    (sweep,) = (tmp_path / "results").iterdir()
    combos = {run.summary().combo for run in find_runs([sweep])}
    assert combos == {"custom", "custom-without-fake_fast"}
    assert len(list((tmp_path / "reports").glob("*/report.md"))) == 1


@pytest.mark.slow
def test_a_multirun_is_a_job_for_each_and_one_report(command, tmp_path):
    code, _, _ = command("-m", *FAKE, "optimizations.fake_fast.enabled=true", "optimizations.fake_fast.factor=2,4")
    assert code == 0
    (sweep,) = (tmp_path / "results").iterdir()
    ratios = [run.summary().comparison["rtf"].value for run in find_runs([sweep])]
    assert ratios == pytest.approx([1 / 2, 1 / 4], abs=0.1)
    assert len(list((tmp_path / "reports").glob("*/report.md"))) == 1


@pytest.mark.slow
def test_a_search_is_told_what_each_combo_costs(command, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    factors = "optimizations.fake_fast.factor=choice(2,4)"
    search = ["hydra/sweeper=search", "hydra.sweeper.n_trials=2", "hydra.sweeper.sampler.seed=1"]
    code, _, _ = command("-m", *FAKE, *search, "optimizations.fake_fast.enabled=true", factors)
    assert code == 0
    (sweep,) = (tmp_path / "results").iterdir()
    assert len(find_runs([sweep])) == 2
    (best, *_) = yaml.safe_load((sweep / "optimization_results.yaml").read_text())["solutions"]
    time, memory, wer = best["values"]
    assert time == pytest.approx(1 / float(best["params"]["optimizations.fake_fast.factor"]), abs=0.1)
    assert memory > 0
    assert wer == 0


@pytest.mark.slow
def test_a_job_that_is_refused_does_not_lose_the_others(command, tmp_path):
    code, out, err = command("-m", *FAKE[:2], *FAKE[3:], "+combo=baseline", "pipeline.name=untrained,missing")
    assert code == 1
    assert "the fake's checkpoint is missing: put it there" in err
    (sweep,) = (tmp_path / "results").iterdir()
    assert len(find_runs([sweep])) == 1
    assert "failures.txt" in out


@pytest.mark.slow
def test_a_job_that_fails_has_its_report_and_another_exit_code(command, tmp_path):
    code, out, _ = command(*FAKE, "optimizations.fake_deadly.enabled=true")
    assert code == 1
    assert "Report: " in out
    (run,) = find_runs([tmp_path / "results"])
    assert run.summary().status == "failed"


# -- what is refused ---------------------------------------------------------------------------------------------

BAD_INPUT = {
    "nothing to measure": ([], "+combo=production"),
    "unknown combo": (["+combo=prodction"], "did you mean production?"),
    "unknown optimization": (["+combo=production", "optimizations.kv_cash.enabled=true"], "did you mean kv_cache?"),
    "unknown parameter": (["+combo=production", "optimizations.kv_cache.bucket_sizes=3"], "bucket_sizes"),
    "unknown sweep": (["+combo=production", "+sweep=leave_one"], "did you mean leave_one_out?"),
    "runs of no screening": (["+combo=production", "+sweep=leave_one_out", "runs=48"], "only sweep=screening"),
    "no number of runs": (["+combo=production", "+sweep=screening", "runs=many"], "runs=many"),
    "pairs of no screening": (["+combo=production", "+sweep=pairs", "paired_with=combo"], "only sweep=screening"),
    "pairs with no combo": (["+sweep=screening", "paired_with=combo"], "name the combo"),
    "pairs with whom": (["+combo=production", "+sweep=screening", "paired_with=me"], "baseline or combo"),
    "a screening of what cannot run": (["+sweep=screening", "optimizations.cuda_graphs.enabled=true"], "on a CPU"),
    "unknown setting": (["+combo=production", "measur.rounds=3"], "measur"),
    "unknown pipeline": (["+combo=production", "pipeline=chaterbox"], "did you mean chatterbox?"),
    "not an override": (["+combo=production", "pipeline=[mini"], "pipeline=[mini"),
    "nothing to leave out": (["+combo=baseline", "+sweep=leave_one_out"], "+combo=production"),
    "two for one stage": (
        ["plugin_modules=[fakes]", *(f"optimizations.fake_{n}_route.enabled=true" for n in ("other", "third"))],
        "fake_other_route and fake_third_route both replace the stage mel_to_wave",
    ),
    "plugin not found": (["+combo=production", "plugin_modules=[no.such.plugin]"], "no.such.plugin"),
    "loader not found": (["+combo=baseline", "pipeline.loader=no.such.loader"], "no.such.loader"),
    "no CUDA": (["+combo=baseline", "device=cuda"], "device=cuda"),
    "unknown device": (["+combo=baseline", "device=tpu"], "device=tpu"),
    "missing checkpoint": (
        ["+combo=baseline", "pipeline=chatterbox", "pipeline.checkpoint_dir=/nowhere"],
        "t3_cfg.safetensors",
    ),
    "missing voice": ([*FAKE, "+combo=baseline", "workload.voices=[nobody.wav]"], "nobody.wav"),
    "empty text": ([*FAKE, "+combo=baseline", "workload.texts=[{id: a, text: ' '}]"], "empty"),
    "over-long text": ([*FAKE, "+combo=baseline", f"workload.texts=[{{id: a, text: {'word ' * 2000}}}]"], "long"),
    "missing workload file": ([*FAKE, "+combo=baseline", "workload.file=/nowhere.txt"], "/nowhere.txt"),
}


@pytest.mark.parametrize("mistake", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(command, tmp_path, mistake):
    arguments, hint = BAD_INPUT[mistake]
    code, out, err = command("device=cpu", *arguments) if "device" not in " ".join(arguments) else command(*arguments)
    assert code == 2
    assert hint in err
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err + out
    assert not list(tmp_path.glob("results/*")), "nothing was measured, so nothing is kept"


# -- what the configuration files say ------------------------------------------------------------------------------


def composed(*overrides: str):
    overrides = tuple(run_sweep.PLUS.sub("", override) for override in overrides)
    register_catalogue(overrides)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", list(overrides))


GROUP_FILES = sorted(path for path in CONFIGS.glob("*/*.yaml"))


@pytest.mark.parametrize("path", GROUP_FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_file_composes_and_begins_with_its_command(path):
    group, name = path.parent.name, path.stem
    command = next(line for line in path.read_text().splitlines() if not line.startswith("# @package"))
    plus = "+" if group in ("combo", "sweep") else ""
    assert re.match(r"# (python |run_sweep)", command), command
    if "run_sweep.py" in command:
        assert f"{plus}{group}={name}" in command
    needs = [] if group == "combo" else ["+combo=production"]
    assert expand(composed(*needs, f"{plus}{group}={name}"))


@pytest.mark.parametrize("combo", sorted(path.stem for path in CONFIGS.glob("combo/*.yaml")))
def test_a_combo_is_named_after_its_file(combo):
    (spec,) = expand(composed(f"+combo={combo}"))
    assert spec.combo == ("baseline_again" if combo == "baseline" else combo)


def test_every_parameter_of_the_catalogue_is_a_setting():
    cfg = composed("+combo=production", "optimizations.kv_cache.enabled=false")
    (spec,) = expand(cfg)
    assert "kv_cache" not in spec.toggles
    assert spec.config["optimizations"]["kv_cache"]["enabled"] is False


def test_one_at_a_time_covers_the_catalogue():
    cfg = composed("+sweep=one_at_a_time")
    alone = [set(spec.toggles) - set(spec.against_toggles) for spec in expand(cfg)]
    assert sorted(alone, key=min) == [{name} for name in sorted(cfg.optimizations)]


def test_a_typo_in_a_combo_file_is_found(tmp_path):
    cfg = composed("+combo=production")
    cfg = cfg.copy()
    from omegaconf import open_dict

    with open_dict(cfg):
        cfg.optimizations["kv_cash"] = {"enabled": True}
    with pytest.raises(UserError, match="did you mean kv_cache"):
        expand(cfg)


# -- the whole thing, once -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_production_on_the_miniature_from_the_command_to_the_report(command, tmp_path):
    """Nothing is faked: upstream's model, the real optimizations, the real scoring where the weights can speak."""
    texts = "workload.texts=['It was late. Sit down.']"
    rounds = ["measure.min_rounds=3", "measure.max_rounds=3", "measure.warmup_calls=0"]
    brief = ["optimizations.warmup.shapes=[8]", "workload.seeds=[1]", "quality.fidelity_texts=1"]
    code, out, _ = command("+combo=production", "device=cpu", texts, *brief, *rounds)
    assert code == 0, out
    (run,) = find_runs([tmp_path / "results"])
    summary = run.summary()
    assert summary.status == "ok"
    unavailable = {name for name, o in summary.optimizations.items() if o["status"] == "unavailable"}
    only_on_a_gpu = {"flat_encoder", "cuda_graphs", "cpu_offload"}
    assert only_on_a_gpu <= unavailable <= only_on_a_gpu | {"mixed_precision"}  # which not every CPU can do
    assert set(summary.active) == set(summary.enabled) - unavailable, summary.optimizations
    assert summary.comparison["rtf"].n == 3
    speed = [row for row in run.measurements()[0] if row.pass_name == "speed"]
    assert all(row.stages_s["generate_tokens"] > 0 and row.stages_s["mel_to_wave"] > 0 for row in speed)
    for before, after in zip(speed[::2], speed[1::2], strict=True):
        assert before.audio_s == pytest.approx(after.audio_s, abs=0.04), "equal tokens make equal audio"
    production = summary.variants["production"]
    assert (production.wer is not None) == production.trained
