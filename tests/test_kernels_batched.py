"""The decode step for many rows: in Triton's interpreter on a CPU, and as it is on a GPU."""

from importlib import import_module

import pytest
import torch
from applied import apply_one
from interpreter import interpreted
from llamas import prompts, tiny, tiny_gpt2, walk
from test_kernels import N_FORCED, gpu_embeds, recorded_walk, relative_error

from harness import checkpoints
from harness.pipeline import Segment
from optimizations.common.modules import cast_parameters
from optimizations.t3.blocks import blocks_of, by_outputs
from optimizations.t3.engines import StaticEngine
from optimizations.t3.slots import SlotEngine

both = pytest.mark.parametrize("make", [tiny, tiny_gpt2], ids=["llama", "gpt2"])


def batched():
    return import_module("optimizations.t3.triton_batched")


def batched_engine(model, bucket=256):
    """An engine whose every step is the one for many rows."""
    kernels = import_module("optimizations.t3.triton_engine")

    class BatchedEngine(kernels.TritonEngine):
        def static_step(self, embeds, extent):
            return batched().step(self, embeds, extent)

    return BatchedEngine(model, bucket)


def engine_in_8_bits(model, bucket):
    engine = import_module("optimizations.t3.triton_engine").engine_for(model, bucket)
    engine.int8_cache = True
    return engine


def addresses(model):
    """Where the matrices of the first layer's first product lie."""
    attention = model.layers[0].self_attn
    return [p.weight.data_ptr() for p in (attention.q_proj, attention.k_proj, attention.v_proj)]


@interpreted
@both
def test_steps_are_the_static_engines(make):
    model = make()
    expected = walk(StaticEngine(model, 64), 3, 63)  # up to more slots than attention takes at once
    torch.testing.assert_close(walk(batched_engine(model, 64), 3, 63), expected, atol=1e-5, rtol=1e-5)


@interpreted
@both
def test_rows_padded_behind_a_prefix(make):
    model, rows, pad = make(), 18, torch.arange(18) % 5
    with torch.inference_mode():
        prefix = StaticEngine(model, 64).prefix(prompts(1, 6, seed=9))
    expected = walk(StaticEngine(model, 64), rows, 12, pad, prefix, steps=1)
    actual = walk(batched_engine(model, 64), rows, 12, pad, prefix, steps=1)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    unpadded = walk(StaticEngine(model, 64), rows, 12, None, prefix, steps=1)
    assert relative_error(unpadded, expected) > 1e-2, "padding must matter for this test to say anything"


@interpreted
@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_closer_to_float32_than_the_layers_do(make, dtype):
    exact = walk(StaticEngine(make(), 64), 4, 20, steps=1)
    layers = walk(StaticEngine(make(dtype), 64), 4, 20, steps=1)
    kernels = walk(batched_engine(make(dtype), 64), 4, 20, steps=1)
    assert kernels.dtype == dtype
    assert relative_error(kernels[1:], exact[1:]) < relative_error(layers[1:], exact[1:]) < 0.05


@interpreted
@both
def test_rows_at_positions_of_their_own(make):
    """Beside the layers, which the places of `t3/slots.py` go through on a CPU; and beside each row alone."""
    model, lengths = make(), torch.tensor([5, 0, 17, 70])
    prompt, after = prompts(4, 70), [prompts(4, 1, seed) for seed in range(2, 5)]
    walks = []
    for step in (StaticEngine.static_step, batched().step):
        engine, hidden = SlotEngine(model, 4, 100), []
        with torch.inference_mode():
            engine.read_into(prompt, 70 - lengths, torch.arange(4))
            for embeds in after:
                hidden.append(step(engine, embeds, 100))
                engine.position += 1
        walks.append(torch.stack(hidden))
    torch.testing.assert_close(walks[1], walks[0], atol=1e-5, rtol=1e-5)
    for row, length in enumerate(lengths.tolist()):
        if length:
            alone = StaticEngine(model, 100)
            with torch.inference_mode():
                alone.prefill(prompt[row : row + 1, 70 - length :], None)
                expected = torch.cat([alone.step(embeds[row : row + 1]) for embeds in after])
            torch.testing.assert_close(walks[0][:, row], expected, atol=1e-5, rtol=1e-5)


