"""cuda_graphs: shapes that stay change nothing (on the CPU, nothing captured), and what is captured gives the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import optimizations
from harness import checkpoints
from harness.errors import UserError
from harness.pipeline import Pipeline, Segment, Utterance
from harness.sampling import Sampling
from optimizations.common.graphs import Body, DelayedFlag, Graphs, Uncaptured
from optimizations.cuda_graphs import CudaGraphs
from optimizations.t3.decoder import decoder_of
from optimizations.t3.engines import StaticEngine
from optimizations.vocoder.static_shape import framed_cycles

TEXTS = ["Yes.", "We will meet at the old bridge.", "Where did you leave the keys of the car?"]
PINS = [9, 21, 34]
GREEDY = Sampling(temperature=0.0, max_new_tokens=120)


@pytest.fixture(scope="module")
def loaded() -> Pipeline:
    return checkpoints.load("mini", "cpu")


@pytest.fixture
def mini(loaded: Pipeline) -> Iterator[Pipeline]:
    """The miniature, which is itself again when the test is over, settings included."""
    yield from _restored(loaded)


def _restored(pipeline: Pipeline) -> Iterator[Pipeline]:
    sampling = pipeline.sampling
    yield pipeline
    pipeline.reset()
    pipeline.sampling = sampling


class Hookless(Uncaptured):
    """What is replayed runs no Python, and so no module's hooks; neither do they here, from the first call on."""

    def __call__(self) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.Module, "__call__", lambda module, *args, **kwargs: module.forward(*args, **kwargs))
            return super().__call__()


def fixed(pipeline: Pipeline, bucket: int = 64, make: Callable[[Body], Body] = Uncaptured, **params: int) -> Graphs:
    """kv_cache and the plugin's shapes with nothing captured: a "replay" runs the function over the same buffers."""
    optimizations.create("kv_cache", {"bucket": bucket}).apply(pipeline)
    plugin = optimizations.create("cuda_graphs", params)
    assert isinstance(plugin, CudaGraphs)
    plugin.apply_with(pipeline, make)
    return plugin.graphs


def ungraphed(pipeline: Pipeline, texts: list[str], pins: list[int] | None = None) -> list[list[int]]:
    """What the decoder says in its own loop."""
    optimizations.create("kv_cache").apply(pipeline)
    said = tokens(pipeline, texts, pins)
    pipeline.reset()
    return said


def tokens(pipeline: Pipeline, texts: list[str], pins: list[int] | None = None, batch_size: int = 1) -> list[list[int]]:
    """Speech tokens of each text, with two voices in turn."""
    voices = list(pipeline.voices)
    decoder_of(pipeline, "test").batch_size = batch_size
    torch.manual_seed(0)
    segments = [
        Segment(text, pipeline.stages["condition"](voices[i % len(voices)]), i, pins[i] if pins else None)
        for i, text in enumerate(texts)
    ]
    return [row.tolist() for row in pipeline.stages["generate_tokens"](segments)]


def prepare(pipeline: Pipeline) -> None:
    """Get every stage ready, as `warmup` does."""
    for stage in pipeline.stages.values():
        if hasattr(stage, "prepare"):
            stage.prepare()


@torch.inference_mode()
def mel_of(pipeline: Pipeline, n_tokens: int) -> Tensor:
    """The flow's mel of some tokens, from fixed noise."""
    torch.manual_seed(3)
    voice = next(iter(pipeline.voices.values()))
    speech = voice.gen["prompt_token"][0, :n_tokens].long().to(pipeline.device)
    return pipeline.stages["tokens_to_mel"]([speech], [voice])[0]


@torch.inference_mode()
def wave_of(pipeline: Pipeline, mel: Tensor) -> Tensor:
    torch.manual_seed(4)
    return pipeline.stages["mel_to_wave"]([mel])[0]


