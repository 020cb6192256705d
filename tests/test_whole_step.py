"""The decode step in one launch: it compiles without a GPU, and on one computes what the layers do."""

from copy import deepcopy
from importlib import import_module

import pytest
import torch
from chatterbox.models.t3.llama_configs import LLAMA_CONFIGS
from llamas import relative_error, tiny, tiny_gpt2
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from optimizations.t3 import whole_step
from optimizations.t3.blocks import blocks_of, by_outputs
from optimizations.t3.engines import StaticEngine
from optimizations.t3.int8 import in_8_bits

HOPPER = 227 * 1024
"""Shared memory that a program may have on an H100."""


@pytest.mark.parametrize(
    ("layers", "gpt2", "rows", "capability"),
    [
        (30, False, 2, (9, 0)),
        (24, True, 1, (9, 0)),
        pytest.param(30, False, 1, (9, 0), marks=pytest.mark.slow),
        pytest.param(24, True, 2, (9, 0), marks=pytest.mark.slow),
        pytest.param(30, False, 2, (10, 0), marks=pytest.mark.slow),
    ],
)
def test_it_compiles_for_full_size_in_the_memory_that_is_reserved(rows, layers, gpt2, capability):
    sizes = whole_step.sizes_of(layers, 4096, 16, rows, gpt2, HOPPER)
    assert sizes["SHARED_BYTES"] <= HOPPER
    assert sizes["STAGES"] >= 20, "a layer ahead"
    assert whole_step.compiled(sizes, capability).startswith(b"\x7fELF")
    with pytest.raises(RuntimeError, match="SHARED_BYTES"):
        whole_step.compiled(sizes | {"SHARED_BYTES": sizes["SHARED_BYTES"] - 8000}, capability)


@pytest.mark.parametrize("make", [tiny, tiny_gpt2])
def test_a_cpu_is_told_what_it_lacks(make):
    assert "compute capability 9.0" in whole_step.unsupported(blocks_of(make()), torch.device("cpu"), True)


def test_a_norm_is_folded_into_the_product_behind_it_and_keeps_no_weights():
    model = in_8_bits(tiny_gpt2())
    step = whole_step.WholeStep(blocks_of(model), torch.device("cpu"))
    assert not step.numbers.requires_grad, "what they were made of would be kept"
    layer, x, width, inner = model.h[0], torch.randn(3, 64), 64, 256
    sizes = [width, width, 3 * width, width, inner, width, 3 * width, 3 * width, inner, inner, width, width]
    numbers = step.numbers[0].split(sizes)
    of_gain, shift = numbers[6:8]
    weights, scale = layer.attn.c_attn.unpacked(), (x.var(dim=1, unbiased=False) + layer.ln_1.eps).rsqrt()[:, None]
    folded = ((x * layer.ln_1.weight) @ weights.T - x.mean(dim=1)[:, None] * of_gain) * scale + shift
    torch.testing.assert_close(folded, layer.attn.c_attn(layer.ln_1(x)), atol=1e-4, rtol=1e-4)


def large(gpt2: bool, layers: int = 4):
    """Layers of full size with random weights in 8 bits; and the same in float32."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        if gpt2:
            model = GPT2Model(GPT2Config(**LLAMA_CONFIGS["GPT2_medium"] | {"n_layer": layers})).eval()
        else:
            model = LlamaModel(LlamaConfig(**LLAMA_CONFIGS["Llama_520M"] | {"num_hidden_layers": layers})).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or ("ln_" in name and name.endswith("weight")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        parameter.data = parameter.data.bfloat16()
    for weight, laid_out in by_outputs(model):
        weight.data = laid_out
    return in_8_bits(model)


def engines(model):
    """One in one launch, one through the layers in float32."""
    kernels = import_module("optimizations.t3.triton_engine").engine_for(model)
    return kernels, StaticEngine(deepcopy(model).float())


def with_the_same_cache(engine, exact, rows, filled, pad=None):
    """Both at the slot `filled`, behind the same random keys and values."""
    with torch.inference_mode():
        for each in (engine, exact):
            each.reserve(rows, 1279)
            each.position.fill_(filled)
            each._set_padding(pad)
        for cache, copied in zip((*engine.keys, *engine.values), (*exact.keys, *exact.values), strict=True):
            cache.normal_()
            copied.copy_(cache)


@pytest.mark.gpu
@pytest.mark.parametrize("gpt2", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_gpu_a_step_is_the_layers(gpt2, rows):
    engine, exact = engines(large(gpt2))
    for filled in (0, 1, 5, 64, 300, 513, 700, 1200):
        with_the_same_cache(engine, exact, rows, filled)
        embeds = torch.randn(rows, 1, 1024, device="cuda")
        assert engine.why_several_launches(rows) is None
        with torch.inference_mode():
            hidden, expected = engine.static_step(embeds, 1280), exact.static_step(embeds, 1280)
        assert relative_error(hidden, expected) < 0.005
        for cache, copied in zip((*engine.keys, *engine.values), (*exact.keys, *exact.values), strict=True):
            assert relative_error(cache[:, :, filled], copied[:, :, filled]) < 0.005


@pytest.mark.gpu
@pytest.mark.parametrize("gpt2", [False, True])
def test_gpu_padded_rows_are_the_layers(gpt2):
    engine, exact = engines(large(gpt2))
    with_the_same_cache(engine, exact, 2, 200, torch.tensor([70, 3], device="cuda"))
    embeds = torch.randn(2, 1, 1024, device="cuda")
    with torch.inference_mode():
        assert relative_error(engine.static_step(embeds, 1280), exact.static_step(embeds, 1280)) < 0.005


@pytest.mark.gpu
@pytest.mark.parametrize("gpt2", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_gpu_a_step_repeats_bit_for_bit(gpt2, rows):
    """Among captured steps in close succession, of one row and of two in turn: a number read too early would show."""
    engine, exact = engines(large(gpt2, layers=8))
    with_the_same_cache(engine, exact, rows, 333)
    embeds, graph = torch.randn(rows, 1, 1024, device="cuda"), torch.cuda.CUDAGraph()
    with torch.inference_mode():
        first = engine.static_step(embeds, 1280).clone()
        engine.static_step(embeds[:1], 1280)
        with torch.cuda.graph(graph):
            hidden = [engine.static_step(embeds, 1280) for _ in range(8)]
        for _ in range(100):
            graph.replay()
            assert all(torch.equal(each, first) for each in hidden)


@pytest.mark.gpu
def test_gpu_what_it_does_not_take_goes_through_the_kernels():
    engine, _ = engines(large(gpt2=False, layers=2))
    engine.reserve(3, 100)
    assert "2 rows" in engine.why_several_launches(3)
    engine.heads = ((0, 1),)
    assert "guard" in engine.why_several_launches(2)
