"""The decode loop and the plugins that stand on it: alignment_analyzer, kv_cache, token_sequence."""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chatterbox.models.t3.inference.alignment_stream_analyzer import AlignmentStreamAnalyzer
from llamas import prompts, tiny
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopPLogitsWarper,
)

import optimizations
from harness import checkpoints
from harness.errors import UserError
from harness.pipeline import Pipeline, Request
from harness.sampling import Sampling
from optimizations.t3 import sampling as ours
from optimizations.t3.engines import StaticEngine
from optimizations.t3.guard import Guard
from optimizations.token_sequence import causal_scores, crossfade, split_text

TEXT = "Good morning, how are you today?"
TEXTS = ["Yes.", "We will meet at the old bridge.", "Where did you leave the keys of the car?"]
N_TOKENS = 14


@pytest.fixture(scope="module")
def mini() -> Pipeline:
    return checkpoints.load("mini", "cpu")


@pytest.fixture(scope="module")
def multilingual() -> Pipeline:
    return checkpoints.load("mini_multilingual", "cpu")


def applied(pipeline, **plugins):
    """Apply plugins by name with their parameters, in the catalogue's order."""
    instances = {n: optimizations.create(n, plugins[n]) for n in optimizations.names() if n in plugins}
    for plugin in instances.values():
        plugin.apply(pipeline)
    return instances


def relative_error(wave, reference):
    return np.linalg.norm(wave - reference) / np.linalg.norm(reference)


@pytest.mark.parametrize(
    "plugins",
    [
        *(pytest.param({name: {}}, marks=pytest.mark.slow) for name in ("alignment_analyzer", "kv_cache")),  # see below
        {"kv_cache": {"bucket": 8, "prefix_reuse": False}},
        {"alignment_analyzer": {}, "kv_cache": {}},
        {"token_sequence": {}},
    ],
    ids=lambda p: "+".join(p),
)
@pytest.mark.parametrize("kind", ["mini", pytest.param("multilingual", marks=pytest.mark.slow)])
def test_same_tokens_and_wave_as_the_baseline_and_back_again(kind, plugins, request):
    pipeline = request.getfixturevalue(kind)
    voice = next(iter(pipeline.voices))
    before = pipeline.synthesize(TEXT, voice, seed=5, n_tokens=N_TOKENS)
    applied(pipeline, **plugins)
    for _ in range(2):  # the second call meets what the first one left: caches, prefixes
        changed = pipeline.synthesize(TEXT, voice, seed=5, n_tokens=N_TOKENS)
        assert torch.equal(changed.tokens[0], before.tokens[0])
        assert relative_error(changed.wave, before.wave) < 1e-4
    pipeline.reset()
    after = pipeline.synthesize(TEXT, voice, seed=5, n_tokens=N_TOKENS)
    if kind == "mini":  # upstream's multilingual baseline does not even repeat itself: it goes eager for good
        np.testing.assert_array_equal(after.wave, before.wave)
    assert torch.equal(after.tokens[0], before.tokens[0])


@pytest.mark.parametrize("engine", ["alignment_analyzer", "kv_cache"])
def test_free_running_stops_where_the_baseline_stops(mini, engine):
    voice = next(iter(mini.voices))
    mini.sampling, old = replace(mini.sampling, max_new_tokens=40), mini.sampling
    try:
        before = mini.synthesize(TEXT, voice, seed=1)
        applied(mini, **{engine: {}})
        changed = mini.synthesize(TEXT, voice, seed=1)
        assert torch.equal(changed.tokens[0], before.tokens[0])
    finally:
        mini.reset()
        mini.sampling = old