def without_noise(pipeline: Pipeline) -> None:
    """Leave the source its phases as the only random numbers: noise is drawn for padding as well, so it differs."""
    optimizations.create("fused_vocoder").apply(pipeline)
    generator = pipeline.model.s3gen.mel2wav.m_source.l_sin_gen
    pipeline.swap(generator, "noise_std", 0.0)
    pipeline.swap(generator, "voiced_threshold", -1.0)


def relative_error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).norm() / b.norm())


# -- T3 ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_a_fixed_step_is_a_step(mini: Pipeline) -> None:
    """Both engines take the same padded prompts and the same tokens; only the shapes differ."""
    tfmr = mini.model.t3.tfmr
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(4, 12, tfmr.config.hidden_size, generator=generator)
    pad = torch.tensor([0, 5, 0, 5])
    growing, staying = StaticEngine(tfmr, bucket=16), StaticEngine(tfmr, bucket=16)
    growing.prefill(prompts, pad)
    staying.prefill(prompts, pad)
    addresses = [buffer.data_ptr() for buffer in staying.keys]
    for _ in range(3):
        embeds = torch.randn(4, 1, tfmr.config.hidden_size, generator=generator)
        torch.testing.assert_close(staying.static_step(embeds, 16), growing.step(embeds), atol=1e-5, rtol=1e-5)
        staying.position += 1
    assert staying.length == 12, "a fixed step leaves the host's numbers alone"
    assert [buffer.data_ptr() for buffer in staying.keys] == addresses


def test_fewer_rows_use_the_same_memory(mini: Pipeline) -> None:
    engine = StaticEngine(mini.model.t3.tfmr, bucket=16)
    engine.reserve(8, 30)
    held = engine.keys[0].data_ptr(), engine.cache_bytes, engine.moves
    engine.reserve(2, 10)
    assert engine.keys[0].shape[0] == len(engine.pads) == 2
    assert (engine.keys[0].data_ptr(), engine.cache_bytes, engine.moves) == held
    engine.reserve(2, 33)
    assert engine.moves == held[2] + 1


@pytest.mark.parametrize(("pins", "batch_size"), [(None, 1), pytest.param(None, 3, marks=pytest.mark.slow), (PINS, 3)])
def test_the_captured_loop_says_the_very_tokens(mini: Pipeline, pins: list[int] | None, batch_size: int) -> None:
    """Utterances of different length one after the other, or padded side by side and filled up to four rows."""
    mini.sampling = GREEDY
    alone = ungraphed(mini, TEXTS, pins)
    assert pins or len({len(said) % 8 for said in alone}) > 1, "the ends have to lie within polling intervals"
    graphs = fixed(mini, poll=8)
    assert tokens(mini, TEXTS, pins, batch_size) == alone
    assert tokens(mini, TEXTS, pins, batch_size) == alone
    extents = graphs.captured["generate_tokens"]
    assert 2 <= extents < graphs.replays["generate_tokens"]


def test_rows_run_on_beyond_the_end_and_no_further_than_two_looks(mini: Pipeline) -> None:
    mini.sampling = replace(GREEDY, max_new_tokens=1 + 8 * 12)  # no single steps
    graphs = fixed(mini, poll=8)
    sampled = len(tokens(mini, TEXTS[:1])[0]) + 1  # the stop, which is not speech
    runs = graphs.captured["generate_tokens"] + graphs.replays["generate_tokens"] - 1  # without the prompt
    steps = 1 + 8 * runs
    assert sampled <= steps < sampled + 2 * 8


def test_the_cap_ends_what_does_not_end(mini: Pipeline) -> None:
    mini.sampling = replace(GREEDY, max_new_tokens=13)
    expected = ungraphed(mini, TEXTS)
    fixed(mini)
    assert tokens(mini, TEXTS) == expected
    assert {len(said) for said in expected} == {13}


