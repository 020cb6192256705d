"""The Triton kernels: in Triton's interpreter on a CPU, and as they are on a GPU."""

import os
import subprocess
import sys
import time
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from applied import TEXT, apply_one, spoken
from interpreter import interpreted, not_interpreted
from llamas import assert_padding_counts, prompts, relative_error, tiny, tiny_gpt2, walk

import optimizations
from harness import checkpoints
from harness.errors import UserError
from harness.pipeline import HELD_BACK
from harness.sampling import TURBO, Sampling
from optimizations.common.modules import cast_parameters
from optimizations.compile import OURS, Compilations
from optimizations.t3.blocks import blocks_of
from optimizations.t3.engines import StaticEngine
from optimizations.t3.int8 import Int8Linear, in_8_bits
from optimizations.t3.sampling import Filters, SamplingTensors, guide, sample
from optimizations.t3.token_buffers import TokenBuffers

QUICK = (
    "(static_engines and (2-5 or gpt2)) or (velocities_are and dtype0) or (hidden_frames and 21) or blocks_of_all"
    " or (own_steps and False) or prompt_in_8_bits"
)
"""Of each file's kernels the tests that run them all; the others are slow."""
FILES = sorted(map(str, Path(__file__).parent.glob("test_kernels*.py")))


@not_interpreted
@pytest.mark.parametrize("chosen", [["-k", QUICK], pytest.param([], marks=pytest.mark.slow)], ids=["quick", "all"])
def test_kernels_in_the_interpreter(chosen):
    """One child for the kernels of all files: other tests have imported Triton as a compiler by now."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-m", "not gpu" if not chosen else "not gpu and not slow"]
    command += [*chosen, *FILES]
    child = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout + child.stderr


@pytest.fixture
def fused():
    """Makes engines of few large programs, as the interpreter takes its time for every one: two or more a product."""
    engine = import_module("optimizations.t3.triton_engine")
    sizes = dict.fromkeys(engine.TILES, 32) | {"rmsnorm_qkv_rope": 16, "attention": 64}
    tiles = {name: engine.Tile(outputs, 1) for name, outputs in sizes.items()}
    return lambda model: engine.TritonEngine(model, 64, tiles)


@interpreted
@pytest.mark.parametrize(
    ("rows", "length"),
    [
        (2, 5),
        pytest.param(2, 300, marks=pytest.mark.slow),  # of slots, more than attention takes
        (1, 5),
        pytest.param(3, 9, marks=pytest.mark.slow),
    ],
)
def test_steps_are_the_static_engines(fused, rows, length):
    model = tiny()
    expected = walk(StaticEngine(model, 64), rows, length)
    torch.testing.assert_close(walk(fused(model), rows, length), expected, atol=1e-5, rtol=1e-5)


@interpreted
def test_rows_padded_behind_a_prefix(fused):
    assert_padding_counts(tiny(), fused)


@interpreted
def test_half_precision_stays_closer_to_float32_than_the_layers_do(fused):
    exact = walk(StaticEngine(tiny(), 64), 2, 20)
    layers = walk(StaticEngine(tiny(torch.bfloat16), 64), 2, 20)
    kernels = walk(fused(tiny(torch.bfloat16)), 2, 20)
    assert kernels.dtype == torch.float32, "the last norm is not rounded"
    assert relative_error(kernels[1:], exact[1:]) < relative_error(layers[1:], exact[1:]) < 0.05


@interpreted
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_weights_in_8_bits_are_read_as_they_are(fused, dtype, tolerance):
    model = in_8_bits(tiny(dtype))
    for rows in (1, 2):
        expected = walk(StaticEngine(in_8_bits(tiny()), 64), rows, 5, steps=1)
        assert relative_error(walk(fused(model), rows, 5, steps=1), expected) < tolerance
    exact = relative_error(walk(StaticEngine(tiny(), 64), 2, 5, steps=1), expected)
    assert 1e-4 < exact < 0.05, "8 bits must change something, and not much"


@interpreted
def test_watched_heads_give_their_rows(fused):
    model = tiny()
    engines = [StaticEngine(model, 64), fused(model)]
    for engine in engines:
        engine.heads = ((0, 1), (1, 0))
        walk(engine, 4, 9, torch.tensor([0, 3, 0, 3]), steps=1)
    for row, expected in zip(engines[1].rows, engines[0].rows, strict=True):
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)


@interpreted
def test_nothing_runs_while_kernels_are_compiled_together(fused):
    launching, model = import_module("optimizations.common.launching"), tiny()
    engine, newest = fused(model), prompts(2, 1, seed=2)
    with torch.inference_mode():
        engine.prefill(prompts(2, 5), None, None)
        engine.reserve(2, 6)
        engine.position.fill_(5)
        with launching.compiled_together():
            engine.static_step(newest, 6)
        assert not any(keys[:, :, 5].any() for keys in engine.keys)
        engine.static_step(newest, 6)
        assert all(keys[:, :, 5].any() for keys in engine.keys)


@interpreted
def test_many_rows(fused):
    model = tiny()
    expected = walk(StaticEngine(model), 18, 4, steps=1)
    torch.testing.assert_close(walk(fused(model), 18, 4, steps=1), expected, atol=1e-5, rtol=1e-5)


@interpreted
def test_head_takes_a_vocabulary_of_any_size():
    engine = import_module("optimizations.t3.triton_engine")
    for rows in (1, 2, 3):
        head, hidden = torch.nn.Linear(64, 37, bias=False), torch.randn(rows, 64)
        torch.testing.assert_close(engine.head_logits(head, hidden), head(hidden), atol=1e-5, rtol=1e-5)
        words = Int8Linear.of(head)
        exact = torch.nn.functional.linear(hidden, words.unpacked())
        torch.testing.assert_close(engine.head_logits(words, hidden), exact, atol=1e-5, rtol=1e-5)


@interpreted
@pytest.mark.parametrize(
    "make", [partial(tiny, hidden_size=256, num_attention_heads=8, num_hidden_layers=1), tiny_gpt2]
)
def test_a_prompt_in_8_bits_is_the_layers_own(make):
    """Behind a prefix, in rows that are padded by different lengths."""
    torch.manual_seed(0)
    model = in_8_bits(make(torch.bfloat16))
    width = blocks_of(model).norm.weight.shape[0]
    ours = import_module("optimizations.t3.triton_engine").engine_for(model, 16)
    exact = StaticEngine(deepcopy(model).float(), 16)
    opening, prompt, pad = torch.randn(1, 2, width), torch.randn(2, 4, width), torch.tensor([0, 1])
    hidden = {}
    for engine in (ours, exact):
        prefix = engine.prefix(opening)
        hidden[engine] = engine.prefill(prompt, pad, prefix)
    assert relative_error(hidden[ours], hidden[exact]) < 0.02
    for mine, theirs in zip((*ours.keys, *ours.values), (*exact.keys, *exact.values), strict=True):
        filled = mine[:, :, :6].float(), theirs[:, :, :6]
        assert relative_error(filled[0][0], filled[1][0]) < 0.02
        assert relative_error(filled[0][1, :, 3:], filled[1][1, :, 3:]) < 0.02


@interpreted
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [3, 100])
def test_a_prompt_reads_weights_in_8_bits_as_they_are(rows, bias, monkeypatch):
    torch.manual_seed(0)
    kernels, layer = import_module("optimizations.t3.triton_int8"), torch.nn.Linear(256, 72, bias=bias)
    monkeypatch.setattr(kernels, "TILES", kernels.TILES[2 * bias + rows % 2 :][:1])
    words, x = Int8Linear(layer.weight.detach(), layer.bias), torch.randn(2, rows, 256).bfloat16()
    assert kernels.fits(x)
    assert not kernels.fits(x.float())
    y = kernels.product(x, words)
    exact = torch.nn.functional.linear(x.float(), words.unpacked(), words.bias)
    assert y.dtype == x.dtype
    assert relative_error(y, exact) < relative_error(words(x), exact) < 0.01


def assert_kernel_samples(sampling, device, n_ids, width, rows=3, seed=0, rounded=False):
    """The kernel of `choose.py` against `sample` with the same random numbers."""
    written, sides = 4, 2 if sampling.guided else 1
    with torch.device(device):
        torch.manual_seed(seed)
        logits = 3 * torch.randn(sides * rows, n_ids)
        logits = logits.round() if rounded else logits
        table, positions = torch.randn(n_ids, width), torch.randn(20, width)
        settings, buffers = SamplingTensors(torch.device(device)), TokenBuffers.blank(rows, sides, 10, table, n_ids)
        settings.set(sampling)
        buffers.written.fill_(written)
        buffers.held[-100:] = True
        buffers.seen.copy_(torch.rand(rows, n_ids) < 0.3)
        torch.manual_seed(1)
        guided = guide(logits, sampling.cfg_weight, sides).masked_fill(buffers.held, HELD_BACK)
        expected = sample(guided, buffers.seen, sampling)
        seen = buffers.seen.scatter(1, expected, True)
        stop = int(expected[-1])
        torch.manual_seed(1)
        times, position = torch.empty(rows, n_ids).exponential_(), torch.tensor([7])
        choose_tokens = import_module("optimizations.t3.triton_sampling").choose_tokens
        choose_tokens(logits, times, settings, buffers, position, table, positions, stop, Filters.of(sampling))
    assert torch.equal(buffers.token, expected)
    assert position.item() == 8
    assert torch.equal(buffers.tokens[:, written], expected[:, 0])
    assert buffers.written.item() == written + 1
    assert torch.equal(buffers.seen, seen)
    assert buffers.finished.flatten().tolist() == [bool(token == stop) for token in expected]
    embeds = table[expected] + positions[written + 1]
    torch.testing.assert_close(buffers.embeds, torch.cat([embeds] * sides))


GREEDY = Sampling(temperature=0.0)
OTHERS = Sampling(temperature=1.3, min_p=0.3, cfg_weight=0.1, repetition_penalty=2.0)
SAMPLINGS = {
    "default": Sampling(),
    "greedy": GREEDY,
    "others": OTHERS,
    "unguided": Sampling(cfg_weight=0.0),
    "nucleus": Sampling(top_p=0.8),
}
SAMPLINGS |= {"turbo": replace(TURBO, top_k=150), "sharp": replace(TURBO, temperature=0.3, top_p=0.7)}


@interpreted
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_what_follows_the_logits(sampling):
    for rows in (1, 3):
        assert_kernel_samples(sampling, "cpu", n_ids=1003, width=48, rows=rows)


@interpreted
@pytest.mark.parametrize("top_k", [1, 7, 400, 902, 903, 1003, 2000])  # of 1003 a hundred are held back
def test_as_many_ids_stay_as_top_k_says(top_k):
    """Also where several have one and the same logit."""
    for seed in range(3):
        few = replace(TURBO, top_k=top_k, top_p=1.0)
        assert_kernel_samples(few, "cpu", n_ids=1003, width=16, rows=2, seed=seed, rounded=seed > 0)


@interpreted
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.95, 1.0])
def test_who_is_drawn_is_of_the_nucleus(top_p):
    for seed in range(3):
        assert_kernel_samples(replace(TURBO, top_k=300, top_p=top_p), "cpu", n_ids=1003, width=16, rows=3, seed=seed)


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
    unsupported = import_module("optimizations.t3.triton_engine").unsupported
    model = tiny()
    assert unsupported(model) is None
    change(model)
    assert says in unsupported(model)


@interpreted
def test_plugin_speaks_the_baselines_tokens_through_the_kernels(monkeypatch):
    engine = import_module("optimizations.t3.triton_engine")
    for name in engine.TILES:  # few large programs, of which the interpreter needs less time
        monkeypatch.setitem(engine.TILES, name, engine.Tile(32 if name == "rmsnorm_qkv_rope" else 256, 1))
    launched = Counter()
    launch = engine.launch

    def counted(kernel, *args, **options):
        launched[kernel.fn.__name__] += 1
        launch(kernel, *args, **options)

    monkeypatch.setattr(engine, "launch", counted)
    mini = checkpoints.load("mini", "cpu")
    mini.model.t3.tfmr.layers = mini.model.t3.tfmr.layers[:2]  # of eight, all alike
    expected = spoken(mini, 2)
    apply_one(mini, "kv_cache")
    apply_one(mini, "compile", decode="triton", estimator=False)
    assert spoken(mini, 2) == expected
    assert set(launched) == set(OURS)
    mini.reset()
    assert spoken(mini, 2) == expected


# -- what PyTorch compiles -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini():
    pipeline = checkpoints.load("mini", "cpu")
    yield pipeline
    pipeline.reset()


@pytest.fixture
def captured_only(monkeypatch):
    """torch.compile without its code generator, which takes half a minute: what it captures runs as it is."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()


