"""Each stage against the reference's own inputs: figures, verdicts, and the stages of the miniature."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import calibrate, checkpoints
from harness.__main__ import main
from harness.errors import UserError
from harness.fidelity import compare_combos, toggles_of
from harness.locations import ROOT
from harness.pipeline import Pipeline
from harness.quality import fidelity, replay, stages
from harness.quality.fidelity import DIFFERS, FAITHFUL, NOT_MEASURED, Trace
from harness.quality.scoring import create_judges
from harness.report.curve import draw
from harness.report.fidelity import write_page
from harness.results import read_rows
from harness.worker import Setup, Variant
from optimizations import create
from optimizations.common.graphs import Uncaptured

CASES = [
    replay.Case("rain", "Will it rain?", "rms"),
    replay.Case("bread", "There is some bread.", "kal16", n_tokens=30),
]
SEED = 3
RNG = np.random.default_rng(0)


# -- figures


def test_equal_distributions_do_not_diverge_whatever_is_added_to_all_logits():
    logits = RNG.standard_normal((20, 50))
    assert fidelity.compare_logits(logits, logits + 7.0) == pytest.approx(
        {"kl_mean": 0.0, "kl_p99": 0.0, "top1_changed": 0.0}, abs=1e-12
    )


def test_divergence_is_that_of_the_two_distributions():
    reference, other = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.1, 0.9]])
    found = fidelity.compare_logits(reference, other)
    kl = [0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75), 0.8 * math.log(9)]
    assert found["kl_mean"] == pytest.approx(np.mean(kl))
    assert found["kl_p99"] == pytest.approx(np.quantile(kl, 0.99))
    assert found["top1_changed"] == 1.0


def test_mels_are_compared_in_decibels_of_their_amplitudes():
    mel = RNG.standard_normal((80, 30)) - 5
    louder = mel + math.log(10) / 20  # one decibel
    found = fidelity.compare_mels(mel, louder)
    assert found["mel_distance_db"] == pytest.approx(1.0)
    assert found["mel_error"] == pytest.approx(np.linalg.norm(louder - mel) / np.linalg.norm(mel))


def noise(seed: int, n: int = 24_000) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n)


def test_another_source_is_taken_out_of_the_waves_distance():
    reference, chance = noise(0), noise(1)
    assert fidelity.compare_waves(reference, reference, chance)["wave_distance_db"] == 0
    assert fidelity.compare_waves(reference, noise(2), chance)["wave_distance_db"] < 1.5
    dull = np.convolve(noise(2), np.hanning(8), "same")
    assert fidelity.compare_waves(reference, dull, chance)["wave_distance_db"] > 5
    same_source = fidelity.compare_waves(reference, 1.26 * reference, chance)
    assert same_source["wave_distance_db"] == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize(
    ("compare", "reference"),
    [
        (fidelity.compare_logits, np.zeros((4, 5))),
        (fidelity.compare_mels, np.ones((80, 6))),
        (lambda a, b: fidelity.compare_waves(a, b, noise(1)), noise(0)),
    ],
)
def test_what_is_not_finite_or_of_another_shape_is_infinitely_far(compare, reference):
    for other in (reference * np.nan, reference[:-1]):
        assert math.inf in compare(reference, other).values()


# -- verdicts


def figures(scale: float) -> dict[str, dict[str, float]]:
    return {stage: {name: scale * limit for name, limit in limits.items()} for stage, limits in fidelity.LIMITS.items()}


def test_a_stage_is_faithful_while_all_its_figures_are_within_their_limits():
    near = fidelity.summarize([figures(0.5)] * 3, ["a", "b", "c"])
    assert {record["verdict"] for record in near.values()} == {FAITHFUL}
    one_far = fidelity.summarize(
        [figures(0.5), figures(0.5) | {"tokens_to_mel": figures(9)["tokens_to_mel"]}], ["a", "b"]
    )
    assert one_far["tokens_to_mel"]["verdict"] == DIFFERS
    assert one_far["generate_tokens"]["verdict"] == FAITHFUL


def test_a_stage_that_a_text_has_nothing_of_is_not_measured():
    partly = {stage: found for stage, found in figures(0).items() if stage != "generate_tokens"}
    found = fidelity.summarize([figures(0), partly], ["a", "b"])
    assert found["generate_tokens"] == {"verdict": NOT_MEASURED, "figures": {}}
    assert fidelity.summarize([], [])["watermark"]["verdict"] == NOT_MEASURED


def test_figures_that_were_kept_are_judged_by_the_limits_of_today(monkeypatch):
    kept = fidelity.summarize([figures(0.5)] * 3, ["a", "b", "c"])
    monkeypatch.setitem(fidelity.LIMITS, "tokens_to_mel", {"mel_error": 0.001})
    again = fidelity.judged(kept)
    assert again["tokens_to_mel"]["verdict"] == DIFFERS
    assert again["tokens_to_mel"]["figures"]["mel_error"]["limit"] == 0.001
    assert again["tokens_to_mel"]["figures"]["mel_distance_db"]["limit"] is None
    assert again["mel_to_wave"] == kept["mel_to_wave"]
    lost = {
        "mel_to_wave": {"verdict": FAITHFUL, "figures": {"wave_distance_db": {"mean": None, "low": 1, "high": None}}}
    }
    assert fidelity.judged(lost)["mel_to_wave"]["verdict"] == DIFFERS


def test_infinitely_far_differs():
    far = {stage: dict.fromkeys(found, math.inf) for stage, found in figures(0).items()}
    assert {record["verdict"] for record in fidelity.summarize([far] * 8, list("abcdefgh")).values()} == {DIFFERS}


# -- the miniature's stages


@pytest.fixture(scope="module")
def mini() -> Pipeline:
    return checkpoints.load("mini", "cpu")


@pytest.fixture(scope="module")
def spoken(mini) -> tuple[list[replay.Inputs], list[Trace]]:
    inputs = replay.record(mini, CASES, SEED)
    return inputs, replay.replay(mini, CASES, inputs, SEED)


def verdicts(mini: Pipeline, spoken, **plugins) -> tuple[dict[str, str], dict]:
    """With these plugins applied, the verdict of each stage, and the whole summary."""
    inputs, reference = spoken
    for name, params in plugins.items():
        plugin = create(name, params)
        if name == "cuda_graphs":  # on a CPU a captured step is the step
            plugin.apply_with(mini, Uncaptured)
        else:
            plugin.apply(mini)
    try:
        traces = replay.replay(mini, CASES, inputs, SEED)
    finally:
        mini.reset()
    compared = [fidelity.compare(*pair) for pair in zip(reference, traces, strict=True)]
    summary = fidelity.summarize(compared, [case.text_id for case in CASES])
    return {stage: record["verdict"] for stage, record in summary.items()}, summary


def test_what_is_kept_is_what_was_spoken(mini, spoken):
    (rain, bread), (trace, _) = spoken
    assert len(bread.tokens) == 30
    assert rain.mel.shape == (80, 2 * len(rain.tokens))
    assert trace.logits.shape[0] == len(rain.tokens)
    assert np.array_equal(trace.mel, rain.mel)
    assert np.array_equal(trace.wave, rain.wave)
    assert trace.mark > 0.9


def test_the_teachers_logits_are_those_of_the_loop_that_chose_the_tokens(mini, spoken, monkeypatch):
    """With nothing but the best token left to draw, the loop says the best of each step's logits."""
    monkeypatch.setattr(mini, "sampling", mini.sampling.__class__(min_p=1.0, repetition_penalty=1.0))
    inputs = replay.record(mini, CASES[1:], SEED)
    (trace,) = replay.replay(mini, CASES[1:], inputs, SEED)
    assert np.array_equal(trace.logits.argmax(axis=1), inputs[0].tokens)


