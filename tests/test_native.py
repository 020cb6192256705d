"""The decode step in C++: what the layers compute, and what it says where it cannot run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from chatterbox.models.s3gen.hifigan import Snake
from llamas import prompts, tiny, walk

import optimizations
from harness import checkpoints
from harness.sampling import TURBO, Sampling
from optimizations.common import cpp
from optimizations.t3.cpp_engine import MAX_ROWS, CppEngine, linear, sample, unsupported
from optimizations.t3.engines import StaticEngine
from optimizations.t3.int8 import in_8_bits
from optimizations.t3.sampling import sample as sample_by_operators
from optimizations.vocoder.cpp_hift import ConvolutionInCpp, SnakeInCpp, fits

INNER = {"intermediate_size": 96}  # no power of two is needed here


@pytest.fixture(scope="module")
def mini():
    pipeline = checkpoints.load("mini", "cpu")
    yield pipeline
    pipeline.reset()


@pytest.mark.parametrize(
    ("rows", "length"),
    [(2, 5), (1, 5), (3, 20), (2, 62)],
    ids=["two rows", "one row", "an odd number of rows", "the cache grows"],
)
@pytest.mark.slow
def test_steps_are_the_static_engines(rows, length):
    model = tiny(**INNER)
    engine = CppEngine(model, 64)
    torch.testing.assert_close(walk(engine, rows, length), walk(StaticEngine(model, 64), rows, length))
    assert engine.n_steps == 3


def test_rows_padded_behind_a_prefix():
    model, pad = tiny(**INNER), torch.tensor([0, 4])
    with torch.inference_mode():
        prefix = StaticEngine(model, 64).prefix(prompts(1, 6))
    expected = walk(StaticEngine(model, 64), 2, 12, pad, prefix)
    torch.testing.assert_close(walk(CppEngine(model, 64), 2, 12, pad, prefix), expected)
    unpadded = walk(StaticEngine(model, 64), 2, 12, None, prefix)
    assert not torch.allclose(unpadded, expected, atol=1e-2), "padding must matter for this test to say anything"


@pytest.mark.parametrize(("rows", "length"), [(2, 5), (3, 20)], ids=["two rows", "an odd number of rows"])
def test_weights_in_8_bits_are_read_as_they_are(rows, length):
    model = in_8_bits(tiny())
    engine = CppEngine(model, 64)
    torch.testing.assert_close(walk(engine, rows, length), walk(StaticEngine(model, 64), rows, length))
    assert engine.n_steps == 3


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("outputs", [64, 67, 3])
def test_a_product_of_any_number_of_outputs(rows, outputs):
    layer, x = torch.nn.Linear(32, outputs, bias=False), torch.randn(rows, 32)
    with torch.inference_mode():
        torch.testing.assert_close(linear(layer, x), layer(x))
        across = torch.randn(32, rows).T  # other strides than the C++ reads
        torch.testing.assert_close(linear(layer, across), layer(across))


@pytest.mark.parametrize("min_p", [0.0, 0.05])
@pytest.mark.parametrize("temperature", [0.3, 0.8, 1.0])
def test_it_draws_what_the_operators_draw(temperature, min_p):
    assert_it_draws_what_the_operators_draw(Sampling(temperature=temperature, min_p=min_p, repetition_penalty=1.4))


@pytest.mark.parametrize(
    "sampling", [Sampling(top_p=0.5), Sampling(top_k=20), replace(TURBO, top_k=60), replace(TURBO, min_p=0.1)]
)
def test_it_filters_as_the_operators_do(sampling):
    assert_it_draws_what_the_operators_draw(sampling)


def assert_it_draws_what_the_operators_draw(sampling):
    generator = torch.Generator().manual_seed(0)
    for seed in range(50):
        logits = 3 * torch.randn(3, 501, generator=generator)
        seen = torch.rand(3, 501, generator=generator) < 0.1
        drawn = []
        for draw in (sample, sample_by_operators):
            torch.manual_seed(seed)
            drawn.append(draw(logits, seen, sampling))
        assert torch.equal(*drawn)


def test_the_likeliest_is_chosen_by_the_operators():
    logits, seen = torch.randn(2, 9), torch.zeros(2, 9, dtype=torch.bool)
    assert torch.equal(sample(logits, seen, Sampling(temperature=0)), logits.argmax(dim=-1, keepdim=True))


@pytest.mark.parametrize(
    ("inputs", "outputs", "taps", "dilation", "padding"),
    [(16, 16, 11, 5, 25), (80, 48, 7, 1, 3), (5, 18, 3, 1, 1), (4, 1, 1, 1, 0), (8, 32, 4, 2, 0), (8, 16, 3, 1, 5)],
)
@pytest.mark.parametrize("length", [7, 23, 400])
def test_convolutions_of_any_length(inputs, outputs, taps, dilation, padding, length):
    layer = torch.nn.Conv1d(inputs, outputs, taps, dilation=dilation, padding=padding, bias=outputs > 1)
    assert fits(layer)
    x = torch.randn(2, inputs, length)
    with torch.inference_mode():
        expected = layer(x)
        torch.testing.assert_close(ConvolutionInCpp(layer)(x), expected, rtol=1e-4, atol=1e-5)
        innermost = x.transpose(1, 2).contiguous().transpose(1, 2)
        result = ConvolutionInCpp(layer)(innermost)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    assert result.stride(1) == 1


@pytest.mark.parametrize("size", [0.01, 1, 100])
def test_snakes_of_any_size(size):
    module = Snake(32)
    module.alpha.data.uniform_(0.05, 4)
    x = size * torch.randn(2, 32, 501)
    with torch.inference_mode():
        turned = (x * module.alpha[:, None]).double()
        exact = x + turned.sin() ** 2 / (module.alpha[:, None] + module.no_div_by_zero)
        # As sine's argument is rounded, so is the sine; as far from it as PyTorch's, which has the same argument.
        torch.testing.assert_close(SnakeInCpp(module)(x).double(), exact, rtol=1e-6, atol=1e-5 * max(1, size / 10))
        torch.testing.assert_close(SnakeInCpp(module)(x), module(x), rtol=1e-6, atol=1e-5 * max(1, size / 10))


def test_modules_that_stay_as_they_are():
    for other in ({"stride": 2}, {"groups": 2}, {"padding_mode": "reflect"}, {"padding": "same"}):
        assert not fits(torch.nn.Conv1d(4, 4, 3, **other))
    assert not fits(Snake(24))
    assert not fits(Snake(32, alpha_logscale=True))
    assert not fits(torch.nn.Linear(4, 4))


def test_watched_heads_and_many_rows_go_through_the_layers():
    model = tiny(**INNER)
    watched = CppEngine(model, 64)
    watched.heads = ((1, 0),)
    walk(watched, 2, 5)
    assert watched.rows[0].shape == (1, 1, 8)
    crowded = CppEngine(model, 64)
    walk(crowded, MAX_ROWS + 1, 5)
    assert watched.n_steps == crowded.n_steps == 0


def test_what_it_cannot_run():
    assert unsupported(tiny(**INNER)) is None
    assert "multiples of 16" in unsupported(tiny(intermediate_size=72))
    assert "every head" in unsupported(tiny(num_key_value_heads=1))
    assert "float32" in unsupported(tiny(torch.bfloat16))
    assert unsupported(in_8_bits(tiny())) is None
    assert "multiples of 16" in unsupported(in_8_bits(tiny(**INNER))), "a row of 96 is 24 words"


def test_without_a_compiler_it_says_so(monkeypatch):
    cpp.load.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert "C++ compiler" in unsupported(tiny(**INNER))


def test_a_compiler_that_fails_is_quoted(tmp_path):
    broken = tmp_path / "broken.cpp"
    broken.write_text("int nothing() { return }")
    with pytest.raises(cpp.CompilerError, match=r"cannot compile broken\.cpp \(.*error"):
        cpp.load(broken)


@pytest.mark.slow
def test_compile_takes_it_on_a_cpu(mini):
    def spoken():
        return mini.synthesize("Good morning, how are you?", next(iter(mini.voices)), 3, n_tokens=20)

    expected = spoken()
    optimizations.create("kv_cache").apply(mini)
    plugin = optimizations.create("compile", {"estimator": False})
    assert plugin.unavailable(mini) is None
    plugin.apply(mini)
    same = spoken()
    assert torch.equal(same.tokens[0], expected.tokens[0])
    np.testing.assert_allclose(same.wave, expected.wave, atol=1e-4)
    evidence = plugin.evidence(mini)
    assert evidence.active, evidence
    assert evidence.facts["native_steps_count"] > 0
    mini.reset()
    np.testing.assert_array_equal(spoken().wave, expected.wave)


@pytest.mark.slow
def test_weights_in_8_bits_on_a_cpu(mini):
    def spoken():
        return mini.synthesize("Good morning, how are you?", next(iter(mini.voices)), 3, n_tokens=20)

    expected = spoken()
    plugins = {}
    for name, params in (("int8_weights", {}), ("kv_cache", {}), ("compile", {"estimator": False})):
        plugins[name] = optimizations.create(name, params)
        assert plugins[name].unavailable(mini) is None
        plugins[name].apply(mini)
    changed = spoken()
    assert np.isfinite(changed.wave).all()
    assert changed.audio_s == pytest.approx(expected.audio_s, abs=0.04)
    assert plugins["compile"].evidence(mini).facts["native_steps_count"] > 0
    evidence = plugins["int8_weights"].evidence(mini)
    assert evidence.active
    assert evidence.facts["linear_layers_now_bytes"] < 0.3 * evidence.facts["linear_layers_before_bytes"]
    assert 0 < evidence.facts["weights_relative_error"] < 0.02
    mini.reset()
    np.testing.assert_array_equal(spoken().wave, expected.wave)


def test_weights_in_8_bits_step_back_where_every_step_would_unpack_them(mini, monkeypatch):
    plugin = optimizations.create("int8_weights")
    monkeypatch.setattr(type(mini.model.t3.hp), "is_multilingual", True)
    assert "guard" in plugin.unavailable(mini)
    monkeypatch.undo()
    cpp.load.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert "C++ compiler" in plugin.unavailable(mini)


@pytest.mark.slow
def test_the_step_in_cpp_steps_back_from_the_guard_unless_there_is_none():
    pipeline = checkpoints.load("mini_multilingual", "cpu")
    for guard, reason in ((True, "guard"), (False, None)):
        for name, parameters in {"alignment_analyzer": {"guard": guard}, "kv_cache": {}}.items():
            optimizations.create(name, parameters).apply(pipeline)
        found = optimizations.create("compile", {"estimator": False}).unavailable(pipeline)
        assert reason in found if reason else found is None
        pipeline.reset()