@pytest.mark.slow
def test_settings_change_without_another_capture(mini: Pipeline) -> None:
    """One utterance, so that no draw comes after the end's; a CPU's generator cannot step back."""
    settings = [
        GREEDY,
        Sampling(max_new_tokens=60),
        Sampling(temperature=1.1, cfg_weight=0.2, min_p=0.2, repetition_penalty=1.5, max_new_tokens=60),
    ]
    expected = []
    for mini.sampling in settings:
        expected.append(ungraphed(mini, TEXTS[:1]))
    assert expected[0] != expected[1] != expected[2]
    graphs = fixed(mini, bucket=256)
    for mini.sampling, said in zip(settings, expected, strict=True):
        assert tokens(mini, TEXTS[:1]) == said
    assert graphs.captured["generate_tokens"] == 3, "the prompt, a step and several"
    mini.sampling = replace(settings[1], top_p=0.7)
    nucleus = tokens(mini, TEXTS[:1])
    assert graphs.captured["generate_tokens"] == 5
    mini.reset()
    assert ungraphed(mini, TEXTS[:1]) == nucleus


@pytest.mark.slow
def test_what_is_prepared_is_not_captured_again(mini: Pipeline) -> None:
    mini.sampling = GREEDY
    graphs = fixed(mini, bucket=256, tokens=40)
    prepare(mini)
    captured = dict(graphs.captured)
    assert captured.keys() == {"generate_tokens", "tokens_to_mel", "mel_to_wave"}
    assert not graphs.replays["tokens_to_mel"], "one step of the solver is enough to be ready"
    for n_tokens in (40, 23):
        mini.synthesize(TEXTS[1], next(iter(mini.voices)), seed=0, n_tokens=n_tokens)
    assert dict(graphs.captured) == captured
    assert not graphs.unprepared
    tokens(mini, TEXTS, [5, 5, 5], batch_size=3)
    assert graphs.unprepared.keys() == {"generate_tokens"}, "nobody prepared for four rows"


def test_a_loop_of_single_steps_looks_for_the_end(mini: Pipeline) -> None:
    mini.sampling = GREEDY
    expected = ungraphed(mini, TEXTS[:1])
    graphs = fixed(mini, poll=1)
    assert tokens(mini, TEXTS[:1]) == expected
    steps = graphs.captured["generate_tokens"] + graphs.replays["generate_tokens"]
    assert steps <= len(expected[0]) + 4 < GREEDY.max_new_tokens


def test_a_guarded_model_keeps_its_loop_around_a_fixed_step() -> None:
    pipeline = checkpoints.load("mini_multilingual", "cpu")
    pipeline.sampling = replace(pipeline.sampling, temperature=0.0, max_new_tokens=40)
    optimizations.create("kv_cache").apply(pipeline)
    alone = tokens(pipeline, TEXTS, batch_size=3)
    decisions = decoder_of(pipeline, "test").decisions
    pipeline.reset()
    graphs = fixed(pipeline, tokens=1)
    prepare(pipeline)
    captured = graphs.captured["generate_tokens"]
    assert tokens(pipeline, TEXTS, batch_size=3) == alone
    assert decoder_of(pipeline, "test").decisions == decisions
    assert tokens(pipeline, TEXTS[:1]) == alone[:1]
    assert graphs.replays["generate_tokens"] > captured


# -- flow and vocoder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", [1, 40])
def test_a_padded_flow_gives_the_mel_that_an_unpadded_one_gives(mini: Pipeline, n_tokens: int) -> None:
    alone = mel_of(mini, n_tokens)
    graphs = fixed(mini)
    assert relative_error(mel_of(mini, n_tokens), alone) < 1e-5
    assert relative_error(mel_of(mini, n_tokens), alone) < 1e-5
    assert graphs.captured["tokens_to_mel"] == 2
    assert graphs.replays["tokens_to_mel"] == 2 * 11 - 2
    mini.reset()
    assert torch.equal(mel_of(mini, n_tokens), alone)


def test_flow_steps_need_no_capture_of_their_own(mini: Pipeline) -> None:
    plugin = optimizations.create("flow_steps", {"steps": 4})
    plugin.apply(mini)
    coarse = mel_of(mini, 20)
    graphs = fixed(mini, make=Hookless)
    assert relative_error(mel_of(mini, 20), coarse) < 1e-5
    assert graphs.replays["tokens_to_mel"] == 4 - 1
    evidence = plugin.evidence(mini)
    assert evidence.active
    assert evidence.facts["solver_steps_count"] == 4


