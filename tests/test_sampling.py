"""Settings of the model: without guidance, without chance, and everything else that upstream's `generate` takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from applied import apply_uncaptured

from harness import checkpoints
from harness.application import optimize
from harness.pipeline import Pipeline, Segment
from harness.quality.replay import Case, record, replay
from harness.sampling import Sampling

TEXT = "The boat is late. We wait."
TEXTS = ["Yes.", "We will meet at the old bridge.", "Where did you leave the keys?"]
SHORT = Sampling(max_new_tokens=18)
SETTINGS = {
    "unguided": replace(SHORT, cfg_weight=0.0),
    "greedy": replace(SHORT, temperature=0.0),
    "unguided and greedy": replace(SHORT, cfg_weight=0.0, temperature=0.0),
    "others": replace(
        SHORT, temperature=1.2, top_p=0.8, min_p=0.0, repetition_penalty=1.6, cfg_weight=1.5, exaggeration=0.9
    ),
}
COMBOS: dict[str, dict[str, dict]] = {
    "alignment_analyzer": {"alignment_analyzer": {}},
    "captured": {"kv_cache": {"bucket": 64}, "cuda_graphs": {"poll": 8}},
    "native": {"kv_cache": {}, "compile": {"estimator": False}},
    "token_sequence": {"token_sequence": {}},
}


@pytest.fixture(scope="module")
def loaded() -> Pipeline:
    return checkpoints.load("mini", "cpu")


@pytest.fixture
def mini(loaded: Pipeline) -> Iterator[Pipeline]:
    """The miniature, which is itself again when the test is over, settings included."""
    sampling = loaded.sampling
    yield loaded
    loaded.reset()
    loaded.sampling = sampling


@pytest.fixture(scope="module")
def multilingual() -> Pipeline:
    return checkpoints.load("mini_multilingual", "cpu")


def said(pipeline: Pipeline, text: str = TEXT, seed: int = 4, n_tokens: int | None = None) -> list[int]:
    return together(pipeline, [text], seed, n_tokens)[0]


def together(pipeline: Pipeline, texts: list[str], seed: int = 4, n_tokens: int | None = None) -> list[list[int]]:
    """Speech tokens of each text; what follows T3 is left out."""
    voice = pipeline.stages["condition"](next(iter(pipeline.voices)))
    torch.manual_seed(seed)
    with torch.inference_mode():
        spoken = pipeline.stages["generate_tokens"]([Segment(text, voice, i, n_tokens) for i, text in enumerate(texts)])
    return [tokens.tolist() for tokens in spoken]


def rows_of(pipeline: Pipeline, speak) -> set[int]:
    """Numbers of rows that the transformer is given meanwhile."""
    seen: set[int] = set()
    norm = pipeline.model.t3.tfmr.layers[0].mlp
    handle = norm.register_forward_pre_hook(lambda _module, args: seen.add(len(args[0])))
    try:
        speak()
    finally:
        handle.remove()
    return seen


# -- the baseline ----------------------------------------------------------------------------------------------------


def test_without_guidance_it_says_what_guidance_of_no_weight_says(mini):
    """Upstream's own loop, given both rows, is the reference: it computes guidance and weights it 0."""
    mini.sampling = SETTINGS["unguided"]
    voice = mini.stages["condition"](next(iter(mini.voices)))
    torch.manual_seed(4)
    expected = mini.model.t3.inference(
        t3_cond=voice.t3,
        text_tokens=mini.text_tokens(TEXT),
        max_new_tokens=18,
        temperature=0.8,
        cfg_weight=0.0,
        repetition_penalty=1.2,
        min_p=0.05,
        top_p=1.0,
    )
    assert said(mini) == expected[0].tolist()
    assert rows_of(mini, lambda: said(mini)) == {1}
    mini.sampling = SHORT
    assert said(mini) != expected[0].tolist(), "guidance must matter for this test to say anything"
    assert not mini.model.t3.tfmr._forward_pre_hooks
    assert not mini.model.t3.speech_head._forward_hooks


