"""The model card's figures: what is said, how it is scored, what an interval is made of, how the pipeline is broken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from harness.errors import UserError
from harness.mini import models
from harness.mini.training import evaluate, export, speech
from harness.mini.training.evaluate import Clip, Heard
from harness.pipeline import Pipeline

SENTENCES = [f"Sentence number {word} is here." for word in ("one", "two", "three", "four", "five", "six", "seven")]


def heard(clip: Clip, wer: float = 0.1, similarity: float = 0.8) -> Heard:
    return Heard(clip, wer, similarity, True, True, 2.0, 2.2, 1.0, 50)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    model, voices, trained = models.load("cpu")
    return Pipeline(model, torch.device("cpu"), voices, name="mini", trained=trained)


def test_every_sentence_is_said_in_every_voice_and_each_damage_is_paired():
    clips = evaluate.plan(SENTENCES, seeds=3, damage=True)
    baseline = {replace(c, variant="") for c in clips if c.variant == "baseline"}
    assert len(baseline) == len(SENTENCES) * len(models.VOICES) * 3
    for variant in (*evaluate.DAMAGES, evaluate.REFERENCE_CLIP, "vocos"):
        said = [replace(c, variant="") for c in clips if c.variant == variant]
        assert set(said) <= baseline
        assert {c.text for c in said} == set(SENTENCES)
        assert {c.voice for c in said} == set(models.VOICES)


def test_summary_names_the_worst_voice_and_keeps_limits():
    clips = evaluate.plan(SENTENCES, seeds=1, damage=False)
    rows = [heard(c, wer=0.3 if c.voice == "slt" else 0.05) for c in clips if c.variant == "baseline"]
    figures = evaluate.summary(rows)
    assert figures["wer"] == pytest.approx(0.1125)
    assert figures["wer_worst_voice"] == figures["wer_slt"] == pytest.approx(0.3)
    assert figures["speech_rate"] == pytest.approx(1.1)
    assert figures["rtf"] == pytest.approx(0.5)
    kept = evaluate.reached(figures)
    assert kept["wer"]
    assert not kept["wer_worst_voice"]


def test_speech_rate_without_flite_is_not_measured():
    row = replace(heard(Clip("baseline", "One.", "awb", 0)), flite_s=None)
    figures = evaluate.summary([row])
    assert figures["speech_rate"] is None
    assert evaluate.reached(figures)["speech_rate"] is None


def test_change_is_paired_and_has_an_interval():
    clips = evaluate.plan(SENTENCES, seeds=1, damage=True)
    rng = np.random.default_rng(0)
    baseline = [heard(c, wer=w) for c in clips if c.variant == "baseline" for w in [rng.uniform(0, 0.2)]]
    before = {replace(h.clip, variant=""): h.wer for h in baseline}
    worse = [heard(c, wer=before[replace(c, variant="")] + 0.1) for c in clips if c.variant == "nf4"]
    wer = evaluate.change(baseline, worse)["wer"]
    assert [wer[key] for key in ("delta", "low", "high")] == pytest.approx([0.1, 0.1, 0.1])


def test_flite_itself_is_understood_and_recognized(flite_listener):
    """The judges and the clips are right before any model is: flite's own speech scores as the real thing."""
    text = "The soup needs a little more salt and perhaps some pepper."
    samples, _ = speech.speak(text, "rms")
    wer, closeness = flite_listener.judge(text, samples.astype(np.float32) / 32768, speech.SAMPLE_RATE)
    assert wer <= 0.2
    assert max(closeness, key=closeness.get) == "rms"
    assert closeness["rms"] > 0.75


def test_silence_misses_every_word_and_resembles_nobody(flite_listener):
    wer, closeness = flite_listener.judge("One two.", np.zeros(24_000, np.float32), 24_000)
    assert wer == 1
    assert set(closeness.values()) == {0.0}


def test_a_clip_is_spoken_and_heard(flite_listener):
    row = flite_listener.hear(Clip("baseline", "Hello.", "awb", 0))
    assert row.audio_s > 0
    assert row.generation_time_s > 0
    assert row.n_tokens > 0
    assert row.flite_s > 0.3


@pytest.fixture(scope="module")
def flite_listener(tmp_path_factory) -> evaluate.Listener:
    """The untrained miniature among clips that flite really spoke."""
    try:
        clips = {voice: export.reference_clip(voice) for voice in models.VOICES}
    except UserError as error:
        pytest.skip(str(error))
    weights = tmp_path_factory.mktemp("weights")
    (weights / "voices").mkdir()
    for voice, clip in clips.items():
        soundfile.write(voice_path(weights, voice), clip, speech.SAMPLE_RATE)
    return evaluate.Listener(weights)


def voice_path(weights: Path, voice: str) -> Path:
    return weights / "voices" / f"{voice}.flac"


def speak(pipeline: Pipeline) -> np.ndarray:
    return pipeline.synthesize("Hello.", "awb", seed=0, n_tokens=8).wave


@pytest.fixture(scope="module")
def healthy(pipeline) -> np.ndarray:
    return speak(pipeline)


SLOW = {"nf4"}  # bitsandbytes compiles its CPU kernels on first use


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in evaluate.DAMAGES]
)
def test_damage_is_in_the_sound_and_is_undone(pipeline, healthy, variant):
    evaluate.DAMAGES[variant](pipeline, models.WEIGHTS)
    damaged = speak(pipeline)
    pipeline.reset()
    assert not np.allclose(damaged, healthy, atol=1e-3)
    np.testing.assert_allclose(speak(pipeline), healthy, atol=1e-4)


def test_a_folder_without_reference_clips_is_refused(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        evaluate.clip_path(tmp_path, "awb")


def test_an_empty_sentence_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no sentences"):
        evaluate.read_sentences(tmp_path / "none.txt")


def test_an_untrained_checkpoint_is_not_evaluated(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--weights", str(tmp_path)])
    assert stop.value.code == 2
    assert "not trained" in capsys.readouterr().err