def synthesized(pipeline, n_tokens):
    return pipeline.synthesize(TEXT, next(iter(pipeline.voices)), 3, n_tokens=n_tokens)


@not_interpreted
@pytest.mark.slow
def test_compiled_parts_compile_once_for_all_lengths(mini, captured_only):
    lengths = (10, 17)
    expected = [synthesized(mini, n) for n in lengths]
    apply_one(mini, "flash_attention", backend="sdpa")
    apply_one(mini, "kv_cache")
    plugin = apply_one(mini, "compile", decode="inductor")
    for n_tokens, utterance in zip(lengths, expected, strict=True):
        same = synthesized(mini, n_tokens)
        assert torch.equal(same.tokens[0], utterance.tokens[0])
        np.testing.assert_allclose(same.wave, utterance.wave, atol=1e-4)
    evidence = plugin.evidence(mini)
    assert evidence.active, evidence
    assert evidence.facts["graphs_compiled_in_utterance"] == {"1": 2}
    assert evidence.facts["graph_breaks_count"] == 0
    assert evidence.facts["inductor_calls_count"]["tokens_to_mel"] == 10
    mini.reset()
    np.testing.assert_array_equal(synthesized(mini, 10).wave, expected[0].wave)


@not_interpreted
def test_graph_breaks_and_recompilations_are_counted_by_utterance():
    torch._dynamo.reset()
    compilations = Compilations()
    double = torch.compile(lambda x: x * 2 if x.sum().item() > 0 else x, backend="eager", dynamic=False)
    for length in (3, 3, 4):
        with compilations.of_an_utterance():
            double(torch.ones(length))
    facts = compilations.facts()
    assert facts["graph_breaks_count"] > 0
    assert list(facts["graphs_compiled_in_utterance"]) == ["1", "3"]
    assert facts["utterances_count"] == 3


