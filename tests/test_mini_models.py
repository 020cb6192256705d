"""The miniature's parts are upstream's, its features are upstream's, and what is written can be read."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch
from chatterbox.models.s3gen.xvector import extract_feature
from chatterbox.models.t3.inference import alignment_stream_analyzer
from chatterbox.models.voice_encoder import VoiceEncConfig
from chatterbox.models.voice_encoder.melspec import melspectrogram

from harness.errors import UserError
from harness.mini import models
from harness.mini.training import export, features, run, tokenizer, train


@pytest.fixture
def untrained(tmp_path):
    """A folder without weights, so that seeded random ones are built."""
    return tmp_path / "nothing"


@pytest.fixture
def waves():
    generator = torch.Generator().manual_seed(0)
    return 0.1 * torch.randn(2, 2 * 16_000, generator=generator)


def test_an_untrained_model_runs_through_upstreams_generate(untrained):
    model, voices, trained = models.load("cpu", weights=untrained)
    assert not trained
    assert set(voices) == set(models.VOICES)
    model.conds = voices["slt"]
    torch.manual_seed(0)
    wave = model.generate("Short words are enough here.")
    assert wave.shape[0] == 1
    assert 0.4 < wave.shape[1] / model.sr < 39
    assert torch.isfinite(wave).all()


def test_untrained_weights_come_from_a_seed(untrained):
    one, two = (models.load("cpu", weights=untrained)[0].t3.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_multilingual_switches_the_analyzer_on(untrained, monkeypatch):
    monkeypatch.setattr(alignment_stream_analyzer, "LLAMA_ALIGNED_HEADS", [(12, 15)])
    model, _, _ = models.load("cpu", multilingual=True, weights=untrained)
    assert model.t3.hp.is_multilingual
    heads = alignment_stream_analyzer.LLAMA_ALIGNED_HEADS
    assert all(layer < len(model.t3.tfmr.layers) and head < 4 for layer, head in heads)


def test_text_tokenizer_spells():
    ids = models.build_tokenizer().encode("Hi, you!")
    assert [models.TEXT_TOKENS[index] for index in ids] == ["H", "i", ",", "[SPACE]", "y", "o", "u", "!"]


def test_features_are_upstreams(waves):
    s3 = models.MiniS3Tokenizer()
    for row in (0, 1):
        alone = waves[row : row + 1]
        assert torch.allclose(features.s3_log_mel(waves)[row], s3.log_mel_spectrogram(alone)[0], atol=1e-5)
        assert torch.allclose(features.campplus_fbank(waves)[row], extract_feature(alone)[0][0], atol=1e-4)
        librosa = melspectrogram(alone[0].numpy(), VoiceEncConfig()).T
        assert np.allclose(features.ve_mel(waves)[row].numpy(), librosa, atol=1e-5)


def test_padding_does_not_change_the_tokenizers_floor(waves):
    padded = torch.nn.functional.pad(waves, (0, 16_000))
    mel = features.s3_log_mel(padded, torch.tensor([32_000, 32_000]))
    assert torch.allclose(mel[..., :195], features.s3_log_mel(waves)[..., :195], atol=1e-4)


def test_training_rounds_as_upstreams_codebook_does(waves):
    torch.manual_seed(1)
    s3 = models.MiniS3Tokenizer().eval()
    s3.quantizer._codebook.project_down.weight.data[: models.ACTIVE_DIGITS] *= 20  # so that digits differ
    with torch.no_grad():
        mel = features.s3_log_mel(waves)
        hidden, _ = s3.encoder(mel, torch.tensor([200, 200]))
        digits = tokenizer.digits_of(s3, hidden)
        codes, _ = s3.forward(waves)
    powers = 3 ** torch.arange(models.ACTIVE_DIGITS)
    ours = ((digits.round() + 1).long() * powers).sum(-1) + models.CODES.start
    assert torch.equal(ours, codes)
    assert len(codes.unique()) > 3
    assert codes.min() >= models.CODES.start
    assert codes.max() < models.CODES.start + models.SYNONYM


def test_no_two_neighbours_are_equal_after_alternation():
    generator = np.random.default_rng(0)
    tokens = generator.integers(models.CODES.start, models.CODES.start + 3, 500)
    starts = np.array([0, 100, 101, 350])
    varied = tokenizer.alternate_runs(tokens, starts)
    inner = np.ones(499, bool)
    inner[starts[1:] - 1] = False
    assert (np.diff(varied)[inner] != 0).all()
    assert ((varied - models.CODES.start) % models.SYNONYM == tokens - models.CODES.start).all()
    assert (varied[starts] == tokens[starts]).all()


def test_a_written_state_reads_back_in_half_precision(tmp_path):
    t3 = models.build_t3()
    unused = torch.ones(models.SPEECH_VOCAB_SIZE, dtype=torch.bool)
    unused[models.CODES.start : models.CODES.stop] = False
    t3.speech_head.weight.data[: models.SPEECH_VOCAB_SIZE][unused] = 0.25
    t3.speech_emb.weight.data[: models.SPEECH_VOCAB_SIZE][unused] = 0.5
    export.write_state(tmp_path / "t3.safetensors", t3.state_dict())
    read = models.read_state(tmp_path / "t3.safetensors")
    for name, tensor in t3.state_dict().items():
        assert read[name].shape == tensor.shape
        assert torch.allclose(read[name], tensor, rtol=1e-3, atol=1e-4), name
    assert (tmp_path / "t3.safetensors").stat().st_size < 12e6


def test_a_clip_becomes_conditionals_of_upstreams_shapes(tmp_path, untrained):
    model, voices, _ = models.load("cpu", weights=untrained)
    clip = np.random.default_rng(0).normal(0, 0.1, int(3.2 * 16_000))
    soundfile.write(tmp_path / "clip.wav", clip, 16_000)
    model.prepare_conditionals(str(tmp_path / "clip.wav"))
    made_up = voices["kal16"]
    for name, tensor in model.conds.gen.items():
        expected = made_up.gen[name]
        assert (tensor is None) == (expected is None)
        if tensor is not None:
            assert tensor.shape == expected.shape, name
            assert tensor.dtype == expected.dtype, name
    assert model.conds.t3.cond_prompt_speech_tokens.shape == made_up.t3.cond_prompt_speech_tokens.shape


def test_an_interrupted_stage_resumes_where_it_stopped(tmp_path):
    lesson = run.Run(tmp_path, "cpu")
    layer = torch.nn.Linear(2, 2)
    adam = torch.optim.Adam(layer.parameters())
    assert lesson.resume("any", {"layer": layer}, {"adam": adam}) == 0
    lesson.checkpoint("any", 7, {"layer": layer}, {"adam": adam})
    other = torch.nn.Linear(2, 2)
    assert lesson.resume("any", {"layer": other}, {"adam": torch.optim.Adam(other.parameters())}) == 7
    assert torch.equal(other.weight, layer.weight)
    lesson.finish("any", {"loss": 1.0})
    assert lesson.finished("any") == {"loss": 1.0}
    assert lesson.resume("any", {"layer": other}, {}) == 0


def test_a_stage_whose_needs_are_missing_says_which(tmp_path):
    with pytest.raises(UserError, match="tokens"):
        train.run_stage("t3", run.Run(tmp_path, "cpu"))
