"""batching: rows of different length together are what they are alone, through flow, vocoder and the whole pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from applied import apply_uncaptured

import optimizations
from harness import checkpoints
from harness.answers import Order
from harness.errors import UserError
from harness.pipeline import Pipeline, Request
from harness.variant import Setup, Variant
from optimizations.batching import batches
from optimizations.common.graphs import Uncaptured
from optimizations.vocoder.batched import HIFT_REACH, decode

ROOT = Path(__file__).parent.parent
LENGTHS = (20, 37, 29)
TEXTS = ("Yes.", "We will meet at the old bridge.", "Where did you leave the keys of the car?")


@pytest.fixture(scope="module")
def mini() -> Pipeline:
    return checkpoints.load("mini", "cpu")


@pytest.fixture(autouse=True)
def _back_to_the_baseline(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in {"mini", "large"} & set(request.fixturenames):
        pipeline = request.getfixturevalue(name)
        pipeline.reset()
        assert pipeline.stages["tokens_to_mel"] == pipeline._tokens_to_mel


def applied(pipeline: Pipeline, **params: object):
    plugin = optimizations.create("batching", params)
    assert plugin.unavailable(pipeline) is None
    plugin.apply(pipeline)
    return plugin


def rows(pipeline: Pipeline, lengths: tuple[int, ...] = LENGTHS) -> tuple[list, list]:
    """Speech tokens of these lengths, spoken by the pipeline's voices in turn, with prompts of different lengths."""
    voices = []
    for index, voice in enumerate(list(pipeline.voices.values())[:1] * len(lengths)):
        n = voice.gen["prompt_token"].shape[1] - 5 * index
        gen = voice.gen | {
            "prompt_token": voice.gen["prompt_token"][:, :n].long(),
            "prompt_token_len": torch.tensor([n], device=pipeline.device),
            "prompt_feat": voice.gen["prompt_feat"][:, : 2 * n],
        }
        voices.append(replace(voice, gen=gen))
    prompt = voices[0].gen["prompt_token"][0]
    tokens = [prompt.repeat(-(-n // len(prompt)))[:n] for n in lengths]
    return tokens, voices


@torch.inference_mode()
def run(pipeline: Pipeline, stage: str, *args: object) -> list[torch.Tensor]:
    torch.manual_seed(5)
    return pipeline.stages[stage](*args)


def assert_close(together: list[torch.Tensor], alone: list[torch.Tensor], tolerance: float) -> None:
    for one, other in zip(together, alone, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= tolerance * other.norm()


def test_rows_of_the_flow_are_what_they_are_alone(mini: Pipeline) -> None:
    tokens, voices = rows(mini)
    alone = run(mini, "tokens_to_mel", tokens, voices)
    plugin = applied(mini, size=3)
    before = [voice.gen["prompt_token"].dtype for voice in voices]
    assert_close(run(mini, "tokens_to_mel", tokens, voices), alone, 1e-5)
    assert [voice.gen["prompt_token"].dtype for voice in voices] == before
    assert plugin._flow.tally.sizes == [3]
    assert 0 < plugin._flow.tally.padding_share < 0.2


def test_rows_of_the_flow_take_as_many_steps_as_flow_steps_says(mini: Pipeline) -> None:
    tokens, voices = rows(mini)
    optimizations.create("flow_steps", {"steps": 4}).apply(mini)
    alone = run(mini, "tokens_to_mel", tokens, voices)
    applied(mini)
    assert_close(run(mini, "tokens_to_mel", tokens, voices), alone, 1e-5)


@pytest.mark.parametrize("lengths", [(80, 74, 90), (70, 70), (20, 74)], ids=["ragged", "equal", "a short one"])
def test_rows_of_the_vocoder_are_what_they_are_alone(mini: Pipeline, lengths: tuple[int, ...]) -> None:
    mel = next(iter(mini.voices.values())).gen["prompt_feat"].transpose(1, 2)
    mels = [mel[..., 5 * i : 5 * i + n].clone() for i, n in enumerate(lengths)]
    alone = run(mini, "mel_to_wave", mels)
    applied(mini)
    assert_close(run(mini, "mel_to_wave", mels), alone, 1e-4)


def test_rows_of_a_vocoder_in_fixed_shapes_draw_what_they_draw_alone(mini: Pipeline) -> None:
    """Noise included, which is drawn for the padding of each row's own bucket as well."""
    mel = next(iter(mini.voices.values())).gen["prompt_feat"].transpose(1, 2)
    mels = [mel[..., 5 * i : 5 * i + n].clone() for i, n in enumerate((80, 74, 60))]
    fixed: dict[str, dict[str, Any]] = {"fused_vocoder": {}, "kv_cache": {}, "cuda_graphs": {}}
    apply_uncaptured(mini, **fixed)
    alone = run(mini, "mel_to_wave", mels)
    mini.reset()
    apply_uncaptured(mini, **fixed, batching={})
    assert_close(run(mini, "mel_to_wave", mels), alone, 1e-4)


def test_hift_reaches_no_further_than_is_counted_on(mini: Pipeline) -> None:
    """A changed mel frame leaves everything beyond the margin as it was, to the last bit that matters."""
    hift = mini.model.s3gen.mel2wav
    mel = next(iter(mini.voices.values())).gen["prompt_feat"][:, :60].transpose(1, 2)
    excitation = torch.zeros(1, 1, 480 * 60)
    changed = mel.clone()
    changed[..., 40] += 3
    with torch.inference_mode():
        difference = (hift.decode(x=mel, s=excitation) - hift.decode(x=changed, s=excitation))[0].abs()
    reached = difference.nonzero()[:, 0] // 480
    assert 40 - HIFT_REACH <= reached.min() <= reached.max() <= 40 + HIFT_REACH
    assert reached.max() > 40 + HIFT_REACH // 2, "or the margin is larger than it has to be"


def test_ends_are_decoded_among_ends(mini: Pipeline) -> None:
    """With a stand-in for HiFT that sees two frames to either side, rows of any length come out as alone."""

    def blur(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        kernel = torch.ones(1, 1, 5)
        smooth = torch.nn.functional.conv1d(x[:, :1], kernel, padding=2)
        return (smooth.repeat_interleave(480, dim=2) + s)[:, 0]

    mels = [torch.randn(1, 80, n) for n in (50, 90, 33)]
    sources = [torch.randn(1, 1, 480 * mel.shape[2]) for mel in mels]
    alone = [blur(mel, source)[0] for mel, source in zip(mels, sources, strict=True)]
    assert_close(decode(blur, mels, sources), alone, 1e-6)


@pytest.mark.slow
def test_a_batch_of_texts_is_spoken_together_and_each_at_its_length(mini: Pipeline) -> None:
    plugin = applied(mini, size=2)
    requests = [Request(text, voice, 1, n) for text, voice, n in zip(TEXTS, mini.voices, (5, 12, 9), strict=False)]
    spoken = mini.synthesize_batch(requests)
    assert [utterance.n_tokens for utterance in spoken] == [5, 12, 9]
    for utterance in spoken:
        assert utterance.audio_s == pytest.approx(utterance.n_tokens / 25)
        assert np.isfinite(utterance.wave).all()
    evidence = plugin.evidence(mini)
    assert evidence.active
    for stage in ("generate_tokens", "tokens_to_mel", "mel_to_wave"):
        assert evidence.facts["batches_by_size"][stage] == {"1": 1, "2": 1}
    assert max(evidence.facts["row_against_alone_relative_error"].values()) < 1e-4


@pytest.mark.slow
def test_greedy_tokens_of_a_batch_are_those_of_single_calls(mini: Pipeline) -> None:
    mini.swap(mini, "sampling", replace(mini.sampling, temperature=0.0))
    optimizations.create("kv_cache").apply(mini)
    requests = [Request(text, "rms", 1, n) for text, n in zip(TEXTS, (5, 12, 9), strict=True)]
    alone = [mini.synthesize_batch([request])[0] for request in requests]
    applied(mini)
    together = mini.synthesize_batch(requests)
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.tokens[0], other.tokens[0])


def test_one_text_takes_the_way_it_would_take_without(mini: Pipeline) -> None:
    optimizations.create("kv_cache").apply(mini)
    alone = mini.synthesize(TEXTS[0], "rms", seed=1, n_tokens=12)
    plugin = applied(mini)
    np.testing.assert_array_equal(mini.synthesize(TEXTS[0], "rms", seed=1, n_tokens=12).wave, alone.wave)
    evidence = plugin.evidence(mini)
    assert not evidence.active
    assert "offline" in evidence.reason


@pytest.mark.slow
def test_beside_token_sequence_its_size_counts_and_vocos_keeps_its_own_way(mini: Pipeline) -> None:
    for name, params in (("vocos", {}), ("token_sequence", {"target_tokens": 30, "batch_size": 8})):
        optimizations.create(name, params).apply(mini)
    plugin = applied(mini, size=2)
    assert mini.stages["generate_tokens"].batch_size == 2
    mini.synthesize("It rains. Stay here. Who is it? I cannot see the road from here.", "rms", seed=1, n_tokens=24)
    evidence = plugin.evidence(mini)
    assert evidence.active
    assert set(evidence.facts["batches_by_size"]["tokens_to_mel"]) <= {"1", "2"}
    assert evidence.facts["batches_by_size"]["mel_to_wave"] == {}


@pytest.mark.slow
def test_shapes_that_stay_take_batches_too(mini: Pipeline) -> None:
    tokens, voices = rows(mini)
    alone = run(mini, "tokens_to_mel", tokens, voices)
    plugin = applied(mini, size=3)
    graphs = optimizations.create("cuda_graphs", {"tokens": 30})
    graphs.apply_with(mini, Uncaptured)
    assert_close(run(mini, "tokens_to_mel", tokens, voices), alone, 1e-5)
    run(mini, "mel_to_wave", alone)
    assert graphs.graphs.captured["tokens_to_mel"] == 1
    sources, decoded = 2, 2  # of rows in two buckets; the batch, and the rows' ends once more
    assert graphs.graphs.captured["mel_to_wave"] == sources + decoded
    assert max(plugin.evidence(mini).facts["row_against_alone_relative_error"].values()) < 1e-4


def test_neighbours_in_length_go_together() -> None:
    assert batches([5, 50, 6, 49, 7], size=2) == [[1, 3], [4, 2], [0]]
    assert sorted(i for batch in batches([1] * 7, 3) for i in batch) == list(range(7))


@pytest.mark.slow
def test_a_worker_speaks_a_call_as_a_batch(tmp_path: Path) -> None:
    arguments, plugins = {"name": "mini"}, {"kv_cache": {}, "batching": {"size": 2}}
    variant = Variant(Setup("combo", tmp_path, "harness.checkpoints.load", arguments, "cpu", plugins=plugins))
    variant.load()
    answer = variant.speak([Order("Yes.", "rms", 1, 4), Order("Yes.", "slt", 1, 12)], 0)
    short, long = answer.utterances
    assert (short.n_tokens, long.n_tokens) == (4, 12)
    assert [len(wave) / short.sample_rate for wave in variant.waves] == [0.16, 0.48]
    assert short.stages_s == long.stages_s  # the call's
    assert 0 < sum(short.stages_s.values()) <= answer.seconds


def test_a_bad_size_is_named(mini: Pipeline) -> None:
    with pytest.raises(UserError, match="size=0"):
        optimizations.create("batching", {"size": 0}).apply(mini)


# -- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large() -> Pipeline:
    return checkpoints.load("random", "cuda")


@pytest.mark.gpu
def test_gpu_rows_are_what_they_are_alone_in_float32(large: Pipeline) -> None:
    large.swap(torch.backends.cudnn, "allow_tf32", False)
    tokens, voices = rows(large, (60, 100, 80))
    mels = run(large, "tokens_to_mel", tokens, voices)
    waves = run(large, "mel_to_wave", mels)
    applied(large)
    assert_close(run(large, "tokens_to_mel", tokens, voices), mels, 1e-3)
    together = run(large, "mel_to_wave", mels)
    errors = [float((one - other).norm() / other.norm()) for one, other in zip(together, waves, strict=True)]
    print(f"\nwaves in a batch against alone: {errors}")
    assert max(errors) < 1e-2


@pytest.mark.gpu
def test_gpu_the_throughput_combo_speaks_64_passages(large: Pipeline) -> None:
    """What `+combo=throughput workload=offline` does in one measured call; its figures are printed."""
    combo = yaml.safe_load((ROOT / "configs/combo/throughput.yaml").read_text())["optimizations"]
    plugins = {}
    for name in optimizations.names():
        if combo.get(name, {}).get("enabled"):
            params = {key: value for key, value in combo[name].items() if key != "enabled"}
            plugins[name] = optimizations.create(name, params)
            reason = plugins[name].unavailable(large)
            assert reason is None, f"{name}: {reason}"
            plugins[name].apply(large)
    requests = [Request("The boats were already back when we reached the harbour.", "random", 0, 250)] * 64
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        spoken = large.synthesize_batch(requests)
    seconds, audio_s = spoken[0].generation_time_s, sum(utterance.audio_s for utterance in spoken)
    stages = {name: round(s, 3) for name, s in spoken[0].stages_s.items()}
    print(f"\n{audio_s:.0f} s of audio in {seconds:.2f} s: RTF {seconds / audio_s:.5f}; stages {stages}")
    print(f"peak allocated {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    assert audio_s == pytest.approx(640)
    evidence = plugins["batching"].evidence(large)
    print(evidence.facts)
    assert evidence.active
    assert seconds / audio_s < 0.004