@interpreted
@both
def test_watched_heads_give_their_rows(make):
    model = make()
    engines = [StaticEngine(model, 64), batched_engine(model, 64)]
    for engine in engines:
        engine.heads = ((0, 1), (1, 0))
        walk(engine, 4, 9, torch.tensor([0, 3, 0, 3]), steps=1)
    for row, expected in zip(engines[1].rows, engines[0].rows, strict=True):
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)


@interpreted
@both
def test_a_step_writes_its_own_slot_alone(make):
    engine = batched_engine(make(), 64)
    walk(engine, 2, 5, steps=0)
    before = [cache.clone() for cache in (*engine.keys, *engine.values)]
    with torch.inference_mode():
        engine.step(prompts(2, 1))
    for old, new in zip(before, (*engine.keys, *engine.values), strict=True):
        changed = (old != new).any(dim=-1)
        assert changed[:, :, 5].all()
        assert changed.sum() == changed[:, :, 5].sum()


@interpreted
def test_layers_and_kernels_read_the_same_joined_weights():
    model = tiny()
    parameters, before = dict(model.named_parameters()), addresses(model)
    prompt = walk(StaticEngine(model, 64), 2, 5, steps=0)
    engine = batched_engine(model, 64)
    walk(engine, 2, 5, steps=1)
    q, k, v = addresses(model)
    assert [q, k, v] != before
    assert (k - q, v - k) == (64 * 64 * 4,) * 2
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert not any(parameter.is_inference() for parameter in model.parameters())
    assert torch.equal(walk(StaticEngine(model, 64), 2, 5, steps=0), prompt)
    assert not batched().join(blocks_of(model)), "what lies together stays where it is"
    assert addresses(model) == [q, k, v]


@interpreted
def test_weights_that_were_cast_or_restored_are_joined_again():
    model = tiny()
    engine = batched_engine(model, 64)
    first = walk(engine, 2, 5, steps=1)
    originals = {parameter: parameter.data for parameter in model.parameters()}
    moves = engine.moves
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    expected = walk(batched_engine(tiny(torch.bfloat16), 64), 2, 5, steps=1)
    assert torch.equal(walk(engine, 2, 5, steps=1), expected)
    assert engine.moves > moves, "recorded steps know the old addresses"
    for parameter, data in originals.items():
        parameter.data = data.clone()
    assert torch.equal(walk(engine, 2, 5, steps=1), first)


@interpreted
@both
@pytest.mark.parametrize("n_prefix", [0, 6])
def test_a_cache_in_8_bits_is_near_the_one_of_floats_and_smaller(make, n_prefix):
    model, rows, pad, prefix = make(), 18, torch.arange(18) % 5, None
    if n_prefix:
        with torch.inference_mode():
            prefix = StaticEngine(model, 64).prefix(prompts(1, n_prefix, seed=9))
    engines = StaticEngine(model, 64), engine_in_8_bits(model, 64)
    expected, actual = (walk(engine, rows, 12, pad, prefix, steps=3) for engine in engines)
    assert 1e-5 < relative_error(actual, expected) < 0.02
    assert engines[1].cache_bytes < engines[0].cache_bytes / 3
    few = [walk(engine, 4, 12, steps=0) for engine in engines]
    torch.testing.assert_close(few[1], few[0], atol=1e-5, rtol=1e-5)


@interpreted
def test_a_cache_in_8_bits_keeps_what_it_holds_when_it_grows():
    model, rows = tiny(), 18
    roomy, tight = engine_in_8_bits(model, 64), engine_in_8_bits(model, 16)
    with torch.inference_mode():
        roomy.reserve(rows, 63)
    walks = [walk(engine, rows, 14, steps=4) for engine in (roomy, tight)]
    assert (roomy.capacity, tight.capacity) == (64, 32), "the prompt had room for 16"
    assert torch.equal(*walks)


