"""The Triton kernels of a GPT-2's decode step: in Triton's interpreter on a CPU, and as they are on a GPU."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from applied import apply_one, spoken
from interpreter import interpreted
from llamas import assert_padding_counts, relative_error, tiny_gpt2, walk

from harness import checkpoints
from harness.sampling import TURBO
from optimizations.common.modules import cast_parameters
from optimizations.t3.blocks import by_outputs
from optimizations.t3.engines import StaticEngine
from optimizations.t3.int8 import in_8_bits


@pytest.fixture
def fused():
    """Makes engines of few large programs, as the interpreter takes its time for every one."""
    engine = import_module("optimizations.t3.triton_engine")
    tiles = {name: engine.Tile(64 if name == "attention" else 32, 1) for name in engine.GPT2_TILES}
    return lambda model: engine.engine_for(model, 64, tiles)


@interpreted
@pytest.mark.parametrize(("rows", "length"), [(1, 70), pytest.param(3, 5, marks=pytest.mark.slow)])
def test_steps_are_the_static_engines(fused, rows, length):
    model = tiny_gpt2()
    expected = walk(StaticEngine(model, 64), rows, length)
    torch.testing.assert_close(walk(fused(model), rows, length), expected, atol=1e-5, rtol=1e-5)


@interpreted
@pytest.mark.slow
def test_weights_in_8_bits_are_read_as_they_are(fused):
    model = in_8_bits(tiny_gpt2())
    expected = walk(StaticEngine(model, 64), 1, 5)
    torch.testing.assert_close(walk(fused(model), 1, 5), expected, atol=1e-5, rtol=1e-5)


@interpreted
@pytest.mark.slow
def test_rows_padded_behind_a_prefix(fused):
    assert_padding_counts(tiny_gpt2(), fused)


@interpreted
@pytest.mark.slow
def test_half_precision_stays_closer_to_float32_than_the_layers_do(fused):
    exact = walk(StaticEngine(tiny_gpt2(), 64), 1, 20)
    layers = walk(StaticEngine(tiny_gpt2(torch.bfloat16), 64), 1, 20)
    kernels = walk(fused(tiny_gpt2(torch.bfloat16)), 1, 20)
    assert kernels.dtype == torch.float32, "the last norm is not rounded"
    assert relative_error(kernels[1:], exact[1:]) < relative_error(layers[1:], exact[1:]) < 0.05


@interpreted
def test_the_heads_bias_is_added():
    engine = import_module("optimizations.t3.triton_engine")
    for rows in (1, 2, 3):
        head, hidden = torch.nn.Linear(64, 37), torch.randn(rows, 64)
        torch.testing.assert_close(engine.head_logits(head, hidden), head(hidden), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@interpreted
def test_plugin_speaks_the_baselines_tokens_through_the_kernels(monkeypatch):
    engine = import_module("optimizations.t3.triton_engine")
    for name in engine.GPT2_TILES:
        monkeypatch.setitem(engine.GPT2_TILES, name, engine.Tile(32 if name == "layernorm_qkv" else 128, 1))
    turbo = checkpoints.load("tiny_turbo", "cpu")
    expected = spoken(turbo, 3)
    apply_one(turbo, "kv_cache")
    apply_one(turbo, "compile", decode="triton", estimator=False)
    assert isinstance(turbo.stages["generate_tokens"].engine, engine.GPT2Engine)
    assert spoken(turbo, 3) == expected
    turbo.reset()
    assert spoken(turbo, 3) == expected


# -- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded():
    return checkpoints.load("random_turbo", "cuda")


@pytest.fixture
def turbo(loaded):
    yield loaded
    loaded.reset()
    loaded.sampling = TURBO


@pytest.mark.gpu
def test_gpu_greedy_float32_tokens_are_upstreams(turbo):
    """Upstream's own loop, the static cache, the kernels, and the kernels captured: 500 of 500."""
    turbo.sampling = replace(TURBO, temperature=0.0)
    expected = spoken(turbo, 500)
    assert len(expected) == 500
    for names in (("kv_cache",), ("kv_cache", "compile"), ("kv_cache", "compile", "cuda_graphs")):
        for name in names:
            apply_one(turbo, name, **({"estimator": False} if name == "compile" else {}))
        assert spoken(turbo, 500) == expected, names
        turbo.reset()


