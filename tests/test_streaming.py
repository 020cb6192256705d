"""Streaming: the same tokens in pieces, in every loop; HiFT in windows is HiFT; joins, watermark, random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from applied import apply_one_uncaptured
from conftest import ROOT
from listening import Judged, Listener

import optimizations
from harness import checkpoints
from harness.locations import HELD_OUT
from harness.pipeline import Chunk, Pipeline, Segment, SynthesisError, Utterance
from harness.player import arrivals_of, listen
from harness.quality.signals import relative_error
from harness.quality.watermark import create_detector
from optimizations.flow.prefix import PrefixFlow
from optimizations.streams.pieces import SpokenPieces, own_random_numbers
from optimizations.vocoder.continued import ContinuedVocoder

TEXT = "Yes, it does."
LONG = "The boats were already back when we reached the harbour. Somebody had left a lamp burning on the wall."
N_TOKENS = 20
FIRST = {"first": 3, "growth": 2}
LOOPS = {
    "growing": [],
    "static": ["kv_cache"],
    "captured": ["kv_cache", "cuda_graphs"],
}


@pytest.fixture(scope="module")
def loaded() -> Pipeline:
    return checkpoints.load("mini", "cpu")


@pytest.fixture
def mini(loaded: Pipeline) -> Iterator[Pipeline]:
    apply_one_uncaptured(loaded, "flow_steps", steps=1)  # nobody listens
    yield loaded
    loaded.reset()
    assert loaded.streamer is None


def stream(pipeline: Pipeline, seed: int = 3, n_tokens: int | None = N_TOKENS) -> tuple[list[Chunk], Utterance]:
    return speak(pipeline, TEXT, next(iter(pipeline.voices)), seed, n_tokens)


def speak(
    pipeline: Pipeline, text: str, voice: str, seed: int, n_tokens: int | None = None
) -> tuple[list[Chunk], Utterance]:
    chunks, spoken = [], pipeline.synthesize_stream(text, voice, seed, n_tokens)
    while True:
        try:
            chunks.append(next(spoken))
        except StopIteration as end:
            return chunks, end.value


def joined(chunks: list[Chunk]) -> np.ndarray:
    return np.concatenate([chunk.wave for chunk in chunks])


def test_unmodified_it_is_one_chunk_at_the_end(mini: Pipeline) -> None:
    (chunk,), utterance = stream(mini)
    whole = mini.synthesize(TEXT, next(iter(mini.voices)), 3, N_TOKENS)
    np.testing.assert_array_equal(chunk.wave, whole.wave)
    np.testing.assert_array_equal(utterance.wave, whole.wave)
    assert chunk.ready_s == utterance.generation_time_s


@pytest.mark.parametrize(
    "loop", ["captured", *(pytest.param(one, marks=pytest.mark.slow) for one in LOOPS if one != "captured")]
)
def test_pieces_say_the_tokens_of_the_whole(mini: Pipeline, loop: str) -> None:
    for name in LOOPS[loop]:
        apply_one_uncaptured(mini, name)
    apply_one_uncaptured(mini, "streaming", **FIRST)
    for n_tokens in (N_TOKENS, None):
        whole = mini.synthesize(TEXT, next(iter(mini.voices)), 3, n_tokens)
        chunks, utterance = stream(mini, n_tokens=n_tokens)
        assert torch.equal(utterance.tokens[0], whole.tokens[0])
        assert len(joined(chunks)) == len(whole.wave) == 960 * whole.n_tokens
        assert [len(chunk.wave) // 960 for chunk in chunks[:2]] == [3, 6]
        np.testing.assert_array_equal(utterance.wave, joined(chunks))
        assert all(one.ready_s < other.ready_s for one, other in pairwise(chunks))
        assert np.isfinite(utterance.wave).all()


def test_the_mark_is_found_in_what_was_said_in_small_pieces(mini: Pipeline) -> None:
    apply_one_uncaptured(mini, "streaming", first=5, growth=1)
    detector = create_detector()
    assert detector is not None
    chunks, utterance = stream(mini, n_tokens=25)
    assert len(chunks) == 5
    assert detector.read(utterance.wave, utterance.sample_rate) > 0.9


@pytest.mark.parametrize("hops", [(40,), (5, 7, 9, 13, 6), (1, 1, 38)])
def test_the_vocoder_in_windows_is_the_vocoder(mini: Pipeline, hops: tuple[int, ...]) -> None:
    """With 16 frames ahead of each window, whatever the windows."""
    hift, reach = mini.model.s3gen.mel2wav, 16
    mel = mini.voices["rms"].gen["prompt_feat"].transpose(1, 2)[:, :, 20:60].float()
    with torch.inference_mode():
        torch.manual_seed(1)
        whole, _ = ContinuedVocoder(hift, 26)(mel, 40)
        torch.manual_seed(1)
        vocoder, pieces, said = ContinuedVocoder(hift, 26), [], 0
        for n in hops:
            wave, start = vocoder(mel[:, :, said : said + n + reach], n)
            pieces.append(wave[start : start + 480 * n])
            said += n
    assert torch.cat(pieces).shape == whole.shape
    assert relative_error(torch.cat(pieces).numpy(), whole.numpy()) < 1e-3


def test_pieces_of_a_mel_that_stays_join_to_its_wave(mini: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where passes of the flow agree, what is left is the lookahead: six frames ahead in place of sixteen."""
    voice = mini.voices["rms"]
    mel = voice.gen["prompt_feat"].transpose(1, 2)[:, :, 20:120].float()
    monkeypatch.setattr(PrefixFlow, "__call__", lambda _, ids, said, steps: mel[:, :, 2 * said : 2 * len(ids)])
    monkeypatch.setitem(mini.stages, "watermark", lambda waves: [wave.numpy() for wave in waves])

    def say(hop: int) -> np.ndarray:
        torch.manual_seed(1)
        spoken, pieces = SpokenPieces(mini, Segment(TEXT, voice, 0), 50, first_steps=5, context=250), []
        for end in range(hop, 51, hop):
            spoken.launch(torch.arange(min(50, end + 3)), end, last=end == 50)
            pieces.append(spoken.take())
        return np.concatenate(pieces)

    with torch.inference_mode():
        whole, pieces = say(50), say(10)
    assert len(whole) == len(pieces) == 960 * 50
    assert relative_error(pieces, whole) < 0.05


