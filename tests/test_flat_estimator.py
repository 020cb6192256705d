"""The flat estimator: upstream's numbers in another layout, and upstream's way for what it does not do."""

import pytest
import torch
import torch.nn.functional as F

import optimizations
from harness import checkpoints
from optimizations.flow.estimator import mish, windows
from optimizations.mixed_precision import cast_estimator


@pytest.fixture(scope="module")
def pipeline():
    return checkpoints.load("mini", "cpu")


@pytest.fixture
def mini(pipeline):
    yield pipeline
    pipeline.reset()


def apply(pipeline, name):
    plugin = optimizations.create(name)
    assert plugin.unavailable(pipeline) is None
    plugin.apply(pipeline)
    return plugin


def velocity(pipeline, padding=0):
    """The estimator's answer for two rows of 30 frames, the second with padding at its end."""
    generator = torch.Generator().manual_seed(0)
    frames = [torch.randn(2, 80, 30, generator=generator) for _ in range(3)]
    speaker = torch.randn(2, 80, generator=generator)
    mask = torch.ones(2, 1, 30)
    mask[1, :, 30 - padding :] = 0
    x, mu, cond = frames
    with torch.inference_mode():
        estimator = pipeline.model.s3gen.flow.decoder.estimator
        return estimator.forward(x=x, mask=mask, mu=mu, t=torch.full((2,), 0.3), spks=speaker, cond=cond)


def test_velocities_are_upstreams(mini):
    expected = velocity(mini)
    plugin = apply(mini, "flat_estimator")
    torch.testing.assert_close(velocity(mini), expected, atol=1e-5, rtol=1e-5)
    evidence = plugin.evidence(mini)
    assert evidence.active
    assert evidence.facts["masked_calls_count"] == 0
    mini.reset()
    assert torch.equal(velocity(mini), expected)


def test_in_half_precision_it_is_no_further_from_float32_than_the_layers(mini):
    if reason := optimizations.create("mixed_precision").unavailable(mini):
        pytest.skip(reason)
    exact = velocity(mini)
    apply(mini, "mixed_precision")
    layers = (velocity(mini) - exact).norm()
    apply(mini, "flat_estimator")
    flat = velocity(mini)
    assert flat.dtype == torch.float32
    assert 0 < (flat - exact).norm() < layers


def test_padded_rows_take_upstreams_way(mini):
    expected = velocity(mini, padding=7)
    plugin = apply(mini, "flat_estimator")
    assert torch.equal(velocity(mini, padding=7), expected)
    assert plugin.evidence(mini).facts["masked_calls_count"] == 1


def test_it_says_where_it_does_not_fit(mini, monkeypatch):
    estimator = mini.model.s3gen.flow.decoder.estimator
    plugin = optimizations.create("flat_estimator")
    with monkeypatch.context() as patched:
        patched.setattr(estimator, "static_chunk_size", 50)
        assert "other layers" in plugin.unavailable(mini)
    monkeypatch.setattr(mini, "device", torch.device("cuda"))
    assert "switch mixed_precision on" in plugin.unavailable(mini)
    monkeypatch.setattr(mini, "device", torch.device("mps"))
    assert "needs CUDA" in plugin.unavailable(mini)


def test_its_kernels_say_what_they_do_not_take(mini, monkeypatch):
    """The miniature's weights are on a CPU, where it makes no difference."""
    pytest.importorskip("triton")
    estimator = mini.model.s3gen.flow.decoder.estimator
    monkeypatch.setattr(mini, "device", torch.device("cuda"))
    plugin = optimizations.create("flat_estimator")
    cast_estimator(mini, torch.bfloat16)
    assert plugin.unavailable(mini) is None
    mini.swap(estimator, "in_channels", 300)
    assert "multiples of 16" in plugin.unavailable(mini)
    mini.swap(estimator, "mid_blocks", torch.nn.ModuleList())
    assert "between the first and the last" in plugin.unavailable(mini)


def test_mish_is_pytorchs_also_where_its_exponential_overflows():
    x = torch.cat((torch.linspace(-30, 30, 601), torch.tensor([-200.0, 50.0, 90.0, 200.0])))
    torch.testing.assert_close(mish(x).double(), F.mish(x.double()), atol=2e-6, rtol=1e-6)


def test_windows_make_a_convolution_a_product():
    x, weight = torch.randn(2, 9, 4), torch.randn(6, 4, 3)
    expected = F.conv1d(F.pad(x.transpose(1, 2), (2, 0)), weight).transpose(1, 2)
    product = windows(x, 3, torch.float32) @ weight.transpose(1, 2).flatten(1).T
    torch.testing.assert_close(product, expected, atol=1e-5, rtol=1e-5)
