"""Turbo: one row, a GPT-2, a flow of two steps; what works on it, and that it says upstream's very words."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from applied import apply_uncaptured
from safetensors.torch import save_file

import optimizations
from harness import checkpoints, turbo
from harness.errors import UserError
from harness.mini import models as mini
from harness.pipeline import Pipeline, Segment, Teacher
from harness.quality import fidelity, replay
from harness.results import find_runs
from harness.sampling import TURBO

TEXT = "The boat is late. We wait."
TEXTS = ["Yes.", "We will meet at the old bridge.", "Where did you leave the keys?"]
SHORT = replace(TURBO, max_new_tokens=24)
GREEDY = replace(SHORT, temperature=0.0)
WAYS: dict[str, dict[str, dict]] = {
    "alignment_analyzer": {"alignment_analyzer": {}},
    "kv_cache": {"kv_cache": {}},
    "kv_cache without prefixes": {"kv_cache": {"prefix_reuse": False}},
    "native": {"kv_cache": {}, "compile": {"estimator": False}},
    "captured": {"kv_cache": {"bucket": 64}, "cuda_graphs": {"poll": 8}},
}


@pytest.fixture(scope="module")
def loaded() -> Pipeline:
    return checkpoints.load("tiny_turbo", "cpu")


@pytest.fixture
def tiny(loaded: Pipeline) -> Iterator[Pipeline]:
    yield loaded
    loaded.reset()
    loaded.sampling = TURBO


def said(
    pipeline: Pipeline, texts: list[str], n_tokens: int | None = None, seed: int = 4, voice: str = "random"
) -> list[list[int]]:
    """Speech tokens of each text; what follows T3 is left out."""
    voice = pipeline.stages["condition"](voice)
    torch.manual_seed(seed)
    with torch.inference_mode():
        spoken = pipeline.stages["generate_tokens"]([Segment(text, voice, i, n_tokens) for i, text in enumerate(texts)])
    return [tokens.tolist() for tokens in spoken]


def mel_of(pipeline: Pipeline, n_tokens: int = 21, seed: int = 5) -> torch.Tensor:
    voice = pipeline.stages["condition"]("random")
    torch.manual_seed(seed)
    with torch.inference_mode():
        return pipeline.stages["tokens_to_mel"]([torch.arange(n_tokens) * 300], [voice])[0]


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_the_baseline_is_upstreams_generate_bit_for_bit(tiny, monkeypatch):
    inference = tiny.model.t3.inference_turbo
    monkeypatch.setattr(tiny.model.t3, "inference_turbo", lambda **kwargs: inference(**kwargs | {"max_gen_len": 23}))
    torch.manual_seed(3)
    expected = tiny.model.generate(TEXT)
    tiny.sampling = SHORT
    utterance = tiny.synthesize(TEXT, "random", seed=3)
    assert torch.equal(torch.from_numpy(utterance.wave), expected[0])
    assert utterance.n_tokens == 24
    assert utterance.audio_s == (24 + 3) / 25, "three tokens of silence end each segment"


def test_nano_is_read_from_its_files(loaded, tmp_path, monkeypatch):
    """Tiny in everything but the files, of which each part takes its own."""
    monkeypatch.setattr(turbo, "NANO_GPT2", turbo.TINY_GPT2)
    monkeypatch.setattr(turbo, "S3Gen", mini.MiniS3Gen)
    monkeypatch.setattr(turbo, "VoiceEncoder", mini.build_voice_encoder)
    monkeypatch.setattr(turbo, "N_TEXT_TOKENS", 256)
    monkeypatch.setattr(turbo.TurboT3Config.__init__, "__defaults__", (turbo.UPSTREAM_GPT2, 256))
    t3 = turbo.T3(turbo.TurboT3Config(turbo.TINY_GPT2))
    for name, part in {"ve": loaded.model.ve, "s3gen_meanflow": loaded.model.s3gen, "t3_nano_v1": t3}.items():
        save_file({key: value.clone() for key, value in part.state_dict().items()}, tmp_path / f"{name}.safetensors")
    loaded.model.tokenizer.save_pretrained(tmp_path)
    loaded.model.conds.save(tmp_path / "conds.pt")
    nano = checkpoints.load("nano", "cpu", checkpoint_dir=tmp_path)
    assert torch.equal(nano.model.t3.speech_head.weight, t3.speech_head.weight)
    assert nano.sampling == TURBO
    assert len(said(nano, [TEXT], n_tokens=4, voice="default")[0]) == 4


def test_nano_is_another_size_alone():
    nano, medium = (turbo.LLAMA_CONFIGS[name] for name in (turbo.NANO_GPT2, turbo.UPSTREAM_GPT2))
    assert {name: nano[name] for name in nano if nano[name] != medium[name]} == {
        "hidden_size": 768,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
    }


def test_a_pinned_length_is_kept_and_a_teacher_is_obeyed(tiny):
    assert [len(tokens) for tokens in said(tiny, TEXTS, n_tokens=7)] == [7, 7, 7]
    for plugins in ({}, WAYS["kv_cache"], WAYS["captured"]):
        apply_uncaptured(tiny, **plugins)
        teacher = Teacher(torch.tensor([5, 4000, 17]))
        segment = Segment(TEXT, tiny.stages["condition"]("random"), 0, 3, teacher)
        with torch.inference_mode():
            (tokens,) = tiny.stages["generate_tokens"]([segment])
        assert tokens.tolist() == [5, 4000, 17]
        heard = torch.stack(teacher.logits)
        if not plugins:
            baseline = heard
        torch.testing.assert_close(heard, baseline, atol=1e-4, rtol=1e-4)
        tiny.reset()


def test_a_short_clip_is_refused_in_one_line(tiny, tmp_path):
    import soundfile

    soundfile.write(tmp_path / "short.wav", torch.zeros(24000).numpy(), 24000)
    with pytest.raises(UserError, match="longer than 5 seconds"):
        tiny.synthesize(TEXT, str(tmp_path / "short.wav"), seed=0, n_tokens=4)


@pytest.mark.parametrize("sampling", [SHORT, GREEDY, replace(SHORT, top_k=0, top_p=1.0, repetition_penalty=1.8)])
@pytest.mark.parametrize("way", WAYS)
def test_it_says_upstreams_very_words(tiny, way, sampling):
    """With upstream's random numbers, whose penalty spares the start token from the second token on."""
    tiny.sampling = sampling
    expected = said(tiny, [TEXT]), said(tiny, [TEXT], n_tokens=30)
    apply_uncaptured(tiny, **WAYS[way])
    assert (said(tiny, [TEXT]), said(tiny, [TEXT], n_tokens=30)) == expected