@pytest.mark.gpu
def test_gpu_sampled_tokens_are_those_of_the_layers(turbo):
    """Captured, with Turbo's own filters, the same draws."""
    apply_one(turbo, "kv_cache")
    expected = spoken(turbo, 100)
    apply_one(turbo, "compile", estimator=False)
    apply_one(turbo, "cuda_graphs")
    tokens = spoken(turbo, 100)
    assert sum(a == b for a, b in zip(tokens, expected, strict=True)) >= 90


@pytest.mark.gpu
def test_gpu_kernels_that_start_early_compute_the_same_bits(turbo):
    """Were anything read before it is written, steps in close succession would show it."""
    cast_parameters(turbo, turbo.model.t3.tfmr, torch.bfloat16)
    for weight, laid_out in by_outputs(turbo.model.t3.tfmr):
        turbo.set_data(weight, laid_out)
    engine = import_module("optimizations.t3.triton_engine")
    embeds = torch.randn(1, 700, 1024, generator=torch.Generator().manual_seed(5)).cuda()
    walks = []
    for overlap in (True, False):
        kernels = engine.GPT2Engine(turbo.model.t3.tfmr, overlap=overlap)
        with torch.inference_mode():
            kernels.reserve(1, 700)
            hidden = [kernels.prefill(embeds[:, :50], None, None)]
            newest = embeds[:, 50:51].clone()
            kernels.static_step(newest, kernels.capacity)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = kernels.static_step(newest, kernels.capacity)
                kernels.position += 1
            for i in range(50, 700):
                newest.copy_(embeds[:, i : i + 1])
                graph.replay()
                hidden.append(output.clone())
            walks.append(torch.stack(hidden))
    assert walks[0].isfinite().all()
    assert torch.equal(*walks)


@pytest.fixture
def pipeline(request):
    pipeline = checkpoints.load(request.param, "cuda")
    yield pipeline
    pipeline.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("heat", [0.8, 0.0], ids=["sampled", "greedy"])
@pytest.mark.parametrize("pipeline", ["random_turbo", "random"], indirect=True)
def test_gpu_steps_of_one_graph_are_single_steps(pipeline, heat):
    """Of both transformers, in every bit of the cache.

    Nothing is launched in the ordinary way between them: what a step reads, the one before has to have written.
    """
    pipeline.sampling = replace(pipeline.sampling, temperature=heat)
    for one in ("int8_weights", "mixed_precision", "kv_cache", "compile", "cuda_graphs"):
        apply_one(pipeline, one, **({"estimator": False} if one == "compile" else {}))
    decoder = pipeline.stages["generate_tokens"]
    loop, engine, runs = decoder.captured_loop, decoder.engine, []
    spoken(pipeline, 300)
    for loop.poll in (1, 16, 16, 7):
        tokens, filled = spoken(pipeline, 300), engine.length + 299
        runs.append((tokens, [cache[:, :, :filled].clone() for cache in (*engine.keys, *engine.values)]))
    (single, cache), *others = runs
    for tokens, other in others:
        assert tokens == single
        assert all(map(torch.equal, other, cache))
    assert len(set(single)) > 1


@pytest.mark.gpu
@torch.inference_mode()
def test_gpu_a_step_that_nobody_will_hear_does_nothing(turbo):
    for one in ("int8_weights", "mixed_precision"):
        apply_one(turbo, one)
    engine = import_module("optimizations.t3.triton_engine").engine_for(turbo.model.t3.tfmr)
    assert engine.why_several_launches(2) is None
    embeds = torch.randn(2, 20, 1024, generator=torch.Generator().manual_seed(5)).cuda()
    engine.reserve(2, 40)
    engine.prefill(embeds, None, None)
    for ended, moves in (([True, True], False), ([True, False], True), ([True, True], False), ([False, False], True)):
        engine.ended, before = torch.tensor(ended, device="cuda")[:, None], engine.keys[3].clone()
        engine.static_step(embeds[:, :1], engine.capacity)
        engine.position += 1
        assert torch.equal(engine.keys[3], before) != moves


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 40, 192, 1000])
def test_gpu_prompts_read_weights_in_8_bits_as_they_are(turbo, rows):
    apply_one(turbo, "int8_weights")
    layer = turbo.model.t3.tfmr.h[0].mlp.c_proj
    x = torch.randn(1, rows, 4096, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).bfloat16()
    exact = torch.nn.functional.linear(x.float(), layer.unpacked(), layer.bias)
    assert relative_error(layer(x), exact) < 0.005