def test_the_same_pipeline_is_itself(mini, spoken):
    found, summary = verdicts(mini, spoken)
    assert set(found.values()) == {FAITHFUL}
    assert summary["generate_tokens"]["figures"]["kl_mean"]["high"] == 0
    assert summary["mel_to_wave"]["figures"]["wave_error"]["high"] == 0


@pytest.mark.parametrize(
    "plugins",
    [
        pytest.param({"kv_cache": {}}, marks=pytest.mark.slow),
        pytest.param({"batching": {}}, marks=pytest.mark.slow),
        {"kv_cache": {}, "inference_mode": {}, "flat_estimator": {}, "fused_vocoder": {}, "gpu_watermark": {}},
        pytest.param({"kv_cache": {}, "cuda_graphs": {"tokens": 8}}, marks=pytest.mark.slow),
        {"kv_cache": {}, "batching": {}, "cuda_graphs": {"tokens": 8}},
    ],
    ids=lambda plugins: "+".join(plugins),
)
def test_what_changes_no_arithmetic_is_faithful_in_every_stage(mini, spoken, plugins):
    found, _ = verdicts(mini, spoken, **plugins)
    assert set(found.values()) == {FAITHFUL}


def test_a_stage_that_differs_is_the_one_that_is_told(mini, spoken):
    found, _ = verdicts(mini, spoken, flow_steps={"steps": 1})
    assert found == {
        "generate_tokens": FAITHFUL,
        "tokens_to_mel": DIFFERS,
        "mel_to_wave": FAITHFUL,
        "watermark": FAITHFUL,
    }