def test_a_frame_starts_from_the_same_noise_in_every_pass(mini: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    inference = mini.model.s3gen.flow.inference

    def listen(**arguments):
        asked.append(arguments)
        return inference(**arguments)

    monkeypatch.setattr(mini.model.s3gen.flow, "inference", listen)
    voice = mini.voices["rms"]
    n_prompt, ids = 2 * voice.gen["prompt_token"].shape[1], voice.gen["prompt_token"][0, :30]
    with torch.inference_mode():
        flow = PrefixFlow(mini, voice, 30, context=8)
        shapes = [flow(ids[:n], first, steps=3).shape for n, first in ((12, 0), (30, 8), (30, 20))]
    assert shapes == [(1, 80, 24), (1, 80, 44), (1, 80, 20)]
    whole = asked[1]["noised_mels"]
    for one, (start, n) in zip(asked, ((0, 12), (0, 30), (12, 30)), strict=True):
        assert torch.equal(one["token"][0], ids[start:n])
        assert torch.equal(one["noised_mels"][:, :, :n_prompt], whole[:, :, :n_prompt])
        assert torch.equal(one["noised_mels"][:, :, n_prompt:], whole[:, :, n_prompt + 2 * start : n_prompt + 2 * n])
        assert one["n_timesteps"] == 1  # what `flow_steps` allows


def test_random_numbers_outside_go_on_as_if_none_were_drawn_inside() -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    drawn = [torch.rand(1)]
    with own_random_numbers(torch.device("cpu")) as resume:
        inside = [torch.rand(1)]
    for _ in range(2):
        drawn.append(torch.rand(1))
        with resume():
            inside.append(torch.rand(1))
    drawn.append(torch.rand(1))
    assert torch.equal(torch.cat(drawn), expected)
    assert len({float(number) for number in (*inside, *drawn)}) == 7


def test_between_pieces_nothing_of_a_synthesis_is_left_behind(mini: Pipeline) -> None:
    apply_one_uncaptured(mini, "inference_mode")
    apply_one_uncaptured(mini, "streaming", **FIRST)
    spoken = mini.synthesize_stream(TEXT, "rms", 1, N_TOKENS)
    next(spoken)
    assert not torch.is_inference_mode_enabled()
    spoken.close()
    assert mini.synthesize(TEXT, "rms", 1, 5).n_tokens == 5


def test_a_voice_is_not_changed(mini: Pipeline) -> None:
    apply_one_uncaptured(mini, "streaming", **FIRST)
    before = {key: value for key, value in mini.voices["rms"].gen.items() if isinstance(value, torch.Tensor)}
    kinds = {key: (value.dtype, value.shape) for key, value in before.items()}
    list(mini.synthesize_stream(TEXT, "rms", 1, 8))
    assert {key: (mini.voices["rms"].gen[key].dtype, mini.voices["rms"].gen[key].shape) for key in before} == kinds


def test_no_speech_is_an_error(mini: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    apply_one_uncaptured(mini, "streaming")
    monkeypatch.setattr(
        mini.stages["generate_tokens"],
        "sample",
        lambda logits, *_: torch.full((1, 1), mini.model.t3.hp.stop_speech_token),
    )
    with pytest.raises(SynthesisError, match="stop token first"):
        stream(mini, n_tokens=None)


def test_segments_follow_one_another(mini: Pipeline) -> None:
    apply_one_uncaptured(mini, "streaming", **FIRST)
    mini.wrap_stage("split_text", lambda _whole: lambda text: ["Yes.", "No."])
    chunks, utterance = stream(mini, n_tokens=14)
    assert [len(tokens) for tokens in utterance.tokens] == [8, 6]
    assert utterance.segments == ["Yes.", "No."]
    assert len(joined(chunks)) == 960 * 14


def test_evidence_tells_whether_anybody_asked_for_a_stream(mini: Pipeline) -> None:
    plugin = apply_one_uncaptured(mini, "streaming")
    mini.rehearse(TEXT, "rms", 1, 5)
    shown = plugin.evidence(mini)
    assert not shown.active
    assert "nobody asked" in str(shown.reason)
    stream(mini, n_tokens=5)
    shown = plugin.evidence(mini)
    assert shown.active
    assert shown.facts["streams_count"] == 1
    assert shown.facts["detector_on_joined"] > 0.9


def test_another_vocoder_is_named(mini: Pipeline) -> None:
    mini.replace_stage("mel_to_wave", lambda mels: mels, by="another_vocoder")
    reason = optimizations.create("streaming", {}).unavailable(mini)
    assert reason is not None
    assert "another_vocoder" in reason


# -- what is heard -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_stream_is_understood_as_the_whole_is_and_begins_early(mini: Pipeline) -> None:
    """The same tokens in pieces and as a whole, on what a CPU has of the combo; figures are printed."""
    mini.reset()
    apply_combo(mini)
    listener = Listener()
    sentences = HELD_OUT.read_text().splitlines()
    heard: dict[str, list[Judged]] = {"whole": [], "pieces": []}
    shares = []
    for index in range(12):
        text, voice = " ".join(sentences[3 * index : 3 * index + 2]), list(mini.voices)[index % len(mini.voices)]
        ways = {
            "whole": partial(mini.synthesize, text, voice, index),
            "pieces": partial(speak, mini, text, voice, index),
        }
        made: dict[str, Any] = {name: ways[name]() for name in sorted(ways, reverse=bool(index % 2))}
        chunks, joined = made["pieces"]
        shares.append(chunks[0].ready_s / made["whole"].generation_time_s)
        assert torch.equal(joined.tokens[0], made["whole"].tokens[0])
        for name, wave in (("whole", made["whole"].wave), ("pieces", joined.wave)):
            heard[name].append(listener.judge(text, voice, wave, joined.sample_rate))
    (wer, sim, _), (wer_pieces, sim_pieces, _) = (np.mean(heard[name], axis=0) for name in ("whole", "pieces"))
    print(f"\nWER {wer:.4f} whole, {wer_pieces:.4f} in pieces; similarity {sim:.4f}, {sim_pieces:.4f}")
    print(f"first audio after {np.median(shares):.3f} of the whole's time ({min(shares):.3f} to {max(shares):.3f})")
    assert min(one.mark for one in heard["pieces"]) > 0.5
    assert wer_pieces <= wer + 0.02
    assert sim_pieces >= sim - 0.02
    assert np.median(shares) <= 0.35


def apply_combo(pipeline: Pipeline) -> dict[str, optimizations.Optimization]:
    """What can run here of the combo `streaming`."""
    combo = yaml.safe_load((ROOT / "configs/combo/streaming.yaml").read_text())["optimizations"]
    plugins = {}
    for name in optimizations.names():
        if combo.get(name, {}).get("enabled"):
            plugin = optimizations.create(name, {k: v for k, v in combo[name].items() if k != "enabled"})
            if plugin.unavailable(pipeline) is None:
                plugin.apply(pipeline)
                plugins[name] = plugin
    return plugins


# -- full size, on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_gpu_first_words_at_full_size() -> None:
    """The combo `streaming` beside whole utterances: the tokens, the mark, and the times, which are printed."""
    large = checkpoints.load("random", "cuda")
    plugins = apply_combo(large)
    graphs = plugins["cuda_graphs"].graphs
    voice, detector, heard, wholes = next(iter(large.voices)), create_detector(), [], []
    for _ in range(2):
        list(large.synthesize_stream(LONG, voice, 0, 250))
    captured, late = dict(graphs.captured), dict(graphs.unprepared)
    for seed in range(20):
        whole = large.synthesize(LONG, voice, seed, 250)
        chunks, utterance = speak(large, LONG, voice, seed, 250)
        assert torch.equal(utterance.tokens[0], whole.tokens[0])
        assert len(utterance.wave) == len(whole.wave)
        assert np.isfinite(utterance.wave).all()
        heard.append(listen(arrivals_of(chunks)))
        wholes.append(whole.generation_time_s)
    first = [one.first_s for one in heard]
    print(f"\nfirst audio: p50 {np.median(first):.4f} s, most {max(first):.4f} s; whole {np.median(wholes):.4f} s")
    print(
        f"last audio: {np.median([one.last_s for one in heard]):.4f} s; pieces {[round(c.audio_s, 2) for c in chunks]}"
    )
    print(f"ready {[round(c.ready_s, 4) for c in chunks]}; pre-roll {max(one.preroll_s for one in heard):.4f} s")
    print(f"captured {captured}, of which late {late}; then {dict(graphs.captured)}")
    print(f"mark {detector.read(utterance.wave, utterance.sample_rate):.3f}")
    print(plugins["streaming"].evidence(large))
    assert dict(graphs.captured) == captured
    assert all(one.is_continuous for one in heard)
    assert np.median(first) < 0.050
    assert max(first) < 0.080
    assert np.median([one.last_s for one in heard]) < 1.5 * np.median(wholes)
