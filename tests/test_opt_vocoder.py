"""The plugins that change how mels and waves are computed: vocos, channels_last."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import optimizations
from harness import checkpoints
from harness.errors import UserError
from harness.mini import vocos as mini_vocos
from harness.pipeline import Pipeline, Request
from optimizations import channels_last
from optimizations.channels_last import Timing
from optimizations.vocos import VocosStage, pipeline_mel

TEXT = "Good morning, how are you today?"
N_TOKENS = 5


@pytest.fixture(scope="module")
def mini() -> Pipeline:
    return checkpoints.load("mini", "cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Vocos for the pipeline's mel, as a training stores it, with the weights of a seed."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("vocos") / "vocos.safetensors"
    mini_vocos.save(mini_vocos.build(), path)
    return path


@pytest.fixture(scope="module")
def baseline(mini):
    return speak(mini)


@pytest.fixture(autouse=True)
def _reset(mini):
    yield
    mini.reset()


def speak(pipeline):
    return pipeline.synthesize(TEXT, next(iter(pipeline.voices)), seed=5, n_tokens=N_TOKENS)


def applied(pipeline, name, **params):
    plugin = optimizations.create(name, params)
    plugin.apply(pipeline)
    return plugin


def state(pipeline):
    s3gen = pipeline.model.s3gen
    return {name: (t.clone(), t.stride()) for name, t in s3gen.state_dict().items()}


def assert_same_state(pipeline, before):
    for name, tensor in pipeline.model.s3gen.state_dict().items():
        assert torch.equal(tensor, before[name][0]), name
        assert tensor.stride() == before[name][1], name


def relative_error(wave, reference):
    return np.linalg.norm(wave - reference) / np.linalg.norm(reference)


# -- vocos ---------------------------------------------------------------------------------------------------------


def test_vocos_speaks_in_hifts_place_and_gives_it_back(mini, baseline, checkpoint):
    before = state(mini)
    plugin = applied(mini, "vocos", checkpoint=str(checkpoint))
    changed = speak(mini)
    assert torch.equal(changed.tokens[0], baseline.tokens[0])
    assert changed.wave.shape == baseline.wave.shape
    assert relative_error(changed.wave, baseline.wave) > 0.1  # an untrained vocoder cannot sound like HiFT
    evidence = plugin.evidence(mini)
    assert evidence.active
    assert evidence.facts["hift_calls_count"] == 0
    assert evidence.facts["vocos_calls_count"] == 1
    assert evidence.facts["vocoder_mel"] == evidence.facts["pipeline_mel"]
    assert evidence.facts["hift_bytes"] > evidence.facts["hift_parameters_count"] > 0
    assert evidence.facts["vocos_bytes"] > evidence.facts["vocos_parameters_count"] > 0
    json.dumps(evidence.facts)
    mini.reset()
    assert_same_state(mini, before)
    np.testing.assert_array_equal(speak(mini).wave, baseline.wave)


def test_vocos_is_inactive_where_hift_made_the_wave(mini, checkpoint):
    plugin = applied(mini, "vocos", checkpoint=str(checkpoint))
    assert not plugin.evidence(mini).active
    mini.stages["mel_to_wave"] = mini._mel_to_wave  # somebody went round the plugin
    speak(mini)
    evidence = plugin.evidence(mini)
    assert not evidence.active
    assert evidence.facts["hift_calls_count"] == 1


def test_vocos_batches_mels_of_one_length_and_keeps_their_order(mini, checkpoint):
    fade = mini.model.s3gen.trim_fade
    stage = VocosStage(mini_vocos.load(checkpoint), fade)
    mels = [torch.randn(1, 80, frames) for frames in (6, 4, 6, 4, 5)]
    waves = stage(mels)
    assert stage.n_calls == 3
    for mel, wave in zip(mels, waves, strict=True):
        alone = stage([mel])[0]
        assert wave.shape == (480 * mel.shape[-1],)
        torch.testing.assert_close(wave, alone, rtol=1e-4, atol=1e-5)
        assert wave[: len(fade) // 2].abs().max() == 0


def test_vocos_without_weights_says_how_to_get_them(mini, monkeypatch, tmp_path):
    monkeypatch.setattr("optimizations.vocos.MINI_CHECKPOINT", tmp_path / "none.safetensors")
    plugin = optimizations.create("vocos")
    reason = plugin.unavailable(mini)
    assert "python -m harness.mini.training vocos" in reason
    assert "python -m harness.mini.training.distill_vocos" in reason
    with pytest.raises(UserError, match="distill_vocos"):
        plugin.apply(mini)


def test_vocos_for_another_mel_is_refused_with_both_mels(mini, tmp_path):
    path = tmp_path / "vocos-mel-24khz.safetensors"
    save_file({"backbone.embed.weight": torch.zeros(512, 100, 7), "head.out.weight": torch.zeros(1026, 512)}, path)
    reason = optimizations.create("vocos", {"checkpoint": str(path)}).unavailable(mini)
    assert "100 bins and n_fft 1024" in reason
    assert "80 bins, n_fft 1920, hop 480, 24000 Hz" in reason


def test_vocos_wants_a_file_that_holds_one(mini, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        optimizations.create("vocos", {"checkpoint": str(tmp_path / "gone")}).unavailable(mini)
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(1)}, other)
    with pytest.raises(UserError, match="no Vocos"):
        optimizations.create("vocos", {"checkpoint": str(other)}).unavailable(mini)
    text = tmp_path / "text.safetensors"
    text.write_text("not weights")
    with pytest.raises(UserError, match="no Vocos"):
        optimizations.create("vocos", {"checkpoint": str(text)}).unavailable(mini)


def test_the_pipelines_mel_is_read_from_its_extractor(mini):
    assert str(pipeline_mel(mini)) == "80 bins, n_fft 1920, hop 480, 24000 Hz"


# -- channels_last -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modules", [["vocoder"], ["flow_estimator", "flow_encoder"], list(channels_last.PARTS)])
def test_channels_last_by_name_is_lossless_and_undone(mini, baseline, modules):
    before = state(mini)
    plugin = applied(mini, "channels_last", modules=modules)
    assert not plugin.evidence(mini).active  # nothing ran yet
    changed = speak(mini)
    assert torch.equal(changed.tokens[0], baseline.tokens[0])
    assert relative_error(changed.wave, baseline.wave) < 1e-4
    evidence = plugin.evidence(mini)
    assert evidence.active
    assert evidence.facts["convolutions_converted_count"] > 5
    assert all(strides[1] == 1 for strides in evidence.facts["output_strides"])
    mini.reset()
    assert_same_state(mini, before)
    assert not any("_conv_forward" in module.__dict__ for module in mini.model.s3gen.modules())
    np.testing.assert_array_equal(speak(mini).wave, baseline.wave)


def test_channels_last_auto_converts_what_its_timings_say(mini, baseline, monkeypatch):
    monkeypatch.setattr(channels_last, "PROBE_TOKENS", 4)
    rng = torch.get_rng_state()
    plugin = applied(mini, "channels_last")
    assert torch.equal(torch.get_rng_state(), rng)
    changed = speak(mini)
    assert torch.equal(changed.tokens[0], baseline.tokens[0])
    assert relative_error(changed.wave, baseline.wave) < 1e-4
    evidence = plugin.evidence(mini)
    timings = evidence.facts["timings"]
    assert len({timing["convolution"] for timing in timings}) > 5
    converted = sum(timing["modules_count"] for timing in timings if timing["converted"])
    assert evidence.facts["convolutions_converted_count"] == converted
    assert evidence.active == (converted > 0)
    json.dumps(evidence.facts)


def test_channels_last_auto_says_when_nothing_pays(mini, baseline, monkeypatch):
    monkeypatch.setattr(channels_last, "PROBE_TOKENS", 4)
    monkeypatch.setattr(channels_last, "_compare", lambda *_: Timing(plain_s=1.04, channels_last_s=1.0))
    plugin = applied(mini, "channels_last")
    np.testing.assert_array_equal(speak(mini).wave, baseline.wave)
    evidence = plugin.evidence(mini)
    assert not evidence.active
    assert "none pays" in evidence.reason


def test_channels_last_auto_converts_only_what_pays(mini, monkeypatch):
    monkeypatch.setattr(channels_last, "PROBE_TOKENS", 4)
    times = iter([2.0] + [1.0] * 1000)
    monkeypatch.setattr(channels_last, "_compare", lambda *_: Timing(plain_s=next(times), channels_last_s=1.0))
    plugin = applied(mini, "channels_last")
    speak(mini)
    facts = plugin.evidence(mini).facts
    kept = [timing for timing in facts["timings"] if timing["converted"]]
    assert len(kept) == 1
    assert facts["convolutions_converted_count"] == kept[0]["modules_count"]


def test_channels_last_leaves_what_another_computes(mini, baseline, monkeypatch):
    monkeypatch.setattr(channels_last, "PROBE_TOKENS", 4)
    monkeypatch.setattr(channels_last, "_compare", lambda *_: Timing(plain_s=1.0, channels_last_s=1.0))
    fused = applied(mini, "fused_vocoder")
    applied(mini, "channels_last")
    assert relative_error(speak(mini).wave, baseline.wave) < 1e-4
    assert fused.evidence(mini).facts["convolutions_in_cpp_count"] > 50


@pytest.mark.parametrize("modules", ["vocodr", [], ["flow"]])
def test_channels_last_names_its_parts(mini, modules):
    with pytest.raises(UserError, match="give auto, or a list of one or more of flow_encoder, flow_estimator, vocoder"):
        applied(mini, "channels_last", modules=modules)


@pytest.mark.parametrize("geometry", [{}, {"stride": 3, "padding": 2}, {"dilation": 3, "padding": 6}, {"groups": 4}])
def test_a_converted_convolution_computes_the_same(mini, geometry):
    convolution = nn.Conv1d(8, 12, 5, **geometry)
    x = torch.randn(2, 8, 40)
    plain = convolution(x)
    channels_last._convert(mini, convolution)
    torch.testing.assert_close(convolution(x), plain, rtol=1e-5, atol=1e-5)


# -- together, and on a GPU ----------------------------------------------------------------------------------------


def test_vocos_leaves_no_convolution_of_hift_to_convert(mini, checkpoint, monkeypatch):
    monkeypatch.setattr(channels_last, "PROBE_TOKENS", 4)
    applied(mini, "vocos", checkpoint=str(checkpoint))
    plugin = applied(mini, "channels_last")
    hift = sum(isinstance(module, nn.Conv1d) for module in mini.model.s3gen.mel2wav.modules())
    flow = sum(isinstance(module, nn.Conv1d) for module in mini.model.s3gen.flow.modules())
    assert 0 < sum(plugin._seen.values()) <= flow
    assert hift > 0


@pytest.mark.gpu
@pytest.mark.parametrize("modules", ["auto", list(channels_last.PARTS)], ids=["auto", "all"])
def test_channels_last_on_the_gpu_at_full_size(modules, monkeypatch):
    pipeline = checkpoints.load("random", "cuda")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = pipeline.synthesize(TEXT, "random", seed=5, n_tokens=50)
    plugin = applied(pipeline, "channels_last", modules=modules)
    changed = pipeline.synthesize(TEXT, "random", seed=5, n_tokens=50)
    assert torch.equal(changed.tokens[0], before.tokens[0])
    assert relative_error(changed.wave, before.wave) < 1e-4
    evidence = plugin.evidence(pipeline)
    assert evidence.active or "none pays" in evidence.reason
    pipeline.reset()
    after = pipeline.synthesize(TEXT, "random", seed=5, n_tokens=50)
    assert relative_error(after.wave, before.wave) < 1e-5  # cuDNN need not repeat itself to the bit


@pytest.mark.gpu
def test_vocos_on_the_gpu_lets_hift_wait_on_the_cpu(checkpoint):
    pipeline = checkpoints.load("random", "cuda")
    before = pipeline.synthesize(TEXT, "random", seed=5, n_tokens=20)
    held = torch.cuda.memory_allocated()
    plugin = applied(pipeline, "vocos", checkpoint=str(checkpoint))
    freed = held - torch.cuda.memory_allocated()
    requests = [Request(TEXT, "random", seed=5, n_tokens=20)] * 2
    assert [len(u.wave) for u in pipeline.synthesize_batch(requests)] == [len(before.wave)] * 2
    facts = plugin.evidence(pipeline).facts
    assert freed == pytest.approx(facts["hift_bytes"] - facts["vocos_bytes"], rel=0.05)
    assert facts["vocos_calls_count"] == 1
    pipeline.reset()
    after = pipeline.synthesize(TEXT, "random", seed=5, n_tokens=20)
    assert relative_error(after.wave, before.wave) < 1e-5  # cuDNN need not repeat itself to the bit