@pytest.mark.slow
def test_damaged_weights_and_a_lost_mark_differ(mini, spoken):
    head = mini.model.t3.speech_head.weight
    kept = head.detach().clone()
    mini.replace_stage("watermark", lambda waves: [wave.cpu().numpy() for wave in waves], by="test")
    try:
        with torch.no_grad():
            head += 0.3 * head.std() * torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
        found, _ = verdicts(mini, spoken)
    finally:
        with torch.no_grad():
            head.copy_(kept)
        mini.reset()
    assert found["generate_tokens"] == found["watermark"] == DIFFERS
    assert found["tokens_to_mel"] == found["mel_to_wave"] == FAITHFUL


@pytest.mark.slow
def test_a_loop_that_knows_no_teacher_is_not_measured(mini, spoken):
    inputs, _ = spoken
    mini.replace_stage("generate_tokens", lambda segments: [torch.from_numpy(i.tokens) for i in inputs], by="test")
    found, _ = verdicts(mini, spoken)
    assert found["generate_tokens"] == NOT_MEASURED


def test_traces_survive_their_file(tmp_path, spoken):
    inputs, traces = spoken
    replay.save(tmp_path / "a/inputs.npz", inputs)
    replay.save(tmp_path / "a/traces.npz", [*traces, Trace()])
    again = replay.load(tmp_path / "a/traces.npz", Trace)
    assert np.array_equal(again[0].logits, traces[0].logits)
    assert again[1].mark == traces[1].mark
    assert again[2] == Trace()
    assert np.array_equal(replay.load(tmp_path / "a/inputs.npz", replay.Inputs)[1].tokens, inputs[1].tokens)


# -- in a job


class FakeSide:
    """A side whose process is here; `fails` names the question that it cannot answer."""

    def __init__(self, name: str, pipeline: Pipeline, fails: str = "") -> None:
        self.name, self.fails, self.last_error = name, fails, None
        self.variant = Variant(Setup(name, Path(), "", {}, "cpu"))
        self.variant.pipeline = pipeline

    def ask(self, method: str, *arguments, limit_s: float):
        if method == self.fails:
            self.last_error = "Traceback\nRuntimeError: no room"
            return None
        return getattr(self.variant, method)(*arguments)


@pytest.mark.slow
def test_a_jobs_sides_are_compared_and_nothing_is_left_behind(tmp_path, mini):
    cases = CASES[1:]
    found = stages.compare_stages(
        tmp_path, FakeSide("baseline", mini), FakeSide("combo", mini), cases, SEED, limit_s=60
    )
    (case,) = found["cases"]
    assert (case["text_id"], case["voice"], case["n_tokens"]) == ("bread", "kal16", 30)
    assert {record["verdict"] for record in found["stages"].values()} == {FAITHFUL}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("fails", "side"), [("record_stages", "baseline"), ("replay_stages", "combo")])