@not_interpreted
def test_compile_says_what_it_lacks(mini, monkeypatch):
    def reason(**params):
        return optimizations.create("compile", params).unavailable(mini)

    assert "kv_cache" in reason(decode="inductor", estimator=False)
    assert "nothing is left" in reason(decode="none", estimator=False)
    assert "kv_cache" in reason(estimator=False)
    apply_one(mini, "kv_cache")
    assert "CUDA" in reason(decode="triton", estimator=False)
    mini.reset()
    monkeypatch.setenv("PATH", "")
    assert "C++ compiler" in reason(decode="none")
    with pytest.raises(UserError, match="choose one of"):
        optimizations.create("compile", {"decode": "cuda"})


# -- on a GPU ------------------------------------------------------------------------------------------------------

N_FORCED = 200


@pytest.fixture(scope="module")
def large():
    return checkpoints.load("random", "cuda")


@pytest.fixture(autouse=True)
def _large_back_to_baseline(request):
    yield
    if "large" in request.fixturenames:
        request.getfixturevalue("large").reset()


def forced_logits(t3, engine, tokens, prompt=60):
    """Logits [tokens - prompt + 1, 2, V] while the engine is fed with given tokens, whatever it would have said."""
    with torch.inference_mode():
        embeds = t3.speech_emb(tokens).expand(2, -1, -1) * torch.tensor([1.0, 0.5], device="cuda")[:, None, None]
        hidden = [engine.prefill(embeds[:, :prompt], None, None)]
        hidden += [engine.step(embeds[:, i : i + 1]) for i in range(prompt, len(tokens))]
        return t3.speech_head(torch.stack(hidden).to(t3.speech_head.weight.dtype)).float()


