"""What goes beyond the campaign's twelve: conditioning_cache, flow_steps, fused_vocoder, gpu_watermark."""

import numpy as np
import pytest
import soundfile
import torch

import optimizations
from harness import checkpoints
from harness.errors import UserError
from optimizations.common import cpp
from optimizations.watermark.perth import mark

TEXT, N_TOKENS = "Leave the window open tonight.", 20


@pytest.fixture(scope="module")
def mini():
    return checkpoints.load("mini", "cpu")


@pytest.fixture(scope="module")
def baseline(mini):
    return speak(mini)


def speak(pipeline, voice=None):
    return pipeline.synthesize(TEXT, voice or next(iter(pipeline.voices)), seed=6, n_tokens=N_TOKENS)


def apply(pipeline, name, **params):
    plugin = optimizations.create(name, params)
    assert plugin.unavailable(pipeline) is None
    plugin.apply(pipeline)
    return plugin


def write_clip(path, pitch):
    seconds = np.arange(3 * 16000) / 16000
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * pitch * seconds) * np.sin(4 * np.pi * seconds), 16000)


@pytest.fixture(autouse=True)
def back_to_the_baseline(mini, baseline):
    yield
    mini.reset()
    np.testing.assert_array_equal(speak(mini).wave, baseline.wave)


def test_fused_vocoder_gives_the_same_wave_without_weight_norm(mini, baseline):
    plugin = apply(mini, "fused_vocoder")
    wave = speak(mini).wave
    assert np.linalg.norm(wave - baseline.wave) < 1e-4 * np.linalg.norm(baseline.wave)
    evidence = plugin.evidence(mini)
    assert evidence.active
    assert evidence.facts["convolutions_folded_count"] > 50
    assert evidence.facts["convolutions_in_cpp_count"] > 50
    assert evidence.facts["weight_norm_calls_count"] == 0


def test_fused_vocoder_does_without_a_compiler(mini, baseline, monkeypatch):
    cpp.load.cache_clear()
    monkeypatch.setenv("PATH", "")
    plugin = apply(mini, "fused_vocoder")
    wave = speak(mini).wave
    assert np.linalg.norm(wave - baseline.wave) < 1e-4 * np.linalg.norm(baseline.wave)
    assert plugin.evidence(mini).facts["convolutions_in_cpp_count"] == 0


def test_fused_vocoder_steps_back_where_another_vocoder_speaks(mini):
    mini.replace_stage("mel_to_wave", mini.stages["mel_to_wave"], by="some_vocoder")
    assert "some_vocoder" in optimizations.create("fused_vocoder").unavailable(mini)


@pytest.mark.parametrize("steps", [pytest.param(4, marks=pytest.mark.slow), 6])
def test_flow_steps_are_counted_not_believed(mini, steps):
    plugin = apply(mini, "flow_steps", steps=steps)
    assert speak(mini).n_tokens == N_TOKENS
    evidence = plugin.evidence(mini)
    assert evidence.active
    assert evidence.facts["solver_steps_count"] == steps


def test_ten_flow_steps_are_upstream_itself(mini, baseline):
    plugin = apply(mini, "flow_steps", steps=10)
    np.testing.assert_array_equal(speak(mini).wave, baseline.wave)
    assert not plugin.evidence(mini).active


def test_the_device_watermark_is_found_by_upstreams_detector(mini, baseline):
    plugin = apply(mini, "gpu_watermark")
    wave = speak(mini).wave
    assert len(wave) == len(baseline.wave)
    assert wave.dtype == np.float32
    assert mini.model.watermarker.get_watermark(wave, sample_rate=24000) == 1
    assert np.linalg.norm(wave - baseline.wave) < 0.1 * np.linalg.norm(baseline.wave)
    evidence = plugin.evidence(mini)
    assert evidence.active
    assert evidence.facts["detector_on_marked"] > 0.9


def test_the_mark_is_upstreams_where_nothing_is_resampled(mini, baseline):
    marker = mini.model.watermarker
    rate, wave = marker.perth_net.hp.sample_rate, baseline.wave
    expected = marker.apply_watermark(wave, sample_rate=rate)
    hop = marker.perth_net.hp.hop_size
    padded = torch.nn.functional.pad(torch.from_numpy(wave), (0, 5 * hop - len(wave) % hop))
    with torch.inference_mode():
        marked, (length,) = mark(marker.perth_net, padded[None], torch.tensor([len(wave)]))
    assert length == len(expected)
    np.testing.assert_allclose(marked[0, :length].numpy(), expected, atol=1e-6)
    assert not marked[0, length:].any()
    assert np.abs(expected[: len(wave)] - wave[: len(expected)]).max() > 1e-3


@pytest.mark.parametrize("fills_up", [False, True])
def test_waves_of_any_lengths_are_marked_together_as_they_are_alone(mini, fills_up):
    plugin = apply(mini, "gpu_watermark")
    plugin._marker.fills_up = fills_up
    generator = torch.Generator().manual_seed(0)
    loudness = torch.linspace(0.02, 0.2, 9600)  # so that the threshold of loud frames is each row's own
    waves = [loudness[:n] * torch.randn(n, generator=generator) for n in (9600, 4800, 5555)]
    together = plugin._marker(waves)
    for wave, marked in zip(waves, together, strict=True):
        assert len(marked) == len(wave)
        np.testing.assert_allclose(marked, plugin._marker([wave])[0], atol=1e-6)


@pytest.mark.slow
def test_conditioning_cache_goes_by_content(mini, tmp_path):
    clip, copy = tmp_path / "voice.wav", tmp_path / "same.wav"
    write_clip(clip, 140)
    copy.write_bytes(clip.read_bytes())
    expected = speak(mini, str(clip))
    plugin = apply(mini, "conditioning_cache", size=1)
    assert not plugin.evidence(mini).active
    for path in (clip, copy, clip):
        np.testing.assert_array_equal(speak(mini, str(path)).wave, expected.wave)
    assert plugin.evidence(mini).facts == {"clips_analysed_count": 1, "calls_from_cache_count": 2}
    write_clip(clip, 90)  # another voice under the same name
    assert not np.array_equal(speak(mini, str(clip)).wave, expected.wave)
    assert plugin.n_misses == 2


@pytest.mark.parametrize(
    ("name", "params", "says"),
    [("flow_steps", {"steps": 0}, "steps=0"), ("conditioning_cache", {"size": 0}, "size=0")],
)
def test_bad_parameters_are_named(mini, name, params, says):
    with pytest.raises(UserError, match=says):
        optimizations.create(name, params).apply(mini)


def test_the_flow_takes_no_more_steps_than_upstream(mini):
    optimizations.create("flow_steps", {"steps": 10})
    with pytest.raises(UserError, match=f"steps={11}"):
        optimizations.create("flow_steps", {"steps": 11})