@pytest.mark.slow
def test_a_side_that_cannot_do_it_is_named_with_its_error(tmp_path, mini, fails, side):
    sides = [FakeSide(name, mini, fails if name == side else "") for name in ("baseline", "combo")]
    found = stages.compare_stages(tmp_path, *sides, CASES[1:], SEED, limit_s=60)
    assert found == {"reason": f"{side}: RuntimeError: no room"}
    assert not list(tmp_path.iterdir())


# -- by itself


def test_a_name_is_a_combos_or_an_optimizations_with_what_it_requires():
    assert list(toggles_of("compile", gpu=True)) == ["kv_cache", "compile"]
    assert set(toggles_of("campaign", gpu=True)) > {"vocos", "quantization"}
    assert set(toggles_of("streaming", gpu=True)) > {"streaming", "kv_cache"}, "of the same name the combo goes first"
    assert toggles_of("campaign", gpu=True)["quantization"] == {"strategy": "conservative"}
    with pytest.raises(UserError, match="did you mean production"):
        toggles_of("productoin", gpu=False)


@pytest.mark.slow
def test_combos_are_put_on_one_pipeline_and_taken_off_again(mini):
    sides = {
        "one step": {"flow_steps": {"steps": 1}},
        "cached": {"kv_cache": {}},
        "nowhere": {"cuda_graphs": {}},
        "wrong": {"kv_cache": {"bucket": "many"}},
    }
    found = dict(compare_combos(mini, sides, CASES[1:]))
    assert found["one step"]["stages"]["tokens_to_mel"]["verdict"] == DIFFERS
    assert {stage["verdict"] for stage in found["cached"]["stages"].values()} == {FAITHFUL}
    assert found["cached"]["applied"]["kv_cache"]["changes"]
    assert "CUDA" in found["nowhere"]["applied"]["cuda_graphs"]["reason"]
    assert "stages" not in found["nowhere"], "what did nothing is not called faithful"
    assert "bucket" in found["wrong"]["reason"]
    assert not mini.standing()


@pytest.mark.slow
def test_it_leaves_a_page_with_a_table_and_a_picture(tmp_path, capsys):
    arguments = ["--device", "cpu", "--texts", "1", "--tokens", "8", "--out", str(tmp_path)]
    assert main(["fidelity", "flow_steps", "inference_mode", *arguments]) == 0
    kept = json.loads((tmp_path / "fidelity.json").read_text())
    assert list(kept["combos"]) == ["baseline", "inference_mode", "flow_steps"]
    page = (tmp_path / "report.md").read_text()
    assert "| `baseline` | 0 nats | 0.0 % | 0 dB | 0.000 |  |" in page
    assert "| `inference_mode` | the same | the same | the same | the same | faithful |" in page
    assert re.search(r"\| `flow_steps` \| the same \| [0-9.]+ % \| the same \| the same \|", page)
    assert (tmp_path / "fidelity.png").stat().st_size > 5_000
    assert "inference_mode: generate_tokens faithful" in capsys.readouterr().out


def found(status: str = "active", kl: float = 0.0) -> dict:
    """A combo's part of the record, with one optimization of that status."""
    stages = fidelity.summarize(
        [{**figures(0), "generate_tokens": {"kl_mean": kl, "kl_p99": kl, "top1_changed": 0.0}}], ["a"]
    )
    return {
        "stages": stages,
        "applied": {"vocos": {"status": status, "reason": "not here", "changes": []}},
        "commit": "c",
    }


def row(page: str, name: str) -> str:
    return next(line for line in page.splitlines() if line.startswith(f"| `{name}` |")).rsplit(" | ", 1)[1]


