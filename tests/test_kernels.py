"""The Triton kernels of the decode step: in Triton's interpreter on a CPU, and as they are on a GPU."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from optimizations.engines import StaticEngine

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a child, whose Triton interprets")
TINY = {
    "vocab_size": 8,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
}


@pytest.mark.skipif(INTERPRETED, reason="this is the child")
def test_kernels_in_the_interpreter():
    """Triton decides on import whether it compiles or interprets, and other tests have imported it by now."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "not gpu and not slow", __file__]
    child = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout + child.stderr


def tiny(dtype=torch.float32):
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**TINY)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.1)
        parameter.data = parameter.data.to(dtype)
    return model


def fused(model, bucket=64):
    """The engine with tiles as large as the tiny model allows: the interpreter takes its time for every program."""
    engine = import_module("optimizations.kernels.engine")
    tiles = {name: engine.Tile(16, 1) for name in engine.TILES} | {"split_attention": engine.Tile(64, 1)}
    return engine.FusedEngine(model, bucket, tiles)


def relative_error(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def prompts(rows, length, width=TINY["hidden_size"], seed=1):
    return torch.randn(rows, length, width, generator=torch.Generator().manual_seed(seed))


def walk(engine, rows, length, pad=None, prefix=None, steps=2):
    """Hidden states of a prompt and of the steps after it, [steps + 1, R, C]."""
    with torch.inference_mode():
        hidden = [engine.prefill(prompts(rows, length), pad, prefix)]
        hidden += [engine.step(prompts(rows, 1, seed=seed)) for seed in range(2, 2 + steps)]
    return torch.stack(hidden)


@interpreted
@pytest.mark.parametrize("length", [5, 600])  # fewer slots than one split takes at once; more than all of them do
def test_steps_are_the_static_engines(length):
    model = tiny()
    expected = walk(StaticEngine(model, 64), 2, length)
    torch.testing.assert_close(walk(fused(model), 2, length), expected, atol=1e-5, rtol=1e-5)


@interpreted
def test_rows_padded_behind_a_prefix():
    model, pad = tiny(), torch.tensor([0, 4, 0, 4])
    with torch.inference_mode():
        prefix = StaticEngine(model, 64).prefix(prompts(1, 6, seed=9))
    expected = walk(StaticEngine(model, 64), 4, 12, pad, prefix)
    torch.testing.assert_close(walk(fused(model), 4, 12, pad, prefix), expected, atol=1e-5, rtol=1e-5)
    unpadded = walk(fused(model), 4, 12, None, prefix)
    assert relative_error(unpadded, expected) > 1e-2, "padding must matter for this test to say anything"


@interpreted
def test_half_precision_stays_closer_to_float32_than_the_layers_do():
    exact = walk(StaticEngine(tiny(), 64), 2, 20)
    layers = walk(StaticEngine(tiny(torch.bfloat16), 64), 2, 20)
    kernels = walk(fused(tiny(torch.bfloat16)), 2, 20)
    assert kernels.dtype == torch.bfloat16
    assert relative_error(kernels[1:], exact[1:]) < relative_error(layers[1:], exact[1:]) < 0.05


@interpreted
def test_watched_heads_give_their_rows():
    model = tiny()
    engines = [StaticEngine(model, 64), fused(model)]
    for engine in engines:
        engine.heads = ((0, 1), (1, 0))
        walk(engine, 4, 9, torch.tensor([0, 3, 0, 3]))
    for row, expected in zip(engines[1].rows, engines[0].rows, strict=True):
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)


@interpreted
def test_many_rows_go_through_the_layers():
    model = tiny()
    torch.testing.assert_close(walk(fused(model), 18, 4), walk(StaticEngine(model), 18, 4), atol=1e-5, rtol=1e-5)


@interpreted
def test_head_takes_a_vocabulary_of_any_size():
    engine = import_module("optimizations.kernels.engine")
    head, hidden = torch.nn.Linear(64, 37, bias=False), torch.randn(2, 64)
    torch.testing.assert_close(engine.head_logits(head, hidden), head(hidden), atol=1e-5, rtol=1e-5)


@interpreted
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: setattr(m.config, "num_key_value_heads", 1), "key heads"),
        (lambda m: setattr(m.config, "intermediate_size", 96), "powers of two"),
        (lambda m: m.layers[1].mlp.half(), "one floating dtype"),
        (lambda m: setattr(m.layers[0].mlp, "up_proj", type("Linear4bit", (torch.nn.Linear,), {})(64, 128)), "quanti"),
    ],
)
def test_what_the_kernels_cannot_run_is_named(change, says):
    unsupported = import_module("optimizations.kernels.engine").unsupported
    model = tiny()
    assert unsupported(model) is None
    change(model)
    assert says in unsupported(model)
