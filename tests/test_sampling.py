"""Settings of the model: without guidance, without chance, and everything else that upstream's `generate` takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from applied import apply_uncaptured
from chatterbox.mtl_tts import SUPPORTED_LANGUAGES, ChatterboxMultilingualTTS
from chatterbox.tts import ChatterboxTTS
from chatterbox.tts_turbo import ChatterboxTurboTTS
from test_cli import composed

from harness import checkpoints, devices, job, preflight, sampling
from harness.application import optimize
from harness.config import expand
from harness.errors import UserError
from harness.gate.decide import require_comparable
from harness.pipeline import Pipeline, Request, Segment
from harness.quality.fidelity import LIMITS
from harness.quality.replay import Case, record, replay
from harness.report import write_report
from harness.results import RunFolder
from harness.sampling import Sampling

TEXT = "The boat is late. We wait."
TEXTS = ["Yes.", "We will meet at the old bridge.", "Where did you leave the keys?"]
SHORT = Sampling(max_new_tokens=18)
SETTINGS = {
    "unguided": replace(SHORT, cfg_weight=0.0),
    "greedy": replace(SHORT, temperature=0.0),
    "unguided and greedy": replace(SHORT, cfg_weight=0.0, temperature=0.0),
    "greedy with a nucleus": replace(SHORT, temperature=0.0, top_p=0.3, repetition_penalty=1.6),
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


@pytest.mark.slow
def test_greedy_draws_nothing(mini):
    """So what follows T3 is drawn as it is with a loop that draws nothing."""
    mini.sampling = SETTINGS["greedy"]
    voice = next(iter(mini.voices))
    before = mini.synthesize(TEXT, voice, 3, n_tokens=8)
    apply_uncaptured(mini, kv_cache={})
    after = mini.synthesize(TEXT, voice, 3, n_tokens=8)
    np.testing.assert_allclose(after.wave, before.wave, atol=1e-4)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.slow
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


@pytest.mark.parametrize("plugins", [{}, COMBOS["captured"], {"kv_cache": {}, "batching": {"size": 2}}])
@pytest.mark.slow
def test_each_text_is_read_in_its_own_language(multilingual, monkeypatch, plugins):
    """The miniature has no character for a language, so it is the tokenizer that is watched."""
    asked = []
    read = multilingual.model.tokenizer.text_to_tokens

    def watched(text: str, language_id: str | None = None):
        asked.append((text, language_id))
        return read(text, language_id=language_id)

    monkeypatch.setattr(multilingual.model.tokenizer, "text_to_tokens", watched)
    apply_uncaptured(multilingual, **plugins)
    asked.clear()
    try:
        requests = [Request(text, "rms", 1, 4, language) for text, language in (("Oui.", "fr"), ("Yes.", None))]
        multilingual.synthesize_batch(requests)
        multilingual.synthesize("Ja.", "rms", 1, 4, language="de")
        list(multilingual.synthesize_stream("No.", "rms", 1, 4, language="es"))
        assert asked == [("Oui.", "fr"), ("Yes.", "en"), ("Ja.", "de"), ("No.", "es")]
    finally:
        multilingual.reset()


# -- every other way of decoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("combo", COMBOS)
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(name, marks=pytest.mark.slow) if name.startswith(("unguided and", "greedy with")) else name
        for name in SETTINGS
    ],
)
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


@pytest.mark.slow
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
@pytest.mark.slow
def test_a_teacher_hears_the_same_logits(mini, settings, combo):
    mini.sampling = SETTINGS[settings]
    cases = [Case("t", TEXTS[1], next(iter(mini.voices)), n_tokens=6)]
    inputs = record(mini, cases, seed=0)
    (before,) = replay(mini, cases, inputs, seed=0)
    apply_uncaptured(mini, **COMBOS[combo])
    (after,) = replay(mini, cases, inputs, seed=0)
    np.testing.assert_allclose(after.logits, before.logits, atol=1e-3)


@pytest.mark.slow
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


# -- what a command may ask for --------------------------------------------------------------------------------------


def looked_at(*overrides: str) -> dict:
    """A command's settings, as they are looked at before anything loads."""
    (spec,) = expand(composed("+combo=baseline", *overrides))
    preflight.look(spec.config)
    return spec.config["pipeline"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["pipeline.sampling.temperature=-0.1"], r"pipeline\.sampling\.temperature=-0\.1: give a number from 0 to 10"),
        (["pipeline.sampling.temperature=nan"], r"pipeline\.sampling\.temperature=nan"),
        (
            ["pipeline.sampling.temperature=1e-9"],
            r"temperature=1e-09: give 0 .*, or 0\.01 or more",
        ),
        (["pipeline.sampling.cfg_weight=-1"], r"pipeline\.sampling\.cfg_weight=-1"),
        (["pipeline.sampling.exaggeration=inf"], r"pipeline\.sampling\.exaggeration=inf"),
        (["pipeline.sampling.repetition_penalty=0"], r"repetition_penalty=0(\.0)?: give a number above 0"),
        (["pipeline.sampling.top_p=1.1"], r"pipeline\.sampling\.top_p=1\.1"),
        (["pipeline.sampling.min_p=-0.1"], r"pipeline\.sampling\.min_p=-0\.1"),
        (["pipeline.sampling.max_new_tokens=0"], r"max_new_tokens=0: give a number from 1 to 1000"),
        (["pipeline.sampling.max_new_tokens=1001"], r"max_new_tokens=1001"),
        (["pipeline.sampling.top_k=5"], r"top_k=5: the pipeline mini has no such setting"),
        (["pipeline=tiny_turbo", "pipeline.sampling.cfg_weight=0.5"], r"cfg_weight=0\.5: .* tiny_turbo has no such"),
        (["pipeline=tiny_turbo", "pipeline.sampling.top_k=0"], r"top_k=0: give a number of 1 or more"),
        (["pipeline=turbo", "pipeline.language=de"], r"language=de: the pipeline turbo speaks English only"),
        (["pipeline.language=fr"], r"pipeline\.language=fr: the pipeline mini speaks English only.*mini_multilingual"),
        (["pipeline=mini_multilingual", "pipeline.language=xx"], r"language=xx: .* it knows ar, da, de,"),
        (["pipeline.language=EN"], r"language=EN: .* speaks English only \(did you mean en\?\)"),
        (["pipeline=mini_multilingual", "pipeline.language=zh-CN"], r"does not speak it \(did you mean zh\?\)"),
        (["pipeline=mini_multilingual", "pipeline.language="], r"language=: .* does not speak it; it knows"),
        (["workload.texts=[{id: a, text: Ja., language: de}]"], r"text a: language=de: .* speaks English only"),
        (
            ["pipeline=mini_multilingual", "workload.texts=[{id: a, text: Ja., language: xx}]"],
            r"language=xx: .* it knows",
        ),
        (["workload.texts=[{id: a, text: Nei., language: true}]"], r"entry 1: expected"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_by_name(overrides, says):
    with pytest.raises(UserError, match=says) as error:
        looked_at(*overrides)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_ends_of_the_ranges():
    for override in ("temperature=0", "temperature=0.01", "cfg_weight=0", "top_p=0", "min_p=1", "max_new_tokens=1"):
        looked_at(f"pipeline.sampling.{override}")
    for override in ("temperature=0", "cfg_weight=0", "top_k=1", "top_p=0"):
        looked_at("pipeline=tiny_turbo", f"pipeline.sampling.{override}")
    looked_at("pipeline.language=en")
    looked_at("pipeline=mini_multilingual", "pipeline.language=zh")


def test_the_languages_are_upstreams():
    assert set(sampling.LANGUAGES) == set(SUPPORTED_LANGUAGES)


def test_the_defaults_are_those_of_upstreams_classes():
    for cls, ours in (
        (ChatterboxTTS, sampling.ENGLISH),
        (ChatterboxMultilingualTTS, sampling.MULTILINGUAL),
        (ChatterboxTurboTTS, sampling.TURBO),
    ):
        theirs = {name: one.default for name, one in inspect.signature(cls.generate).parameters.items()}
        kept = {name: value for name, value in vars(ours).items() if name in theirs}
        assert kept == {name: theirs[name] for name in kept}
        assert len(kept) >= 5


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        ([], "mini"),
        (["pipeline.sampling.temperature=0.8", "pipeline.language=en"], "mini"),
        (["pipeline.sampling.cfg_weight=0", "pipeline.sampling.top_p=0.9"], "mini (cfg_weight=0, top_p=0.9)"),
        (["pipeline=mini_multilingual", "pipeline.language=fr"], "mini_multilingual (language=fr)"),
        (["pipeline=tiny_turbo", "pipeline.sampling.top_k=50"], "tiny_turbo (top_k=50)"),
        (["pipeline=random_multilingual", "pipeline.sampling.repetition_penalty=2"], "random_multilingual"),
    ],
)
def test_what_is_not_the_default_is_told_and_asked_for_again(overrides, label):
    asked = looked_at(*overrides)
    assert sampling.label(asked) == label
    assert sampling.label(looked_at(*sampling.overrides(asked))) == label