def test_the_page_says_what_was_not_active_and_what_the_baseline_does_to_itself(tmp_path):
    combos = {
        "baseline": {**found(kl=1e-6), "applied": {}},
        "campaign": {**found("unavailable", 1e-4)},
        "vocos": {"applied": {"vocos": {"status": "unavailable", "reason": "none", "changes": []}}, "commit": "c"},
        "streaming": found("inactive", 5e-7),
        "min_vram": found(kl=0.1),
    }
    combos["campaign"]["applied"]["kv_cache"] = {"status": "active", "reason": None, "changes": ["it"]}
    about = {"environment": {"device": {"name": "G", "type": "cuda"}}, "cases": [{"n_tokens": 8}], "pipeline": "mini"}
    page = write_page({**about, "combos": combos}, tmp_path).read_text()
    assert row(page, "campaign") == "faithful, without `vocos` |"
    assert row(page, "vocos") == "not compared |"
    assert row(page, "streaming") == "says nothing: not active |"
    assert row(page, "min_vram") == "`generate_tokens` differs |"
    assert "| `streaming` | the same |" in page
    assert "| `campaign` | 0.0001" in page
    assert "`vocos` was unavailable in `campaign`: not here." in page
    assert "Of 2 combos, 1 differs" in page, "what was not active is not in the picture"
    older = {"kv_cache": found("applied", 5e-7), "vocos": found("failed")}
    page = write_page({**about, "combos": older}, tmp_path).read_text()
    assert "nobody was asked for evidence" in page
    assert row(page, "kv_cache") == "faithful |"
    assert "`vocos` failed in `vocos`: not here." in page


def test_a_folder_is_gone_on_with_and_another_comparisons_is_left_alone(tmp_path, capsys, monkeypatch):
    arguments = ["fidelity", "kv_cache", "--device", "cpu", "--tokens", "8", "--out", str(tmp_path)]
    case = {"text_id": "a", "text": "A.", "voice": "rms", "n_tokens": 8, "language": None}
    about = {"environment": {"device": {"name": "G", "type": "cpu"}}, "cases": [case], "pipeline": "mini"}
    combos = {"baseline": {**found(), "applied": {}}, "kv_cache": found()}
    (tmp_path / "fidelity.json").write_text(json.dumps({**about, "combos": combos}))
    monkeypatch.setattr(checkpoints, "load", lambda *_: pytest.fail("there is nothing left to compare"))
    assert main([*arguments, "--texts", "1"]) == 0
    assert "`kv_cache`" in (tmp_path / "report.md").read_text()
    assert main([*arguments, "--texts", "2"]) == 2
    assert "name another --out" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["nobody"], ["production", "--pipeline", "mimi"], ["production", "--texts", "0"]])