@torch.inference_mode()
def test_rows_of_different_length_are_padded_as_one_is(mini: Pipeline) -> None:
    """The encoder and the solver take upstream's lengths and masks."""
    flow = mini.model.s3gen.flow
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([30, 19])
    embedded = torch.randn(2, 30, flow.encoder.embed.out[0].in_features, generator=generator)
    embedded[1, 19:] = 0
    alone = flow.encoder(embedded[1:, :19], lengths[1:])[0]
    fixed(mini)
    together, mask = flow.encoder(embedded, lengths)
    assert mask.sum(dim=-1).flatten().tolist() == [60, 38]
    assert relative_error(together[1:, :38], alone) < 1e-5


@pytest.mark.parametrize("n_frames", [2, pytest.param(64, marks=pytest.mark.slow), 100])
def test_a_padded_vocoder_gives_the_wave_that_an_unpadded_one_gives(mini: Pipeline, n_frames: int) -> None:
    mel = mel_of(mini, 50)[:, :, :n_frames]
    without_noise(mini)
    alone = wave_of(mini, mel)
    graphs = fixed(mini)
    assert relative_error(wave_of(mini, mel), alone) < 1e-4
    assert relative_error(wave_of(mini, mel)[-480:], alone[-480:]) < 1e-4
    assert graphs.captured["mel_to_wave"] == graphs.replays["mel_to_wave"] == 1
    wave_of(mini, mel_of(mini, 60))  # what is longer leaves nothing behind
    assert relative_error(wave_of(mini, mel), alone) < 1e-4


@pytest.mark.slow
def test_a_watermark_in_whole_buckets_is_the_one_alone(mini: Pipeline) -> None:
    wave = 0.1 * torch.randn(24000, generator=torch.Generator().manual_seed(0))
    plugin = optimizations.create("gpu_watermark")
    plugin.apply(mini)
    (alone,) = mini.stages["watermark"]([wave])
    mini.stages["watermark"].bucket = 24000
    graphs = fixed(mini, tokens=40)
    prepare(mini)
    assert graphs.captured["watermark"] == 2
    for n in (24000, 16000, 23999):  # what is longer leaves nothing behind
        (marked,) = mini.stages["watermark"]([wave[:n]])
        assert len(marked) == n
    (marked,) = mini.stages["watermark"]([wave])
    np.testing.assert_allclose(marked, alone, atol=1e-6)
    assert graphs.captured["watermark"] == 2
    assert graphs.replays["watermark"] == 4


@pytest.mark.slow
def test_steps_of_one_graph_may_need_more_room(mini: Pipeline) -> None:
    """The cache grows within a graph's steps, by what is filled; single steps end what is no whole graph."""
    mini.sampling = GREEDY
    expected = ungraphed(mini, TEXTS[:1], [90])
    for bucket, poll in ((64, 16), (16, 32), (1, 7)):
        fixed(mini, bucket=bucket, poll=poll)
        assert tokens(mini, TEXTS[:1], [90]) == expected
        mini.reset()


def test_cycles_of_whole_frames_are_those_of_their_samples() -> None:
    """Up to 400 cycles a second and 9 harmonics for 10 s; upstream's sum on a CPU is in float64 inside."""
    each = torch.rand(2, 9, 500, generator=torch.Generator().manual_seed(0)) * 9 * 400 / 24000
    exact = each.double().repeat_interleave(480, dim=-1).cumsum(dim=-1)
    error = (framed_cycles(each, 480) - exact + 0.5) % 1 - 0.5  # 0.999 and 0.001 are close
    assert error.abs().max() < 1e-5