@interpreted
@both
def test_a_cache_in_8_bits_reads_prompts_behind_what_it_holds(make):
    """Without a prefix in the way: the second half of a prompt sees the first as it was rounded."""
    model, prompt = make(), prompts(18, 12)
    engines = StaticEngine(model, 64), engine_in_8_bits(model, 64)
    halves = []
    for engine in engines:
        with torch.inference_mode():
            engine.prefill(prompt[:, :7], None)
            halves.append(engine.read(prompt[:, 7:], 7))
    assert 1e-5 < relative_error(halves[1], halves[0]) < 0.02


@interpreted
def test_rows_of_floats_open_anew_where_rows_in_8_bits_have_been():
    model, engine = tiny(), engine_in_8_bits(tiny(), 64)
    with torch.inference_mode():
        prefix = StaticEngine(model, 64).prefix(prompts(1, 6, seed=9))
        engine.reserve(64, 63)  # room for as many slots in either form
    packed = walk(engine, 18, 12, None, prefix, steps=1)
    few = walk(engine, 16, 12, None, prefix, steps=0)
    torch.testing.assert_close(few, walk(StaticEngine(model, 64), 16, 12, None, prefix, steps=0), atol=1e-5, rtol=1e-5)
    assert torch.equal(walk(engine, 18, 12, None, prefix, steps=1), packed)


@interpreted
def test_int8_cache_is_active_where_batches_are_large(monkeypatch):
    plugin_module = import_module("optimizations.int8_cache")
    monkeypatch.setattr(plugin_module, "for_device", lambda path, _device: import_module(path))
    mini = checkpoints.load("mini", "cpu")
    mini.model.t3.tfmr.layers = mini.model.t3.tfmr.layers[:2]  # of eight, all alike
    apply_one(mini, "kv_cache")
    apply_one(mini, "compile", decode="triton", estimator=False)
    plugin, decoder = apply_one(mini, "int8_cache"), mini.stages["generate_tokens"]
    voice = mini.stages["condition"](next(iter(mini.voices)))
    mini.swap(decoder, "batch_size", 9)
    decoder([Segment("Yes.", voice, 0, 1)])
    assert not plugin.evidence(mini).active
    assert "more than 16 rows" in plugin.evidence(mini).reason
    decoder([Segment("Yes.", voice, 0, 2)] * 9)
    evidence = plugin.evidence(mini)
    assert evidence.active
    assert evidence.facts["batches_in_8_bits_count"] == 1
    assert evidence.facts["slot_in_8_bits_bytes"] < 0.3 * evidence.facts["slot_in_floats_bytes"]
    assert 1e-4 < evidence.facts["keys_relative_error"] < 0.02
    assert 1e-4 < evidence.facts["values_relative_error"] < 0.02
    mini.reset()
    assert "switch kv_cache and compile on" in plugin.unavailable(mini)


# -- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["random", "random_turbo"])
def loaded(request):
    return checkpoints.load(request.param, "cuda")


@pytest.fixture
def large(loaded):
    """A full-size pipeline, which is the baseline again after the test."""
    for weight, laid_out in by_outputs(loaded.model.t3.tfmr):
        loaded.set_data(weight, laid_out)
    yield loaded
    loaded.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [18, 32, 128])
def test_gpu_recorded_steps_are_the_layers_in_float32(large, rows):
    tfmr, embeds = large.model.t3.tfmr, gpu_embeds(rows, 150)
    hidden = recorded_walk(batched_engine(tfmr), embeds, prompt=120)
    assert relative_error(hidden, recorded_walk(StaticEngine(tfmr), embeds, prompt=120)) < 1e-3