def random_tokens():
    return torch.randint(0, 6561, (60 + N_FORCED,), generator=torch.Generator().manual_seed(3)).cuda()


def engine_of(tfmr):
    return import_module("optimizations.t3.triton_engine").TritonEngine(tfmr)


def recorded_walk(engine, embeds, prompt):
    """Hidden states of fixed steps behind a prompt, the steps replayed from one CUDA graph."""
    with torch.inference_mode():
        engine.reserve(embeds.shape[0], embeds.shape[1])
        hidden = [engine.prefill(embeds[:, :prompt], None, None)]
        newest, capacity = embeds[:, prompt : prompt + 1].clone(), engine.capacity
        engine.static_step(newest, capacity)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = engine.static_step(newest, capacity)
            engine.position += 1
        for i in range(prompt, embeds.shape[1]):
            newest.copy_(embeds[:, i : i + 1])
            graph.replay()
            hidden.append(output.clone())
        return torch.stack(hidden)


def gpu_embeds(rows, length):
    return torch.randn(rows, length, 1024, generator=torch.Generator().manual_seed(5)).cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [2, 4, 8, 16])
def test_gpu_recorded_steps_are_the_layers_in_float32(large, rows):
    tfmr, embeds = large.model.t3.tfmr, gpu_embeds(rows, 90)
    kernels = engine_of(tfmr)
    hidden = recorded_walk(kernels, embeds, prompt=50)
    assert relative_error(hidden, recorded_walk(StaticEngine(tfmr), embeds, prompt=50)) < 1e-4


