"""The shared pipeline: the baseline is upstream's `generate`, and every change can be undone."""

import numpy as np
import pytest
import torch
from chatterbox.models.s3tokenizer import drop_invalid_tokens

from harness import checkpoints
from harness.errors import UserError
from harness.pipeline import STAGES, Pipeline, Request, share_tokens, stop_held_back

TEXT = "Will it rain tomorrow?"


@pytest.fixture(scope="module")
def mini() -> Pipeline:
    return checkpoints.load("mini", "cpu")


def short(pipeline, monkeypatch, limit=40):
    """Keep an untrained model from speaking for 40 s: upstream hard-codes 1000 tokens, so cap its loop."""
    inference = pipeline.model.t3.inference

    def capped(*args, max_new_tokens, **kwargs):
        return inference(*args, max_new_tokens=min(limit, max_new_tokens), **kwargs)

    monkeypatch.setattr(pipeline.model.t3, "inference", capped)


def assert_bit_for_bit(pipeline, monkeypatch):
    short(pipeline, monkeypatch)
    model = pipeline.model
    for seed, voice in enumerate(pipeline.voices):
        utterance = pipeline.synthesize(TEXT, voice, seed)
        model.conds = pipeline.voices[voice]
        torch.manual_seed(seed)
        expected = model.generate(TEXT)
        np.testing.assert_array_equal(utterance.wave, expected[0].numpy())


def test_the_baseline_is_upstreams_generate_bit_for_bit(mini, monkeypatch):
    assert_bit_for_bit(mini, monkeypatch)


@pytest.mark.slow
def test_the_full_size_baseline_is_upstreams_generate_bit_for_bit(monkeypatch):
    assert_bit_for_bit(checkpoints.load("random", "cpu"), monkeypatch)


@pytest.mark.slow
def test_a_reference_clip_goes_upstreams_way(mini, monkeypatch, tmp_path):
    import soundfile

    short(mini, monkeypatch)
    seconds = np.arange(3 * 16000) / 16000
    clip = tmp_path / "voice.wav"
    soundfile.write(clip, 0.3 * np.sin(2 * np.pi * 140 * seconds) * np.sin(2 * np.pi * 2 * seconds), 16000)
    utterance = mini.synthesize(TEXT, str(clip), seed=3)
    torch.manual_seed(3)
    expected = mini.model.generate(TEXT, audio_prompt_path=str(clip))
    np.testing.assert_array_equal(utterance.wave, expected[0].numpy())


@pytest.mark.parametrize("name", ["mini", pytest.param("mini_multilingual", marks=pytest.mark.slow)])
def test_pinned_synthesis_speaks_for_exactly_that_long(name):
    pipeline = checkpoints.load(name, "cpu")
    for n_tokens in (5, 23):
        utterance = pipeline.synthesize(TEXT, next(iter(pipeline.voices)), seed=0, n_tokens=n_tokens)
        assert utterance.n_tokens == n_tokens
        assert len(utterance.wave) == n_tokens * 960
        assert utterance.audio_s == n_tokens / 25
    assert not pipeline.model.t3.speech_head._forward_hooks


def test_stages_are_timed_and_add_up(mini):
    utterance = mini.synthesize(TEXT, next(iter(mini.voices)), seed=0, n_tokens=10)
    assert set(utterance.stages_s) == set(STAGES)
    assert 0 < sum(utterance.stages_s.values()) <= utterance.generation_time_s
    assert utterance.stages_s["generate_tokens"] > 0


def test_a_batch_returns_one_utterance_per_request(mini):
    voices = list(mini.voices)
    requests = [Request("Yes.", voices[0], 1, 6), Request("No, thank you.", voices[-1], 1, 9)]
    utterances = mini.synthesize_batch(requests)
    assert [u.n_tokens for u in utterances] == [6, 9]
    assert mini.synthesize_batch([]) == []


def test_every_change_is_undone_by_reset(mini):
    voice = next(iter(mini.voices))
    before = mini.synthesize(TEXT, voice, seed=2, n_tokens=8)
    calls = []
    mini.wrap_stage("mel_to_wave", lambda stage: lambda mels: [wave * 0 for wave in stage(mels)])
    mini.call_between(calls.append)
    mini.swap(mini.model.t3, "compiled", "changed")
    assert abs(mini.synthesize(TEXT, voice, seed=2, n_tokens=8).wave).max() < 1e-6
    assert calls == list(STAGES)
    mini.reset()
    np.testing.assert_array_equal(mini.synthesize(TEXT, voice, seed=2, n_tokens=8).wave, before.wave)
    assert calls == list(STAGES)


def test_two_plugins_that_replace_one_stage_are_refused_by_name(mini):
    mini.replace_stage("mel_to_wave", lambda mels: mels, by="one")
    with pytest.raises(UserError, match="two and one both replace the stage mel_to_wave"):
        mini.replace_stage("mel_to_wave", lambda mels: mels, by="two")
    mini.reset()


@pytest.mark.parametrize(
    ("total", "weights", "shares"),
    [(10, [1, 1, 2], [2, 3, 5]), (7, [3], [7]), (3, [100, 1, 1], [1, 1, 1]), (250, [40, 60], [100, 150])],
)
def test_tokens_are_shared_in_proportion_and_none_is_lost(total, weights, shares):
    assert share_tokens(total, weights) == shares
    assert sum(share_tokens(total, weights)) == total


@pytest.mark.parametrize(
    "ids", [[5, 7], [6561, 5, 7, 6562], [5, 6561, 7], [5, 7, 6562, 8], [6562, 5, 6561, 7], [5, 8000, 7], [6562]]
)
def test_speech_is_what_upstream_keeps(mini, ids):
    kept = drop_invalid_tokens(torch.tensor(ids))
    assert mini.speech_only(torch.tensor(ids)).tolist() == kept[kept < 6561].tolist()


@pytest.mark.parametrize(
    ("ids", "speech"),
    [([6561, 5, 6561, 7], [5, 7]), ([5, 6562, 6562], [5]), ([6561, 4, 6562, 6561, 9, 6562], [4]), ([6561, 6561], [])],
)
def test_of_several_starts_and_stops_the_first_counts(mini, ids, speech):
    with pytest.raises(TypeError):
        drop_invalid_tokens(torch.tensor(ids))
    assert mini.speech_only(torch.tensor(ids)).tolist() == speech


def test_held_back_stop_survives_guidance(mini):
    """Guidance subtracts logits: infinities would turn into NaN there."""
    t3 = mini.model.t3
    with stop_held_back(t3):
        logits = t3.speech_head(torch.randn(2, t3.dim))
    guided = logits[0] + 0.5 * (logits[0] - logits[1])
    assert torch.isfinite(guided).all()
    assert guided.argmax() < 6561


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("gigantic", "cpu"), "unknown pipeline 'gigantic'"),
        (("mini", "cuda"), "sees no CUDA device"),
        (("chatterbox", "cpu", "/nowhere"), "lacks ve.safetensors, t3_cfg.safetensors"),
        (("multilingual", "cpu", "/nowhere"), "lacks ve.pt"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(args, says):
    if args[1] == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has the device that the test wants to miss")
    with pytest.raises(UserError, match=says) as error:
        checkpoints.load(*args)
    assert "\n" not in str(error.value)