@pytest.mark.gpu
def test_gpu_padded_rows_are_the_layers(large):
    tfmr, rows = large.model.t3.tfmr, 32
    pad, walks = torch.arange(rows, device="cuda") % 9, []
    with torch.inference_mode():
        prefix = StaticEngine(tfmr).prefix(gpu_embeds(1, 34))
        for engine in (StaticEngine(tfmr), batched_engine(tfmr)):
            hidden = [engine.prefill(gpu_embeds(rows, 60), pad, prefix)]
            hidden += [engine.step(embeds[:, None]) for embeds in gpu_embeds(rows, 20).unbind(1)]
            walks.append(torch.stack(hidden))
    assert relative_error(walks[1], walks[0]) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [32, 128])
def test_gpu_bfloat16_is_no_further_from_float32_than_the_layers(large, rows, capsys):
    tfmr, embeds = large.model.t3.tfmr, gpu_embeds(rows, 150)
    exact = recorded_walk(StaticEngine(tfmr), embeds, prompt=120)[1:]
    cast_parameters(large, tfmr, torch.bfloat16)
    layers = relative_error(recorded_walk(StaticEngine(tfmr), embeds, prompt=120)[1:], exact)
    kernels = relative_error(recorded_walk(batched_engine(tfmr), embeds, prompt=120)[1:], exact)
    with capsys.disabled():
        print(f"\nbfloat16's relative error at {rows} rows: kernels {kernels:.4f}, layers {layers:.4f}")
    assert kernels < 1.05 * layers


@pytest.mark.gpu
def test_gpu_a_cache_in_8_bits_diverges_little_from_float32(large, capsys):
    """Beside bfloat16's, from the same embeddings: 32 rows of 200 steps behind a prompt."""
    t3, n_prompt = large.model.t3, 60
    tokens = torch.randint(0, 6561, (32, n_prompt + N_FORCED), generator=torch.Generator().manual_seed(3)).cuda()

    @torch.inference_mode()
    def log_likely(engine):
        hidden = recorded_walk(engine, t3.speech_emb(tokens), n_prompt)
        return t3.speech_head(hidden.to(t3.speech_head.weight.dtype)).float().log_softmax(-1)

    exact = log_likely(StaticEngine(t3.tfmr))
    cast_parameters(large, t3.tfmr, torch.bfloat16)
    divergence = {}
    for name, engine in (("bfloat16", batched_engine(t3.tfmr)), ("8 bits", engine_in_8_bits(t3.tfmr, 256))):
        divergence[name] = (exact.exp() * (exact - log_likely(engine))).sum(-1)[1:].mean().item()
    with capsys.disabled():
        print(f"\nKL from float32 by the cache's numbers, mean of {N_FORCED} steps of 32 rows: {divergence}")
    assert divergence["8 bits"] < 0.001
    assert divergence["8 bits"] != divergence["bfloat16"], "the cache must be in 8 bits for this test to say anything"


@pytest.mark.gpu
@pytest.mark.parametrize("make", [batched_engine, engine_in_8_bits], ids=["floats", "8 bits"])
def test_gpu_steps_repeat_bit_for_bit(large, make):
    cast_parameters(large, large.model.t3.tfmr, torch.bfloat16)
    embeds = gpu_embeds(128, 150)
    once, again = (recorded_walk(make(large.model.t3.tfmr, 256), embeds, prompt=120) for _ in range(2))
    assert torch.equal(once, again)
    assert once.isfinite().all()


@pytest.mark.gpu
def test_gpu_joined_weights_are_held_once(large):
    cast_parameters(large, large.model.t3.tfmr, torch.bfloat16)
    before, blocks = torch.cuda.memory_allocated(), blocks_of(large.model.t3.tfmr)
    assert batched().join(blocks) == blocks.rotates, "a GPT-2 has nothing that lies apart"
    # The allocator rounds each of a layer's two by up to 1 MiB; held twice, they would be 6 MiB and 16 MiB.
    assert abs(torch.cuda.memory_allocated() - before) <= 2 * len(blocks.layers) * 2**20