@pytest.mark.gpu
def test_gpu_padded_rows_are_the_layers(large):
    tfmr, pad = large.model.t3.tfmr, torch.tensor([0, 7, 0, 7], device="cuda")
    walks = []
    with torch.inference_mode():
        prefix = StaticEngine(tfmr).prefix(gpu_embeds(1, 34))
        for engine in (StaticEngine(tfmr), engine_of(tfmr)):
            hidden = [engine.prefill(gpu_embeds(4, 30), pad, prefix)]
            hidden += [engine.step(embeds[:, None]) for embeds in gpu_embeds(4, 20).unbind(1)]
            walks.append(torch.stack(hidden))
    assert relative_error(walks[1], walks[0]) < 1e-4


@pytest.mark.gpu
def test_gpu_kernels_that_start_early_compute_the_same_bits(large):
    """Were anything read before it is written, steps in close succession would show it."""
    tfmr = large.model.t3.tfmr
    cast_parameters(large, tfmr, torch.bfloat16)
    engine = import_module("optimizations.t3.triton_engine")
    embeds = gpu_embeds(2, 700)
    early, late = (recorded_walk(engine.TritonEngine(tfmr, overlap=o), embeds, prompt=50) for o in (True, False))
    assert engine.can_overlap(embeds.device)
    assert torch.equal(early, late)
    assert early.isfinite().all()


@pytest.mark.gpu
def test_gpu_greedy_float32_tokens_are_those_of_the_layers(large):
    large.sampling, usual = Sampling(temperature=0), large.sampling
    try:
        apply_one(large, "kv_cache")
        expected = spoken(large, 500)
        apply_one(large, "compile", estimator=False)
        tokens = spoken(large, 500)
    finally:
        large.sampling = usual
    assert len(tokens) == 500
    assert tokens == expected


@pytest.mark.gpu
def test_gpu_bfloat16_diverges_little_from_float32(large, capsys):
    t3, tokens = large.model.t3, random_tokens()
    exact = forced_logits(t3, StaticEngine(t3.tfmr), tokens).log_softmax(-1)
    cast_parameters(large, t3.tfmr, torch.bfloat16)
    engines = {"layers": StaticEngine(t3.tfmr), "kernels": engine_of(t3.tfmr)}
    logits = {name: forced_logits(t3, engine, tokens).log_softmax(-1) for name, engine in engines.items()}
    # The kernels decode; the prompt's own position is left out.
    divergence = {name: (exact.exp() * (exact - p)).sum(-1)[1:].mean().item() for name, p in logits.items()}
    with capsys.disabled():
        print(f"\nKL from float32, mean of {N_FORCED} steps: {divergence}")
    assert divergence["kernels"] < 0.01
    assert divergence["kernels"] < 2 * divergence["layers"]


@pytest.mark.gpu
def test_gpu_8_bits_diverge_little_from_float32(large, capsys):
    t3, tokens = large.model.t3, random_tokens()
    exact = forced_logits(t3, StaticEngine(t3.tfmr), tokens).log_softmax(-1)
    plugin = apply_one(large, "int8_weights")
    cast_parameters(large, t3.tfmr, torch.bfloat16)
    logits = forced_logits(t3, engine_of(t3.tfmr), tokens).log_softmax(-1)
    divergence = (exact.exp() * (exact - logits)).sum(-1)[1:].mean().item()
    evidence = plugin.evidence(large)
    with capsys.disabled():
        print(f"\nKL from float32 in 8 bits, mean of {N_FORCED} steps: {divergence}; {evidence.facts}")
    assert evidence.active
    assert evidence.facts["linear_layers_now_bytes"] < 0.26 * evidence.facts["linear_layers_before_bytes"]
    assert divergence < 0.01


@pytest.mark.gpu
def test_gpu_head_takes_both_precisions(large):
    head = large.model.t3.speech_head
    hidden = torch.randn(2, head.in_features, device="cuda")
    kernels = import_module("optimizations.t3.triton_engine")
    with torch.inference_mode():
        exact = head(hidden)
        assert relative_error(kernels.head_logits(head, hidden), exact) < 1e-5
        cast_parameters(large, head, torch.bfloat16)
        assert relative_error(kernels.head_logits(head, hidden.bfloat16()), exact) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_gpu_what_follows_the_logits(sampling):
    for rows in (1, 3):
        assert_kernel_samples(sampling, "cuda", n_ids=8194, width=1024, rows=rows)