@pytest.mark.parametrize("ids", [[6561, 5, 6561, 7], [5, 6561, 7, 6561], [6561, 6561], [9, 6600, 6561, 8]])
@pytest.mark.parametrize("way", [{}, WAYS["kv_cache"]], ids=["baseline", "decoder"])
def test_start_tokens_among_the_speech_are_left_out_as_upstream_does(tiny, monkeypatch, way, ids):
    """Random weights say such things; English's rule would drop what is in front of one, and raises at two."""
    tokens = torch.tensor(ids)
    apply_uncaptured(tiny, **way)
    if way:
        monkeypatch.setattr(tiny.stages["generate_tokens"], "_loop", lambda *_: tokens[None])
    else:
        monkeypatch.setattr(tiny.model.t3, "inference_turbo", lambda **_: tokens[None])
    assert said(tiny, [TEXT]) == [tokens[tokens < 6561].tolist()]


@pytest.mark.slow
def test_500_greedy_tokens_are_upstreams(tiny):
    tiny.sampling = GREEDY
    expected = said(tiny, [TEXT], n_tokens=500)
    assert len(expected[0]) == 500
    for way in WAYS.values():
        apply_uncaptured(tiny, **way)
        assert said(tiny, [TEXT], n_tokens=500) == expected, way
        tiny.reset()


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_says_what_each_text_says_alone(tiny, way):
    tiny.sampling = GREEDY
    expected = said(tiny, TEXTS)
    apply_uncaptured(tiny, batching={"size": 4}, **WAYS[way])
    assert said(tiny, TEXTS) == expected


def test_a_voice_opens_with_376_positions_that_are_kept(tiny):
    (plugin,) = apply_uncaptured(tiny, kv_cache={})
    said(tiny, [TEXT, TEXT], n_tokens=4)
    decoder = tiny.stages["generate_tokens"]
    assert decoder.opening() == 376
    assert decoder.n_prefix_hits == 1
    assert plugin.evidence(tiny).active


@pytest.mark.parametrize(
    "plugins", [{"flat_estimator": {}}, {"cuda_graphs": {}}, {"cuda_graphs": {}, "flat_estimator": {}}]
)
@pytest.mark.parametrize("steps", [2, 1])
def test_the_flow_gives_upstreams_mel(tiny, plugins, steps):
    if steps == 1:
        apply_uncaptured(tiny, flow_steps={})
    expected = mel_of(tiny)
    apply_uncaptured(tiny, **plugins)
    assert relative_error(mel_of(tiny), expected) < 1e-4


def test_rows_of_a_flow_are_what_they_are_alone(tiny):
    voice = tiny.stages["condition"]("random")
    rows = [torch.arange(n) * 300 for n in (20, 12)]
    with torch.inference_mode():
        torch.manual_seed(2)
        alone = tiny.stages["tokens_to_mel"](rows, [voice] * 2)
        apply_uncaptured(tiny, batching={"size": 4})
        torch.manual_seed(2)
        together = tiny.stages["tokens_to_mel"](rows, [voice] * 2)
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(together, alone, strict=True))