# -- from the command to the report ----------------------------------------------------------------------------------


def measured(out: Path, *overrides: str) -> RunFolder:
    """A short job on the CPU, from a command's words."""
    least = ("measure.min_rounds=1", "measure.max_rounds=1", "measure.warmup_calls=0", "workload.seeds=[1]")
    (spec,) = expand(composed("device=cpu", *least, *overrides))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "LOCKS", out)
        summary = job.run(spec, out, lambda *_: None)
    return RunFolder.open(out / summary.run_id)


@pytest.fixture(scope="module")
def spoken_job(tmp_path_factory) -> RunFolder:
    """The miniature without guidance and without chance, two languages in one workload, heard by nobody's ear."""
    texts = "[{id: eins, text: Wir kommen gern., language: de}, {id: two, text: We will come.}]"
    asked = (f"workload.texts={texts}", "workload.voices=[rms]", "measure.pinned_tokens=6", "quality.fidelity_texts=2")
    settings = [f"pipeline.sampling.{one}" for one in ("cfg_weight=0", "temperature=0", "max_new_tokens=12")]
    pipeline = ("pipeline=mini_multilingual", "pipeline.language=fr", "optimizations.kv_cache.enabled=true")
    return measured(tmp_path_factory.mktemp("results"), *pipeline, *settings, *asked)