@pytest.mark.parametrize("plugins", [{}, {"kv_cache": {}}, {"kv_cache": {"prefix_reuse": False}}])
@pytest.mark.parametrize("kind", ["mini", pytest.param("multilingual", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_batch_gives_each_text_the_tokens_it_gets_alone(kind, plugins, request):
    """Greedy, so that no random number couples the rows: padding and batching must change nothing."""
    pipeline = request.getfixturevalue(kind)
    voices = list(pipeline.voices)
    pipeline.sampling, old = replace(pipeline.sampling, temperature=0.0), pipeline.sampling
    try:
        applied(pipeline, token_sequence={"batch_size": 4}, **plugins)
        requests = [Request(t, voices[i % len(voices)], 0, 10 + i) for i, t in enumerate(TEXTS)]
        alone = [pipeline.synthesize_batch([request])[0] for request in requests]
        together = pipeline.synthesize_batch(requests)
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one.tokens[0], other.tokens[0])
    finally:
        pipeline.reset()
        pipeline.sampling = old


def test_rows_open_with_whatever_voice_comes_next():
    """A voice that the rows open with already is not written again; another one, more rows or more room are."""
    model, engine = tiny(), StaticEngine(tiny(), 16)
    with torch.inference_mode():
        voices = [StaticEngine(model, 16).prefix(prompts(1, 6, seed)) for seed in (8, 9)]

    def heard(engine, voice, rows, length):
        with torch.inference_mode():
            hidden = [engine.prefill(prompts(rows, length), None, None if voice is None else voices[voice])]
            hidden += [engine.step(prompts(rows, 1, seed)) for seed in (2, 3)]
        return torch.stack(hidden)

    order = [(0, 1, 5), (0, 1, 7), (0, 2, 5), (0, 1, 5), (1, 1, 5), (0, 2, 5), (None, 1, 5), (0, 1, 5), (0, 1, 40)]
    order.append((0, 2, 5))
    for voice, rows, length in order:
        fresh = heard(StaticEngine(model, 16), voice, rows, length)
        torch.testing.assert_close(heard(engine, voice, rows, length), fresh, msg=str((voice, rows, length)))
    with torch.inference_mode():
        engine.prefix(prompts(1, 6, 9))
    torch.testing.assert_close(heard(engine, 0, 2, 5), heard(StaticEngine(model, 16), 0, 2, 5))


def test_evidence_of_a_run(mini):
    voice = next(iter(mini.voices))
    try:
        plugins = applied(mini, alignment_analyzer={}, kv_cache={}, token_sequence={"target_tokens": 20})
        idle = {name: plugin.evidence(mini).active for name, plugin in plugins.items()}
        assert not any(idle.values()), "nothing ran yet, so nothing can have been active"
        mini.synthesize("It rains today. Take a warm coat with you. Goodbye!", voice, 0, n_tokens=30)
        evidence = {name: plugin.evidence(mini) for name, plugin in plugins.items()}
        assert all(e.active for e in evidence.values()), evidence
        assert evidence["kv_cache"].facts["cat_calls_per_token"] == 0
        assert evidence["kv_cache"].facts["cache_bytes"] > 0
        assert evidence["token_sequence"].facts["texts_by_segments"] == {"3": 1}
        assert evidence["token_sequence"].facts["batches_by_size"]["3"] == 1
        assert 0 < evidence["token_sequence"].facts["attention_scores_saved_percent"] < 100
    finally:
        mini.reset()


@pytest.mark.slow
def test_the_guards_own_notes_are_not_the_caches(multilingual):
    """It keeps what it has seen of the text on the host, by `cat`; of the cache there is none."""
    try:
        plugin = applied(multilingual, kv_cache={})["kv_cache"]
        multilingual.synthesize(TEXT, next(iter(multilingual.voices)), 0, n_tokens=4)
        evidence = plugin.evidence(multilingual)
        assert evidence.active
        assert evidence.facts["cat_calls_per_token"] == 0
        step = plugin._decoder.token_embedding
        plugin._decoder.token_embedding = lambda token, position: torch.cat((step(token, position)[:1],) * 2)
        assert plugin.evidence(multilingual).facts["cat_calls_per_token"] == 1
    finally:
        multilingual.reset()


@pytest.mark.slow
def test_the_baseline_concatenates_where_the_static_cache_does_not(mini):
    """The probe behind kv_cache's evidence sees `cat` when there is some."""
    voice = next(iter(mini.voices))
    try:
        plugin = applied(mini, kv_cache={})["kv_cache"]
        mini.synthesize(TEXT, voice, 0, n_tokens=4)
        step = plugin._decoder.token_embedding
        plugin._decoder.token_embedding = lambda token, position: torch.cat((step(token, position)[:1],) * 2)
        evidence = plugin.evidence(mini)
        assert evidence.facts["cat_calls_per_token"] == 1
        assert not evidence.active
    finally:
        mini.reset()


@pytest.mark.slow
def test_upstream_leaves_hooks_and_eager_attention_behind_and_we_do_not():
    pipeline = checkpoints.load("mini_multilingual", "cpu")
    voice = next(iter(pipeline.voices))
    plugin = applied(pipeline, alignment_analyzer={})["alignment_analyzer"]
    for seed in range(3):
        pipeline.synthesize(TEXT, voice, seed, n_tokens=5)
    evidence = plugin.evidence(pipeline)
    assert evidence.active
    assert evidence.facts["hooks_per_layer_after"] == evidence.facts["hooks_per_layer_before"] == 0
    assert sum(n for fact, n in evidence.facts.items() if fact.startswith("guard_")) == 15
    pipeline.reset()
    for seed in range(2):
        pipeline.synthesize(TEXT, voice, seed, n_tokens=5)
    assert pipeline.model.t3.tfmr.config._attn_implementation == "eager"


def test_guard_decides_as_upstream_on_the_same_rows():
    """Random walks along the text, with stutters and repeats: every logit must come out equal."""
    generator = torch.Generator().manual_seed(0)
    n_text, n_heads, stop, vocabulary = 24, 3, 7, 12
    transformer = SimpleNamespace(layers=defaultdict(lambda: SimpleNamespace(self_attn=torch.nn.Identity())))
    forced = suppressed = 0
    for _ in range(12):
        theirs = AlignmentStreamAnalyzer(transformer, None, text_tokens_slice=(0, n_text), eos_idx=stop)
        guard = Guard(n_text, stop)
        position, token = 0.0, 0
        for step in range(60):
            position += torch.rand(1, generator=generator).item()
            centre = int(position) % (n_text + 6)
            rows = torch.rand(n_heads, 2 if step == 0 else 1, n_text, generator=generator) * 0.05
            rows[..., min(centre, n_text - 1)] += 0.9
            logits = torch.randn(1, vocabulary, generator=generator)
            matrix = torch.cat((torch.zeros(n_heads, n_text, n_text), rows), dim=1) if step == 0 else rows
            theirs.last_aligned_attns = list(matrix)
            expected = AlignmentStreamAnalyzer.step(theirs, logits.clone(), next_token=token)
            actual = guard.judge(rows, logits.clone(), token)
            assert torch.equal(actual, expected)
            forced += guard.decision == "forced"
            suppressed += guard.decision == "suppressed"
            token = int(torch.randint(0, 4, (1,), generator=generator))
    assert forced > 0, "the walk must reach both of the guard's decisions"
    assert suppressed > 0


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_sampling_filters_are_transformers_formulas(top_p):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 200, generator=generator) * 4
    ids = torch.randint(0, 200, (1, 30), generator=generator)
    seen = torch.zeros(1, 200, dtype=torch.bool).scatter_(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(1.2)(ids, logits.clone()) / 0.8
    expected = TopPLogitsWarper(top_p)(ids, MinPLogitsWarper(0.05)(ids, expected))
    actual = ours.keep_min_p(ours.penalize(logits, seen, 1.2) / 0.8, 0.05)
    actual = ours.keep_top_p(actual, top_p)
    torch.testing.assert_close(actual, expected)
    settings = Sampling(top_p=top_p)
    torch.manual_seed(4)
    ours_drawn = ours.sample(logits, seen, settings)
    torch.manual_seed(4)
    assert torch.equal(ours_drawn, torch.multinomial(expected.softmax(-1), 1))


def test_split_keeps_every_word_and_respects_the_limits():
    sentence = "When the rain had stopped, the children ran out, and they played until it was dark outside."
    text = f"{sentence} {sentence} Was it late? {sentence}"
    pieces = split_text(text, target=150, maximum=200)
    assert " ".join(pieces) == text
    assert len(pieces) == 4
    shorter = split_text(text, target=50, maximum=60)
    assert " ".join(shorter) == text
    assert max(len(piece) for piece in shorter) <= 60 * 0.6
    assert split_text("One short text.", 100, 400) == ["One short text."]


def test_crossfade_of_a_constant_is_that_constant():
    joined = crossfade([torch.ones(100), torch.ones(80), torch.ones(60)], overlap=20)
    assert len(joined) == 100 + 80 + 60 - 2 * 20
    torch.testing.assert_close(joined, torch.ones(200))
    one = torch.randn(50)
    assert crossfade([one], 20) is one


def test_causal_scores():
    assert causal_scores(4) == 10


@pytest.mark.parametrize(
    ("name", "params", "says"),
    [
        ("kv_cache", {"bucket": 0}, "bucket=0"),
        ("token_sequence", {"target_tokens": 500}, "max_tokens=400"),
        ("token_sequence", {"batch_size": 0}, "batch_size=0"),
        ("kv_cash", {}, "did you mean kv_cache"),
        ("kv_cache", {"buckets": 1}, "did you mean bucket"),
    ],
)
def test_bad_parameters_are_named(mini, name, params, says):
    with pytest.raises(UserError, match=says):
        optimizations.create(name, params).apply(mini)
    mini.reset()