def test_half_precision_leaves_time_and_solver_alone(tiny):
    exact = mel_of(tiny)
    plugin = optimizations.create("mixed_precision", {"parts": ["t3", "flow"]})
    if reason := plugin.unavailable(tiny):
        pytest.skip(reason)
    plugin.apply(tiny)
    assert 0 < relative_error(mel_of(tiny), exact) < 0.1
    assert plugin.evidence(tiny).active
    apply_uncaptured(tiny, flat_estimator={})
    assert 0 < relative_error(mel_of(tiny), exact) < 0.1


def test_weights_in_8_bits_are_read_as_they_are(tiny):
    tiny.sampling = GREEDY
    int8, *_ = apply_uncaptured(tiny, int8_weights={}, kv_cache={})
    expected = said(tiny, TEXTS)
    assert int8.evidence(tiny).active
    tiny.reset()
    *_, compiled = apply_uncaptured(tiny, int8_weights={}, kv_cache={}, compile={"estimator": False})
    assert said(tiny, TEXTS) == expected
    assert compiled.evidence(tiny).facts["native_steps_count"]


@pytest.mark.slow
def test_fidelity_is_judged_stage_by_stage(tiny):
    cases = [replay.Case(str(i), text, "random", n) for i, (text, n) in enumerate(zip(TEXTS, (6, 11, 8), strict=True))]
    inputs = replay.record(tiny, cases, seed=3)
    reference = replay.replay(tiny, cases, inputs, seed=3)
    assert [trace.logits.shape[0] for trace in reference] == [6, 11, 8]

    def verdicts() -> dict[str, str]:
        traces = replay.replay(tiny, cases, inputs, seed=3)
        compared = [fidelity.compare(one, other) for one, other in zip(reference, traces, strict=True)]
        found = fidelity.summarize(compared, [case.text_id for case in cases])
        return {stage: one["verdict"] for stage, one in found.items()}

    faithful = dict.fromkeys(fidelity.LIMITS, fidelity.FAITHFUL)
    assert verdicts() == faithful
    apply_uncaptured(
        tiny, fused_vocoder={}, flat_estimator={}, kv_cache={}, gpu_watermark={}, cuda_graphs={"tokens": 8}
    )
    assert verdicts() == faithful
    tiny.reset()
    apply_uncaptured(tiny, flow_steps={})
    assert verdicts() == faithful | {"tokens_to_mel": fidelity.DIFFERS}


@pytest.mark.parametrize(
    ("name", "word"), [("quantization", "GPT-2"), ("streaming", "silence"), ("cuda_graphs", "CUDA")]
)
def test_what_cannot_work_says_why(tiny, name, word):
    reason = optimizations.create(name).unavailable(tiny)
    assert word in reason
    assert "\n" not in reason


@pytest.mark.slow
def test_every_optimization_is_active_or_says_why_not(tiny):
    said: dict[str, str] = {}
    for name in optimizations.names():
        plugin = optimizations.create(name, {"estimator": False} if name == "compile" else {})
        reason = plugin.unavailable(tiny)
        if reason is None:
            plugin.apply(tiny)
            tiny.synthesize(TEXT, "random", seed=0, n_tokens=5)
            evidence = plugin.evidence(tiny)
            reason = "" if evidence.active else evidence.reason
        assert reason is not None, name
        said[name] = reason
        tiny.reset()
    active = {name for name, reason in said.items() if not reason}
    assert active >= {
        "alignment_analyzer",
        "kv_cache",
        "inference_mode",
        "flat_estimator",
        "flow_steps",
        "gpu_watermark",
    }
    assert "GPT-2" in said["quantization"]
    assert "silence" in said["streaming"]


@pytest.mark.slow
def test_production_end_to_end_is_twice_as_fast_and_says_of_every_optimization_what_it_did(tmp_path):
    folders = [f"{name}_dir={tmp_path / name}" for name in ("results", "reports")]
    words = ["+combo=production", "pipeline=tiny_turbo", "workload=smoke", "measure=fast", "device=cpu", *folders]
    root = Path(__file__).parent.parent
    ran = subprocess.run([sys.executable, "run_sweep.py", *words], cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (folder,) = find_runs([tmp_path / "results"])
    summary = folder.summary()
    enabled = {name: summary.optimizations[name] for name in summary.enabled}
    assert {one["status"] for one in enabled.values()} <= {"active", "unavailable"}
    assert all(one["reason"] for one in enabled.values() if one["status"] == "unavailable")
    active = {name for name, one in enabled.items() if one["status"] == "active"}
    assert active >= {"kv_cache", "compile", "int8_weights", "flat_estimator", "gpu_watermark"}
    assert summary.comparison["rtf"].value <= 0.5
    stages = json.loads((folder.path / "fidelity.json").read_text())["stages"]
    assert {stage["verdict"] for stage in stages.values()} == {fidelity.FAITHFUL}
