"""The decode step in C++: what the layers compute, and what it says where it cannot run."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaModel

import optimizations
from harness import checkpoints
from optimizations.engines import StaticEngine
from optimizations.native import library
from optimizations.native.engine import MAX_ROWS, NativeEngine, unsupported

SIZES = {
    "vocab_size": 8,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
}


def transformer(**sizes):
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**SIZES | sizes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def walk(engine, rows, length, pad=None, prefix=None, steps=3):
    """Hidden states of a prompt and of the steps after it, [steps + 1, R, C]."""

    def embeddings(n, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(rows, n, SIZES["hidden_size"], generator=generator)

    with torch.inference_mode():
        hidden = [engine.prefill(embeddings(length, 1), pad, prefix)]
        hidden += [engine.step(embeddings(1, seed)) for seed in range(2, 2 + steps)]
    return torch.stack(hidden)


@pytest.fixture(scope="module")
def mini():
    pipeline = checkpoints.load("mini", "cpu")
    yield pipeline
    pipeline.reset()


@pytest.mark.parametrize(
    ("rows", "length"), [(2, 5), (3, 20), (2, 62)], ids=["two rows", "an odd number of rows", "the cache grows"]
)
def test_steps_are_the_static_engines(rows, length):
    model = transformer()
    engine = NativeEngine(model, 64)
    torch.testing.assert_close(walk(engine, rows, length), walk(StaticEngine(model, 64), rows, length))
    assert engine.n_steps == 3


def test_rows_padded_behind_a_prefix():
    model, pad = transformer(), torch.tensor([0, 4])
    with torch.inference_mode():
        prefix = StaticEngine(model, 64).prefix(torch.randn(1, 6, SIZES["hidden_size"]))
    expected = walk(StaticEngine(model, 64), 2, 12, pad, prefix)
    torch.testing.assert_close(walk(NativeEngine(model, 64), 2, 12, pad, prefix), expected)
    unpadded = walk(StaticEngine(model, 64), 2, 12, None, prefix)
    assert not torch.allclose(unpadded, expected, atol=1e-2), "padding must matter for this test to say anything"


def test_watched_heads_and_many_rows_go_through_the_layers():
    model = transformer()
    watched = NativeEngine(model, 64)
    watched.heads = ((1, 0),)
    walk(watched, 2, 5)
    assert watched.rows[0].shape == (1, 1, 8)
    crowded = NativeEngine(model, 64)
    walk(crowded, MAX_ROWS + 1, 5)
    assert watched.n_steps == crowded.n_steps == 0


def test_what_it_cannot_run():
    assert unsupported(transformer()) is None
    assert "multiples of 16" in unsupported(transformer(intermediate_size=72))
    assert "every head" in unsupported(transformer(num_key_value_heads=1))
    assert "float32" in unsupported(transformer().bfloat16())


def test_without_a_compiler_it_says_so(monkeypatch):
    library.load.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert "C++ compiler" in unsupported(transformer())


def test_a_compiler_that_fails_is_quoted(tmp_path):
    broken = tmp_path / "broken.cpp"
    broken.write_text("int nothing() { return }")
    with pytest.raises(library.CompilerError, match=r"cannot compile broken\.cpp \(.*error"):
        library.load(broken)


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