@pytest.mark.gpu
def test_gpu_what_was_compiled_together_is_ready(monkeypatch):
    jit, launching = import_module("triton.runtime.jit"), import_module("optimizations.common.launching")
    model = tiny(intermediate_size=256).cuda()  # a size that no other test has compiled anything for
    embeds, newest = prompts(2, 5).cuda(), prompts(2, 1, seed=2).cuda()
    with torch.inference_mode():
        engines = StaticEngine(model, 64), engine_of(model)
        for engine in engines:
            engine.prefill(embeds, None, None)
            engine.reserve(2, 6)
            engine.position.fill_(5)
        with launching.compiled_together():
            engines[1].static_step(newest, 6)
        monkeypatch.delattr(jit.JITFunction, "_do_compile")
        expected, given = [engine.static_step(newest, 6) for engine in engines]
    assert relative_error(given, expected) < 1e-4


@pytest.mark.gpu
def test_gpu_captured_decode_says_what_the_loop_says(large, capsys):
    """In float32: a captured prompt is padded, and in bfloat16 its other rounding would turn a close choice."""
    large.sampling, usual = Sampling(temperature=0), large.sampling
    try:
        apply_one(large, "kv_cache")
        apply_one(large, "compile", estimator=False)
        expected = spoken(large, 250)
        apply_one(large, "cuda_graphs", tokens=250)
        large.stages["generate_tokens"].prepare()
        assert spoken(large, 250) == expected
        torch.cuda.synchronize()
        start = time.perf_counter()
        spoken(large, 250)
        torch.cuda.synchronize()
        with capsys.disabled():
            print(f"\n{250 / (time.perf_counter() - start):,.0f} tokens/s, prompt included")
    finally:
        large.sampling = usual


@pytest.mark.gpu
def test_gpu_compile_shows_its_kernels_and_comes_back(large):
    before = spoken(large, 8)
    apply_one(large, "mixed_precision", tf32=False)
    apply_one(large, "flash_attention", backend="sdpa")
    apply_one(large, "kv_cache")
    voice = next(iter(large.voices))
    plain = large.synthesize(TEXT, voice, 1, n_tokens=40)
    plugin = apply_one(large, "compile")
    for n_tokens in (40, 60, 81):
        fast = large.synthesize(TEXT, voice, 1, n_tokens=n_tokens)
        assert fast.n_tokens == n_tokens
    evidence = plugin.evidence(large)
    assert evidence.active, evidence
    assert evidence.facts["triton_kernels_count"]["attention"] >= 30 * 7  # eight tokens, one of them the prompt's
    assert evidence.facts["graph_breaks_count"] == 0
    assert set(evidence.facts["graphs_compiled_in_utterance"]) == {"1"}
    assert plain.n_tokens == 40
    large.reset()
    assert spoken(large, 8) == before


@pytest.mark.gpu
def test_gpu_compiled_estimator_gives_the_same_mel(large):
    apply_one(large, "flash_attention", backend="sdpa")
    voice = next(iter(large.voices.values()))
    tokens = voice.gen["prompt_token"][0, :50].long()

    def mel():
        torch.manual_seed(0)
        with torch.inference_mode():
            return large.stages["tokens_to_mel"]([tokens], [voice])[0]

    expected = mel()
    apply_one(large, "compile", decode="none")
    assert relative_error(mel(), expected) < 1e-3


@pytest.mark.gpu
def test_gpu_all_of_it_is_captured(large):
    apply_one(large, "mixed_precision", tf32=False)
    apply_one(large, "kv_cache")
    plugin = apply_one(large, "compile")
    graphs = apply_one(large, "cuda_graphs", tokens=100)
    voice = next(iter(large.voices))
    for n_tokens in (60, 90, 61):
        assert np.isfinite(large.synthesize(TEXT, voice, 1, n_tokens=n_tokens).wave).all()
    evidence = plugin.evidence(large)
    assert evidence.active, evidence
    assert evidence.facts["graph_breaks_count"] == 0
    assert set(evidence.facts["graphs_compiled_in_utterance"]) == {"1"}
    assert graphs.evidence(large).active


@pytest.mark.gpu
def test_gpu_quantized_weights_are_refused(large):
    apply_one(large, "kv_cache")
    apply_one(large, "quantization", strategy="aggressive")
    assert "bitsandbytes" in optimizations.create("compile", {"estimator": False}).unavailable(large)