@pytest.mark.slow
def test_reset_restores_the_baseline(mini: Pipeline) -> None:
    voice = next(iter(mini.voices))
    before = mini.synthesize(TEXTS[1], voice, seed=5, n_tokens=20)
    fixed(mini)
    changed = mini.synthesize(TEXTS[1], voice, seed=5, n_tokens=20)
    assert torch.equal(changed.tokens[0], before.tokens[0])
    mini.reset()
    after = mini.synthesize(TEXTS[1], voice, seed=5, n_tokens=20)
    np.testing.assert_array_equal(after.wave, before.wave)
    assert not hasattr(mini.stages["generate_tokens"], "prepare")


# -- the plugin ----------------------------------------------------------------------------------------------------


def test_a_signal_is_read_one_look_late() -> None:
    signal, value = DelayedFlag(torch.device("cpu")), torch.zeros(1, dtype=torch.bool)
    assert not signal.look(value)
    value.fill_(True)
    assert not signal.look(value)
    assert signal.look(value)
    signal.reset()
    assert not signal.look(value)


def test_a_cpu_captures_nothing_and_says_so(mini: Pipeline) -> None:
    assert "device=cuda" in str(optimizations.create("cuda_graphs").unavailable(mini))


@pytest.mark.parametrize(("params", "says"), [({"poll": 0}, "poll=0"), ({"flow_bucket": 7}, "flow_bucket=7")])
def test_bad_parameters_are_named(mini: Pipeline, params: dict[str, int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        fixed(mini, **params)


# -- on a GPU, at full size ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_gpu() -> Iterator[Pipeline]:
    """Full-size modules with random weights, in true float32."""
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield checkpoints.load("random", "cuda")
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed


@pytest.fixture
def gpu(on_gpu: Pipeline) -> Iterator[Pipeline]:
    yield from _restored(on_gpu)


def apply(pipeline: Pipeline, *names: str, **params: object) -> CudaGraphs:
    """The named plugins, then cuda_graphs with its parameters."""
    for name in names:
        optimizations.create(name).apply(pipeline)
    plugin = optimizations.create("cuda_graphs", dict(params))
    assert isinstance(plugin, CudaGraphs)
    assert plugin.unavailable(pipeline) is None
    plugin.apply(pipeline)
    return plugin


def say(pipeline: Pipeline, n_tokens: int | None = None, seed: int = 0) -> Utterance:
    return pipeline.synthesize("It was a long day, and the road went on.", "random", seed, n_tokens=n_tokens)


@pytest.mark.gpu
def test_captured_greedy_tokens_are_the_ungraphed_ones(gpu: Pipeline) -> None:
    gpu.sampling = replace(gpu.sampling, temperature=0.0)
    optimizations.create("kv_cache").apply(gpu)
    expected = tokens(gpu, ["A long text that is spoken for twenty seconds."], [500])[0]
    gpu.reset()
    apply(gpu, "kv_cache")
    said = [tokens(gpu, ["A long text that is spoken for twenty seconds."], [500])[0] for _ in range(2)]
    agree = [sum(a == b for a, b in zip(row, expected, strict=True)) for row in said]
    assert agree == [500, 500], agree


@pytest.mark.gpu
def test_captured_sampling_draws_as_the_ungraphed_loop(gpu: Pipeline) -> None:
    """The same generator and the same race; a draw that is decided by rounding may end differently, rarely."""
    optimizations.create("kv_cache").apply(gpu)
    expected = tokens(gpu, TEXTS[:1], [40])[0]
    gpu.reset()
    apply(gpu, "kv_cache")
    said = tokens(gpu, TEXTS[:1], [40])[0]
    assert said[:10] == expected[:10]
    assert tokens(gpu, TEXTS[:1], [40])[0] == said


@pytest.mark.gpu
def test_a_captured_batch_says_what_each_text_says_alone(gpu: Pipeline) -> None:
    gpu.sampling = replace(gpu.sampling, temperature=0.0)
    apply(gpu, "kv_cache")
    alone = tokens(gpu, TEXTS, [30, 40, 50])
    together = tokens(gpu, TEXTS, [30, 40, 50], batch_size=3)
    assert [len(row) for row in together] == [30, 40, 50]
    assert [row[:10] for row in together] == [row[:10] for row in alone]


@pytest.mark.gpu
@pytest.mark.usefixtures("on_gpu")
def test_a_guarded_model_says_the_same_with_its_step_captured(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = checkpoints.load("random_multilingual", "cuda")
    pipeline.sampling = replace(pipeline.sampling, temperature=0.0)
    optimizations.create("kv_cache").apply(pipeline)
    expected = tokens(pipeline, TEXTS[:2], [60, 60])
    pipeline.reset()
    apply(pipeline, "kv_cache")
    assert tokens(pipeline, TEXTS[:2], [60, 60]) == expected
    start = time.perf_counter()
    tokens(pipeline, TEXTS[:1], [60])
    with capsys.disabled():
        print(f"\nguarded: {60 / (time.perf_counter() - start):.0f} tokens/s")


@pytest.mark.gpu
def test_draws_behind_the_end_are_given_back(gpu: Pipeline) -> None:
    """What the flow draws next does not depend on how far the host had run ahead."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    gpu.sampling = replace(gpu.sampling, max_new_tokens=100)
    apply(gpu, "kv_cache")
    # A stop token that speech will hit: with random weights the real one hardly ever comes.
    stop = tokens(gpu, TEXTS[:1])[0][30]
    gpu.reset()
    ends = []
    for poll in (4, 32):
        apply(gpu, "kv_cache", poll=poll)
        gpu.swap(gpu.model.t3.hp, "stop_speech_token", stop)
        for _ in range(2):  # with captures on the way, and without
            said = tokens(gpu, TEXTS[:1])[0]
            ends.append((len(said), generator.get_offset()))
        gpu.reset()
    assert ends == [ends[0]] * 4
    assert 0 < ends[0][0] <= 30


@pytest.mark.gpu
@pytest.mark.parametrize("n_tokens", [37, 250])
def test_a_captured_flow_gives_the_eager_mel(gpu: Pipeline, n_tokens: int) -> None:
    eager = mel_of(gpu, n_tokens)
    apply(gpu)
    assert relative_error(mel_of(gpu, n_tokens), eager) < 1e-3
    assert relative_error(mel_of(gpu, n_tokens), eager) < 1e-3


@pytest.mark.gpu
def test_a_captured_flow_in_bfloat16_packs_its_rows(gpu: Pipeline) -> None:
    """Packed flash attention against the masked attention of the eager flow; both round to bfloat16."""
    exact = mel_of(gpu, 37)
    optimizations.create("mixed_precision", {"parts": ["flow"], "tf32": False}).apply(gpu)
    rounding = relative_error(mel_of(gpu, 37), exact)
    apply(gpu)
    mel_of(gpu, 37)
    assert relative_error(mel_of(gpu, 37), exact) < 1.5 * rounding + 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("n_frames", [50, 500])
def test_a_captured_vocoder_gives_the_eager_wave(gpu: Pipeline, n_frames: int) -> None:
    mel = torch.randn(1, 80, n_frames, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    without_noise(gpu)
    eager = wave_of(gpu, mel)
    apply(gpu)
    assert relative_error(wave_of(gpu, mel), eager) < 1e-3
    assert relative_error(wave_of(gpu, mel), eager) < 1e-3


@pytest.mark.gpu
def test_nothing_is_captured_once_all_is_prepared(gpu: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    """Half precision, all stages, as it would be used; prints what it takes."""
    gpu.sampling = replace(gpu.sampling, max_new_tokens=300)
    plugin = apply(gpu, "fused_vocoder", "mixed_precision", "flash_attention", "kv_cache", "gpu_watermark")
    start = time.perf_counter()
    prepare(gpu)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    captured = dict(plugin.graphs.captured)
    say(gpu, 250)
    runs = [say(gpu, n_tokens) for n_tokens in (250, 250, 90, None)]
    evidence = plugin.evidence(gpu)
    with capsys.disabled():
        print(f"\nprepared in {seconds:.1f} s: {captured}; {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB at most")
        for run in runs:
            speed = run.n_tokens / run.stages_s["generate_tokens"]
            stages = {name: f"{1000 * s:.1f} ms" for name, s in run.stages_s.items() if s > 1e-4}
            print(
                f"{run.n_tokens} tokens: {speed:.0f} tokens/s, RTF {run.generation_time_s / run.audio_s:.4f}, {stages}"
            )
        print(evidence)
    assert evidence.facts["captures_inside_utterances_count"] == {}
    assert evidence.active
    assert evidence.facts["launches_per_token"] < 1
    assert all(np.isfinite(run.wave).all() for run in runs)


@pytest.mark.gpu
def test_captured_kernels(gpu: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    """The Triton engine's step in a graph: prints its speed at several batch sizes."""
    for name in ("mixed_precision", "kv_cache"):
        optimizations.create(name).apply(gpu)
    optimizations.create("compile", {"estimator": False}).apply(gpu)
    plugin = apply(gpu)
    graphs, (of_many, of_one) = plugin.graphs, divmod(249, plugin.config.poll)
    for batch_size in (1, 4, 16):
        texts, pins = TEXTS[:1] * batch_size, [250] * batch_size
        tokens(gpu, texts, pins, batch_size)
        torch.cuda.synchronize()
        before, start = graphs.captured + graphs.replays, time.perf_counter()
        tokens(gpu, texts, pins, batch_size)
        speed = 250 * batch_size / (time.perf_counter() - start)
        with capsys.disabled():
            print(f"\nbatch {batch_size}: {speed:.0f} tokens/s")
        launched = graphs.captured + graphs.replays - before
        assert launched["generate_tokens"] == 1 + of_many + of_one, "the prompt, and each of the 249 steps"


def test_a_rehearsal_runs_each_shape_once_and_leaves_no_trace():
    graphs, runs = Graphs(), []

    def body() -> int:
        runs.append("run")
        return len(runs)

    with graphs.rehearsing():
        assert [graphs.run("stage", shape, body) for shape in (1, 1, 2)] == [1, 1, 2]
    assert not graphs.captured
    assert not graphs.unprepared
    assert graphs.run("stage", 1, body) == 3
    assert graphs.captured == {"stage": 1}


@torch.inference_mode()
def test_a_voice_is_not_kept_as_kernels_that_did_not_run_left_it(mini, monkeypatch):
    graphs = fixed(mini, tokens=8)
    decoder, idle = decoder_of(mini, "test"), []
    prefix, rehearsing = decoder.engine.prefix, graphs.rehearsing

    @contextmanager
    def without_kernels() -> Iterator[None]:
        idle.append("kernels")
        with rehearsing():
            yield
        idle.clear()

    def opening(embeds: Tensor) -> Any:
        kept = prefix(embeds)
        return [(k.fill_(torch.nan), v.fill_(torch.nan)) for k, v in kept] if idle else kept

    monkeypatch.setattr(graphs, "rehearsing", without_kernels)
    monkeypatch.setattr(decoder.engine, "prefix", opening)
    mini.stages["generate_tokens"].prepare()
    for voice in mini.voices.values():
        assert all(torch.isfinite(k).all() and torch.isfinite(v).all() for k, v in decoder.stacked_prefixes([voice.t3]))


@pytest.mark.gpu
@torch.inference_mode()
def test_a_voice_is_kept_as_8_bit_weights_read_it(gpu: Pipeline) -> None:
    """Getting ready compiles kernels without running them, the product in 8 bits among them."""
    apply(gpu, "int8_weights", "mixed_precision", "kv_cache", "compile", tokens=8)
    gpu.stages["generate_tokens"].prepare()
    decoder, voice = decoder_of(gpu, "test"), gpu.voices["random"].t3
    kept = decoder.stacked_prefixes([voice])
    decoder.forget_prefixes()
    for layer, again in zip(kept, decoder.stacked_prefixes([voice]), strict=True):
        for mine, its in zip(layer, again, strict=True):
            torch.testing.assert_close(mine, its)