def test_what_cannot_be_compared_is_one_line(tmp_path, capsys, wrong):
    assert main(["fidelity", *wrong, "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


# -- calibration


def test_fewer_bits_and_more_noise_are_farther_from_the_weight():
    weight = torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(0))
    by_bits = [float((calibrate.rounded(weight, bits) - weight).norm()) for bits in (8, 6, 4, 3)]
    by_noise = [float((calibrate.noisy(weight, amount) - weight).norm()) for amount in (0.01, 0.1, 0.3)]
    assert by_bits == sorted(by_bits)
    assert by_noise == sorted(by_noise)
    assert calibrate.rounded(weight, 8).shape == weight.shape


def test_damages_grow_within_a_family_and_every_stage_with_weights_has_some():
    found = list(calibrate.damages())
    assert {damage.stage for damage in found} == {"generate_tokens", "tokens_to_mel", "mel_to_wave"}
    assert len({(damage.family, damage.size) for damage in found}) == len(found)


@pytest.mark.slow
def test_a_damage_stands_on_the_curve_and_leaves_the_pipeline_as_it_was(mini):
    listener = calibrate.Listener(mini, create_judges({}))
    one_step = calibrate.Damage("flow_steps", 1, "tokens_to_mel", lambda p: calibrate.take_steps(p, 1))
    for _ in range(2):
        whole, damaged = listener.rows(CASES[0], "tokens_to_mel", (1,), [one_step])
        assert (whole["family"], damaged["family"], damaged["size"]) == ("unharmed", "flow_steps", 1)
        assert damaged["fidelity"]["mel_error"] > 0.05
        assert damaged["similarity"] < whole["similarity"]


@pytest.mark.parametrize("stage", calibrate.SEEDS)
@pytest.mark.slow
def test_a_stage_that_nobody_damaged_is_no_distance_away_and_sounds_the_same(mini, stage):
    nothing = calibrate.Damage("none", 0, stage, lambda _pipeline: None)
    whole, same = calibrate.Listener(mini, create_judges({})).rows(CASES[1], stage, (1,), [nothing])
    assert set(same["fidelity"].values()) == {0}
    assert (same["wer"], same["similarity"]) == (whole["wer"], whole["similarity"])


@pytest.mark.slow
def test_a_t3_that_says_nothing_is_heard_as_nothing(mini):
    mute = calibrate.Damage(
        "mute",
        1,
        "generate_tokens",
        lambda p: p.replace_stage("generate_tokens", lambda s: [torch.zeros(0, dtype=torch.long)] * len(s), by="test"),
    )
    listener = calibrate.Listener(mini, create_judges({}))
    listener.trace = lambda *_: Trace(logits=np.zeros((3, 5)))  # a teacher finds no ear in this one
    _, silent = listener.rows(CASES[1], "generate_tokens", (1,), [mute])
    assert (silent["wer"], silent["similarity"]) == (1.0, 0.0)


def clip(family: str, text: int, wer: float, amount: float | None = None, seed: int = 1) -> dict:
    """A row of clips.jsonl for a damage of size 0.1 to the flow."""
    found = {} if amount is None else {"mel_error": amount, "mel_distance_db": 20 * amount}
    where = {"text_id": f"s{text}", "stage": "tokens_to_mel", "family": family, "seed": seed}
    return where | {"size": 0 if family == "unharmed" else 0.1, "wer": wer, "similarity": 0.9, "fidelity": found}


def test_the_curve_pairs_each_clip_with_the_unharmed_one_of_its_text_and_seed():
    rows = [clip("unharmed", i, 0.01 * i) for i in range(8)] + [
        clip("flow_noise", i, 0.01 * i + 0.2, amount=0.1) for i in reversed(range(8))
    ]
    (entry,) = calibrate.curve(rows)
    assert (entry["family"], entry["size"], entry["texts"], entry["clips"]) == ("flow_noise", 0.1, 8, 8)
    assert entry["wer"] == pytest.approx({"mean": 0.2, "low": 0.2, "high": 0.2})
    assert entry["fidelity"]["mel_error"]["mean"] == pytest.approx(0.1)
    assert calibrate.harm(entry) == "harmed"


def test_work_that_is_done_is_not_done_again():
    done = [clip("unharmed", 0, 0.0)]
    left = [(case.text_id, stage) for case, stage in calibrate.work(done, ["One.", "Two."])]
    assert ("s0", "tokens_to_mel") not in left
    assert len(left) == 2 * len(calibrate.SEEDS) - 1


def damaged(amount: float, wer: tuple[float, float], stage: str = "tokens_to_mel") -> dict:
    """An entry of the curve."""
    figures = {name: {"mean": amount} for name in fidelity.LIMITS[stage]}
    still = {"mean": 0.0, "low": -0.001, "high": 0.001}
    moved = {"mean": sum(wer) / 2, "low": wer[0], "high": wer[1]}
    return {"family": "flow_noise", "stage": stage, "fidelity": figures, "wer": moved, "similarity": still}


CURVE = [
    damaged(0.01, (-0.01, 0.01)),
    damaged(0.02, (-0.01, 0.015)),
    damaged(0.03, (-0.05, 0.05)),  # nobody can tell
    damaged(0.04, (0.03, 0.2)),
    damaged(0.06, (-0.01, 0.01)),  # harmless, but beyond what harmed
]


def test_limits_are_the_largest_harmless_amounts_below_the_smallest_harmful_one():
    found = calibrate.limits(CURVE)
    assert set(found["tokens_to_mel"].values()) == {0.02}
    assert set(found["generate_tokens"].values()) == {None}


def test_the_curve_is_drawn(tmp_path):
    draw(CURVE, calibrate.limits(CURVE), list(map(calibrate.harm, CURVE)), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_the_limits_are_the_committed_curves():
    kept = json.loads((ROOT / "docs/calibration/curve.json").read_text())
    rows, _ = read_rows(ROOT / "docs/calibration/clips.jsonl")
    assert calibrate.limits(kept["curve"]) == kept["limits"]
    assert len(calibrate.curve(rows)) == len(kept["curve"]) == len(list(calibrate.damages()))
    for stage, named in kept["limits"].items():
        for name, most in named.items():
            assert 0.9 * most < fidelity.LIMITS[stage][name] <= most