def test_greedy_is_the_likeliest_token_whatever_the_seed(mini):
    mini.sampling = SETTINGS["greedy"]
    spoken = said(mini, seed=1)
    assert said(mini, seed=2) == spoken
    mini.sampling = replace(SHORT, temperature=0.01)
    assert said(mini) == spoken, "as cold as can be drawn"
    mini.sampling = SHORT
    assert said(mini) != spoken


def test_greedy_draws_nothing(mini):
    """So what follows T3 is drawn as it is with a loop that draws nothing."""
    mini.sampling = SETTINGS["greedy"]
    voice = next(iter(mini.voices))
    before = mini.synthesize(TEXT, voice, 3, n_tokens=8)
    apply_uncaptured(mini, kv_cache={})
    after = mini.synthesize(TEXT, voice, 3, n_tokens=8)
    np.testing.assert_allclose(after.wave, before.wave, atol=1e-4)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_multilingual_model_and_its_guard_take_them_too(multilingual, settings):
    usual = multilingual.sampling
    multilingual.sampling = SETTINGS[settings]
    try:
        expected = said(multilingual)
        for plugins in ({"alignment_analyzer": {}}, COMBOS["captured"]):
            apply_uncaptured(multilingual, **plugins)
            assert said(multilingual) == expected
            multilingual.reset()
    finally:
        multilingual.reset()
        multilingual.sampling = usual


# -- every other way of decoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("combo", COMBOS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_every_way_of_decoding_says_the_very_tokens(mini, settings, combo):
    mini.sampling = SETTINGS[settings]
    expected, pinned = said(mini), said(mini, n_tokens=12)
    apply_uncaptured(mini, **COMBOS[combo])
    for _ in range(2):  # the second time meets what the first one left: caches, graphs
        assert said(mini) == expected
        assert said(mini, n_tokens=12) == pinned
    if not mini.sampling.guided:
        assert rows_of(mini, lambda: said(mini)) <= {1}


@pytest.mark.parametrize("combo", ["captured", "native"])
def test_rows_of_a_batch_say_what_they_say_alone(mini, combo):
    mini.sampling = SETTINGS["unguided and greedy"]
    alone = [said(mini, text) for text in TEXTS]
    apply_uncaptured(mini, **COMBOS[combo], batching={"size": 4})
    for _ in range(2):
        assert together(mini, TEXTS) == alone


def test_guidance_may_come_and_go_between_calls(mini):
    expected = {}
    for name, mini.sampling in SETTINGS.items():
        expected[name] = said(mini)
    apply_uncaptured(mini, **COMBOS["captured"])
    for name in (*SETTINGS, *reversed(SETTINGS)):
        mini.sampling = SETTINGS[name]
        assert said(mini) == expected[name], name


@pytest.mark.parametrize("combo", ["alignment_analyzer", "captured", "native"])
@pytest.mark.parametrize("settings", ["unguided", "unguided and greedy", "others"])
def test_a_teacher_hears_the_same_logits(mini, settings, combo):
    mini.sampling = SETTINGS[settings]
    cases = [Case("t", TEXTS[1], next(iter(mini.voices)), n_tokens=6)]
    inputs = record(mini, cases, seed=0)
    (before,) = replay(mini, cases, inputs, seed=0)
    apply_uncaptured(mini, **COMBOS[combo])
    (after,) = replay(mini, cases, inputs, seed=0)
    np.testing.assert_allclose(after.logits, before.logits, atol=1e-3)


def test_an_application_asks_for_them_in_generate(mini):
    tts = mini.model
    tts.conds = next(iter(mini.voices.values()))
    mini.sampling = replace(SETTINGS["unguided and greedy"], max_new_tokens=1000)
    expected = mini.synthesize(TEXTS[0], next(iter(mini.voices)), 5)
    fast = optimize(tts, {"kv_cache": {}})
    try:
        torch.manual_seed(5)
        wave = fast.generate(TEXTS[0], cfg_weight=0.0, temperature=0)
        np.testing.assert_allclose(wave[0].numpy(), expected.wave, atol=1e-4)
    finally:
        fast.restore()
