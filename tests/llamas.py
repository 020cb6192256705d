"""Transformers too small to say anything, a Llama and a GPT-2, and a walk of an engine through them."""

import torch
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from optimizations.t3.blocks import by_outputs
from optimizations.t3.engines import StaticEngine

WIDTH = 64


def tiny(dtype=torch.float32, **sizes):
    """Two layers of random weights; `sizes` as the configuration names them."""
    usual = {
        "vocab_size": 8,
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-5,
    }
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**usual | sizes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.1)
        parameter.data = parameter.data.to(dtype)
    return model


def tiny_gpt2(dtype=torch.float32):
    """The same of a GPT-2, its weights laid out as our steps read them."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=8, n_embd=WIDTH, n_head=2, n_layer=2, n_positions=400, activation_function="gelu_new"
    )
    model = GPT2Model(config).eval()
    for name, parameter in model.named_parameters():
        if "ln_" in name and name.endswith("weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.1)
        parameter.data = parameter.data.to(dtype)
    for weight, laid_out in by_outputs(model):
        weight.data = laid_out
    return model


def prompts(rows, length, seed=1):
    return torch.randn(rows, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def walk(engine, rows, length, pad=None, prefix=None, steps=3):
    """Hidden states of a prompt and of the steps after it, [steps + 1, R, C]."""
    with torch.inference_mode():
        hidden = [engine.prefill(prompts(rows, length), pad, prefix)]
        hidden += [engine.step(prompts(rows, 1, seed)) for seed in range(2, 2 + steps)]
    return torch.stack(hidden)


def relative_error(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def assert_padding_counts(model, fused):
    """Rows of which one is padded, behind a prefix: the engine that `fused` makes goes as the static one does."""
    pad = torch.tensor([0, 4])
    with torch.inference_mode():
        prefix = StaticEngine(model, 64).prefix(prompts(1, 6, seed=9))
    expected = walk(StaticEngine(model, 64), 2, 12, pad, prefix)
    torch.testing.assert_close(walk(fused(model), 2, 12, pad, prefix), expected, atol=1e-5, rtol=1e-5)
    unpadded = walk(StaticEngine(model, 64), 2, 12, None, prefix)
    assert relative_error(unpadded, expected) > 1e-2, "padding must matter for this test to say anything"