@pytest.mark.slow
def test_a_job_speaks_as_it_is_asked(spoken_job):
    rows, _ = spoken_job.measurements()
    assert {row.error for row in rows} == {None}
    assert {(row.text_id, row.language) for row in rows} == {("eins", "de"), ("two", None)}
    free = [row for row in rows if row.pass_name == "quality"]
    assert all(row.n_tokens <= 12 for row in free)
    assert any(row.hit_token_cap for row in free), "the cap is the one that was asked for"
    by_work: dict = {}
    for row in free:
        by_work.setdefault(row.work, set()).add(row.n_tokens)
    assert all(len(counts) == 1 for counts in by_work.values()), "greedy, both sides say the same"


@pytest.mark.slow
def test_words_are_judged_in_each_texts_language(spoken_job):
    reasons = {score.text_id: score.reason for score in spoken_job.scores()[0] if score.pass_name == "quality"}
    assert "does not know the language de" in reasons["eins"]
    assert "does not know the language fr" in reasons["two"]


@pytest.mark.slow
def test_what_was_asked_is_recorded_and_makes_another_experiment(spoken_job):
    summary, kept = spoken_job.summary(), spoken_job.job()["pipeline"]
    assert kept["language"] == "fr"
    assert kept["sampling"]["cfg_weight"] == 0
    assert summary.pipeline == "mini_multilingual (language=fr, temperature=0, cfg_weight=0, max_new_tokens=12)"
    with pytest.raises(UserError, match="measured pipeline"):
        require_comparable(summary, replace(summary, pipeline="mini_multilingual"))
    assert spoken_job.read_json("fidelity.json")["stages"]["generate_tokens"]["verdict"] == "faithful"


@pytest.mark.slow
def test_the_report_says_it(spoken_job, tmp_path):
    write_report([spoken_job], tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "language=fr, temperature=0, cfg_weight=0" in text
    assert "pipeline=mini_multilingual pipeline.language=fr pipeline.sampling.temperature=0" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["pipeline=mini_multilingual", "pipeline.language=fr"],
        ["pipeline=mini_multilingual", "workload=languages", "pipeline.sampling.max_new_tokens=50"],
        ["pipeline.sampling.cfg_weight=0"],
        ["pipeline.sampling.temperature=0"],
        ["pipeline=mini_multilingual", "pipeline.sampling.cfg_weight=0", "pipeline.sampling.temperature=0"],
    ],
    ids=" ".join,
)
def test_production_holds_whatever_is_asked(tmp_path, overrides):
    folder = measured(tmp_path, "+combo=production", "workload=smoke", *overrides)
    summary, fidelity = folder.summary(), folder.read_json("fidelity.json")
    assert summary.status == "ok"
    assert {one["status"] for one in summary.optimizations.values() if one["enabled"]} <= {"active", "unavailable"}
    assert {stage: found["verdict"] for stage, found in fidelity["stages"].items()} == dict.fromkeys(LIMITS, "faithful")
